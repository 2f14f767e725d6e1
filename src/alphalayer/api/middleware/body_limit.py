"""Limit of the size of request bodies."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alphalayer.api.errors import Problem, find_renderer


class BodyLimit:
    """ASGI middleware that answers 413 to bodies over `limit` bytes, declared or sent.

    FastAPI's `max_body_size` has the same limit. It answers a declared length over the limit
    with plain text, outside of the exception handlers, the request log and the CORS headers.
    """

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
            response = find_renderer(scope)(Problem.of_http(error), {})
            await response(scope, receive, send)
        else:
            await self._app(scope, receive_counted, send)
