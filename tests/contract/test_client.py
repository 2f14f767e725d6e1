"""Our own Python client, sync and async, against real services."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from tests.support import fake_service
from tests.support.serving import answers, free_port, served, wait_until

from alphalayer.auth.api_keys import add_key
from alphalayer.client import AsyncClient, Client, JobStatus, ServiceUnreachable
from alphalayer.core.errors import Cancelled, FileMissing, InvalidRequest, JobMissing, Unauthorized
from alphalayer.images import codecs

SMALL = {"width": 64, "height": 64, "steps": 5}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("service"), engine_options={"step_s": 0.02}) as service:
        yield str(service.base_url)


def test_generate_brings_the_files_and_tells_how_far_it_is(address: str):
    changes: list[JobStatus] = []
    with Client(address) as client:
        pictures = client.generate(
            "an apple", seed=7, batch_size=2, on_change=changes.append, **SMALL
        )
    assert len(pictures) == 2
    rgba, parameters = codecs.decode(pictures[1])
    assert rgba.shape == (64, 64, 4)
    assert "Seed: 8" in (parameters or "")
    # steps that follow each other closely may be told as one
    steps = [each.step for each in changes if each.state == "running"]
    assert steps == sorted(steps)
    assert len(set(steps)) > 1
    assert changes[-1].state == "done"
    assert [each.seed for each in changes[-1].images] == [7, 8]


async def test_the_async_client_does_the_same(address: str):
    changes: list[JobStatus] = []
    async with AsyncClient(address) as client:
        (picture,) = await client.generate("an apple", seed=7, on_change=changes.append, **SMALL)
        assert codecs.decode(picture)[0].shape == (64, 64, 4)
        assert changes[-1].is_finished
        job = await client.submit("slow", steps=150, width=64, height=64)
        assert (await client.get(job.id)).state in ("queued", "running")
        assert job.id in {each.id for each in await client.list(limit=5)}
        await client.cancel(job.id)
        last = [each async for each in client.events(job.id)][-1]
        assert last.state == "cancelled"
        with pytest.raises(JobMissing):
            [each async for each in client.events("0" * 24)]


def test_the_same_key_is_the_same_job(address: str):
    with Client(address) as client:
        first = client.submit("an apple", idempotency_key="mine", **SMALL)
        assert client.submit("an apple", idempotency_key="mine", **SMALL).id == first.id
        assert client.submit("an apple", **SMALL).id != first.id


def test_errors_are_those_of_the_service(address: str):
    with Client(address) as client:
        with pytest.raises(InvalidRequest) as wrong:
            client.submit("an apple", steps=0)
        assert wrong.value.field == "steps"
        with pytest.raises(JobMissing):
            client.get("0" * 24)
        job = client.submit("slow", steps=150, width=64, height=64)
        client.cancel(job.id)
        with pytest.raises(Cancelled):
            list(client.events(job.id))[-1].check()


def test_a_query_may_hold_none(address: str):
    with Client(address) as client:
        assert [each.id for each in client.list(state=None, limit=1)] == [
            each.id for each in client.list(limit=1)
        ]


def test_an_address_that_cannot_be_asked_is_told_at_once():
    start = time.monotonic()
    with Client("localhost:7861") as client:
        for ask in (client.get, client.download, lambda job: list(client.events(job))):
            with pytest.raises(ServiceUnreachable, match="does not answer"):
                ask("0" * 24)
    assert time.monotonic() - start < 2


def test_a_picture_that_nobody_hands_out_is_missed_at_its_own_address(address: str):
    elsewhere = f"http://127.0.0.1:{free_port()}/cup.png"
    with (
        Client(address, retry_timeout_s=0) as client,
        pytest.raises(ServiceUnreachable, match=elsewhere),
    ):
        client.download(elsewhere)
    with Client(address) as client, pytest.raises(FileMissing):
        client.download(f"{address}/alpha/v1/file/absent.png")


@pytest.mark.parametrize(
    "address", [f"http://127.0.0.1:{free_port()}", "localhost:7861"], ids=["nobody", "no scheme"]
)
def test_nobody_there_is_told_at_once(address: str):
    start = time.monotonic()
    with Client(address) as client:
        for ask in (lambda: client.generate("an apple"), client.list):
            with pytest.raises(ServiceUnreachable, match="does not answer"):
                ask()
    assert time.monotonic() - start < 2


async def test_a_job_is_waited_for_as_long_as_was_said():
    address, start = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with Client(address, retry_timeout_s=0.4) as client, pytest.raises(ServiceUnreachable):
        list(client.events("0" * 24))
    async with AsyncClient(address, retry_timeout_s=0.4) as client:
        with pytest.raises(ServiceUnreachable):
            await client.get("0" * 24)
    assert 0.4 <= time.monotonic() - start < 3


@contextmanager
def other(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of another server."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_something_else_there():
    with (
        other(BaseHTTPRequestHandler) as address,
        Client(address) as client,
        pytest.raises(ServiceUnreachable, match="501"),
    ):
        client.generate("an apple")


@contextmanager
def saying(status: int, body: str) -> Iterator[str]:
    """The address of a server that always answers this."""

    class Sayer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

    for method in ("POST", "DELETE"):
        setattr(Sayer, f"do_{method}", Sayer.do_GET)
    with other(Sayer) as address:
        yield address


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "<h1>Welcome</h1>"),
        (200, '{"jobs": [{}], "id": 1}'),
        (200, "[]"),
        (400, '"no"'),
        (400, "[]"),
    ],
)
async def test_answers_of_something_else_are_told_as_such(status: int, body: str):
    with saying(status, body) as address:
        with Client(address) as client:
            for ask in (
                client.submit,
                client.get,
                client.cancel,
                client.withdraw,
                lambda job: list(client.events(job)),
            ):
                with pytest.raises(ServiceUnreachable, match=str(status)):
                    ask("0" * 24)
            with pytest.raises(ServiceUnreachable, match=str(status)):
                client.list()
        async with AsyncClient(address) as client:
            with pytest.raises(ServiceUnreachable, match=str(status)):
                await client.get("0" * 24)
            with pytest.raises(ServiceUnreachable, match=str(status)):
                [each async for each in client.events("0" * 24)]


@pytest.mark.parametrize("status", [403, 404])
def test_a_bucket_without_the_picture_is_no_service_that_is_away(status: int):
    refusal = "<Error><Code>AccessDenied</Code></Error>"
    with (
        saying(status, refusal) as address,
        Client(address) as client,
        pytest.raises(FileMissing, match=rf"no image is at {address}/pictures/cup.png\."),
    ):
        client.download(f"{address}/pictures/cup.png?X-Amz-Signature=secret")


async def test_a_proxy_that_finds_nobody_is_asked_again(address: str):
    found: list[int] = []

    class Proxy(BaseHTTPRequestHandler):
        """Finds nobody three times, then hands on."""

        def do_GET(self) -> None:
            found.append(502 + len(found) if len(found) < 3 else 200)
            content = (
                httpx.get(f"{address}{self.path}").content
                if found[-1] == 200
                else b"<h1>Bad Gateway</h1>"
            )
            self.send_response(found[-1])
            self.end_headers()
            self.wfile.write(content)

    with Client(address) as client:
        job = client.submit("an apple", **SMALL)
    with other(Proxy) as proxy:
        async with AsyncClient(proxy, retry_timeout_s=0) as client:
            with pytest.raises(ServiceUnreachable, match="answered 502: <h1>Bad Gateway</h1>"):
                await client.get(job.id)
        with Client(proxy) as client:
            assert [each.state for each in client.events(job.id)][-1] == "done"
    assert found == [502, 503, 504, 200]


def test_a_key_is_sent_with_the_calls_and_not_with_files(tmp_path: Path):
    (tmp_path / "data").mkdir()
    key = add_key(tmp_path / "data" / "keys.json", "me")
    with served(tmp_path, keys_file=tmp_path / "data" / "keys.json") as service:
        with Client(str(service.base_url)) as client, pytest.raises(Unauthorized, match="key"):
            client.submit("an apple")
        asked: list[httpx.Request] = []
        http = httpx.Client(event_hooks={"request": [asked.append]})
        with Client(str(service.base_url), api_key=key, http=http) as client:
            assert len(client.generate("an apple", **SMALL)) == 1
        assert {"authorization" in each.headers for each in asked if "/file/" in str(each.url)} == {
            False
        }


def test_a_picture_is_waited_for_across_a_restart_of_the_service(tmp_path: Path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    running = [fake_service.start(tmp_path, port, 0.1)]

    def restart() -> None:
        running[0].kill()
        running[0].wait()
        time.sleep(0.5)
        running.append(fake_service.start(tmp_path, port, 0.1))

    try:
        wait_until(lambda: answers(address), 30)
        with Client(address) as client:
            job = client.submit("an apple", width=64, height=64, steps=20)
            seen = threading.Event()
            killer = threading.Thread(target=lambda: (seen.wait(30), restart()))
            killer.start()
            states = []
            for status in client.events(job.id):
                states.append(status)
                if status.step >= 3:
                    seen.set()
            killer.join()
            assert states[-1].state == "done"
            assert len(client.download(states[-1].images[0])) > 100
    finally:
        for each in running:
            each.kill()
            each.wait()
