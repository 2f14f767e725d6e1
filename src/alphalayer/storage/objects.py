"""Storage in a local folder or an S3 bucket, through one interface (obstore)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from alphalayer.core.errors import FileMissing, SetupFailed, StorageFailed
from alphalayer.core.job import PREVIEW_PREFIX, new_id
from alphalayer.images import codecs
from alphalayer.storage import StoredFile, check_key, localfiles

CHUNK_BYTES = 256 * 1024
FOR_EVER = "public, max-age=31536000, immutable"
_ASKS_FOR_KEYS = re.compile("/latest/(api/token|meta-data)")
"""Where machines of Amazon's find keys; whoever has none is sent there."""


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
        said = {"Content-Type": codecs.mime_type(key), "Cache-Control": lasts}
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
                f'there is no file "{key}".',
                hint="It may have been removed after its time; draw it again.",
            ) from None
        except (BaseError, OSError) as error:
            raise self._failed("read", key, error) from None
        return StoredFile(
            found.meta["size"], found.meta["last_modified"].timestamp(), _chunks(found)
        )

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
            return [
                (each["path"], each["size"], each["last_modified"].timestamp())
                for page in pages
                for each in page
            ]
        except (BaseError, OSError) as error:
            raise self._failed("list", "files", error) from None

    def tidy(self) -> None:
        """Remove what killed processes left, of which buckets keep nothing; see the protocol."""
        if not isinstance(self._store, LocalStore):
            return
        try:
            localfiles.remove_unfinished(Path(self._where))
        except OSError as error:
            raise self._failed("tidy", "", error) from None

    def _failed(self, doing: str, key: str, error: Exception) -> StorageFailed:
        return StorageFailed(
            f"cannot {doing} {key or 'the files'} in {self._where}: {_cause(error)}.",
            hint="Check that there is space, that the place may be written to, and its address and keys.",
        )


def _cause(error: Exception) -> str:
    """What is wrong: a bucket's own words, or the error without the trace that obstore adds."""
    if said := re.search(
        r"<Code>(.*?)</Code>\s*<Message>(.*?)\.?</Message>", str(error), re.DOTALL
    ):
        return f"{said[2]} ({said[1]})"
    lines = [line.strip() for line in str(error).partition("<?xml")[0].splitlines() if line.strip()]
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
        return ObjectStorage(LocalStore(place), str(Path(place).resolve()))
    except (BaseError, OSError, ValueError) as error:
        raise StorageFailed(
            f"cannot use {place} for pictures: {_cause(error)}.", hint="Set another folder or URL."
        ) from None


def check_bucket(place: str) -> None:
    """Write a small file into a bucket and remove it, so that what is wrong is known before anything is drawn. Asks no long time.

    Raises:
        SetupFailed: no such bucket, no keys or keys that are refused, or it cannot be reached.
    """
    # a preview by its name: where it may not be removed, it is swept away with those
    key = f"{PREVIEW_PREFIX}{new_id()}.webp"
    try:
        store = from_url(place, retry_config={"max_retries": 2})
        obstore.put(store, key, b"alphalayer", mode="overwrite", use_multipart=False)
    except (BaseError, OSError, ValueError) as error:
        raise _unusable(place, error) from None
    with contextlib.suppress(BaseError, OSError):
        obstore.delete(store, key)


def _unusable(place: str, error: Exception) -> SetupFailed:
    name, asked = place.split("/")[2], re.search(r"https?://[^/\s]+", str(error))
    if _ASKS_FOR_KEYS.search(str(error)):
        return SetupFailed(
            f'there are no keys for the bucket "{name}".',
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    if isinstance(error, FileNotFoundError):
        return SetupFailed(
            f'there is no bucket "{name}" at {asked[0] if asked else place}.',
            hint="Make it, or mend the setting storage or AWS_ENDPOINT_URL.",
        )
    return SetupFailed(
        f'the bucket "{name}" cannot be written to: {_cause(error)}.',
        hint="Check its address, its keys and their rights.",
    )
