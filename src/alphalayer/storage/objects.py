"""Storage in a local folder or an S3 bucket, through one interface (obstore)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from alphalayer import images
from alphalayer.errors import FileMissing, StorageFailed
from alphalayer.storage import StoredFile, check_key, localfiles

CHUNK_BYTES = 256 * 1024
FOR_EVER = "public, max-age=31536000, immutable"


class ObjectStorage:
    """Implements `alphalayer.storage.Storage` on any obstore store."""

    def __init__(self, store: Any, where: str):
        self._store = store
        self._where = where

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Write a file as a whole; see the protocol."""
        try:
            if isinstance(self._store, LocalStore):
                localfiles.write(Path(self._where), check_key(key), data, replace=replace)
            else:
                self._put(check_key(key), data, "overwrite" if replace else "create")
        except AlreadyExistsError:
            pass  # the job was run before
        except (BaseError, OSError) as error:
            raise self._failed("write", key, error) from None

    def _put(self, key: str, data: bytes, mode: Literal["create", "overwrite"]) -> None:
        # whoever opens a signed URL is told by the bucket what they get
        lasts = FOR_EVER if mode == "create" else "no-store"
        said = {"Content-Type": images.mime_type(key), "Cache-Control": lasts}
        obstore.put(self._store, key, data, attributes=said, mode=mode, use_multipart=False)

    def delete(self, key: str) -> None:
        """Remove a file; see the protocol."""
        try:
            obstore.delete(self._store, check_key(key))
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            raise self._failed("delete", key, error) from None

    async def open(self, key: str) -> StoredFile:
        """Open a file; see the protocol."""
        try:
            found = await obstore.get_async(self._store, check_key(key))
        except FileNotFoundError:
            raise FileMissing(
                f'there is no file "{key}".', hint="It may have been removed after its time; draw it again."
            ) from None
        except (BaseError, OSError) as error:
            raise self._failed("read", key, error) from None
        return StoredFile(found.meta["size"], found.meta["last_modified"].timestamp(), _chunks(found))

    def presign(self, key: str, seconds: float) -> str | None:
        """A URL of the bucket's own; see the protocol."""
        if isinstance(self._store, LocalStore):
            return None
        try:
            return obstore.sign(self._store, "GET", check_key(key), timedelta(seconds=seconds))
        except (BaseError, OSError) as error:
            raise self._failed("sign a URL for", key, error) from None

    def list(self, after: str = "") -> list[tuple[str, int, float]]:
        """All files from a name on; see the protocol."""
        try:
            pages = obstore.list(self._store, offset=after or None)
            return [(each["path"], each["size"], each["last_modified"].timestamp()) for page in pages for each in page]
        except (BaseError, OSError) as error:
            raise self._failed("list", "", error) from None

    def _failed(self, doing: str, key: str, error: Exception) -> StorageFailed:
        return StorageFailed(
            f"cannot {doing} {key} in {self._where}: {_first_line(error)}.",
            hint="Check that there is space, that the place may be written to, and its address and keys.",
        )


def _first_line(error: Exception) -> str:
    """What is wrong, without the trace that obstore adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


async def _chunks(found: Any) -> AsyncIterator[bytes]:
    async for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
        yield bytes(chunk)


def open_storage(place: str) -> ObjectStorage:
    """A folder's path, or a URL such as `s3://bucket/prefix` (credentials come from the usual AWS_* variables).

    Raises:
        StorageFailed: the folder cannot be made, or the URL is not understood.
    """
    try:
        if "://" in place:
            return ObjectStorage(from_url(place), place)
        Path(place).mkdir(parents=True, exist_ok=True)
        localfiles.remove_unfinished(Path(place))
        return ObjectStorage(LocalStore(place), str(Path(place).resolve()))
    except (BaseError, OSError, ValueError) as error:
        raise StorageFailed(
            f"cannot use {place} for pictures: {_first_line(error)}.", hint="Set another folder or URL."
        ) from None
