"""X-Forwarded-* headers of trusted proxies: scheme, host, path prefix and client address."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[\w.~-]+)+/?", re.ASCII)
"""Path prefixes that are accepted: plain names, because pages and URLs contain them."""


class ForwardedHeaders:
    """ASGI middleware that applies X-Forwarded-* headers of trusted proxies.

    `trusted` lists addresses and networks, separated by commas. "*" trusts every client.
    """

    def __init__(self, app: ASGIApp, trusted: str):
        self._app = app
        names = [name.strip() for name in trusted.split(",") if name.strip()]
        self._trusts_all = "*" in names
        self._networks = [ip_network(name, strict=False) for name in names if name != "*"]
        # a client or proxy sends many requests, and parsing its address takes 30 µs
        self._is_trusted = lru_cache(1024)(self._find_network)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrite the scope of a request that came through a trusted proxy."""
        if scope["type"] in ("http", "websocket") and self._is_trusted(
            (scope.get("client") or (None,))[0]
        ):
            headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
            }
            scope = {**scope, **_forwarded(scope, headers)}
        await self._app(scope, receive, send)

    def _find_network(self, host: str | None) -> bool:
        """Return whether a host is in a trusted network."""
        if self._trusts_all:
            return True
        try:
            return host is not None and any(
                ip_address(host) in network for network in self._networks
            )
        except ValueError:
            return False


def _forwarded(scope: Scope, headers: dict[str, str]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    first = {
        name: value.split(",")[0].strip()
        for name, value in headers.items()
        if name.startswith("x-forwarded-")
    }
    if first.get("x-forwarded-proto") in ("http", "https"):
        changed["scheme"] = first["x-forwarded-proto"]
    if first.get("x-forwarded-host"):
        others = [pair for pair in scope["headers"] if pair[0] != b"host"]
        changed["headers"] = [*others, (b"host", first["x-forwarded-host"].encode("latin-1"))]
    if _PREFIX.fullmatch(first.get("x-forwarded-prefix", "")):
        # the proxy removed the prefix; ASGI expects it in the path and removes it before routing
        prefix = first["x-forwarded-prefix"].rstrip("/")
        changed |= {"root_path": prefix, "path": prefix + scope["path"]}
        if scope.get("raw_path") is not None:
            changed["raw_path"] = prefix.encode("latin-1") + scope["raw_path"]
    if first.get("x-forwarded-for"):
        # the trusted proxy added the last address; a client may have made up the others
        changed["client"] = (headers["x-forwarded-for"].rpartition(",")[2].strip(), 0)
    return changed
