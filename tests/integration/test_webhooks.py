"""Webhooks with a real receiver: signatures, retries, restarts and private networks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook as Signer
from structlog.testing import capture_logs
from tests.support.serving import free_port, served, wait_until

from alphalayer.config import Settings
from alphalayer.core.errors import Cancelled, InvalidRequest, SetupFailed
from alphalayer.core.job import Delivery, Job, JobSpec, JobState, Submission, Webhook
from alphalayer.core.request import GenerationRequest
from alphalayer.observability.metrics import Metrics
from alphalayer.service import webhooks
from alphalayer.service.app import check

SECRET = "whsec_" + base64.b64encode(b"a key of our own").decode()
BODY = {"prompt": "an apple", "width": 64, "height": 64, "steps": 2}


class Receiver(ThreadingHTTPServer):
    """A receiver that answers with these statuses in turn, then 204, and keeps the requests."""

    def __init__(self, *answers: int, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.answers = list(answers)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/hook?from=test"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Receiver = self.server  # type: ignore[assignment]
        body = self.rfile.read(int(self.headers["content-length"]))
        server.requests.append(
            (self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        )
        self.send_response(server.answers.pop(0) if server.answers else 204)
        self.send_header("location", "http://127.0.0.1:1/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "PAUSES_S", (0.1, 0.1))
    monkeypatch.setattr(webhooks, "POLL_EVERY_S", 0.05)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[object]:
    options = {"step_s": 0.02}
    with served(
        tmp_path, webhook_secret=SECRET, webhook_allow_private=True, engine_options=options
    ) as client:
        yield client


def resigned(headers: dict[str, str], body: bytes, age_s: int) -> dict[str, str]:
    """Return headers of an older message with a valid signature."""
    sent_at = datetime.now(timezone.utc) - timedelta(seconds=age_s)
    signature = Signer(SECRET).sign(headers["webhook-id"], sent_at, body.decode())
    timestamp = str(int(sent_at.timestamp()))
    return {**headers, "webhook-timestamp": timestamp, "webhook-signature": signature}


def test_webhook_sends_the_signed_job(service):
    with Receiver() as receiver:
        job = service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": receiver.url}).json()
        wait_until(lambda: receiver.requests)
        path, headers, body = receiver.requests[0]
        assert path == "/hook?from=test"
        assert headers["host"] == f"127.0.0.1:{receiver.server_port}"
        assert headers["webhook-id"] == job["id"]
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        signed = f"{job['id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(
            hmac.new(b"a key of our own", signed, hashlib.sha256).digest()
        ).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        guide = (Path(__file__).parents[2] / "docs" / "guides" / "clients.md").read_text(
            encoding="utf-8"
        )
        (example,) = [block for block in guide.split("```python\n") if "def is_authentic" in block]
        names: dict[str, Any] = {}
        exec(example.split("```")[0], names)  # the receiver of the guide
        assert names["is_authentic"](headers, body)
        assert not names["is_authentic"](headers, body + b" ")
        assert not names["is_authentic"](resigned(headers, body, age_s=301), body)
        assert names["is_authentic"](resigned(headers, body, age_s=290), body)
        payload = json.loads(body)
        assert payload == service.get(job["url"]).json()
        assert payload["state"] == "done"
        assert service.get(payload["images"][0]["url"]).status_code == 200
        time.sleep(0.3)
        assert len(receiver.requests) == 1


def test_webhooks_continue_after_a_journal_outage(
    service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(webhooks, "OUTAGE_PAUSE_S", 0.1)
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "data" / "jobs.sqlite")) as journal,
        Receiver() as receiver,
    ):
        journal.execute("ALTER TABLE jobs RENAME TO away")
        time.sleep(0.5)
        journal.execute("ALTER TABLE away RENAME TO jobs")
        service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": receiver.url})
        wait_until(lambda: receiver.requests)


def test_webhook_reports_failed_and_cancelled_jobs(service, tmp_path: Path):
    with Receiver() as receiver:
        running = service.post(
            "/alpha/v1/jobs", json={**BODY, "steps": 150, "webhook_url": receiver.url}
        ).json()
        waiting = service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": receiver.url}).json()
        service.delete(waiting["url"])
        service.delete(running["url"])
        wait_until(lambda: len(receiver.requests) == 2)
        shutil.rmtree(tmp_path / "outputs")
        (tmp_path / "outputs").write_text("a file in the way")
        failed = service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": receiver.url}).json()
        wait_until(lambda: len(receiver.requests) == 3)
        payloads = [json.loads(body) for _, _, body in receiver.requests]
        assert [payload["state"] for payload in payloads] == ["cancelled", "cancelled", "failed"]
        assert (payloads[2]["id"], payloads[2]["error"]["code"]) == (failed["id"], "storage_failed")


def test_webhook_is_retried_then_given_up(service):
    with (
        Receiver(500, 429) as receiver,
        Receiver(*[503] * 9) as unavailable,
        Receiver(410) as removed,
        Receiver(302) as redirecting,
    ):
        for server in (receiver, unavailable, removed, redirecting):
            service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": server.url})
        wait_until(
            lambda: (
                len(receiver.requests) == 3
                and len(unavailable.requests) == 3
                and len(redirecting.requests) == 2
            )
        )
        assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 1
        time.sleep(0.4)
        assert [
            len(server.requests) for server in (receiver, unavailable, removed, redirecting)
        ] == [3, 3, 1, 2]
        metrics = service.get("/metrics").text
        for outcome, count in (("delivered", 2), ("given_up", 2), ("retried", 5)):
            assert f'alphalayer_webhooks_total{{outcome="{outcome}"}} {count}.0' in metrics


def test_pending_webhook_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "PAUSES_S", (1.5,) * 9)
    port = free_port()
    settings = {"webhook_secret": SECRET, "webhook_allow_private": True}
    with served(tmp_path, **settings) as service:
        job = service.post(
            "/alpha/v1/jobs", json={**BODY, "webhook_url": f"http://127.0.0.1:{port}/"}
        ).json()
        wait_until(lambda: 'outcome="retried"} 1.0' in service.get("/metrics").text)
    with Receiver(port=port) as receiver, served(tmp_path, **settings):
        wait_until(lambda: receiver.requests)
        assert receiver.requests[0][1]["webhook-id"] == job["id"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "http://",
        "http://me:secret@example.com/",
        "nonsense",
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest",
    ],
)
def test_check_url_refuses_private_and_invalid_urls(tmp_path: Path, url: str):
    with pytest.raises(InvalidRequest) as caught:
        webhooks.check_url(url, allow_private=False)
    assert caught.value.field == "webhook_url"


def test_check_url_accepts_public_urls():
    webhooks.check_url("https://example.com/hook", allow_private=False)
    webhooks.check_url("https://93.184.216.34:8443/hook", allow_private=False)
    webhooks.check_url("http://10.0.0.1/", allow_private=True)


@pytest.mark.parametrize("port", [22, 25, 143, 587, 1023])
def test_check_url_refuses_ports_of_other_protocols(port: int):
    with pytest.raises(InvalidRequest, match=f"port {port} is refused") as caught:
        webhooks.check_url(f"https://example.com:{port}/hook", allow_private=False)
    assert caught.value.field == "webhook_url"
    webhooks.check_url(f"https://example.com:{port}/hook", allow_private=True)


def test_check_url_accepts_web_ports():
    for port in (80, 443, 1024, 8443, 65535):
        webhooks.check_url(f"https://example.com:{port}/hook", allow_private=False)


class FakeQueue:
    """A journal with one due webhook for each URL. It keeps the recorded attempts."""

    def __init__(self, *urls: str):
        spec = JobSpec(generation=GenerationRequest(prompt="an apple"))
        problem = Cancelled("cancelled.").to_dict()
        self.due = [
            Job(
                id=f"{number:024x}",
                created_at=1.0,
                finished_at=2.0,
                state=JobState.CANCELLED,
                spec=spec,
                error=problem,
                delivery=Delivery(webhook=Webhook(url=url, service_url="http://localhost")),
            )
            for number, url in enumerate(urls)
        ]
        self.attempts: dict[str, float | None] = {}
        """When each URL is due again, None if never."""

    async def claim_due_webhooks(self, limit: int) -> list[tuple[Job, int]]:
        due, self.due = self.due[:limit], self.due[limit:]
        return [(job, 0) for job in due]

    async def record_webhook_attempt(self, job_id: str, due: float | None, tries: int) -> None:
        self.attempts[job_id] = due


class FakeResolver:
    """A resolver with these addresses of hosts. A host without addresses hangs."""

    def __init__(self, **hosts: list[str]):
        self.hosts = hosts
        self.released = threading.Event()
        self.threads: set[str] = set()

    def __call__(self, host: str, port: int, family: int, kind: int) -> list[Any]:
        self.threads.add(threading.current_thread().name)
        name = host.partition(".")[0]
        if not self.hosts.get(name):
            self.released.wait(10)
            raise socket.gaierror("no response")
        return [(family, kind, 6, "", (address, port)) for address in self.hosts[name]]


async def send_all(
    queue: FakeQueue,
    resolver: FakeResolver,
    count: int,
    *,
    posts: list[tuple[str, str]] | None = None,
) -> list[str]:
    """Send the webhooks of a queue until `count` attempts are over.

    Args:
        queue: The journal.
        resolver: The resolver.
        count: Number of attempts.
        posts: List that gets host and address of each message, instead of a network.

    Returns:
        The reasons in the log.
    """
    allow_private = posts is None
    sender = webhooks.Webhooks(
        queue, Metrics(), b"key", allow_private=allow_private, lookup=resolver
    )
    if posts is not None:

        async def post(_http: Any, _id: str, url: httpx.URL, address: str, _body: str) -> int:
            posts.append((url.host, address))
            return 204

        sender._post = post
    with capture_logs() as lines:
        task = asyncio.create_task(sender.run())
        try:
            deadline = time.monotonic() + 5
            while len(queue.attempts) < count:
                assert time.monotonic() < deadline, "waited too long"
                await asyncio.sleep(0.01)
        finally:
            resolver.released.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    return [line.get("reason", "") for line in lines if line["event"].startswith("webhook.")]


@pytest.mark.parametrize("addresses", [
    ["127.0.0.1"],  # what a resolver returns for 2130706433, 0x7f.1 and 017700000001
    ["192.0.0.8"], ["192.88.99.1"], ["3fff::1"], ["fe80::1%2"], ["64:ff9b:1::7f00:1"],
    ["2606:2800:220:1:0:5efe:a00:1"],
    ["93.184.216.34", "10.0.0.1"], ["2606:2800:220:1::1", "::1"],
])  # fmt: skip
async def test_host_with_a_private_address_gets_no_webhook(addresses: list[str]):
    queue, posts = FakeQueue("http://hook.example/?token=hidden"), []
    resolver = FakeResolver(hook=addresses)
    reasons = await send_all(queue, resolver, 1, posts=posts)
    assert posts == []
    assert list(queue.attempts.values()) == [None]
    assert "not an address of the internet" in reasons[0]
    assert "hidden" not in reasons[0]


async def test_webhook_goes_to_the_checked_address():
    # the resolver would return a private address the second time
    queue, posts = FakeQueue("https://hook.example:8443/"), []

    class Rebinding(FakeResolver):
        def __call__(self, *arguments: Any) -> list[Any]:
            records = super().__call__(*arguments)
            self.hosts["hook"] = ["127.0.0.1"]
            return records

    await send_all(queue, Rebinding(hook=["93.184.216.34", "1.0.0.1"]), 1, posts=posts)
    assert posts == [("hook.example", "93.184.216.34")]


async def test_hanging_lookups_delay_nothing_else():
    """More lookups hang than the event loop has threads."""
    hanging = [f"http://slow{number}.example/" for number in range(webhooks.LOOKUP_THREADS - 1)]
    queue, posts = FakeQueue(*hanging, "http://hook.example/"), []
    resolver = FakeResolver(hook=["93.184.216.34"])
    sending = asyncio.create_task(send_all(queue, resolver, 1, posts=posts))
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 1) == "free"
    await sending
    assert posts == [("hook.example", "93.184.216.34")]
    assert all(name.startswith("lookup") for name in resolver.threads)


async def test_hanging_lookup_reaches_the_timeout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.05)
    queue = FakeQueue("http://slow.example/")
    assert await send_all(queue, FakeResolver(), 1) == ["no response in 0.05 s"]
    assert queue.attempts[f"{0:024x}"]


@pytest.mark.parametrize("owner", ["", "ann"])
async def test_attempts_of_one_client_are_limited(owner: str):
    """More webhooks of one client hang than there are attempts and threads."""
    count = webhooks.MAX_ATTEMPTS
    queue, posts = FakeQueue(*["http://slow.example/"] * count, "http://hook.example/"), []
    submission = Submission(owner=owner)
    queue.due[:-1] = [job.model_copy(update={"submission": submission}) for job in queue.due[:-1]]
    resolver = FakeResolver(hook=["93.184.216.34"])
    postponed = count - webhooks.MAX_ATTEMPTS_OF_ONE
    await send_all(queue, resolver, postponed + 1, posts=posts)
    assert posts == [("hook.example", "93.184.216.34")]
    assert sum(due is not None for due in queue.attempts.values()) == postponed


async def test_webhook_claimed_again_meanwhile_is_sent_once():
    """An attempt is still being stored when its webhook is due again."""
    queue, posts = FakeQueue("http://hook.example/"), []
    (job,) = queue.due
    store = queue.record_webhook_attempt

    async def store_slowly(*attempt: Any) -> None:
        queue.due = [job]
        while queue.due:
            await asyncio.sleep(0.01)
        await store(*attempt)

    queue.record_webhook_attempt = store_slowly
    await send_all(queue, FakeResolver(hook=["93.184.216.34"]), 1, posts=posts)
    assert len(posts) == 1


@pytest.mark.parametrize(
    ("head", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", ""),
        (b"HTTP/1.1 200 OK\r\n", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\n/secret-path?token=hidden\r\n\r\n", "RemoteProtocolError"),
    ],
    ids=["endless body", "endless headers", "reflected address"],
)
async def test_response_of_a_receiver_is_bounded(head: bytes, outcome: str):
    # one case returns the address of the webhook in a wrong header
    sent = 0

    async def respond(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with contextlib.suppress(OSError):
            writer.write(head)
            while True:
                writer.write(b"X-Filler: " + b"x" * 4000 + b"\r\n")
                await writer.drain()
                sent += 4000
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        queue = FakeQueue(f"http://hook.example:{port}/secret-path?token=hidden")
        reasons = await send_all(queue, FakeResolver(hook=["127.0.0.1"]), 1)
    assert reasons == [outcome]
    assert sent < 20_000_000


@pytest.mark.parametrize("secret", ["whsec_not base64!", "whsec_", "whsec_abc"])
def test_invalid_webhook_secret_fails_the_check(tmp_path: Path, secret: str):
    settings = Settings(data_dir=tmp_path, outputs_dir=tmp_path / "outputs", webhook_secret=secret)
    with pytest.raises(SetupFailed, match="webhook_secret") as caught:
        asyncio.run(check(settings))
    assert "openssl rand" in caught.value.hint


def test_hanging_receivers_delay_no_other_webhook(service):
    """Send webhooks to a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hanging, Receiver() as receiver:
        for _ in range(20):
            url = f"http://127.0.0.1:{hanging.getsockname()[1]}/"
            service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": url})
        service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": receiver.url})
        wait_until(lambda: receiver.requests, 5)


def test_slow_receiver_reaches_the_timeout(service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as receiver:

        def answer_slowly() -> None:
            connection, _ = receiver.accept()
            with contextlib.suppress(OSError), connection:
                while True:
                    connection.send(b"H")
                    time.sleep(0.1)

        threading.Thread(target=answer_slowly, daemon=True).start()
        url = f"http://127.0.0.1:{receiver.getsockname()[1]}/"
        service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": url})
        wait_until(lambda: 'outcome="retried"} 1.0' in service.get("/metrics").text, 5)


def test_unsendable_webhook_url_is_given_up(service):
    url = f"http://{'a' * 70}.example/"
    service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": url})
    wait_until(lambda: 'outcome="given_up"} 1.0' in service.get("/metrics").text)


def test_webhook_to_this_machine_is_not_sent(tmp_path: Path):
    with Receiver() as receiver, served(tmp_path, webhook_secret=SECRET) as service:
        assert (
            service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": receiver.url}).status_code
            == 422
        )
        url = f"http://localhost:{receiver.server_port}/"
        assert service.post("/alpha/v1/jobs", json={**BODY, "webhook_url": url}).status_code == 202
        wait_until(lambda: 'outcome="given_up"} 1.0' in service.get("/metrics").text)
        assert receiver.requests == []


def test_webhook_without_a_secret_is_refused(tmp_path: Path):
    with served(tmp_path) as service:
        answer = service.post(
            "/alpha/v1/jobs", json={**BODY, "webhook_url": "https://example.com/"}
        )
        assert answer.status_code == 422
        assert answer.json()["field"] == "webhook_url"
        assert "webhook_secret" in answer.json()["hint"]
