"""Headers that limit what browsers do with an answer."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Content security policy of answers without their own."""
IMAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
"""Content security policy of images. Browsers style the page that shows a single image."""


class SecurityHeaders:
    """ASGI middleware that adds security headers to each answer.

    Pages of other origins may show images, and nothing else without CORS.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and add headers to its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(MutableHeaders(scope=message), message["status"])
            await send(message)

        await self._app(scope, receive, send_with_headers)


def add_headers(headers: MutableHeaders, status: int) -> None:
    """Add the security headers to those of an answer with a status."""
    is_image = headers.get("content-type", "").startswith("image/")
    # a redirect may lead to an image in a bucket
    is_embeddable = is_image or 300 <= status < 400
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Content-Security-Policy", IMAGE_POLICY if is_image else POLICY)
    headers.setdefault(
        "Cross-Origin-Resource-Policy", "cross-origin" if is_embeddable else "same-origin"
    )
