"""What storage promises: in a folder, and in a bucket of a real S3 server."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastmcp import Client as Assistant
from fastmcp.client.transports import StreamableHttpTransport
from tests.serving import served

from alphalayer.client import Client
from alphalayer.errors import FileMissing, StorageFailed
from alphalayer.keys import add_key
from alphalayer.storage import Storage
from alphalayer.storage.objects import open_storage

FOR_EVER = "public, max-age=31536000, immutable"


@pytest.fixture
def bucket(s3: dict[str, str], s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return s3_prefix


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    place = str(tmp_path / "pictures") if request.param == "folder" else request.getfixturevalue("bucket")
    return open_storage(place)


async def read(storage: Storage, key: str) -> bytes:
    return b"".join([chunk async for chunk in (await storage.open(key)).chunks])


async def test_a_file_is_written_found_listed_and_removed(storage: Storage):
    storage.put("alpha_1.png", b"one")
    found = await storage.open("alpha_1.png")
    assert (found.size_bytes, b"".join([chunk async for chunk in found.chunks])) == (3, b"one")
    storage.put("preview_1.webp", b"preview", replace=True)
    assert sorted((key, size) for key, size, _ in storage.list()) == [("alpha_1.png", 3), ("preview_1.webp", 7)]
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
        written = list(pool.map(lambda i: storage.put("alpha_1.png", bytes([i]) * 50_000), range(8)))
    assert written == [None] * 8
    data = await read(storage, "alpha_1.png")
    assert len(data) == 50_000
    assert len(set(data)) == 1


async def test_a_picture_has_its_name_once_it_is_safe_from_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_what_a_killed_process_left_unfinished_goes_at_a_later_start(tmp_path: Path):
    old, new, foreign = tmp_path / "alpha_1.png#77", tmp_path / "alpha_2.png#78", tmp_path / "notes#old"
    for path in (old, new, foreign):
        path.write_bytes(b"half a pict")
    for path in (old, foreign):
        os.utime(path, (1e9, 1e9))
    assert open_storage(str(tmp_path)).list() == [("notes#old", 11, 1e9)]
    assert not old.exists()
    assert new.exists(), "somebody may be writing it"


async def test_a_picture_stays_what_it_was_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    for key, kind, lasts in (("alpha_2.avif", "image/avif", FOR_EVER), ("preview_2.webp", "image/webp", "no-store")):
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


def test_pictures_are_redirected_to_the_bucket(bucket: str, tmp_path: Path):
    with served(tmp_path, storage=bucket, redirect_files=True) as client:
        made = client.post("/alpha/v1/txt2img", json={"prompt": "x", "width": 64, "height": 64, "steps": 2}).json()
        answer = client.get(made["url"])
        assert answer.status_code == 307
        picture = httpx.get(answer.headers["location"], trust_env=False)
        assert picture.content.startswith(b"\x89PNG")
        assert (picture.headers["content-type"], picture.headers["cache-control"]) == ("image/png", FOR_EVER)
        # not the page, whose policy lets it show nothing from elsewhere
        shown = client.get(made["url"], headers={"Sec-Fetch-Site": "same-origin"})
        assert shown.content == picture.content
        assert shown.headers["vary"] == answer.headers["vary"] == "Sec-Fetch-Site"


async def test_our_clients_follow_to_the_bucket_without_their_key(bucket: str, tmp_path: Path):
    key, small = add_key(tmp_path / "keys.json", "me"), {"width": 64, "height": 64, "steps": 2}
    asked: list[httpx.Request] = []
    http = httpx.Client(event_hooks={"request": [asked.append]}, trust_env=False)
    with served(tmp_path, storage=bucket, redirect_files=True, keys_file=tmp_path / "keys.json") as service:
        with Client(str(service.base_url), api_key=key, headers={"X-Tenant": "shop"}, http=http) as client:
            (picture,) = client.generate("an apple", **small)
        assert picture.startswith(b"\x89PNG")
        to_bucket = [each for each in asked if each.url.port != service.base_url.port]
        assert len(to_bucket) == 1
        assert not {"authorization", "x-tenant"} & set(to_bucket[0].headers)
        assert all(each.headers["x-tenant"] == "shop" for each in asked if "/jobs" in each.url.path)
        own = StreamableHttpTransport(f"{service.base_url}/mcp/", headers={"X-API-Key": key})
        async with Assistant(own) as assistant:
            answer = await assistant.call_tool("draw_transparent_picture", {"prompt": "an apple", **small})
        assert answer.content[0].mime_type == "image/png"
