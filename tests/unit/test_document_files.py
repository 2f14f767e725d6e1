"""Documents for downloads: shared by equal requests, made one after another, and deleted."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import IO, Any

import pytest

from alphalayer.api import document_files
from alphalayer.api.document_files import DocumentFile, DocumentFiles
from alphalayer.core.errors import Busy, StorageFailed


class Writer:
    """Work that writes a document once the test releases it."""

    def __init__(self, content: bytes = b"content"):
        self.content, self.calls, self.is_cancelled = content, 0, False
        self.started, self.released = asyncio.Event(), asyncio.Event()

    async def __call__(self, file: IO[bytes]) -> None:
        self.calls += 1
        self.started.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        file.write(self.content)


async def read(documents: DocumentFiles, key: str, writer: Any) -> tuple[DocumentFile, bytes]:
    async with documents.open(key, writer) as file:
        return file, b"".join([chunk async for chunk in file.chunks()])


async def test_equal_requests_share_one_document(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(document_files, "CHUNK_BYTES", 3)
    documents, writer = DocumentFiles(), Writer()
    reads = [asyncio.create_task(read(documents, "a", writer)) for _ in range(20)]
    await writer.started.wait()
    writer.released.set()
    results = await asyncio.gather(*reads)
    assert {content for _, content in results} == {b"content"}
    assert len({id(file) for file, _ in results}) == writer.calls == 1
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="closed"):
        [chunk async for chunk in results[0][0].chunks()]


async def test_documents_are_made_one_after_another_up_to_a_limit():
    documents, first, second = DocumentFiles(limit=2), Writer(), Writer()
    reads = [
        asyncio.create_task(read(documents, key, writer))
        for key, writer in (("a", first), ("b", second))
    ]
    await first.started.wait()
    with pytest.raises(Busy) as error:
        await read(documents, "c", Writer())
    assert error.value.retry_after_s > 1
    assert second.calls == 0
    first.released.set()
    second.released.set()
    await asyncio.gather(*reads)
    assert second.calls == 1


async def test_document_is_made_until_the_last_request_has_left():
    documents, writer = DocumentFiles(), Writer()
    reads = [asyncio.create_task(read(documents, "a", writer)) for _ in range(2)]
    await writer.started.wait()
    reads[0].cancel()
    await asyncio.wait(reads[:1])
    assert not writer.is_cancelled
    reads[1].cancel()
    await asyncio.wait(reads)
    await asyncio.sleep(0)
    assert writer.is_cancelled
    again = Writer()
    again.released.set()
    assert (await read(documents, "a", again))[1] == b"content"


async def test_full_disk_of_documents_is_reported(tmp_path: Path):
    async def fail(_file: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageFailed, match="No space left"):
        await read(DocumentFiles(), "a", fail)
    missing = tmp_path / "missing"
    with pytest.raises(StorageFailed, match="cannot be written"):
        await read(DocumentFiles(missing), "a", fail)
