"""Count of wrong keys by address, in a table of bounded size."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

PER_MINUTE = 20
"""Wrong keys that an address may send in a minute."""
MAX_ADDRESSES = 10_000
"""Addresses in the table. A new one replaces the oldest."""
WINDOW_S = 60.0


class WrongKeys:
    """Number of wrong keys of each address within its current minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """Start of the minute and count, by address."""

    def __len__(self) -> int:
        return len(self._windows)

    def record(self, host: str) -> int:
        """Count a wrong key of a host. Return the number of its current minute."""
        address = _network_of(host)
        start, count = self._current(address)
        self._windows[address] = (start, count + 1)
        if len(self._windows) > MAX_ADDRESSES:
            self._windows.popitem(last=False)
        return count + 1

    def retry_after_s(self, host: str) -> int:
        """Return the seconds until a host may send a wrong key again; 0: now."""
        start, count = self._current(_network_of(host))
        return max(1, math.ceil(start + WINDOW_S - self._clock())) if count >= PER_MINUTE else 0

    def _current(self, address: str) -> tuple[float, int]:
        start, count = self._windows.get(address, (-math.inf, 0))
        if self._clock() - start < WINDOW_S:
            return start, count
        self._windows.pop(address, None)  # its next minute is the newest entry
        return self._clock(), 0


def _network_of(host: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or a /64 of IPv6."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host[:100]
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
