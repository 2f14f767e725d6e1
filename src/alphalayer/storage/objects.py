"""Storage in a local folder or an S3 bucket, both through obstore."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from alphalayer.core.errors import FileMissing, SetupFailed, StorageFailed
from alphalayer.core.job import PREVIEW_PREFIX, new_id
from alphalayer.images import codecs
from alphalayer.storage import StoredFile, check_key, localfiles

CHUNK_BYTES = 256 * 1024
CACHE_FOREVER = "public, max-age=31536000, immutable"
_CREDENTIALS_PATH = re.compile("/latest/(api/token|meta-data)")
"""Path of Amazon's credentials service. An error with it means that no keys are set."""


class ObjectStorage:
    """Implementation of `alphalayer.storage.Storage` on any obstore store."""

    def __init__(self, store: Any, location: str):
        self._store = store
        self._location = location

    def put(self, key: str, data: bytes, *, replace: bool = False, renew: bool = False) -> None:
        """Write a file completely or not at all; see the protocol."""
        try:
            if isinstance(self._store, LocalStore):
                folder = Path(self._location)
                localfiles.write(folder, check_key(key), data, replace=replace, renew=renew)
            else:
                self._put_object(check_key(key), data, replace=replace, renew=renew)
        except AlreadyExistsError:
            pass  # an earlier run of the job stored it
        except (BaseError, OSError) as error:
            raise self._storage_error("write", key, error) from None

    def _put_object(self, key: str, data: bytes, *, replace: bool, renew: bool) -> None:
        """Write an object of a bucket. Its attributes are sent with signed URLs."""
        attributes = {
            "Content-Type": codecs.mime_type(key),
            "Cache-Control": "no-store" if replace else CACHE_FOREVER,
        }
        # a bucket renews the time of an object only when it is written again
        mode = "overwrite" if replace or renew else "create"
        obstore.put(self._store, key, data, attributes=attributes, mode=mode, use_multipart=False)

    def delete(self, key: str) -> None:
        """Delete a file; see the protocol."""
        try:
            obstore.delete(self._store, check_key(key))
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            raise self._storage_error("delete", key, error) from None

    async def open(self, key: str) -> StoredFile:
        """Open a file; see the protocol."""
        try:
            file = await obstore.get_async(self._store, check_key(key))
        except FileNotFoundError:
            raise FileMissing(
                f'there is no file "{key}".',
                hint="It may have been deleted by retention. Generate it again.",
            ) from None
        except (BaseError, OSError) as error:
            raise self._storage_error("read", key, error) from None
        modified_at = file.meta["last_modified"].timestamp()
        return StoredFile(file.meta["size"], modified_at, _chunks(file))

    def presign(self, key: str, seconds: float) -> str | None:
        """Return a signed URL of the bucket; see the protocol."""
        if isinstance(self._store, LocalStore):
            return None
        try:
            return obstore.sign(self._store, "GET", check_key(key), timedelta(seconds=seconds))
        except (BaseError, OSError) as error:
            raise self._storage_error("sign a URL for", key, error) from None

    def list(self, after: str = "") -> list[tuple[str, int, float]]:
        """Return key, size and time of writing of all files; see the protocol."""
        try:
            pages = obstore.list(self._store, offset=after or None)
            return [
                (file["path"], file["size"], file["last_modified"].timestamp())
                for page in pages
                for file in page
            ]
        except (BaseError, OSError) as error:
            raise self._storage_error("list", "files", error) from None

    def delete_unfinished(self) -> None:
        """Delete temporary files of a folder; see the protocol. Buckets have none."""
        if not isinstance(self._store, LocalStore):
            return
        try:
            localfiles.delete_unfinished(Path(self._location))
        except OSError as error:
            raise self._storage_error("clean up", "", error) from None

    def _storage_error(self, action: str, key: str, error: Exception) -> StorageFailed:
        return StorageFailed(
            f"cannot {action} {key or 'the files'} in {self._location}: {_cause(error)}.",
            hint="Check its space, rights, address and keys.",
        )


def _cause(error: Exception) -> str:
    """Return the message of a bucket's XML, or the first line of another error."""
    message = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)\.?</Message>", str(error), re.DOTALL)
    if message:
        return f"{message[2]} ({message[1]})"
    lines = [line.strip() for line in str(error).partition("<?xml")[0].splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


async def _chunks(file: Any) -> AsyncIterator[bytes]:
    async for chunk in file.stream(min_chunk_size=CHUNK_BYTES):
        yield bytes(chunk)


def open_storage(location: str) -> ObjectStorage:
    """Open the storage of a folder or bucket.

    Args:
        location: A folder's path, or a URL such as `s3://bucket/prefix`. Credentials come from
            the AWS_* variables.

    Raises:
        StorageFailed: The folder cannot be created, or the URL is invalid.
    """
    try:
        if "://" in location:
            return ObjectStorage(from_url(location), location)
        Path(location).mkdir(parents=True, exist_ok=True)
        return ObjectStorage(LocalStore(location), str(Path(location).resolve()))
    except (BaseError, OSError, ValueError) as error:
        raise StorageFailed(
            f"cannot use {location} for images: {_cause(error)}.", hint="Set another folder or URL."
        ) from None


def check_bucket(location: str) -> None:
    """Write and delete a small file, to find errors of a bucket before a start.

    Args:
        location: URL of the bucket.

    Raises:
        SetupFailed: The bucket is missing or unreachable, or the keys are missing or refused.
    """
    # retention deletes a preview that may not be deleted here
    key = f"{PREVIEW_PREFIX}{new_id()}.webp"
    try:
        store = from_url(location, retry_config={"max_retries": 2})
        obstore.put(store, key, b"alphalayer", mode="overwrite", use_multipart=False)
    except (BaseError, OSError, ValueError) as error:
        raise _bucket_error(location, error) from None
    with contextlib.suppress(BaseError, OSError):
        obstore.delete(store, key)


def _bucket_error(location: str, error: Exception) -> SetupFailed:
    """Return the error of a bucket with a hint for its cause."""
    name, address = location.split("/")[2], re.search(r"https?://[^/\s]+", str(error))
    if _CREDENTIALS_PATH.search(str(error)):
        return SetupFailed(
            f'there are no keys for the bucket "{name}".',
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    if isinstance(error, FileNotFoundError):
        return SetupFailed(
            f'there is no bucket "{name}" at {address[0] if address else location}.',
            hint="Create it, or fix the setting storage or AWS_ENDPOINT_URL.",
        )
    return SetupFailed(
        f'the bucket "{name}" cannot be written to: {_cause(error)}.',
        hint="Check its address, its keys and their rights.",
    )
