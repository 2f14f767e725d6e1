"""Web page at `/`, with a policy that limits its requests to this service."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

FOLDER = files("alphalayer") / "web" / "playground"
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'self'; "
    "base-uri 'none'; form-action 'self'"
)
"""Content security policy."""
TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Content types by file extension.

The types of the system may be wrong, as in the registry of Windows. Browsers run no script of
type text/plain.
"""


class _FreshFiles(StaticFiles):
    """Files that browsers revalidate each time, because page and scripts must match."""

    def file_response(
        self, full_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Response:
        """Return the file, or 304 if the browser has this version."""
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
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return FileResponse(str(FOLDER / "index.html"), media_type="text/html", headers=headers)

    app.add_route("/", page, include_in_schema=False)
    app.mount("/playground", _FreshFiles(directory=str(FOLDER)))
