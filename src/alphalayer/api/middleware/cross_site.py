"""Check of the web page that sends a request, against cross-site request forgery."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from alphalayer.api.errors import send_error
from alphalayer.core.errors import OriginRefused

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing. Browsers protect their answers by CORS."""
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class CrossSiteCheck:
    """ASGI middleware that refuses changes by foreign web pages with 403.

    A browser sends simple requests of any page, with the user's password for HTTP Basic. It marks
    them by `Origin` and, over HTTPS and on this machine, by `Sec-Fetch-Site`. Other clients send
    neither.

    Args:
        app: The application.
        allowed: Origins that may change something: those of CORS and of the service. "*": all.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]):
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request that changes nothing or has an allowed origin, or refuse it."""
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._admits(headers):
            await self._app(scope, receive, send)
            return
        page = f'"{headers["origin"][:253]}"' if "origin" in headers else "another origin"
        host = headers.get("host", "")[:253]
        error = OriginRefused(
            f'a web page of {page} may not change anything at "{host}".',
            hint="To allow it, add its origin to the setting cors_allow_origins "
            "(ALPHALAYER_CORS_ALLOW_ORIGINS). For the service's own page, set public_url.",
        )
        await send_error(error, scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if "*" in self._allowed or site == "same-origin":
            return True
        if origin is None:
            return site in (None, "none")
        return origin in self._allowed or _is_same_host(origin, headers.get("host", ""))


def _is_same_host(origin: str, host: str) -> bool:
    """Return whether an origin has the host and port of the request.

    The schemes may differ, because a proxy with TLS may not report it.
    """
    scheme, _, authority = origin.lower().partition("://")
    return bool(authority) and authority == host.lower().removesuffix(
        _DEFAULT_PORTS.get(scheme, "")
    )
