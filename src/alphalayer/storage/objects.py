"""Storage in a local folder or an S3 bucket, both through obstore."""

from __future__ import annotations

import asyncio
import contextlib
import os
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
from alphalayer.observability.logging import log
from alphalayer.storage import StoredFile, check_key, disk, localfiles

CHUNK_BYTES = 256 * 1024
CACHE_FOREVER = "public, max-age=31536000, immutable"
OPEN_S = 10.0
"""Seconds after which a file that does not open has failed."""
TIMEOUTS = {"connect_timeout": "3s", "read_timeout": "5s", "timeout": "10m"}
"""Time limits of a bucket. A stalled read ends early, and a slow client may read for long."""
_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""Prefixes of the variables of obstore by the scheme of a bucket."""
_CLIENT_OPTIONS = (
    *TIMEOUTS,
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
)
RETRIES: Any = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"max_backoff": timedelta(seconds=1)},
}
"""Retries of everything that a client waits for."""
LONG_RETRIES: Any = {
    "max_retries": 20,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"max_backoff": timedelta(seconds=5)},
}
"""Retries of the upload of an image, which took long to generate."""
_ADDRESS = re.compile(r"[a-z0-9]+://[^\s,;)]+")
_CREDENTIALS_PATH = re.compile("/latest/(api/token|meta-data)")
"""Path of Amazon's credentials service. An error with it means that no keys are set."""


class ObjectStorage:
    """Implementation of `alphalayer.storage.Storage` on any obstore store."""

    def __init__(self, store: Any, location: str, image_store: Any = None):
        self._store = store
        self._location = location
        self._image_store = image_store or store
        """The same place, with more retries for images."""

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
        is_changeable = replace or renew
        mode = "overwrite" if is_changeable else "create"
        # a client waits for an input image, and the engine for a preview
        store = self._store if is_changeable else self._image_store
        obstore.put(store, key, data, attributes=attributes, mode=mode, use_multipart=False)

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
            file = await asyncio.wait_for(self._open(check_key(key)), OPEN_S)
        except FileNotFoundError:
            raise FileMissing(
                f'there is no file "{key}".',
                hint="It may have been deleted by retention. Generate it again.",
            ) from None
        except asyncio.TimeoutError:
            error = TimeoutError(f"no response for {OPEN_S:g} seconds")
            raise self._storage_error("read", key, error) from None
        except (BaseError, OSError) as error:
            raise self._storage_error("read", key, error) from None
        modified_at = file.meta["last_modified"].timestamp()
        return StoredFile(file.meta["size"], modified_at, self._chunks(key, file))

    async def _open(self, key: str) -> Any:
        """Return obstore's open file. Links, pipes and folders do not exist."""
        if isinstance(self._store, LocalStore) and not await asyncio.to_thread(
            localfiles.is_plain_file, Path(self._location) / key
        ):
            raise FileNotFoundError(key)
        return await obstore.get_async(self._store, key)

    async def _chunks(self, key: str, file: Any) -> AsyncIterator[bytes]:
        """Yield the content of an open file. Raises `StorageFailed`."""
        try:
            async for chunk in file.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)
        except (BaseError, OSError) as error:
            raise self._storage_error("read", key, error) from None

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

    def check(self, *, is_writing: bool) -> None:
        """Check that images can be stored; see the protocol."""
        if isinstance(self._store, LocalStore):
            problem = disk.find_problem(Path(self._location), "the images")
            if problem:
                raise StorageFailed(problem, hint="Free some space and check the folder's rights.")
        key = f"{PREVIEW_PREFIX}{new_id()}.webp"
        if is_writing:
            self.put(key, b"alphalayer", replace=True)
            with contextlib.suppress(StorageFailed):
                self.delete(key)
            return
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            raise self._storage_error("read", key, error) from None

    def _storage_error(self, action: str, key: str, error: Exception) -> StorageFailed:
        """Return the error for clients, and log it with paths and addresses."""
        what = f"cannot {action} {key or 'the files'}"
        log.warning("storage.failed", action=what, storage=self._location, error=_cause(error))
        cause = _ADDRESS.sub("…", _cause(error).replace(self._location, "…"))
        return StorageFailed(
            f"{what}: {cause}.",
            hint="Check the space, rights, address and keys of the storage.",
        )


def _cause(error: Exception) -> str:
    """Return the message of a bucket's XML, or the first line of another error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)\.?</Message>", str(error), re.DOTALL)
    if message:
        return f"{message[2]} ({message[1]})"
    lines = [line.strip() for line in str(error).partition("<?xml")[0].splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _client_options(location: str) -> Any:
    """Return the time limits of a bucket's requests, and other client options.

    obstore reads no option from the environment once one is passed.
    """
    prefix = _PREFIXES.get(location.partition("://")[0], "AWS_")
    variables = {name: os.environ.get(prefix + name.upper()) for name in _CLIENT_OPTIONS}
    return {**TIMEOUTS, **{name: value for name, value in variables.items() if value}}


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
            stores = [
                from_url(location, client_options=_client_options(location), retry_config=retries)
                for retries in (RETRIES, LONG_RETRIES)
            ]
            return ObjectStorage(stores[0], location, stores[1])
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
        store = from_url(location, client_options=_client_options(location), retry_config=RETRIES)
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
