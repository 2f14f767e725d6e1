"""Limit of the size of request bodies."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alphalayer.api import errors


class BodyLimit:
    """ASGI middleware that answers 413 to bodies over `limit` bytes, declared or sent."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and count the bytes of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received_bytes = 0
        error = HTTPException(413, f"the request is larger than {self._limit} bytes.")

        async def receive_counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._limit:
                raise error
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await errors.http_problem(error, errors.path_of(scope))(scope, receive, send)
        else:
            await self._app(scope, receive_counted, send)
