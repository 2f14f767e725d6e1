"""The page at `/`: plain files of this package, with a policy that lets it speak to this service alone."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

FOLDER = files("alphalayer") / "web" / "playground"
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'self'; base-uri 'none'; form-action 'self'"


TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The types of the files; what the system says of them, as Windows' registry does, may be wrong, and no browser runs a text as a script."""


class _FreshFiles(StaticFiles):
    """Files that browsers ask for again each time, and get where they have changed: page and scripts must be of one version."""

    def file_response(
        self, full_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Response:
        """The file, or 304 for the version that the browser has."""
        response = super().file_response(full_path, *args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        if "content-type" in response.headers:
            response.headers["Content-Type"] = TYPES.get(
                Path(full_path).suffix, response.headers["Content-Type"]
            )
        return response


def install(app: FastAPI) -> None:
    """Add the page and its files."""

    async def page(_request: Request) -> FileResponse:
        headers = {
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
        }
        return FileResponse(str(FOLDER / "index.html"), media_type="text/html", headers=headers)

    app.add_route("/", page, include_in_schema=False)
    app.mount("/playground", _FreshFiles(directory=str(FOLDER)))
