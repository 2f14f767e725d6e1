"""Host names of the service: what a `Host` header may be."""

from __future__ import annotations

import socket

import pytest

from alphalayer.api.addresses import KnownHosts, find_names, origin


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> KnownHosts:
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU-box.example.net")
    names = find_names("0.0.0.0", 7861, "https://pics.example.com/draw/", "x1y2")
    return KnownHosts([*names, "service", "*.pages.example.org"])


@pytest.mark.parametrize(
    "host",
    [
        "localhost:7861", "localhost:8080", "LOCALHOST", "localhost.", "app.localhost:7861",
        "127.0.0.1:7861", "127.8.9.1", "[::1]:7861", "203.0.113.5:7861", "[2001:db8::1]",
        "gpu-box.example.net", "gpu-box:7861", "gpu-box.local", "host.docker.internal:7861",
        "pics.example.com", "PICS.example.com:443", "x1y2-7861.proxy.runpod.net", "service:7861",
        "a.b.pages.example.org",
    ],
)  # fmt: skip
def test_known_host_is_included(hosts: KnownHosts, host: str):
    assert hosts.includes(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:7861", "localhost.evil.example", "127.0.0.1.evil.example",
        "evillocalhost", "2130706433", "0x7f.1", "127.1", "[::1", "[localhost]", "::1", "",
        ".", "*", "*.localhost/", "localhost:80@evil.example", "localhost/evil", "localhost,evil",
        "localhost evil", "localhost:x", "localhost\n", "x2y2-7861.proxy.runpod.net",
        "x1y2-80.proxy.runpod.net", "pages.example.org", "evilpages.example.org", "gpu-box.evil",
        "\xb9localhost", f"{'a' * 300}.localhost",
    ],
)  # fmt: skip
def test_other_host_is_unknown(hosts: KnownHosts, host: str):
    assert not hosts.includes(host)


def test_name_of_the_machine_needs_listening_on_all_addresses():
    machine = socket.gethostname().lower()
    assert machine in KnownHosts(find_names("::", 7861, None, None)).names
    assert machine not in KnownHosts(find_names("127.0.0.1", 7861, None, None)).names
    assert KnownHosts(find_names("box.lan", 7861, None, None)).includes("box.lan:7861")


def test_star_includes_all_names_that_are_valid():
    hosts = KnownHosts(["*"])
    assert hosts.includes("evil.example")
    assert not hosts.includes("localhost/evil")


def test_origin_of_a_url_has_no_default_port_and_no_path():
    assert origin("https://Pics.example.com:443/draw/") == "https://pics.example.com"
    assert origin("http://[::1]:7861") == "http://[::1]:7861"
