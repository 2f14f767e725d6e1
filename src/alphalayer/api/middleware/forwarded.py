"""What a trusted reverse proxy says about the client: scheme, host, path prefix and address from X-Forwarded-* headers."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send


class ForwardedHeaders:
    """ASGI middleware. Headers are believed only from the given addresses or networks ("*": from anybody)."""

    def __init__(self, app: ASGIApp, trusted: str):
        self._app = app
        names = [name.strip() for name in trusted.split(",") if name.strip()]
        self._trusts_all = "*" in names
        self._networks = [ip_network(name, strict=False) for name in names if name != "*"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrite the scope of a request that came through a trusted proxy."""
        if scope["type"] in ("http", "websocket") and self._is_trusted(scope.get("client")):
            headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
            }
            scope = {**scope, **_forwarded(scope, headers)}
        await self._app(scope, receive, send)

    def _is_trusted(self, client: tuple[str, int] | None) -> bool:
        if self._trusts_all:
            return True
        try:
            return client is not None and any(
                ip_address(client[0]) in network for network in self._networks
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
        kept = [pair for pair in scope["headers"] if pair[0] != b"host"]
        changed["headers"] = [*kept, (b"host", first["x-forwarded-host"].encode("latin-1"))]
    if first.get("x-forwarded-prefix", "").startswith("/"):
        # the proxy took the prefix off; ASGI has it in the path, too, and takes it off there before it looks for a route
        prefix = first["x-forwarded-prefix"].rstrip("/")
        changed |= {"root_path": prefix, "path": prefix + scope["path"]}
        if scope.get("raw_path") is not None:
            changed["raw_path"] = prefix.encode("latin-1") + scope["raw_path"]
    if first.get("x-forwarded-for"):
        # the last address is the one that the trusted proxy saw; those before it are only claimed
        changed["client"] = (headers["x-forwarded-for"].rpartition(",")[2].strip(), 0)
    return changed
