"""Order of work under load: new jobs start one by one, and looks at jobs go between them."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send


class Turns:
    """ASGI middleware that starts one POST request in a pass of the event loop, oldest first.

    A crowd of clients sends its requests at once. Without turns a later GET request would wait
    until all of them are validated and submitted.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the turn of a POST request, then forward it."""
        if scope["type"] == "http" and scope["method"] == "POST":
            async with self._turn:
                await asyncio.sleep(0)
        await self._app(scope, receive, send)
