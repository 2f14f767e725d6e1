"""The page at `/`: plain files of this package, with a policy that lets it speak to this service alone."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

FOLDER = files("alphalayer") / "web" / "playground"
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'self'; base-uri 'none'; form-action 'self'"


def install(app: FastAPI) -> None:
    """Add the page and its files."""

    async def page(_request: Request) -> FileResponse:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
        return FileResponse(str(FOLDER / "index.html"), media_type="text/html", headers=headers)

    app.add_route("/", page, include_in_schema=False)
    app.mount("/playground", StaticFiles(directory=str(FOLDER)))
