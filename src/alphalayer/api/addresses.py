"""Where something listens, as a URL."""

from __future__ import annotations

import httpx


def address(host: str, port: int) -> str:
    """The URL of what listens there; an IPv6 address gets its brackets."""
    return str(httpx.URL(scheme="http", host=host, port=port))
