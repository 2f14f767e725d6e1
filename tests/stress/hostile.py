"""Hostile requests, files and names against a running service, and what held.

The service runs in a process of its own with a fake engine. While each attack runs, a probe
calls `/livez` and reads the memory of the service.
`python -m tests.stress.hostile --write benchmarks/results/hostile.json`. Linux only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from alphalayer.auth import api_keys
from alphalayer.images import codecs
from tests.stress.report import write_report
from tests.support import fake_service
from tests.support.serving import answers, free_port, put_model, wait_until

LIVEZ_S = 0.5
"""Longest accepted answer of `/livez` on quiet cores."""
MEMORY_MB = 400
"""Largest accepted memory of the service process."""
SMALL = {"prompt": "an apple", "width": 64, "height": 64, "steps": 1}
MARK = "marker-7f3a"
"""Text in prompts, keys and URLs that no log may hold."""


@dataclass
class Outcome:
    """Count of one attack."""

    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    livez_s: float = 0.0
    memory_mb: int = 0
    seconds: float = 0.0

    def check(self, held: object, what: str) -> None:
        """Count one request, and keep what did not hold."""
        self.tried += 1
        self.held += bool(held)
        if not held:
            self.failures.append(what[:300])


class Target:
    """A service in a process, with and without keys, and requests to it."""

    def __init__(self, folder: Path, *, with_keys: bool = False):
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        environment = {
            "ALPHALAYER_LOG_LEVEL": "debug",
            "ALPHALAYER_WEBHOOK_SECRET": "of the test",
            # shorter than the default, so that the end of a half-sent body is seen
            "ALPHALAYER_UPLOAD_TIMEOUT_S": "20",
        }
        self.keys: dict[str, str] = {}
        if with_keys:
            file = folder / "keys.json"
            self.keys = {name: api_keys.add_key(file, name) for name in ("ann", "bob")}
            environment["ALPHALAYER_KEYS_FILE"] = str(file)
        self.process = fake_service.start(folder, self.port, 0.0, 200, environment)
        wait_until(lambda: answers(self.address), 120)
        self.http = self.client()

    def client(self, key: str | None = None, timeout: float = 60) -> httpx.Client:
        """Return an HTTP client that sends a key, the first one by default."""
        key = key or next(iter(self.keys.values()), None)
        headers = {"X-API-Key": key} if key else {}
        return httpx.Client(
            base_url=self.address, headers=headers, timeout=timeout, trust_env=False
        )

    def stop(self) -> None:
        """Stop the process."""
        self.http.close()
        self.process.kill()
        self.process.wait()

    def connect(self) -> socket.socket:
        """Return a plain connection."""
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def raw(self, data: bytes, timeout: float = 30) -> bytes:
        """Send bytes, and return the first line of the answer; empty if it was closed."""
        with self.connect() as connection:
            connection.settimeout(timeout)
            with contextlib.suppress(OSError):
                connection.sendall(data)
            with contextlib.suppress(OSError):
                return connection.recv(65536).split(b"\r\n")[0]
        return b""

    def image(self, side: int) -> str:
        """Generate an image. Return its file name."""
        answer = self.http.post("/alpha/v1/txt2img", json={**SMALL, "width": side, "height": side})
        return answer.json()["filename"]


class Probe:
    """Thread that measures `/livez` and the memory of a service while an attack runs."""

    def __init__(self, target: Target):
        self._target, self._is_over = target, threading.Event()
        self.livez_s, self.memory_mb = 0.0, 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with self._target.client(timeout=30) as http:
            while True:
                start = time.perf_counter()
                try:
                    answered = http.get("/livez").status_code == 200
                except httpx.TransportError:
                    answered = False
                seconds = time.perf_counter() - start if answered else float("inf")
                self.livez_s = max(self.livez_s, seconds)
                self.memory_mb = max(self.memory_mb, memory_mb(self._target.process.pid))
                if self._is_over.wait(0.05):
                    return


def memory_mb(pid: int) -> int:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


Attack = Callable[[Target, Outcome, float], None]
"""Attack on a service. The number scales its size: 1 is the full one."""
OPEN: list[Attack] = []
"""Attacks on a service without keys."""
KEYED: list[Attack] = []
"""Attacks on a service with the keys of `ann` and `bob`."""


def attack(where: list[Attack]) -> Callable[[Attack], Attack]:
    """Add an attack to a list."""

    def add(function: Attack) -> Attack:
        where.append(function)
        return function

    return add


@attack(OPEN)
def costly_jobs(target: Target, outcome: Outcome, scale: float) -> None:
    """Request jobs that would hold the engine or break its pipe; others' jobs still finish."""
    emoji, rare = "\U0001f34e" * 10_000, "xqzjv " * 1600
    bodies = [
        {**SMALL, "prompt": emoji, "negative_prompt": emoji, "n_iter": 16, "batch_size": 8},
        {**SMALL, "prompt": rare, "negative_prompt": rare, "n_iter": 16, "batch_size": 8},
        {**SMALL, "prompt": "\\" * 10_000, "n_iter": 16, "batch_size": 8},
        {**SMALL, "prompt": "\x01\ud7ff" * 5_000, "n_iter": 16, "batch_size": 8},
        {**SMALL, "steps": 150, "n_iter": 16, "batch_size": 8, "width": 2048, "height": 2048},
        {**SMALL, "prompt": " AND ".join("x" * 8), "steps": 150, "n_iter": 16, "width": 2048},
    ]
    for body in bodies[: max(2, int(len(bodies) * scale))]:
        innocent = target.http.post("/alpha/v1/jobs", json=SMALL).json()["id"]
        answer = target.http.post("/alpha/v1/jobs", json=body)
        outcome.check(answer.status_code in (202, 422), f"costly: {answer.text}")
        later = target.http.post("/alpha/v1/jobs", json=SMALL).json()["id"]
        for job in (innocent, later):
            wait_until(lambda job=job: _state(target, job) in ("done", "failed"), 120)
            outcome.check(_state(target, job) == "done", f"innocent job beside {body}"[:200])
        if answer.status_code == 202:
            job = answer.json()["id"]
            wait_until(lambda job=job: _state(target, job) in ("done", "failed"), 120)


@attack(OPEN)
def many_conversions(target: Target, outcome: Outcome, scale: float) -> None:
    """Convert one large image many times at once."""
    name = target.image(2048 if scale == 1 else 512)
    url = f"/alpha/v1/convert/{name}"
    query = {"format": "avif", "defringe": "true"}

    def convert(_number: int) -> httpx.Response:
        with target.client(timeout=300) as http:
            return http.get(url, params=query)

    with ThreadPoolExecutor(60) as pool:
        for answer in pool.map(convert, range(60)):
            held = answer.status_code == 200 or (
                answer.status_code == 429 and "retry-after" in answer.headers
            )
            outcome.check(held, f"convert: {answer.status_code} {answer.text[:100]}")


@attack(OPEN)
def large_json(target: Target, outcome: Outcome, scale: float) -> None:
    """Send JSON that is long, deep or full of elements to every route that reads a body."""
    count = int(5_000_000 * scale)
    bodies = {
        "elements": b'{"loras":[' + b"[]," * count + b"[]]}",
        "deep": b'{"loras":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "names": b"{" + b",".join(b'"f%d":1' % i for i in range(60_000)) + b"}",
        "list": b'{"prompt":"x","loras":[' + b",".join([b"1"] * 300_000) + b"]}",
        "number": b'{"prompt":"x","seed":' + b"9" * 900_000 + b"}",
        "string": b'{"prompt":"' + b"x" * 900_000 + b'"}',
        "escapes": b'{"prompt":"' + b"\\u0000" * 150_000 + b'"}',
        "unclosed": b'{"prompt":"' + b"\\" * 900_001,
        "not utf-8": b'{"prompt":"' + b"\xff" * 1000 + b'"}',
    }
    paths = _paths_of_posts(target)
    for path, (name, body) in itertools.product(paths, bodies.items()):
        with _answer_of(target, path, body) as answer:
            # a route without a body does not read it, and unknown options are ignored
            unread = not paths[path] and answer is not None and answer.status_code in (200, 501)
            ignored = path == "/sdapi/v1/options" and name in ("string", "escapes")
            held = answer is None or unread or ignored or 400 <= answer.status_code < 500
            outcome.check(held, f"{path} {name}: {answer and answer.status_code}")


@attack(KEYED)
def json_without_a_key(target: Target, outcome: Outcome, scale: float) -> None:
    """Send a body of five million lists without a key: 401, at once."""
    body = b'{"loras":[' + b"[]," * int(5_000_000 * scale) + b"[]]}"
    with httpx.Client(base_url=target.address, timeout=60, trust_env=False) as http:
        for path in _paths_of_posts(target):
            start = time.perf_counter()
            try:
                status = http.post(
                    path, content=body, headers={"Content-Type": "application/json"}
                ).status_code
            except httpx.WriteError:
                status = 401  # the service closed the connection after its answer
            outcome.check(status in (401, 413), f"{path}: {status}")
            outcome.check(time.perf_counter() - start < 5, f"{path} took seconds")


@attack(OPEN)
def long_headers(target: Target, outcome: Outcome, scale: float) -> None:
    """Send headers and URLs without end."""
    size = int(150_000_000 * scale)
    start = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
    cases = {
        "one header": start + b"X-A: " + b"a" * size + b"\r\n\r\n",
        "many headers": start + b"".join(b"X-%d: a\r\n" % i for i in range(20_000)) + b"\r\n",
        "header name": start + b"a" * 1_000_000 + b": 1\r\n\r\n",
        "url": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "query": b"GET /livez?" + b"a=b&" * 250_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "method": b"G" * 1_000_000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "chunk size": b"POST /alpha/v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 1_000_000,
        "chunk extension": b"POST /alpha/v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 1_000_000,
    }
    for name, data in cases.items():
        line = target.raw(data)
        outcome.check(line == b"" or b" 4" in line[8:12], f"{name}: {line[:60]!r}")


@attack(OPEN)
def half_sent_requests(target: Target, outcome: Outcome, scale: float) -> None:
    """Open many connections, send a part of a request on each, and wait for their end."""
    parts = (b"", b"G", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
    parts += (b"POST /alpha/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",)
    with ExitStack() as stack:
        connections: list[socket.socket] = []
        for number in range(int(2000 * scale)):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(target.connect())
                connection.sendall(parts[number % len(parts)])
                connections.append(connection)
        outcome.check(target.http.get("/livez").status_code == 200, "livez beside half requests")
        end = time.monotonic() + 90
        for connection in connections:
            connection.settimeout(max(0.1, end - time.monotonic()))
            try:
                while connection.recv(4096):
                    pass
                closed = True
            except TimeoutError:
                closed = False
            except OSError:
                closed = True
            outcome.check(closed, "a half-sent request was never closed")


@attack(OPEN)
def malformed_requests(target: Target, outcome: Outcome, _scale: float) -> None:
    """Send what is no HTTP request, or two requests in one."""
    head = b"POST /alpha/v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
    cases = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /livez\r\n",
        b"\x00" * 1000 + b"\r\n\r\n",
        head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 99999999999999999999999\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        head + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        head + b" folded: 1\r\n\r\n",
        head + b"A b: 1\r\n\r\n",
        head + b"X: a\x00b\r\n\r\n",
    ]
    for data in cases:
        line = target.raw(data + b"", timeout=20)
        outcome.check(line == b"" or line[8:10] in (b" 4", b" 5"), f"{data[:80]!r}: {line!r}")
        outcome.check(b" 500" not in line, f"{data[:80]!r}: {line!r}")


@attack(OPEN)
def foreign_pages(target: Target, outcome: Outcome, _scale: float) -> None:
    """Send what a foreign page can make a browser send."""
    job = target.http.post("/alpha/v1/jobs", json=SMALL).json()["id"]
    marks = [
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
        {"Origin": f"http://127.0.0.1:{target.port + 1}", "Sec-Fetch-Site": "same-site"},
        {"Origin": f"http://127.0.0.1.evil.example:{target.port}"},
    ]
    changes = [
        ("POST", "/sdapi/v1/interrupt"),
        ("POST", "/sdapi/v1/skip"),
        ("POST", "/sdapi/v1/refresh-checkpoints"),
        ("POST", "/sdapi/v1/refresh-loras"),
        ("POST", "/sdapi/v1/unload-checkpoint"),
        ("POST", "/sdapi/v1/options"),
        ("POST", "/sdapi/v1/txt2img"),
        ("POST", "/alpha/v1/txt2img"),
        ("POST", "/alpha/v1/jobs"),
        ("DELETE", f"/alpha/v1/jobs/{job}"),
        ("POST", "/v1/images/generations"),
        ("POST", "/mcp/"),
    ]
    for headers, (method, path) in itertools.product(marks, changes):
        for content_type in ("application/json", "text/plain"):
            answer = target.http.request(
                method,
                path,
                content=json.dumps(SMALL),
                headers={**headers, "Content-Type": content_type},
            )
            held = answer.status_code in (403, 404, 405)
            outcome.check(held, f"{method} {path} {headers}: {answer.status_code}")


@attack(OPEN)
def foreign_hosts(target: Target, outcome: Outcome, _scale: float) -> None:
    """Send names of hosts that a rebound DNS name or a proxy would send."""
    hosts = ["evil.example", f"evil.example:{target.port}", "localhost.evil.example", "127.0.0.1.x"]
    hosts += ["", "a@localhost", "localhost:80@evil.example", "[::1", "lоcalhost", "x" * 5000]
    for host, path in itertools.product(hosts, ("/alpha/v1/jobs", "/", "/openapi.json", "/mcp/")):
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        line = target.raw(head.encode())
        outcome.check(b" 4" in line[8:12] or not line, f"{host[:40]} {path}: {line!r}")


@attack(OPEN)
def odd_names_of_files(target: Target, outcome: Outcome, _scale: float) -> None:
    """Read what is no image through the routes that name a file."""
    outputs = target.folder / "outputs"
    outputs.mkdir(exist_ok=True)
    secret = target.folder / "secret.png"
    secret.write_text(MARK)
    (outputs / "notes.txt").write_text(MARK)
    (outputs / "alphalayer.toml").write_text(MARK)
    (outputs / "jobs.sqlite").write_text(MARK)
    link = "alpha_1700000000_0123456789.png".replace("89.", "8900.")
    (outputs / link).symlink_to(secret)
    names = ["notes.txt", "alphalayer.toml", "jobs.sqlite", link, "keys.json", ".env", "."]
    names += ["..", "../secret.png", "..%2fsecret.png", "%2e%2e%2fsecret.png", "..\\secret.png"]
    names += ["/etc/passwd", "%00", "a%00.png", "con", "x" * 5000 + ".png", "é.png", "%ff.png"]
    for name, route in itertools.product(names, ("file", "convert")):
        answer = target.http.get(f"/alpha/v1/{route}/{name}")
        outcome.check(answer.status_code in (404, 414, 422), f"{route}/{name[:40]}: {answer}")
        outcome.check(MARK not in answer.text, f"{route}/{name[:40]} shows a file")


@attack(OPEN)
def odd_ids(target: Target, outcome: Outcome, _scale: float) -> None:
    """Use ids and keys with characters that a database or a header cannot hold."""
    ids = ["%00", "a%00b", "%ff", "' OR 1=1 --", "x" * 5000, "../..", "%0d%0aX-A:1", "\ud7ff"]
    for job, suffix in itertools.product(ids, ("", "/events")):
        answer = target.http.get(f"/alpha/v1/jobs/{job}{suffix}")
        outcome.check(answer.status_code in (404, 414, 422), f"job {job[:30]}: {answer}")
    for key in (b"a\x01", b"\xff\xfe", b"a" * 5000, b"' OR 1=1", "\u202e".encode(), b"a\tb"):
        head = b"POST /alpha/v1/jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        body = json.dumps(SMALL).encode()
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        line = target.raw(head + b"Idempotency-Key: " + key + b"\r\n\r\n" + body)
        outcome.check(line[9:12] in (b"202", b"400", b"422", b"431"), f"{key[:20]!r}: {line!r}")


@attack(OPEN)
def refused_webhooks(target: Target, outcome: Outcome, _scale: float) -> None:
    """Name receivers in private networks, in every way to write them."""
    hosts = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "172.16.0.1", "0.0.0.0"]
    hosts += ["192.0.0.170", "192.88.99.1", "100.64.0.1", "198.18.0.1", "240.0.0.1", "224.0.0.1"]
    hosts += ["[::1]", "[::]", "[fd00::1]", "[fe80::1]", "[fec0::1]", "[::ffff:10.0.0.1]"]
    hosts += ["[64:ff9b::a00:1]", "[64:ff9b:1::1]", "[2002:a00:1::]", "[2001:db8::1]", "[3fff::1]"]
    hosts += ["[2001:4860::5efe:a00:1]", "[::a00:1]", "[100::1]", "[ff02::1]", "[5f00::1]"]
    urls = [f"http://{host}/" for host in hosts]
    urls += ["file:///etc/passwd", "ftp://example.org/", "http://a:b@example.org/", "http:///x"]
    for url in urls:
        answer = target.http.post("/alpha/v1/jobs", json={**SMALL, "webhook_url": url})
        outcome.check(answer.status_code == 422, f"{url}: {answer.status_code}")


@attack(OPEN)
def broken_images(target: Target, outcome: Outcome, scale: float) -> None:
    """Upload damaged images, and images that claim to be huge."""
    rng = random.Random(0)
    rgba = np.random.default_rng(0).integers(0, 255, (32, 32, 4), dtype=np.uint8)
    images = [
        _png_of_size(60_000, 60_000),
        _png_of_size(2**31 - 1, 1),
        b"",
        b"GIF89a",
        b"\x89PNG",
    ]
    for kind in ("png", "webp", "avif"):
        whole = codecs.encode(rgba, kind, "an apple")
        for _ in range(max(4, int(300 * scale))):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            images.append(bytes(data[: rng.randint(1, len(data))]))
    for image in images:
        data = base64.b64encode(image).decode()
        answer = target.http.post("/sdapi/v1/png-info", json={"image": data})
        outcome.check(answer.status_code in (200, 422), f"png-info: {answer.status_code}")
        form = {"data": SMALL, "files": {"image": image}}
        answer = target.http.post("/alpha/v1/img2img", **form)
        outcome.check(answer.status_code in (200, 422), f"img2img: {answer.status_code}")


@attack(OPEN)
def many_documents(target: Target, outcome: Outcome, scale: float) -> None:
    """Download the documents of one job many times at once, while an image is uploaded."""
    side = 2048 if scale == 1 else 256
    body = {**SMALL, "width": side, "height": side, "checkpoint": "apples"}
    put_model(target.folder)
    answer = target.http.post("/alpha/v1/layers", json=body, timeout=300)
    shutil.rmtree(target.folder / "models/Stable-diffusion/apples")
    urls = list(answer.json()["documents"].values())

    def download(number: int) -> int:
        with target.client(timeout=300) as http:
            return http.get(urls[number % len(urls)]).status_code

    image = codecs.encode(np.full((64, 64, 4), 9, np.uint8))
    with ThreadPoolExecutor(60) as pool:
        statuses = pool.map(download, range(60))
        upload = target.http.post("/alpha/v1/img2img", data=SMALL, files={"image": image})
        outcome.check(upload.status_code == 200, f"upload beside documents: {upload.status_code}")
        for status in statuses:
            outcome.check(status == 200, f"document: {status}")


@attack(OPEN)
def odd_orientations(target: Target, outcome: Outcome, _scale: float) -> None:
    """Upload images whose EXIF orientation has another type or value."""
    whole = codecs.encode(np.full((64, 64, 4), 9, np.uint8))
    for kind, value in itertools.product(range(16), (b"\xff" * 4, b"\0\x09\0\0", bytes(4))):
        exif = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI4s", 0x112, kind, 1, value) + bytes(4)
        chunk = b"eXIf" + exif
        chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        image = whole[:33] + chunk + whole[33:]
        answer = target.http.post("/alpha/v1/img2img", data=SMALL, files={"image": image})
        outcome.check(answer.status_code == 200, f"type {kind} {value!r}: {answer.status_code}")


@attack(OPEN)
def enlarged_images(target: Target, outcome: Outcome, scale: float) -> None:
    """Enlarge many images in one request, and one that is too large; none is stored."""
    count, side = (32, 512) if scale == 1 else (4, 32)
    image = base64.b64encode(codecs.encode(np.full((side, side, 4), 9, np.uint8))).decode()
    options = {"upscaler_1": "Lanczos", "upscaling_resize": 8}
    body = {**options, "imageList": [{"data": image}] * count}
    answer = target.http.post("/sdapi/v1/extra-batch-images", json=body, timeout=300)
    outcome.check(answer.status_code == 200, f"batch: {answer.status_code}")
    large = {**options, "image": base64.b64encode(bytes(21_000_000)).decode()}
    answer = target.http.post("/sdapi/v1/extra-single-image", json=large)
    outcome.check(answer.status_code == 422, f"large: {answer.status_code}")


@attack(OPEN)
def odd_forms(target: Target, outcome: Outcome, scale: float) -> None:
    """Send forms with many parts, long headers, and content that is like a boundary."""
    size = int(30_000_000 * scale)
    part = b'--xx\r\nContent-Disposition: form-data; name="f"\r\n'
    file = b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    bodies = {
        "parts": (part + b"\r\n1\r\n") * (size // len(part)),
        "header": part + b"X: " + b"a" * size + b"\r\n\r\n1\r\n--xx--\r\n",
        "headers": part + b"X: a\r\n" * (size // 6) + b"\r\n1\r\n--xx--\r\n",
        "boundaries": file + b"\r\n--x" * (size // 5) + b"\r\n--xx--\r\n",
        "returns": file + b"\r" * size + b"\r\n--xx--\r\n",
        "preamble": b"\r\n" * (size // 2) + file,
        "text": part + b"\r\n" + b"a" * size + b"\r\n--xx--\r\n",
        "unclosed": file + b"a" * size,
        "empty": b"",
    }
    for path, (name, body) in itertools.product(
        ("/alpha/v1/img2img", "/alpha/v1/layers"), bodies.items()
    ):
        answer = target.http.post(
            path, content=body, headers={"Content-Type": "multipart/form-data; boundary=xx"}
        )
        outcome.check(400 <= answer.status_code < 500, f"{path} {name}: {answer.status_code}")


@attack(OPEN)
def slow_patterns(target: Target, outcome: Outcome, _scale: float) -> None:
    """Send texts that make a bad regular expression slow."""
    texts = ["(" * 10_000, "[" * 10_000, "<lora:" * 1600, "a:1.1)" * 1600, "\\(" * 5000]
    texts += ["((a:1)" * 1600, "a AND " * 7 + "a " * 4000, "<lora:a:" + "1" * 9000 + ">"]
    texts += [" " * 9999 + "a", "#" * 10_000, ("(" * 50 + "a" + ")" * 50) * 90, "BREAK " * 1600]
    for text in texts:
        start = time.perf_counter()
        answer = target.http.post("/alpha/v1/jobs", json={**SMALL, "prompt": text})
        outcome.check(answer.status_code in (202, 422, 429), f"{text[:20]}: {answer.status_code}")
        outcome.check(time.perf_counter() - start < 2, f"{text[:20]} took seconds")


@attack(KEYED)
def guesses(target: Target, outcome: Outcome, scale: float) -> None:
    """Guess keys: after some wrong ones a minute the address waits, and a right key still works."""
    statuses: list[int] = []
    for number in range(max(60, int(400 * scale))):
        headers = {"X-API-Key": f"alk_{number}"}
        statuses.append(target.http.get("/alpha/v1/jobs", headers=headers).status_code)
    outcome.check(set(statuses) <= {401, 429}, f"statuses {set(statuses)}")
    outcome.check(429 in statuses, "no guess was refused")
    outcome.check(statuses.count(401) <= 100, f"{statuses.count(401)} guesses were compared")
    outcome.check(target.http.get("/alpha/v1/jobs").status_code == 200, "a right key is refused")


@attack(KEYED)
def others_jobs(target: Target, outcome: Outcome, _scale: float) -> None:
    """Read, cancel and change what belongs to another key."""
    job = target.http.post("/alpha/v1/jobs", json={**SMALL, "steps": 50}).json()["id"]
    with target.client(target.keys["bob"]) as bob:
        outcome.check(bob.get(f"/alpha/v1/jobs/{job}").status_code == 404, "bob sees ann's job")
        outcome.check(bob.delete(f"/alpha/v1/jobs/{job}").status_code == 404, "bob cancels it")
        outcome.check(bob.get(f"/alpha/v1/jobs/{job}/events").status_code == 404, "bob follows it")
        outcome.check(not bob.get("/alpha/v1/jobs").json()["jobs"], "bob lists it")
        bob.post("/sdapi/v1/interrupt")
        before = target.http.get("/sdapi/v1/options").json()
        bob.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 7})
        outcome.check(target.http.get("/sdapi/v1/options").json() == before, "bob sets options")
    wait_until(lambda: _state(target, job) in ("done", "failed", "cancelled"), 60)
    outcome.check(_state(target, job) == "done", "bob interrupted ann's job")


@attack(KEYED)
def secrets_in_the_log(target: Target, outcome: Outcome, _scale: float) -> None:
    """Put a marker wherever a secret may be, and read the log at level debug."""
    body = {**SMALL, "prompt": MARK, "negative_prompt": MARK}
    target.http.post(
        "/alpha/v1/jobs",
        json={**body, "webhook_url": f"https://127.0.0.1/{MARK}?token={MARK}"},
        headers={"Idempotency-Key": MARK},
    )
    answer = target.http.post("/alpha/v1/jobs", json=body, headers={"Idempotency-Key": MARK})
    wait_until(lambda: _state(target, answer.json()["id"]) == "done", 60)
    target.http.post("/alpha/v1/jobs", json={**body, "steps": MARK})
    target.http.get("/alpha/v1/jobs", headers={"X-API-Key": MARK})
    target.http.get("/alpha/v1/jobs", headers={"Authorization": f"Bearer {MARK}"})
    target.http.get("/alpha/v1/jobs", params={"key": MARK})
    log = (target.folder / "service.log").read_text(errors="replace")
    outcome.check(MARK not in log, f"the log has the marker: {log.partition(MARK)[0][-200:]}")
    for key in target.keys.values():
        outcome.check(key not in log, "the log has a key")


def prepare_models(folder: Path) -> None:
    """Fill the model folders with odd files and names. The service starts with them."""
    headers: dict[str, Any] = {
        "infinity": '{"a":{"dtype":"F16","shape":[Infinity],"data_offsets":[0,0]}}',
        "1e400": '{"a":{"dtype":"F16","shape":[1e400],"data_offsets":[0,0]}}',
        "nan": '{"a":{"dtype":"F16","shape":[NaN],"data_offsets":[0,0]}}',
        "negative": '{"a":{"dtype":"F16","shape":[-1],"data_offsets":[0,0]}}',
        "text": '{"a":{"dtype":"F16","shape":"4","data_offsets":"x"}}',
        "rank": '{"x":{"dtype":"F16","shape":[],"data_offsets":[0,2]}}',
        "list": "[" + "[]," * 200_000 + "[]]",
        "deep": "[" * 100_000 + "]" * 100_000,
        "null": "null",
        "lies": '{"a":{"dtype":"F16","shape":[4],"data_offsets":[0,99999999999]}}',
        "bool": '{"a":{"dtype":true,"shape":[true],"data_offsets":[false,true]}}',
    }
    for name in ("Stable-diffusion", "Lora", "layer_model", "VAE"):
        models = folder / "models" / name
        models.mkdir(parents=True, exist_ok=True)
        for label, header in headers.items():
            text = header.encode()
            data = struct.pack("<Q", len(text)) + text + b"\0\0"
            (models / f"{label}.safetensors").write_bytes(data)
        (models / "empty.safetensors").touch()
        (models / "folder.safetensors").mkdir(exist_ok=True)
        os.mkfifo(models / "fifo.safetensors")
        (models / "dangling.safetensors").symlink_to("nowhere")
        (models / "circle.safetensors").symlink_to("circle.safetensors")
        (models / "new\nline.safetensors").touch()
        Path(os.fsdecode(bytes(models) + b"/\xff\xfe.safetensors")).touch()
    embeddings = folder / "embeddings"
    embeddings.mkdir()
    Path(os.fsdecode(bytes(embeddings) + b"/\xff.safetensors")).touch()
    (embeddings / "empty.safetensors").touch()


@attack(OPEN)
def odd_model_files(target: Target, outcome: Outcome, scale: float) -> None:
    """Call every list while the folders hold the files of `prepare_models`."""
    paths = ["/ping", "/readyz", "/alpha/v1/models", "/v1/models", "/sdapi/v1/sd-models"]
    paths += ["/sdapi/v1/loras", "/sdapi/v1/embeddings", "/sdapi/v1/sd-vae", "/sdapi/v1/options"]
    paths += ["/sdapi/v1/memory", "/sdapi/v1/progress", "/sdapi/v1/scripts", "/metrics", "/"]
    for path in paths * max(1, int(10 * scale)):
        start = time.perf_counter()
        answer = target.http.get(path)
        outcome.check(answer.status_code in (200, 404), f"{path}: {answer.status_code}")
        outcome.check(time.perf_counter() - start < 1, f"{path} took a second")
        outcome.check(str(target.folder) not in answer.text, f"{path} shows a path of the server")
    answer = target.http.post("/alpha/v1/txt2img", json={**SMALL, "checkpoint": "infinity"})
    outcome.check(answer.status_code == 503, f"a broken model: {answer.text[:200]}")


def _state(target: Target, job: str) -> str:
    return target.http.get(f"/alpha/v1/jobs/{job}").json()["state"]


def _paths_of_posts(target: Target) -> dict[str, bool]:
    """Return the paths that take a POST, and whether they read a body."""
    paths: dict[str, Any] = target.http.get("/openapi.json").json()["paths"]
    return {
        path: "requestBody" in methods["post"]
        for path, methods in paths.items()
        if "post" in methods and "{" not in path
    }


@contextlib.contextmanager
def _answer_of(target: Target, path: str, body: bytes) -> Iterator[httpx.Response | None]:
    """Send a body; yield the answer, or None if the service closed the connection."""
    try:
        yield target.http.post(path, content=body, headers={"Content-Type": "application/json"})
    except httpx.TransportError:
        yield None


def _png_of_size(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds one pixel."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data)


def run(folder: Path, scale: float = 1.0, skipped: Collection[str] = ()) -> dict[str, Outcome]:
    """Run all attacks, each with a probe. Return the outcome of each by its name."""
    outcomes: dict[str, Outcome] = {}
    for attacks, with_keys in ((OPEN, False), (KEYED, True)):
        place = folder / ("keyed" if with_keys else "open")
        place.mkdir()
        prepare_models(place)
        target = Target(place, with_keys=with_keys)
        try:
            for function in attacks:
                if function.__name__ in skipped:
                    continue
                outcome, start = outcomes.setdefault(function.__name__, Outcome()), time.monotonic()
                with Probe(target) as probe:
                    try:
                        function(target, outcome, scale)
                    except Exception as error:
                        outcome.check(False, f"the attack ended with {error!r}")
                outcome.seconds = round(time.monotonic() - start, 1)
                outcome.livez_s, outcome.memory_mb = round(probe.livez_s, 3), probe.memory_mb
                outcome.check(target.process.poll() is None, "the service ended")
        finally:
            target.stop()
    return outcomes


def table_of(outcomes: dict[str, Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    lines = ["| attack | tried | held | /livez at most | memory |", "|---|---|---|---|---|"]
    lines += [
        f"| {name.replace('_', ' ')} | {of.tried:,} | {of.held:,} | {of.livez_s:.2f} s "
        f"| {of.memory_mb} MB |"
        for name, of in outcomes.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the attacks, up to 1")
    parser.add_argument("--write", type=Path, help="a file for the result, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        outcomes = run(Path(folder), options.scale)
    report = {
        "seconds": round(time.monotonic() - start),
        "attacks": {name: vars(outcome) for name, outcome in outcomes.items()},
    }
    write_report("hostile", report, options.write)
    print(table_of(outcomes))
    sys.exit(
        any(
            of.held < of.tried or of.livez_s > LIVEZ_S or of.memory_mb > MEMORY_MB
            for of in outcomes.values()
        )
    )


if __name__ == "__main__":
    main()
