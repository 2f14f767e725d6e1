"""Limits of the size of request bodies: of each, and of all together."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from alphalayer.api.errors import send_error
from alphalayer.api.request_body import check_declared, count_received

HELD_BODIES = 3
"""Bodies of the largest size that are in memory together, at most."""
_RELEASE = "alphalayer.release_body"


def release_body(scope: Scope) -> None:
    """Count the body of a request no longer, because nothing holds it."""
    scope[_RELEASE]()


class BodyLimit:
    """ASGI middleware that answers 413 to bodies over `limit` bytes, declared or sent.

    A body is in memory until its response is complete, or until `release_body`. All together have a
    limit, too: over it the answer is 503. Compressed bodies are answered with 415.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self._app = app
        self._limit = limit
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and count the bytes of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            check_declared(scope, self._limit)
        except HTTPException as error:
            await send_error(error, scope, receive, send)
            return
        received_bytes = 0

        def hold(size: int) -> None:
            nonlocal received_bytes
            received_bytes += size
            self._held_bytes += size
            if self._held_bytes > HELD_BODIES * self._limit:
                raise HTTPException(503, "too many large requests are open.", {"Retry-After": "5"})

        def release() -> None:
            nonlocal received_bytes
            self._held_bytes -= received_bytes
            received_bytes = 0

        scope[_RELEASE] = release
        try:
            await self._app(scope, count_received(receive, self._limit, hold), send)
        finally:
            release()
