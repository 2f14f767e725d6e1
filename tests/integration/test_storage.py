"""Storage in a folder, and in a bucket of a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fastmcp import Client as McpClient
from fastmcp.client.transports import StreamableHttpTransport
from structlog.testing import capture_logs
from tests.support.serving import served

from alphalayer.auth.api_keys import add_key
from alphalayer.client import Client
from alphalayer.config import Settings
from alphalayer.core.errors import FileMissing, SetupFailed, StorageFailed
from alphalayer.service.app import check
from alphalayer.storage import Storage, localfiles, objects, read
from alphalayer.storage.objects import open_storage

IMAGE, PREVIEW = "alpha_1_aaaaaaaaaa00.png", f"preview_{'a' * 24}.webp"
IMMUTABLE = "public, max-age=31536000, immutable"


@pytest.fixture
def bucket(s3: dict[str, str], s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return s3_prefix


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    place = (
        str(tmp_path / "pictures")
        if request.param == "folder"
        else request.getfixturevalue("bucket")
    )
    return open_storage(place)


async def test_storage_writes_reads_lists_and_deletes_a_file(storage: Storage):
    storage.put(IMAGE, b"one")
    file = await storage.open(IMAGE)
    assert (file.size_bytes, b"".join([chunk async for chunk in file.chunks])) == (3, b"one")
    storage.put(PREVIEW, b"preview", replace=True)
    assert sorted((key, size) for key, size, _ in storage.list()) == [
        (IMAGE, 3),
        (PREVIEW, 7),
    ]
    assert [key for key, _, _ in storage.list("preview_")] == [PREVIEW]
    for _ in range(2):
        storage.delete(IMAGE)
    with pytest.raises(FileMissing, match=IMAGE):
        await storage.open(IMAGE)


async def test_storage_keeps_images_and_replaces_previews(storage: Storage):
    for data in (b"first", b"second"):
        storage.put(IMAGE, data)
        storage.put(PREVIEW, data, replace=True)
    assert await read(storage, IMAGE) == b"first"
    assert await read(storage, PREVIEW) == b"second"


async def test_storage_concurrent_writes_store_one_image(storage: Storage):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: storage.put(IMAGE, bytes([i]) * 50_000), range(8)))
    assert results == [None] * 8
    data = await read(storage, IMAGE)
    assert len(data) == 50_000
    assert len(set(data)) == 1


async def test_storage_syncs_a_file_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fsync, link, calls = os.fsync, os.link, []

    def fsync_recorded(file: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    def link_recorded(*names: str) -> None:
        calls.append("name")
        link(*names)

    monkeypatch.setattr(os, "fsync", fsync_recorded)
    monkeypatch.setattr(os, "link", link_recorded)
    storage = open_storage(str(tmp_path))
    storage.put(IMAGE, b"first")
    storage.put(PREVIEW, b"preview", replace=True)
    assert calls == ["file", "name", *(["folder"] if os.name != "nt" else [])]
    assert {path.name for path in tmp_path.iterdir()} == {IMAGE, PREVIEW}


async def test_storage_syncs_the_name_of_an_existing_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sync again, because a kill may have prevented the first sync of the name."""
    storage = open_storage(str(tmp_path))
    storage.put(IMAGE, b"first")
    synced: list[Path] = []
    monkeypatch.setattr(localfiles, "_sync", synced.append)
    storage.put(IMAGE, b"second")
    assert synced == [tmp_path]
    assert await read(storage, IMAGE) == b"first"


def test_delete_unfinished_deletes_only_old_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        path_unlink(path, missing_ok)

    path_unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", unlink)
    names = [
        "alpha_1_aaaaaaaaaa00.png",
        "alpha_1_bbbbbbbbbb00.png",
        f"preview_{'c' * 24}.webp",
        "alpha_1_dddddddddd00.png",
    ]
    old, stuck, preview, new = [tmp_path / f"{name}#{i}" for i, name in enumerate(names)]
    foreign = [
        tmp_path / "my notes#1",
        tmp_path / "alpha_1.png#77",
        tmp_path / "alpha_1_eeeeeeeeee00.png#x",
    ]
    for path in (old, stuck, preview, new, *foreign):
        path.write_bytes(b"half an ima")
    folders = [tmp_path / "set#2", tmp_path / "alpha_1_ffffffffff00.png#5"]
    for folder in folders:
        folder.mkdir()
    for path in set(tmp_path.iterdir()) - {new}:
        os.utime(path, (1e9, 1e9))
    storage = open_storage(str(tmp_path))
    assert old.exists(), "opening does not list all images"
    with capture_logs() as logs:
        storage.delete_unfinished()
    assert set(tmp_path.iterdir()) == {stuck, new, *foreign, *folders}, (
        "another process may still write the new file"
    )
    assert [(line["event"], line["file"]) for line in logs] == [
        ("storage.temporary_file_kept", str(stuck))
    ]


async def test_storage_without_links_keeps_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_names: str) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = open_storage(str(tmp_path))
    for data in (b"first", b"second"):
        storage.put(IMAGE, data)
    assert await read(storage, IMAGE) == b"first"
    assert [path.name for path in tmp_path.iterdir()] == [IMAGE]


async def test_storage_invalid_key_raises_file_missing(storage: Storage):
    for key in (
        "../out.png", ".hidden", "a/b.png", "", "a.png", "alphalayer.toml", "keys.json",
        "jobs.sqlite", f"{IMAGE}/x", f"{IMAGE}\n", IMAGE.replace("png", "exe"),
        IMAGE.replace("1", "\N{ARABIC-INDIC DIGIT ONE}"), "input_1.png",
    ):  # fmt: skip
        with pytest.raises(FileMissing):
            storage.put(key, b"x")
        with pytest.raises(FileMissing):
            await storage.open(key)


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
async def test_folder_serves_no_links_pipes_or_folders(tmp_path: Path):
    folder = tmp_path / "images"
    storage = open_storage(str(folder))
    (tmp_path / "secret.txt").write_bytes(b"secret")
    link, lost, pipe, inner = (f"alpha_{i}_aaaaaaaaaa00.png" for i in range(2, 6))
    (folder / link).symlink_to(tmp_path / "secret.txt")
    (folder / lost).symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / pipe)
    (folder / inner).mkdir()
    for key in (link, lost, pipe, inner):
        with pytest.raises(FileMissing):
            await asyncio.wait_for(storage.open(key), 2)


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nab"])
async def test_bucket_that_resets_fails_soon(monkeypatch: pytest.MonkeyPatch, start: bytes):
    monkeypatch.setattr(objects, "RETRIES", {"max_retries": 1})
    with resetting_bucket(monkeypatch, start) as attempts:
        with pytest.raises(StorageFailed, match=f"cannot read {IMAGE}"):
            await read(open_storage("s3://images/x"), IMAGE)
        if not start:
            assert len(attempts) == 2


async def test_bucket_that_hangs_fails_soon(monkeypatch: pytest.MonkeyPatch):
    assert objects.OPEN_S <= 10
    monkeypatch.setattr(objects, "OPEN_S", 0.1)
    with (
        resetting_bucket(monkeypatch, None),
        pytest.raises(StorageFailed, match=r"no response for 0\.1 seconds"),
    ):
        await read(open_storage("s3://images/x"), IMAGE)


async def test_check_of_a_refusing_bucket_hides_its_address(monkeypatch: pytest.MonkeyPatch):
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    with resetting_bucket(monkeypatch, refusal):
        for is_writing in (False, True):
            with pytest.raises(StorageFailed) as caught, capture_logs() as logs:
                open_storage("s3://images/x").check(is_writing=is_writing)
            assert "127.0.0.1" not in str(caught.value)
            assert "127.0.0.1" in logs[0]["error"]


@contextlib.contextmanager
def resetting_bucket(monkeypatch: pytest.MonkeyPatch, start: bytes | None) -> Iterator[list[int]]:
    """Accept requests and reset them after the start of an answer. None: never answer."""
    attempts, hanging = [], []

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                attempts.append(len(connection.recv(65536)))
                if start is None:
                    hanging.append(connection)
                    continue
                connection.sendall(start)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}"),
            ("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "x"),
            ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        threading.Thread(target=answer, daemon=True).start()
        yield attempts
        server.shutdown(socket.SHUT_RDWR)
        for connection in hanging:
            connection.close()


def test_presigned_url_sends_type_and_cache_headers(bucket: str):
    storage = open_storage(bucket)
    storage.put("alpha_2_aaaaaaaaaa00.avif", b"image")
    storage.put(PREVIEW, b"preview", replace=True)
    for key, content_type, cache_control in (
        ("alpha_2_aaaaaaaaaa00.avif", "image/avif", IMMUTABLE),
        (PREVIEW, "image/webp", "no-store"),
    ):
        url = storage.presign(key, 60)
        assert url
        answer = httpx.get(url, trust_env=False)
        assert answer.status_code == 200
        assert (answer.headers["content-type"], answer.headers["cache-control"]) == (
            content_type,
            cache_control,
        )


def test_presign_of_a_folder_returns_none(tmp_path: Path):
    assert open_storage(str(tmp_path)).presign(IMAGE, 60) is None


def test_storage_without_its_folder_raises_storage_failed(tmp_path: Path):
    storage = open_storage(str(tmp_path / "pictures"))
    with contextlib.suppress(OSError):
        (tmp_path / "pictures").rmdir()
    (tmp_path / "pictures").write_text("a file now")
    with pytest.raises(StorageFailed, match=f"cannot write {IMAGE}") as caught:
        storage.put(IMAGE, b"x")
    assert str(tmp_path) not in str(caught.value)


async def test_check_reports_an_unusable_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = Settings(storage=bucket, data_dir=tmp_path)
    bucket_name = bucket.removeprefix("s3://").partition("/")[0]

    async def error_message() -> str:
        with pytest.raises(SetupFailed) as caught:
            await check(settings)
        assert "<" not in str(caught.value)
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "wrong")
        assert "(InvalidAccessKeyId)" in await error_message()
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
        assert "Set AWS_ACCESS_KEY_ID" in await error_message()
    with monkeypatch.context() as patch, serve_no_such_bucket() as address:
        patch.setenv("AWS_ENDPOINT_URL", address)
        assert f'there is no bucket "{bucket_name}" at {address}.' in await error_message()
        with pytest.raises(StorageFailed, match=r"does not exist \(NoSuchBucket\)\.") as caught:
            open_storage(bucket).put(IMAGE, b"x")
        assert "<" not in str(caught.value)
    await check(settings)
    assert open_storage(bucket).list() == []


@contextlib.contextmanager
def serve_no_such_bucket() -> Iterator[str]:
    """Serve the answer of Amazon S3 for a missing bucket."""

    class Answer(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchBucket</Code>'
            body += b"<Message>The specified bucket does not exist</Message>"
            body += b"<BucketName>images</BucketName></Error>"
            self.send_response(404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_image_requests_are_redirected_to_the_bucket(bucket: str, tmp_path: Path):
    with served(tmp_path, storage=bucket, redirect_files=True) as client:
        job = client.post(
            "/alpha/v1/txt2img", json={"prompt": "x", "width": 64, "height": 64, "steps": 2}
        ).json()
        answer = client.get(job["url"])
        assert answer.status_code == 307
        # a URL that is signed for GET allows no other method
        assert (client.head(job["url"]).status_code, client.head(job["url"]).is_redirect) == (
            200,
            False,
        )
        image = httpx.get(answer.headers["location"], trust_env=False)
        assert image.content.startswith(b"\x89PNG")
        assert (image.headers["content-type"], image.headers["cache-control"]) == (
            "image/png",
            IMMUTABLE,
        )
        # the page gets no redirect, because its policy blocks other origins
        response = client.get(job["url"], headers={"Sec-Fetch-Site": "same-origin"})
        assert response.content == image.content
        assert response.headers["vary"] == answer.headers["vary"] == "Sec-Fetch-Site"


async def test_clients_follow_to_the_bucket_without_their_key(bucket: str, tmp_path: Path):
    key, small = add_key(tmp_path / "keys.json", "me"), {"width": 64, "height": 64, "steps": 2}
    requests: list[httpx.Request] = []
    http = httpx.Client(event_hooks={"request": [requests.append]}, trust_env=False)
    with served(
        tmp_path, storage=bucket, redirect_files=True, keys_file=tmp_path / "keys.json"
    ) as service:
        with Client(
            str(service.base_url), api_key=key, headers={"X-Tenant": "shop"}, http=http
        ) as client:
            (image,) = client.generate("an apple", **small)
        assert image.startswith(b"\x89PNG")
        to_bucket = [request for request in requests if request.url.port != service.base_url.port]
        assert len(to_bucket) == 1
        assert not {"authorization", "x-tenant"} & set(to_bucket[0].headers)
        assert all(
            request.headers["x-tenant"] == "shop"
            for request in requests
            if "/jobs" in request.url.path
        )
        transport = StreamableHttpTransport(f"{service.base_url}/mcp/", headers={"X-API-Key": key})
        async with McpClient(transport) as assistant:
            answer = await assistant.call_tool(
                "draw_transparent_picture", {"prompt": "an apple", **small}
            )
        assert answer.content[0].mime_type == "image/png"
