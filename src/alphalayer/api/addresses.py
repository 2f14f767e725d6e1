"""URLs of network addresses."""

from __future__ import annotations

import httpx


def address(host: str, port: int) -> str:
    """Return the URL of a host and port, with brackets around an IPv6 address."""
    return str(httpx.URL(scheme="http", host=host, port=port))
