"""Swagger UI at `/docs`, with a policy that limits its requests to this service.

Its files are part of this package: it works offline, and sends no request to other servers.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

ASSETS = "/docs/assets"
FOLDER = files("alphalayer") / "web" / "swagger"
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'self'; base-uri 'none'; form-action 'self'"
)
"""Content security policy. Swagger UI sets styles of elements."""


def install(app: FastAPI) -> None:
    """Add the page and its files."""

    async def page(_request: Request) -> FileResponse:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return FileResponse(str(FOLDER / "index.html"), media_type="text/html", headers=headers)

    app.add_route("/docs", page, include_in_schema=False)
    app.mount(ASSETS, StaticFiles(directory=str(FOLDER)))
