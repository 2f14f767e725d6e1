"""URLs of network addresses, and the host names of the service."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from ipaddress import ip_address

import httpx

_HOST = re.compile(
    r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_.-]{1,253})(:\d{1,5})?", re.ASCII | re.IGNORECASE
)
LOCAL_NAMES = ("localhost", "*.localhost", "host.docker.internal", "host.containers.internal")
"""Names of this machine, for itself and for its containers. None can be registered in the DNS."""
ALL_ADDRESSES = ("0.0.0.0", "::")
"""Values of `host` for listening on all addresses."""


def address(host: str, port: int) -> str:
    """Return the URL of a host and port, with brackets around an IPv6 address."""
    return str(httpx.URL(scheme="http", host=host, port=port))


def origin(url: str) -> str:
    """Return the origin of a URL, as browsers send it: scheme, host and port."""
    parts = httpx.URL(url)
    return f"{parts.scheme}://{parts.netloc.decode()}"


class KnownHosts:
    """Host names under which clients reach the service.

    IP addresses are always known. An attack by DNS rebinding needs a name, whose address changes
    after a browser has loaded the page of the attacker.

    Attributes:
        names: Names in lower case. `*.example.com` includes all names below it, `*` all names.
    """

    def __init__(self, names: Iterable[str]):
        self.names = list(dict.fromkeys(name.lower().rstrip(".") for name in names))
        self._suffixes = tuple(name[1:] for name in self.names if name.startswith("*."))
        self._includes_all = "*" in self.names

    def includes(self, host: str) -> bool:
        """Return whether a `Host` header has a known name or an IP address."""
        match = _HOST.fullmatch(host)
        if not match:
            return False
        name = match[1].lower().rstrip(".")
        return (
            self._includes_all
            or name in self.names
            or name.endswith(self._suffixes)
            or _is_address(name.strip("[]"))
        )


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def find_names(host: str, port: int, public_url: str | None, pod: str | None) -> list[str]:
    """Return the names of this service.

    Args:
        host: Name or address that the service listens on.
        port: Port that the service listens on.
        public_url: URL of the service for clients.
        pod: Id of the Runpod pod that the service runs in.
    """
    names = [*LOCAL_NAMES]
    if host in ALL_ADDRESSES:
        machine = socket.gethostname()
        label = machine.partition(".")[0]
        names += [machine, label, f"{label}.local"]
    else:
        names.append(host)
    if public_url:
        names.append(httpx.URL(public_url).raw_host.decode())
    if pod:
        names.append(f"{pod}-{port}.proxy.runpod.net")
    return names
