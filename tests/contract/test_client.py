"""Our own Python client, sync and async, against real services."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
from tests.support import fake_service
from tests.support.serving import answers, free_port, put_model, serve_handler, served, wait_until

from alphalayer.auth.api_keys import add_key
from alphalayer.client import AsyncClient, Client, JobStatus, ServiceUnreachable
from alphalayer.core.errors import Cancelled, FileMissing, InvalidRequest, JobMissing, Unauthorized
from alphalayer.images import codecs

SMALL = {"width": 64, "height": 64, "steps": 5}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("service"), engine_options={"step_s": 0.02}) as service:
        yield str(service.base_url)


def test_client_generate_returns_files_and_reports_progress(address: str):
    changes: list[JobStatus] = []
    with Client(address) as client:
        images = client.generate(
            "an apple", seed=7, batch_size=2, on_change=changes.append, **SMALL
        )
    assert len(images) == 2
    rgba, parameters = codecs.decode(images[1])
    assert rgba.shape == (64, 64, 4)
    assert "Seed: 8" in (parameters or "")
    # steps in quick succession may be reported as one
    steps = [status.step for status in changes if status.state == "running"]
    assert steps == sorted(steps)
    assert len(set(steps)) > 1
    assert changes[-1].state == "done"
    assert [status.seed for status in changes[-1].images] == [7, 8]


async def test_async_client_generates_cancels_and_lists_jobs(address: str):
    changes: list[JobStatus] = []
    async with AsyncClient(address) as client:
        (image,) = await client.generate("an apple", seed=7, on_change=changes.append, **SMALL)
        assert codecs.decode(image)[0].shape == (64, 64, 4)
        assert changes[-1].is_finished
        job = await client.submit("slow", steps=150, width=64, height=64)
        assert (await client.get(job.id)).state in ("queued", "running")
        assert job.id in {status.id for status in await client.list(limit=5)}
        await client.cancel(job.id)
        last = [status async for status in client.events(job.id)][-1]
        assert last.state == "cancelled"
        with pytest.raises(JobMissing):
            [status async for status in client.events("0" * 24)]


def test_client_changes_an_image_as_a_file_or_by_its_name(address: str, tmp_path: Path):
    with Client(address) as client:
        changes: list[JobStatus] = []
        (image,) = client.generate("an apple", on_change=changes.append, **SMALL)
        (changed,) = client.img2img("a ripe apple", image, exact_steps=True, **SMALL)
        name = changes[-1].images[0].filename
        assert client.img2img("a ripe apple", name, exact_steps=True, **SMALL) == [changed]
        (tmp_path / "apple.png").write_bytes(image)
        path = tmp_path / "apple.png"
        assert client.img2img("a ripe apple", path, exact_steps=True, **SMALL) == [changed]
        with pytest.raises(InvalidRequest, match="mask: not an image"):
            client.img2img("a ripe apple", image, b"no image")


async def test_async_client_changes_an_image_and_generates_layers(tmp_path: Path):
    with served(put_model(tmp_path)) as service:
        async with AsyncClient(str(service.base_url)) as client:
            changes: list[JobStatus] = []
            layers = await client.layers("an apple", on_change=changes.append, **SMALL)
            assert list(layers) == ["background", "foreground", "blended", "composite"]
            assert [image.role for image in changes[-1].images] == list(layers)
            document = await client.download(changes[-1].documents[0]["psd"])
            assert document.startswith(b"8BPS")
            foreground = layers["foreground"]
            (changed,) = await client.img2img("a pear", foreground, **SMALL)
            assert codecs.decode(changed)[0].shape == (64, 64, 4)
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServiceUnreachable):
        client.layers("an apple", foreground=foreground)


def test_client_same_idempotency_key_returns_the_same_job(address: str):
    with Client(address) as client:
        first = client.submit("an apple", idempotency_key="mine", **SMALL)
        assert client.submit("an apple", idempotency_key="mine", **SMALL).id == first.id
        assert client.submit("an apple", **SMALL).id != first.id


def test_client_raises_the_errors_of_the_service(address: str):
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


def test_client_list_ignores_none_in_its_query(address: str):
    with Client(address) as client:
        assert [status.id for status in client.list(state=None, limit=1)] == [
            status.id for status in client.list(limit=1)
        ]


def test_client_invalid_address_is_an_immediate_error():
    start = time.monotonic()
    with Client("localhost:7861") as client:
        for call in (client.get, client.download, lambda job: list(client.events(job))):
            with pytest.raises(ServiceUnreachable, match="does not answer"):
                call("0" * 24)
    assert time.monotonic() - start < 2


def test_client_download_unreachable_address_is_named(address: str):
    elsewhere = f"http://127.0.0.1:{free_port()}/cup.png"
    with (
        Client(address, retry_timeout_s=0) as client,
        pytest.raises(ServiceUnreachable, match=elsewhere),
    ):
        client.download(elsewhere)
    with Client(address) as client, pytest.raises(FileMissing):
        client.download(f"{address}/alpha/v1/file/absent.png")


@pytest.mark.parametrize(
    "address",
    [f"http://127.0.0.1:{free_port()}", "localhost:7861"],
    ids=["no service", "no scheme"],
)
def test_client_unreachable_service_is_an_immediate_error(address: str):
    start = time.monotonic()
    with Client(address) as client:
        for call in (lambda: client.generate("an apple"), client.list):
            with pytest.raises(ServiceUnreachable, match="does not answer"):
                call()
    assert time.monotonic() - start < 2


async def test_client_retries_until_its_timeout():
    address, start = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with Client(address, retry_timeout_s=0.4) as client, pytest.raises(ServiceUnreachable):
        list(client.events("0" * 24))
    async with AsyncClient(address, retry_timeout_s=0.4) as client:
        with pytest.raises(ServiceUnreachable):
            await client.get("0" * 24)
    assert 0.4 <= time.monotonic() - start < 3


def test_client_another_server_is_reported_with_its_status():
    with (
        serve_handler(BaseHTTPRequestHandler) as address,
        Client(address) as client,
        pytest.raises(ServiceUnreachable, match="501"),
    ):
        client.generate("an apple")


@contextmanager
def serve_answer(status: int, body: str) -> Iterator[str]:
    """Run a server that always gives the same answer; yield its address."""

    class FixedAnswer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

    for method in ("POST", "DELETE"):
        setattr(FixedAnswer, f"do_{method}", FixedAnswer.do_GET)
    with serve_handler(FixedAnswer) as address:
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
async def test_client_invalid_answers_are_reported_with_their_status(status: int, body: str):
    with serve_answer(status, body) as address:
        with Client(address) as client:
            for call in (
                client.submit,
                client.get,
                client.cancel,
                client.withdraw,
                lambda job: list(client.events(job)),
            ):
                with pytest.raises(ServiceUnreachable, match=str(status)):
                    call("0" * 24)
            with pytest.raises(ServiceUnreachable, match=str(status)):
                client.list()
        async with AsyncClient(address) as client:
            with pytest.raises(ServiceUnreachable, match=str(status)):
                await client.get("0" * 24)
            with pytest.raises(ServiceUnreachable, match=str(status)):
                [status async for status in client.events("0" * 24)]


@pytest.mark.parametrize("status", [403, 404])
def test_client_download_missing_in_the_bucket_is_not_retried(status: int):
    refusal = "<Error><Code>AccessDenied</Code></Error>"
    with (
        serve_answer(status, refusal) as address,
        Client(address) as client,
        pytest.raises(FileMissing, match=rf"no image is at {address}/images/cup.png\."),
    ):
        client.download(f"{address}/images/cup.png?X-Amz-Signature=secret")


async def test_client_retries_after_errors_of_a_proxy(address: str):
    statuses: list[int] = []

    class Proxy(BaseHTTPRequestHandler):
        """A proxy that fails three times, then forwards."""

        def do_GET(self) -> None:
            statuses.append(502 + len(statuses) if len(statuses) < 3 else 200)
            content = (
                httpx.get(f"{address}{self.path}").content
                if statuses[-1] == 200
                else b"<h1>Bad Gateway</h1>"
            )
            self.send_response(statuses[-1])
            self.end_headers()
            self.wfile.write(content)

    with Client(address) as client:
        job = client.submit("an apple", **SMALL)
    with serve_handler(Proxy) as proxy:
        async with AsyncClient(proxy, retry_timeout_s=0) as client:
            with pytest.raises(ServiceUnreachable, match="answered 502: <h1>Bad Gateway</h1>"):
                await client.get(job.id)
        with Client(proxy) as client:
            assert [status.state for status in client.events(job.id)][-1] == "done"
    assert statuses == [502, 503, 504, 200]


def test_client_sends_its_key_with_calls_but_not_with_files(tmp_path: Path):
    (tmp_path / "data").mkdir()
    key = add_key(tmp_path / "data" / "keys.json", "me")
    with served(tmp_path, keys_file=tmp_path / "data" / "keys.json") as service:
        with Client(str(service.base_url)) as client, pytest.raises(Unauthorized, match="key"):
            client.submit("an apple")
        requests: list[httpx.Request] = []
        http = httpx.Client(event_hooks={"request": [requests.append]})
        with Client(str(service.base_url), api_key=key, http=http) as client:
            assert len(client.generate("an apple", **SMALL)) == 1
        assert {
            "authorization" in request.headers
            for request in requests
            if "/file/" in str(request.url)
        } == {False}


def test_client_waits_for_an_image_across_a_service_restart(tmp_path: Path):
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
        for process in running:
            process.kill()
            process.wait()
