"""What storage promises: in a folder, and in a bucket of a real S3 server."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fastmcp import Client as Assistant
from fastmcp.client.transports import StreamableHttpTransport
from structlog.testing import capture_logs
from tests.support.serving import served

from alphalayer.auth.api_keys import add_key
from alphalayer.client import Client
from alphalayer.config import Settings
from alphalayer.core.errors import FileMissing, SetupFailed, StorageFailed
from alphalayer.service.app import check
from alphalayer.storage import Storage, localfiles, read
from alphalayer.storage.objects import open_storage

FOR_EVER = "public, max-age=31536000, immutable"


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


async def test_a_file_is_written_found_listed_and_removed(storage: Storage):
    storage.put("alpha_1.png", b"one")
    found = await storage.open("alpha_1.png")
    assert (found.size_bytes, b"".join([chunk async for chunk in found.chunks])) == (3, b"one")
    storage.put("preview_1.webp", b"preview", replace=True)
    assert sorted((key, size) for key, size, _ in storage.list()) == [
        ("alpha_1.png", 3),
        ("preview_1.webp", 7),
    ]
    assert [key for key, _, _ in storage.list("preview_")] == ["preview_1.webp"]
    for _ in range(2):
        storage.delete("alpha_1.png")
    with pytest.raises(FileMissing, match=r"alpha_1\.png"):
        await storage.open("alpha_1.png")


async def test_a_picture_stays_what_it_was_and_a_preview_is_replaced(storage: Storage):
    for data in (b"first", b"second"):
        storage.put("alpha_1.png", data)
        storage.put("preview_1.webp", data, replace=True)
    assert await read(storage, "alpha_1.png") == b"first"
    assert await read(storage, "preview_1.webp") == b"second"


async def test_of_many_who_write_one_picture_one_does(storage: Storage):
    with ThreadPoolExecutor(8) as pool:
        written = list(
            pool.map(lambda i: storage.put("alpha_1.png", bytes([i]) * 50_000), range(8))
        )
    assert written == [None] * 8
    data = await read(storage, "alpha_1.png")
    assert len(data) == 50_000
    assert len(set(data)) == 1


async def test_a_picture_has_its_name_once_it_is_safe_from_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fsync, link, done = os.fsync, os.link, []

    def synced(file: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    def linked(*names: str) -> None:
        done.append("name")
        link(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    storage = open_storage(str(tmp_path))
    storage.put("alpha_1.png", b"first")
    storage.put("preview_1.webp", b"preview", replace=True)
    assert done == ["file", "name", *(["folder"] if os.name != "nt" else [])]
    assert {each.name for each in tmp_path.iterdir()} == {"alpha_1.png", "preview_1.webp"}


async def test_the_name_of_a_picture_is_safe_for_whoever_wrote_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A first process may have been killed between the name and its sync."""
    storage = open_storage(str(tmp_path))
    storage.put("alpha_1.png", b"first")
    synced: list[Path] = []
    monkeypatch.setattr(localfiles, "_sync", synced.append)
    storage.put("alpha_1.png", b"second")
    assert synced == [tmp_path]
    assert await read(storage, "alpha_1.png") == b"first"


def test_what_a_killed_process_left_unfinished_goes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        path_unlink(path, missing_ok)

    path_unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", unlink)
    made = [
        "alpha_1_aaaaaaaaaa00.png",
        "alpha_1_bbbbbbbbbb00.png",
        f"preview_{'c' * 24}.webp",
        "alpha_1_dddddddddd00.png",
    ]
    old, stuck, preview, new = [tmp_path / f"{name}#{i}" for i, name in enumerate(made)]
    foreign = [
        tmp_path / "my notes#1",
        tmp_path / "alpha_1.png#77",
        tmp_path / "alpha_1_eeeeeeeeee00.png#x",
    ]
    for path in (old, stuck, preview, new, *foreign):
        path.write_bytes(b"half a pict")
    folders = [tmp_path / "set#2", tmp_path / "alpha_1_ffffffffff00.png#5"]
    for folder in folders:
        folder.mkdir()
    for path in set(tmp_path.iterdir()) - {new}:
        os.utime(path, (1e9, 1e9))
    storage = open_storage(str(tmp_path))
    assert old.exists(), "to open it does not walk through all pictures"
    with capture_logs() as logs:
        storage.delete_unfinished()
    assert set(tmp_path.iterdir()) == {stuck, new, *foreign, *folders}, (
        "somebody may be writing the new one"
    )
    assert [(line["event"], line["file"]) for line in logs] == [
        ("storage.temporary_file_kept", str(stuck))
    ]


async def test_a_picture_stays_what_it_was_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_names: str) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = open_storage(str(tmp_path))
    for data in (b"first", b"second"):
        storage.put("alpha_1.png", data)
    assert await read(storage, "alpha_1.png") == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["alpha_1.png"]


async def test_a_name_that_is_no_key_leads_nowhere(storage: Storage):
    for key in ("../out.png", ".hidden", "a/b.png", ""):
        with pytest.raises(FileMissing):
            storage.put(key, b"x")


def test_a_signed_url_tells_what_it_is_and_how_long_it_stays(bucket: str):
    storage = open_storage(bucket)
    storage.put("alpha_2.avif", b"picture")
    storage.put("preview_2.webp", b"preview", replace=True)
    for key, kind, lasts in (
        ("alpha_2.avif", "image/avif", FOR_EVER),
        ("preview_2.webp", "image/webp", "no-store"),
    ):
        url = storage.presign(key, 60)
        assert url
        answer = httpx.get(url, trust_env=False)
        assert answer.status_code == 200
        assert (answer.headers["content-type"], answer.headers["cache-control"]) == (kind, lasts)


def test_a_folder_signs_nothing(tmp_path: Path):
    assert open_storage(str(tmp_path)).presign("alpha_1.png", 60) is None


def test_a_place_that_is_gone_is_said(tmp_path: Path):
    storage = open_storage(str(tmp_path / "pictures"))
    with contextlib.suppress(OSError):
        (tmp_path / "pictures").rmdir()
    (tmp_path / "pictures").write_text("a file now")
    with pytest.raises(StorageFailed, match=r"cannot write alpha_1\.png"):
        storage.put("alpha_1.png", b"x")


async def test_a_bucket_that_cannot_be_used_is_said_at_the_start(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = Settings(storage=bucket, data_dir=tmp_path)

    async def refused() -> str:
        with pytest.raises(SetupFailed) as told:
            await check(settings)
        assert "<" not in str(told.value)
        return str(told.value)

    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_ACCESS_KEY_ID", "wrong")
        assert "(InvalidAccessKeyId)" in await refused()
    with monkeypatch.context() as wrong:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            wrong.delenv(name)
        wrong.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
        assert "Set AWS_ACCESS_KEY_ID" in await refused()
    with monkeypatch.context() as wrong, no_such_bucket() as address:
        wrong.setenv("AWS_ENDPOINT_URL", address)
        assert f'there is no bucket "pictures" at {address}.' in await refused()
        with pytest.raises(StorageFailed, match=r"does not exist \(NoSuchBucket\)\.") as told:
            open_storage(bucket).put("alpha_1.png", b"x")
        assert "<" not in str(told.value)
    await check(settings)
    assert open_storage(bucket).list() == []


@contextlib.contextmanager
def no_such_bucket() -> Iterator[str]:
    """A server that says of every bucket what Amazon's says of one that is not there."""

    class Answer(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchBucket</Code>'
            body += b"<Message>The specified bucket does not exist</Message><BucketName>pictures</BucketName></Error>"
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


def test_pictures_are_redirected_to_the_bucket(bucket: str, tmp_path: Path):
    with served(tmp_path, storage=bucket, redirect_files=True) as client:
        made = client.post(
            "/alpha/v1/txt2img", json={"prompt": "x", "width": 64, "height": 64, "steps": 2}
        ).json()
        answer = client.get(made["url"])
        assert answer.status_code == 307
        # a URL that is signed for GET opens for nothing else
        assert (client.head(made["url"]).status_code, client.head(made["url"]).is_redirect) == (
            200,
            False,
        )
        picture = httpx.get(answer.headers["location"], trust_env=False)
        assert picture.content.startswith(b"\x89PNG")
        assert (picture.headers["content-type"], picture.headers["cache-control"]) == (
            "image/png",
            FOR_EVER,
        )
        # not the page, whose policy lets it show nothing from elsewhere
        shown = client.get(made["url"], headers={"Sec-Fetch-Site": "same-origin"})
        assert shown.content == picture.content
        assert shown.headers["vary"] == answer.headers["vary"] == "Sec-Fetch-Site"


async def test_our_clients_follow_to_the_bucket_without_their_key(bucket: str, tmp_path: Path):
    key, small = add_key(tmp_path / "keys.json", "me"), {"width": 64, "height": 64, "steps": 2}
    asked: list[httpx.Request] = []
    http = httpx.Client(event_hooks={"request": [asked.append]}, trust_env=False)
    with served(
        tmp_path, storage=bucket, redirect_files=True, keys_file=tmp_path / "keys.json"
    ) as service:
        with Client(
            str(service.base_url), api_key=key, headers={"X-Tenant": "shop"}, http=http
        ) as client:
            (picture,) = client.generate("an apple", **small)
        assert picture.startswith(b"\x89PNG")
        to_bucket = [each for each in asked if each.url.port != service.base_url.port]
        assert len(to_bucket) == 1
        assert not {"authorization", "x-tenant"} & set(to_bucket[0].headers)
        assert all(each.headers["x-tenant"] == "shop" for each in asked if "/jobs" in each.url.path)
        own = StreamableHttpTransport(f"{service.base_url}/mcp/", headers={"X-API-Key": key})
        async with Assistant(own) as assistant:
            answer = await assistant.call_tool(
                "draw_transparent_picture", {"prompt": "an apple", **small}
            )
        assert answer.content[0].mime_type == "image/png"
