"""Addresses of the internet, and the ones that look like them."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from alphalayer.service import public_addresses
from alphalayer.service.public_addresses import is_public

PUBLIC = [
    "1.0.0.1", "93.184.216.34", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1",
    "192.0.1.1", "192.88.98.1", "198.17.0.1", "198.20.0.1", "223.255.255.255",
    "2606:2800:220:1::1", "2001:200::1", "2a00::1", "3ffe::1", "2606:2800:220:1:0:5efe:5db8:d822",
    "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2002:5db8:d822::1",
]  # fmt: skip
NOT_PUBLIC = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.255",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.9", "192.0.0.170",
    "192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.168.0.1", "192.175.48.1",
    "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::93.184.216.34", "::ffff:10.0.0.1", "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "64:ff9b:1::5db8:d822",
    "100::1", "100:0:0:1::1", "1fff::1", "2001::1", "2001:0:5db8:d822::1", "2001:1::1",
    "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a00:1::1",
    "2002:c058:6301::1", "2620:4f:8000::1", "3fff::1", "3fff:fff::1", "4000::1", "5f00::1",
    "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1",
    "2606:2800:220:1:0:5efe:10.0.0.1", "2606:2800:220:1:200:5efe:169.254.169.254",
    "2002:5db8:d822:0:0:5efe:127.0.0.1", "fe80::5efe:93.184.216.34",
]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "expected"),
    [(address, True) for address in PUBLIC] + [(address, False) for address in NOT_PUBLIC],
)
def test_is_public_accepts_only_internet_hosts(address: str, expected: bool):
    assert is_public(ip_address(address)) is expected


def test_ipaddress_opinion_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    # the properties of `ipaddress` differ between patch releases of Python
    for address in (*PUBLIC, *NOT_PUBLIC):
        for name in ("is_global", "is_private", "is_reserved", "is_multicast", "is_link_local"):
            monkeypatch.setattr(type(ip_address(address)), name, property(lambda _: 1 / 0))
    assert all(is_public(ip_address(address)) for address in PUBLIC)
    assert not any(is_public(ip_address(address)) for address in NOT_PUBLIC)


def test_first_and_last_address_of_each_refused_block():
    blocks = [*public_addresses._REFUSED_IPV4, *public_addresses._REFUSED_IPV6]
    assert len(blocks) == 22
    for block in map(ip_network, blocks):
        assert not is_public(block[0]), block
        assert not is_public(block[-1]), block
