"""Documents that are made for downloads: in temporary files, one after another."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Hashable
from pathlib import Path
from typing import IO

from alphalayer.core.errors import Busy, StorageFailed

MAX_OPEN = 16
"""Most documents that are made or sent at one time. Each takes up to 70 MB of disk."""
CHUNK_BYTES = 1 << 18
RETRY_AFTER_S = 10


class DocumentFile:
    """A document in a temporary file that several requests read."""

    def __init__(self, file: IO[bytes]):
        self._file, self._lock = file, threading.Lock()
        self.size_bytes = file.seek(0, 2)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the content."""
        for offset in range(0, self.size_bytes, CHUNK_BYTES):
            yield await asyncio.to_thread(self._read, offset)

    async def chunks_once(self) -> AsyncIterator[bytes]:
        """Yield the content, and delete the file."""
        try:
            async for chunk in self.chunks():
                yield chunk
        finally:
            self.close()

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def _read(self, offset: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(CHUNK_BYTES)


class _Shared:
    """A document that requests wait for or read."""

    def __init__(self, making: asyncio.Task[DocumentFile]):
        self.making, self.users = making, 0

    def close(self) -> None:
        """Drop the document, or stop making it."""
        self.making.cancel()
        self.making.add_done_callback(_close_file)


class DocumentFiles:
    """Documents of one service. Equal requests share one.

    Documents are made one after another, so that other work on images is not delayed for long.

    Args:
        folder: Folder of the temporary files. None: that of the system.
        limit: Most documents that are made or sent at one time.
    """

    def __init__(self, folder: Path | None = None, limit: int = MAX_OPEN):
        self._folder, self._limit = folder, limit
        self._turn = asyncio.Lock()
        self._shared: dict[Hashable, _Shared] = {}

    @contextlib.asynccontextmanager
    async def open(
        self, key: Hashable, write: Callable[[IO[bytes]], Awaitable[None]]
    ) -> AsyncGenerator[DocumentFile]:
        """Open a document for a block. It is made if no other request has it.

        Args:
            key: What the document depends on.
            write: Function that writes the document to an empty file.

        Raises:
            Busy: Too many documents are made or sent.
            StorageFailed: The temporary file cannot be written.
        """
        shared = self._shared.get(key)
        if shared is None:
            if len(self._shared) >= self._limit:
                raise _busy(len(self._shared))
            shared = self._shared[key] = _Shared(asyncio.create_task(self._make(write)))
        shared.users += 1
        try:
            # a request that leaves must not stop the work for the others
            yield await asyncio.shield(shared.making)
        finally:
            shared.users -= 1
            if not shared.users:
                del self._shared[key]
                shared.close()

    def keep(self, data: bytes) -> DocumentFile:
        """Write data to a temporary file. The call blocks. Raises `StorageFailed`."""
        with _write_errors(), contextlib.ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
            file.write(data)
            stack.pop_all()
            return DocumentFile(file)

    async def _make(self, write: Callable[[IO[bytes]], Awaitable[None]]) -> DocumentFile:
        async with self._turn:
            with _write_errors(), contextlib.ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
                await write(file)
                stack.pop_all()
                return DocumentFile(file)


@contextlib.contextmanager
def _write_errors() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"the document cannot be written: {error.strerror}.") from error


def _close_file(making: asyncio.Task[DocumentFile]) -> None:
    if not making.cancelled() and not making.exception():
        making.result().close()


def _busy(count: int) -> Busy:
    error = Busy(
        f"{count} documents are made or sent.", hint=f"Try again in {RETRY_AFTER_S} seconds."
    )
    error.retry_after_s = RETRY_AFTER_S
    return error
