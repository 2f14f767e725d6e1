"""Foreign web pages: DNS rebinding, cross-site requests, and the headers against them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from tests.support.serving import served

from alphalayer.auth.api_keys import Key
from alphalayer.config import Settings
from alphalayer.service import app
from alphalayer.service.app import DIALECTS

FOREIGN = "https://evil.example"
SMALL = {"prompt": "an apple", "width": 64, "height": 64, "steps": 1}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("service")) as client:
        yield client


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    settings: dict[str, Any] = {
        "api_auth": "ann:secret",
        "cors_allow_origins": "https://app.example.com,null",
    }
    with served(tmp_path_factory.mktemp("keys"), **settings) as client:
        client.auth = ("ann", "secret")
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example", "X-Forwarded-Host": "localhost"},
        {"Host": "localhost", "X-Forwarded-Host": "evil.example"},
    ],
    ids=["host", "host and forwarded host", "forwarded host"],
)
def test_unknown_host_is_refused_by_every_dialect(client: httpx.Client, headers: dict[str, str]):
    for path in ("/", "/docs", "/metrics", "/mcp/", *(f"{each.prefix}/x" for each in DIALECTS)):
        for method in ("GET", "POST", "OPTIONS"):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 421, path
            assert "allowed_hosts" in answer.text
    openai = client.get("/v1/models", headers=headers).json()["error"]
    assert openai["code"] == "host_unknown"
    assert isinstance(client.get("/sdapi/v1/sd-models", headers=headers).json()["detail"], str)
    assert client.get("/alpha/v1/jobs", headers=headers).json()["code"] == "host_unknown"


def test_two_hosts_are_refused_and_none_is_answered(client: httpx.Client):
    def status(request: bytes) -> int:
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as raw:
            raw.sendall(b"GET /alpha/v1/jobs " + request + b"\r\n\r\n")
            return int(raw.recv(100).split()[1])

    assert status(b"HTTP/1.1\r\nHost: localhost\r\nHost: localhost") in (400, 421)
    assert status(b"HTTP/1.0") == 200


def test_port_map_and_probe_of_any_name_are_answered(client: httpx.Client):
    mapped = client.post("/alpha/v1/txt2img", json=SMALL, headers={"Host": "localhost:8080"})
    assert mapped.json()["url"].startswith("http://localhost:8080/alpha/v1/file/")
    for path in ("/livez", "/readyz", "/ping"):
        assert client.get(path, headers={"Host": "a-probe"}).status_code == 200


def test_unknown_host_with_keys_builds_no_url(with_keys: httpx.Client):
    for headers in ({"Host": "evil.example"}, {"X-Forwarded-Host": "evil.example"}):
        headers |= {"X-Forwarded-Proto": "https"}
        image = with_keys.post("/alpha/v1/txt2img", json=SMALL, headers=headers)
        assert image.status_code == 200
        job = with_keys.post("/alpha/v1/jobs", json=SMALL, headers=headers)
        redirect = with_keys.get("/alpha/v1/jobs/", headers=headers)
        urls = [image.json()["url"], job.json()["url"], *map(location_of, (job, redirect))]
        assert [url for url in urls if not url.startswith(str(with_keys.base_url))] == []


def location_of(answer: httpx.Response) -> str:
    return answer.headers["location"]


def test_start_without_keys_logs_the_known_hosts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNPOD_POD_ID", "x1y2")

    def logged_hosts(keys: list[Key] | None = None, **settings: Any) -> list[list[str]]:
        with capture_logs() as lines:
            app._log_access(Settings(**settings), keys)
        return [line["hosts"] for line in lines if line["event"] == "hosts.limited"]

    (hosts,) = logged_hosts(host="0.0.0.0", allowed_hosts="pics.example.com")
    assert {"IP addresses", "localhost", "pics.example.com"} <= {*hosts}
    assert "x1y2-7861.proxy.runpod.net" in hosts
    assert logged_hosts(host="127.0.0.1") == []
    assert logged_hosts([], host="0.0.0.0") == []
    assert logged_hosts(host="0.0.0.0", cors_allow_origins="*") == []


def test_start_with_keys_warns_without_a_name():
    key = Key.model_construct(name="ann")

    def warns(keys: list[Key] | None, **settings: Any) -> bool:
        with capture_logs() as lines:
            app._log_access(Settings(**settings), keys)
        return "hosts.not_set" in [line["event"] for line in lines]

    assert warns([key], host="0.0.0.0")
    assert warns([key], host="::")
    assert not warns([key], host="127.0.0.1")
    assert not warns(None, host="0.0.0.0")
    assert not warns([key], host="0.0.0.0", public_url="https://pics.example.com")
    assert not warns([key], host="0.0.0.0", allowed_hosts="pics.example.com")
    assert not warns([key], host="0.0.0.0", cors_allow_origins="*")


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({"allowed_hosts": "*.example.com"}, "pics.example.com"),
        ({"public_url": "https://pics.example.com/draw"}, "pics.example.com"),
        ({"cors_allow_origins": "*"}, "any.example"),
    ],
    ids=["allowed_hosts", "public_url", "cors"],
)
def test_setting_allows_a_host(tmp_path: Path, settings: dict[str, Any], host: str):
    with served(tmp_path, engine=None, **settings) as client:
        for name in ("Host", "X-Forwarded-Host"):
            assert client.get("/alpha/v1/jobs", headers={name: host}).status_code == 200


def changes(client: httpx.Client) -> list[tuple[str, str]]:
    """Return the method and path of every route that may change something."""
    paths = client.get("/openapi.json").json()["paths"]
    routes = [
        (method.upper(), path.format(job_id="0" * 24, filename="x", model_id="x"))
        for path, methods in paths.items()
        for method in methods
        if method not in ("get", "head", "options")
    ]
    return [*routes, ("POST", "/mcp/"), ("PUT", "/no/such/path")]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": FOREIGN},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
        {"Origin": "file://"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_foreign_page_changes_nothing(client: httpx.Client, headers: dict[str, str]):
    routes = changes(client)
    assert ("POST", "/sdapi/v1/interrupt") in routes
    for method, path in routes:
        simple = {"Content-Type": "text/plain", **headers}
        answer = client.request(method, path, content="{}", headers=simple)
        assert answer.status_code == 403, (method, path)
        assert client.base_url.netloc.decode() in answer.text
        assert headers.get("Origin", "") in answer.text
        assert "cors_allow_origins" in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "{base}"},
        {"Origin": "{base}", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://localhost", "Host": "localhost:443"},
        {"Origin": "https://localhost", "X-Forwarded-Host": "localhost"},
        {"Origin": "http://localhost:8080", "Host": "localhost", "Sec-Fetch-Site": "same-origin"},
    ],
    ids=str,
)
def test_own_page_and_other_clients_change(client: httpx.Client, headers: dict[str, str]):
    base = str(client.base_url).rstrip("/")
    sent = {name: value.format(base=base) for name, value in headers.items()}
    assert client.post("/sdapi/v1/interrupt", headers=sent).status_code == 200


def test_origin_needs_cors_also_with_credentials(with_keys: httpx.Client):
    def status(origin: str, **headers: str) -> int:
        sent = {"Origin": origin, "Sec-Fetch-Site": "cross-site", **headers}
        return with_keys.post("/sdapi/v1/interrupt", headers=sent).status_code

    assert status(FOREIGN) == 403
    assert status("https://app.example.com.evil.example") == 403
    assert status("https://app.example.com") == 200
    assert status("null") == 200
    own = {"Host": "gpu.example.net:7861", "Sec-Fetch-Site": "same-origin"}
    assert status("http://gpu.example.net:7861", **own) == 200
    del own["Sec-Fetch-Site"]
    own["Origin"] = "http://gpu.example.net:7861"
    assert with_keys.post("/sdapi/v1/interrupt", headers=own).status_code == 200


def test_preflight_for_a_private_network_needs_an_allowed_origin(with_keys: httpx.Client):
    def preflight(origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Private-Network"] = "true"
        return with_keys.options("/alpha/v1/jobs", headers=headers)

    allowed = preflight("https://app.example.com")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in allowed.headers
    refused = preflight(FOREIGN)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


def test_answers_have_security_headers(client: httpx.Client):
    image = client.post("/alpha/v1/txt2img", json=SMALL).json()["filename"]
    kinds = {
        "/": ("default-src 'self'", "same-origin"),
        "/docs": ("default-src 'self'", "same-origin"),
        "/alpha/v1/jobs": ("default-src 'none'; frame-ancestors 'none'", "same-origin"),
        "/no/such/path": ("default-src 'none'; frame-ancestors 'none'", "same-origin"),
        f"/alpha/v1/file/{image}": ("sandbox", "cross-origin"),
        f"/alpha/v1/convert/{image}?format=webp": ("sandbox", "cross-origin"),
    }
    for path, (policy, resource_policy) in kinds.items():
        headers = client.get(path).headers
        assert policy in headers["content-security-policy"], path
        assert headers["cross-origin-resource-policy"] == resource_policy, path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        if path in ("/", "/docs"):
            assert "frame-ancestors 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "prefix",
    [
        "//evil.example",
        "/a//b",
        "/../a",
        "/a/..",
        "/<script>",
        '/"onload="',
        "/a?b",
        "/a b",
        "/%2e",
    ],
)
def test_prefix_of_other_characters_is_ignored(client: httpx.Client, prefix: str):
    headers = {"X-Forwarded-Prefix": prefix}
    assert "servers" not in client.get("/openapi.json", headers=headers).json()
    assert prefix not in client.get("/docs", headers=headers).text
    job = client.post("/alpha/v1/jobs", json=SMALL, headers=headers).json()
    assert httpx.URL(job["url"]).path == f"/alpha/v1/jobs/{job['id']}"
