"""Public addresses: which IP addresses are one host on the internet.

The tables are our own, because `ipaddress.is_global` differs between patch releases of Python.

Source: the IANA special-purpose address registries for IPv4 (RFC 6890) and IPv6, as of
2025-10-09. Every block in them is refused, also those that are globally reachable, because none is
a host of a user. Blocks of IPv6 that contain an IPv4 address are checked as that address.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

_REFUSED_IPV4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by the customers of a provider
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, with the metadata service of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, with the broadcast address
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""The only block of IPv6 with public hosts.

Outside it are loopback, discard-only, SRv6, unique local, link-local, site-local, multicast,
IPv4-compatible addresses and the local NAT64 prefix.
"""
_REFUSED_IPV6 = tuple(
    IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments, with Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_6TO4 = IPv6Network("2002::/16")
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)
"""Third quarter of an ISATAP address (RFC 5214). The last one is an IPv4 address."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is one host on the internet."""
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _REFUSED_IPV4)
    bits = int(address)
    if address in _MAPPED or address in _NAT64:
        return is_public(IPv4Address(bits & 0xFFFF_FFFF))
    if address not in _GLOBAL_UNICAST or any(address in block for block in _REFUSED_IPV6):
        return False
    if address in _6TO4 and not is_public(IPv4Address(bits >> 80 & 0xFFFF_FFFF)):
        return False
    is_isatap = bits >> 32 & 0xFFFF_FFFF in _ISATAP
    return not is_isatap or is_public(IPv4Address(bits & 0xFFFF_FFFF))
