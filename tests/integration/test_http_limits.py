"""Hostile bytes on a socket: heads, bodies and connections beyond the limits."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.support.serving import put_model, served, wait_until

from alphalayer.api.middleware.body_limit import HELD_BODIES
from alphalayer.api.request_body import JSON_BYTES, MAX_DELIMITERS, MAX_DEPTH, MAX_VALUES
from alphalayer.service import connections
from alphalayer.service.connections import ConnectionLimits

SHORT = ConnectionLimits(
    connections=20, head_s=0.3, upload_s=0.5, stall_s=0.3, linger_s=0.3, interval_s=0.05
)
HOST = b"Host: localhost\r\n"
POST = b"POST /alpha/v1/txt2img HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LIVEZ = b"GET /livez HTTP/1.1\r\n" + HOST
RENDER = {"prompt": "an apple", "width": 64, "height": 64, "steps": 1}
DIALECTS = ("/alpha/v1/txt2img", "/alpha/v1/jobs", "/sdapi/v1/txt2img", "/v1/images/generations")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = put_model(tmp_path_factory.mktemp("service"))
    slow = {"step_s": 0.05}
    with served(folder, engine_options=slow, limits=SHORT, max_request_bytes=2_000_000) as client:
        yield client


def open_socket(client: httpx.Client) -> socket.socket:
    """Open a connection to the service."""
    opened = socket.create_connection(("127.0.0.1", client.base_url.port or 0))
    opened.settimeout(5)
    return opened


def read_to_end(opened: socket.socket) -> bytes:
    """Return what the service sends until it closes the connection."""
    received = b""
    try:
        while part := opened.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def exchange(client: httpx.Client, sent: bytes) -> bytes:
    """Send bytes and return the response, with the end of the connection."""
    with open_socket(client) as opened:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            opened.sendall(sent)
        return read_to_end(opened)


def status_of(response: bytes) -> int:
    """Return the status of the first response, 0 without one."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.1 ") else 0


# --- heads


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (LIVEZ + b"X: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (LIVEZ + b"X: " + b"a" * 4_000_000, 431),
        (LIVEZ + b"X" * 4_000_000, 431),
        (LIVEZ + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"GET /livez?" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET /" + b"a" * 4_000_000, 414),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (LIVEZ + HOST + b"\r\n", 400),
        (b"GET /livez HTTP/2.0\r\n" + HOST + b"\r\n", 505),
        (b"GET /livez\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(160), 400),
        (b"CONNECT example.com:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (POST + b"Content-Length: -2\r\n\r\n", 400),
    ],
    ids=range(16),
)
def test_head_beyond_limits_is_refused(client: httpx.Client, sent: bytes, status: int):
    response = exchange(client, sent)
    assert status_of(response) == status, response[:200]
    assert b"connection: close" in response
    assert b"x-content-type-options: nosniff\r\n" in response
    assert b"content-security-policy: default-src 'none'" in response
    assert json.loads(response.partition(b"\r\n\r\n")[2])["status"] == status


def test_head_within_limits_is_answered(client: httpx.Client):
    headers = {"X-Long": "a" * 30_000}
    assert client.get("/livez?" + "a" * 30_000, headers=headers).status_code == 200
    assert status_of(exchange(client, b"GET /livez HTTP/1.0\r\n\r\n")) == 200
    absolute = b"GET http://localhost/livez HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    assert status_of(exchange(client, absolute)) == 200


# --- requests that never end


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 0),
        (b"\r\n\r\n", 0),
        (b"GET /liv", 408),
        (LIVEZ, 408),
        (POST + b"Content-Length: 9\r\n\r\n{", 408),
        (CHUNKED + b"1\r\n{\r\n", 408),
        (POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 9\r\n\r\n{", 0),
        (b"POST /v1/images/variations HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n{", 400),
    ],
    ids=range(8),
)
def test_half_request_is_closed(client: httpx.Client, sent: bytes, status: int):
    start = time.monotonic()
    assert status_of(exchange(client, sent)) == status
    assert time.monotonic() - start < 3


def test_empty_lines_do_not_keep_a_connection_open(client: httpx.Client):
    with open_socket(client) as opened:
        opened.sendall(LIVEZ + b"\r\n")
        assert status_of(opened.recv(65536)) == 200
        opened.sendall(b"\r\n")
        assert read_to_end(opened) == b""


def test_trickle_does_not_extend_the_time(client: httpx.Client):
    with open_socket(client) as opened:
        opened.sendall(LIVEZ)
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for letter in b"X: a header that takes two seconds":
                time.sleep(0.05)
                opened.sendall(bytes([letter]))
                sent += 1
        assert status_of(read_to_end(opened)) in (0, 408)
        assert sent < 20


# --- bodies on the wire


@pytest.mark.parametrize(
    "sent",
    [
        CHUNKED + b"5;" + b"a" * 1_000_000,
        CHUNKED + b"1\r\n \r\n" * 60_000,
        CHUNKED + b"1\r\n{\r\n0\r\n" + b"X: aaaaaaaaaaaaaaaaaa\r\n" * 40_000,
    ],
    ids=["extension", "one byte chunks", "trailers"],
)
def test_chunks_with_too_much_framing_are_refused(client: httpx.Client, sent: bytes):
    assert status_of(exchange(client, sent)) == 400


def test_trailer_is_not_a_header(client: httpx.Client):
    body = json.dumps(RENDER).encode()
    sent = CHUNKED + b"%x\r\n%s\r\n0\r\nX-Request-ID: trailer\r\nConnection: close\r\n\r\n"
    with open_socket(client) as opened:
        opened.sendall(sent % (len(body), body))
        response = opened.recv(65536)
    assert status_of(response) == 200
    assert b"trailer" not in response


def test_upgrade_request_with_a_body_is_answered(client: httpx.Client):
    # Java's HttpClient sends it with the first request of a connection
    body = json.dumps(RENDER).encode()
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    head = POST + upgrade + b"Content-Length: %d\r\n\r\n" % len(body)
    for parts in ([head + body + LIVEZ], [head, body[:9], body[9:]]):
        with open_socket(client) as opened:
            for part in parts:
                opened.sendall(part)
            response = read_to_end(opened)
        assert status_of(response) == 200, response
        assert response.count(b"HTTP/1.1 ") == 1


def test_expect_continue_is_answered_only_when_read(client: httpx.Client):
    expect = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    with open_socket(client) as opened:
        opened.sendall(POST + expect % 2)
        assert opened.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        opened.sendall(b"{}")
        assert status_of(opened.recv(65536)) == 422
    assert status_of(exchange(client, POST + expect % 5_000_000)) == 413


def test_pipelined_requests_are_answered_in_order_and_bounded(client: httpx.Client):
    few = exchange(client, (LIVEZ + b"\r\n") * 3 + LIVEZ + b"Connection: close\r\n\r\n")
    assert few.count(b"HTTP/1.1 200") == 4
    many = exchange(client, (LIVEZ + b"\r\n") * 5000)
    assert many.count(b"HTTP/1.1 200") == connections.MAX_PIPELINED + 1
    bad = exchange(client, (LIVEZ + b"\r\n") * 2 + b"BAD\r\n\r\n")
    assert bad.count(b"HTTP/1.1 ") == bad.count(b"HTTP/1.1 200") == 2


def test_all_pipelined_jobs_are_withdrawn_at_disconnect(client: httpx.Client):
    request = json.dumps({**RENDER, "steps": 100}).encode()
    with open_socket(client) as opened:
        opened.sendall((POST + b"Content-Length: %d\r\n\r\n" % len(request) + request) * 2)
        wait_until(lambda: _jobs(client, "running"))
    wait_until(lambda: not _jobs(client, "running") and not _jobs(client, "queued"))
    assert _jobs(client, "cancelled")


def _jobs(client: httpx.Client, state: str) -> list[Any]:
    return client.get("/alpha/v1/jobs", params={"state": state}).json()["jobs"]


# --- bodies in the application


def post_json(client: httpx.Client, path: str, body: bytes) -> httpx.Response:
    """Send a body as JSON."""
    return client.post(path, content=body, headers={"Content-Type": "application/json"})


def detail_of(response: httpx.Response) -> str:
    """Return the text of an error in the form of its dialect."""
    body = response.json()
    return body["error"]["message"] if "error" in body else body["detail"]


@pytest.mark.parametrize("path", [*DIALECTS, "/mcp/"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text", f'"{"," * MAX_DELIMITERS}"', f"more than {MAX_DELIMITERS:,} commas"),
        ("many", "[" + "[]," * MAX_DELIMITERS + "[]]", f"more than {MAX_DELIMITERS:,} commas"),
        ("values", "[" + "[]," * MAX_VALUES + "[]]", f"more than {MAX_VALUES:,} values"),
        ("deep", "[" * 33 + "]" * 33, f"more than {MAX_DEPTH} levels"),
        ("very deep", "[" * 20_000 + "]" * 20_000, "more than"),
    ],
)
def test_json_with_too_many_values_is_refused(
    client: httpx.Client, path: str, name: str, value: str, message: str
):
    response = post_json(client, path, b'{"prompt": "x", "styles": %s}' % value.encode())
    assert response.status_code == (400 if path.startswith("/v1") else 422), name
    assert message in detail_of(response)


@pytest.mark.parametrize("path", DIALECTS)
def test_longest_prompts_are_not_refused(client: httpx.Client, path: str):
    fields = {"prompt": "a," * 5000, "width": 64, "height": 64, "n": 0, "n_iter": 0}
    if not path.startswith("/v1"):
        fields["negative_prompt"] = "," * 10_000
    assert "values" not in detail_of(client.post(path, json=fields))


@pytest.mark.parametrize("path", [*DIALECTS, "/sdapi/v1/png-info", "/sdapi/v1/options", "/mcp/"])
def test_body_over_a_megabyte_needs_a_route_of_images(client: httpx.Client, path: str):
    body = json.dumps({"prompt": "x", "image": "A" * JSON_BYTES, "width": 1}).encode()
    statuses = {
        post_json(client, path, body).status_code,
        client.post(
            path, content=iter([body]), headers={"Content-Type": "application/json"}
        ).status_code,
    }
    assert statuses == ({422} if path in ("/sdapi/v1/txt2img", "/sdapi/v1/png-info") else {413})


@pytest.mark.parametrize("path", [*DIALECTS, "/mcp/"])
def test_compressed_body_is_refused(client: httpx.Client, path: str):
    response = client.post(path, content=b"x", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415
    assert "gzip" in detail_of(response)


def test_form_is_not_read(client: httpx.Client):
    response = client.post("/v1/images/variations", files={f"f{i}": b"x" for i in range(2000)})
    assert response.json()["error"]["code"] == "not_implemented"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/alpha/v1/txt2img", {"a" * 900_000: 1}),
        ("/alpha/v1/txt2img", {"format": "a" * 900_000}),
        ("/alpha/v1/txt2img", {"loras": [1] * 1900}),
        ("/sdapi/v1/txt2img", {"alwayson_scripts": {"a" * 900_000: {"args": [True]}}}),
        ("/v1/images/generations", {"size": "a" * 900_000}),
    ],
)
def test_error_quotes_a_part_of_the_request(
    client: httpx.Client, path: str, fields: dict[str, Any]
):
    response = client.post(path, json={"prompt": "x", **fields})
    assert response.status_code in (400, 422)
    assert len(response.content) < 7000


def test_bodies_in_memory_have_a_limit(client: httpx.Client):
    large = json.dumps({**RENDER, "steps": 2, "ignored": "A" * 1_900_000}).encode()
    statuses: list[int] = []

    def send() -> None:
        statuses.append(post_json(client, "/sdapi/v1/txt2img", large).status_code)

    threads = [threading.Thread(target=send) for _ in range(HELD_BODIES + 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503}
    assert post_json(client, "/sdapi/v1/txt2img", large).status_code == 200, "not released"


# --- readers and crowds


def test_client_that_does_not_read_is_disconnected(client: httpx.Client):
    storage = client.app.state.service.storage  # type: ignore[attr-defined]
    storage.put("alpha_1_000000000001.png", bytes(30_000_000))
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.settimeout(5)
        opened.connect(("127.0.0.1", client.base_url.port or 0))
        opened.sendall(b"GET /alpha/v1/file/alpha_1_000000000001.png HTTP/1.1\r\n" + HOST + b"\r\n")
        wait_until(lambda: opened.getsockname() in _clients(client))
        wait_until(lambda: opened.getsockname() not in _clients(client), 3)


def _clients(client: httpx.Client) -> list[Any]:
    """Return the addresses of the open connections of the service."""
    state = client.server.server_state  # type: ignore[attr-defined]
    return [connection.client for connection in list(state.connections)]


def test_probes_are_answered_above_the_limit(client: httpx.Client):
    def hold(sent: bytes) -> socket.socket:
        opened = open_socket(client)
        opened.sendall(sent)
        return opened

    request = json.dumps({**RENDER, "steps": 150}).encode()
    submit = POST + b"Content-Length: %d\r\n\r\n" % len(request) + request
    crowd = [hold(submit) for _ in range(SHORT.connections + 1)]
    try:
        wait_until(lambda: status_of(exchange(client, _get("/v1/models"))) == 503)
        for path in ("/livez", "/readyz", "/ping"):
            assert status_of(exchange(client, _get(path))) == 200
        for path in ("/", "/v1/models", "/sdapi/v1/sd-models"):
            response = exchange(client, _get(path))
            assert status_of(response) == 503
            assert b"retry-after: 1\r\n" in response
            assert b"x-content-type-options: nosniff\r\n" in response
        # connections that wait are closed for others
        idle = [hold(b"GET /liv") for _ in range(connections.SPARE_CONNECTIONS + 20)]
        assert status_of(exchange(client, _get("/livez"))) == 200
        for opened in idle:
            opened.close()
    finally:
        for opened in crowd:
            opened.close()
    wait_until(lambda: status_of(exchange(client, _get("/v1/models"))) == 200)


def _get(path: str) -> bytes:
    return b"GET %s HTTP/1.1\r\n%sConnection: close\r\n\r\n" % (path.encode(), HOST)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/ping", "/sdapi/v1/sd-models"])
def test_head_of_health_path_is_200(client: httpx.Client, path: str):
    response = client.head(path)
    assert (response.status_code, response.content) == (200, b"")
