"""Where finished pictures are kept. The rest of the program knows this protocol and keys such as `alpha_1700000000_0af3.png`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from alphalayer.core.errors import FileMissing

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""A key is one plain file name: no folders, no leading dot."""


@dataclass(frozen=True)
class StoredFile:
    """A file opened for reading: its size in bytes, when it was written (Unix seconds) and its bytes, piece by piece."""

    size_bytes: int
    modified_at: float
    chunks: AsyncIterator[bytes]


class Storage(Protocol):
    """A flat set of files. `open` is asynchronous; all that asks the place blocks and is called from threads."""

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Write a file as a whole, or not at all. One that is there stays as it is, unless it is to be replaced. Raises `StorageFailed`."""
        ...

    def delete(self, key: str) -> None:
        """Remove a file; one that is not there is no error. Raises `StorageFailed`."""
        ...

    async def open(self, key: str) -> StoredFile:
        """Open a file. Raises `FileMissing`, `StorageFailed`."""
        ...

    def presign(self, key: str, seconds: float) -> str | None:
        """A URL that opens the file for so long without asking this service; None where files are only here."""
        ...

    def list(self, after: str = "") -> list[tuple[str, int, float]]:
        """Key, size in bytes and time of writing (Unix seconds) of every file whose key sorts after this. Raises `StorageFailed`."""
        ...

    def tidy(self) -> None:
        """Remove what was left by processes that were killed while they wrote. Raises `StorageFailed`."""
        ...


async def read(storage: Storage, key: str) -> bytes:
    """A file as a whole. Raises `FileMissing`, `StorageFailed`."""
    found = await storage.open(key)
    return b"".join([chunk async for chunk in found.chunks])


def check_key(key: str) -> str:
    """The key, if it is one. Raises `FileMissing`: what cannot be a key names no file."""
    if not KEY.fullmatch(key) or ".." in key:
        raise FileMissing(f'there is no file "{key[:200]}".', hint="Use the name as it was given.")
    return key
