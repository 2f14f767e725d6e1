"""Check of the `Host` header, against DNS rebinding."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from alphalayer.api.addresses import KnownHosts, address
from alphalayer.api.errors import send_error
from alphalayer.core.errors import HostUnknown
from alphalayer.observability.logging import log

PROBES = ("/livez", "/readyz", "/ping")
"""Paths that answer to any name, because load balancers choose the name of their probes."""


def _received_hosts(scope: Scope) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]


def _is_known(received: list[str], hosts: KnownHosts) -> bool:
    """Return whether the `Host` headers of a request have a known name.

    A request without the header is not from a browser.
    """
    return not received or (len(received) == 1 and hosts.includes(received[0]))


class HostCheck:
    """ASGI middleware that refuses unknown host names with 421 if no key is required.

    The page of an attacker may have a name that resolves to this machine. For the browser, the
    service is then part of that page. A key protects against it, because the browser has no
    credentials for that name.
    """

    def __init__(self, app: ASGIApp, hosts: KnownHosts):
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to a known host, or refuse it."""
        if scope["type"] != "http" or self._admits(scope):
            await self._app(scope, receive, send)
            return
        name = ", ".join(_received_hosts(scope))[:253]
        error = HostUnknown(
            f'the service does not answer to the host name "{name}".',
            hint="Add the name to the setting allowed_hosts (ALPHALAYER_ALLOWED_HOSTS), "
            "set public_url, or create an API key.",
        )
        await send_error(error, scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        return (
            _is_known(_received_hosts(scope), self._hosts)
            or str(scope["path"]).removeprefix(scope.get("root_path", "")) in PROBES
            or scope["app"].state.service.requires_key()
        )


class OwnAddress:
    """ASGI middleware that replaces an unknown `Host` by the address that the client reached.

    Everything behind it can build URLs from the request.
    """

    def __init__(self, app: ASGIApp, hosts: KnownHosts):
        self._app = app
        self._hosts = hosts
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request with a known host or an address."""
        if scope["type"] == "http":
            received = _received_hosts(scope)
            if not _is_known(received, self._hosts):
                scope = self._replace_host(scope, received)
        await self._app(scope, receive, send)

    def _replace_host(self, scope: Scope, received: list[str]) -> Scope:
        base = address(*scope["server"])
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "host.unknown",
                host=", ".join(received)[:253],
                used=base,
                hint="Set public_url, or add the name to allowed_hosts.",
            )
        others = [pair for pair in scope["headers"] if pair[0] != b"host"]
        host = base.removeprefix("http://").encode()
        return {**scope, "scheme": "http", "headers": [*others, (b"host", host)]}
