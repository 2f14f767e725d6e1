"""Storage of images: the protocol, and keys such as `alpha_1700000000_0af3c2d19b00.png`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from alphalayer.core.errors import FileMissing
from alphalayer.core.job import job_prefix_of
from alphalayer.core.request import INPUT_NAME

MAX_FILE_BYTES = 80_000_000
"""Largest file that is read: more than any image, and less than the memory of a service."""
_INPUT = re.compile(INPUT_NAME)


@dataclass(frozen=True)
class StoredFile:
    """An open file: size in bytes, time of writing in Unix seconds, and its content."""

    size_bytes: int
    modified_at: float
    chunks: AsyncIterator[bytes]


class Storage(Protocol):
    """A flat set of files.

    `open` is asynchronous. All other methods that access the files block, so they run in threads.
    """

    def put(self, key: str, data: bytes, *, replace: bool = False, renew: bool = False) -> None:
        """Write a file completely or not at all.

        Args:
            key: Name of the file.
            data: Content of the file.
            replace: Whether to replace an existing file. By default it stays as it is.
            renew: Whether an existing file gets a new time of writing. `data` is its content.

        Raises:
            StorageFailed: The file cannot be written.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete a file. A missing file is no error.

        Raises:
            StorageFailed: The file cannot be deleted.
        """
        ...

    async def open(self, key: str) -> StoredFile:
        """Open a file.

        Raises:
            FileMissing: No file has this key.
            StorageFailed: The file cannot be read. The chunks raise it, too.
        """
        ...

    def presign(self, key: str, seconds: float) -> str | None:
        """Return a URL that opens the file without this service.

        Args:
            key: Name of the file.
            seconds: Lifetime of the URL.

        Returns:
            The URL, or None if only this service can open the file.

        Raises:
            StorageFailed: The URL cannot be signed.
        """
        ...

    def list(self, after: str = "") -> list[tuple[str, int, float]]:
        """Return key, size in bytes and time of writing of all files.

        Args:
            after: Lower bound of the keys, excluded.

        Raises:
            StorageFailed: The files cannot be listed.
        """
        ...

    def delete_unfinished(self) -> None:
        """Delete the temporary files of processes that were killed during a write.

        Raises:
            StorageFailed: The files cannot be listed.
        """
        ...

    def check(self, *, is_writing: bool) -> None:
        """Check that images can be stored.

        Args:
            is_writing: Whether to write and delete a small file. If not, nothing changes.

        Raises:
            StorageFailed: They cannot, or a disk is nearly full.
        """
        ...


async def open_file(storage: Storage, key: str) -> StoredFile:
    """Open a file that is to be read completely.

    Raises:
        FileMissing: No file has this key, or it is too large for an image.
        StorageFailed: The file cannot be read. The chunks raise it, too.
    """
    file = await storage.open(key)
    if file.size_bytes > MAX_FILE_BYTES:
        raise FileMissing(f'"{key}" is too large for an image.')
    return file


async def read(storage: Storage, key: str) -> bytes:
    """Read a complete file. Raises the errors of `open_file`."""
    return b"".join([chunk async for chunk in (await open_file(storage, key)).chunks])


def is_input(key: str) -> bool:
    """Return whether a key is the name of an input image."""
    return _INPUT.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Return the key of an image, a preview or an input image.

    A storage has no other files, whatever a folder or bucket holds.

    Raises:
        FileMissing: The key is another name.
    """
    return check_image_key(key) if not is_input(key) else key


def check_image_key(key: str) -> str:
    """Return the key of an image or a preview, which clients may download.

    Raises:
        FileMissing: The key is another name.
    """
    if job_prefix_of(key) is None:
        raise FileMissing(f'there is no file "{key[:200]}".', hint="Use the name as returned.")
    return key
