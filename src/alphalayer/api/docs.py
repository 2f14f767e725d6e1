"""Swagger at `/docs`, with its files from this package: it works where there is no internet, and tells nobody that it was opened."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

ASSETS = "/docs/assets"


def install(app: FastAPI) -> None:
    """Add the page and its files."""

    async def page(request: Request) -> HTMLResponse:
        below = request.scope.get("root_path", "")
        return get_swagger_ui_html(
            openapi_url=f"{below}/openapi.json",
            title="Alphalayer",
            swagger_js_url=f"{below}{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{below}{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{below}{ASSETS}/favicon-32x32.png",
        )

    app.add_route("/docs", page, include_in_schema=False)
    app.mount(ASSETS, StaticFiles(directory=str(files("alphalayer") / "web" / "swagger")))
