"""API keys and their limits, stored as hashes in a JSON file."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from alphalayer.core import validation
from alphalayer.core.errors import CommandHint, SetupFailed
from alphalayer.observability.logging import log

PREFIX = "alk_"
CHECK_EVERY_S = 1.0
"""Seconds between two checks of the file for changes."""


class Key(BaseModel):
    """One API key. A `per_minute` of 0 means unlimited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.@-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    per_minute: Annotated[int, Field(ge=0)] = 0
    queue_share: Annotated[float, Field(gt=0, le=1)] = 1.0


_KEYS: TypeAdapter[list[Key]] = TypeAdapter(list[Key])


def digest(secret: str) -> str:
    """Return the hash of a key or a "user:password"."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_keys(file: Path) -> list[Key] | None:
    """Return the keys of a file, or None if the file is missing.

    Raises:
        SetupFailed: The file cannot be read.
    """
    try:
        return _KEYS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except ValidationError as error:
        reason = _describe(error.errors(include_url=False)[0])
    raise SetupFailed(
        f"{file} cannot be read: {reason}.",
        hint=CommandHint("Fix it, or move it away and create keys with:", "keys add NAME"),
    )


def add_key(file: Path, name: str, per_minute: int = 0, queue_share: float = 1.0) -> str:
    """Create a key and store its hash.

    Args:
        file: The file of keys. It is created if it is missing.
        name: Name of the client.
        per_minute: Maximum number of requests a minute; 0: unlimited.
        queue_share: Fraction of the queue that the client may fill.

    Returns:
        The key, which is not stored.

    Raises:
        SetupFailed: The name exists, a value is invalid, or the file is not writable.
    """
    keys = read_keys(file) or []
    if any(key.name == name for key in keys):
        raise SetupFailed(
            f'there is a key "{name}" already.',
            hint="Choose another name, or remove that one first.",
        )
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        keys.append(
            Key(name=name, sha256=digest(secret), per_minute=per_minute, queue_share=queue_share)
        )
    except ValidationError as error:
        raise SetupFailed(f"{_describe(error.errors(include_url=False)[0])}.") from None
    _write(file, keys)
    return secret


def remove_key(file: Path, name: str) -> list[Key]:
    """Remove a key. The file stays without keys, so that no client gets access.

    Returns:
        The remaining keys.

    Raises:
        SetupFailed: No key has this name, or the file cannot be read or written.
    """
    keys = read_keys(file) or []
    remaining = [key for key in keys if key.name != name]
    if len(remaining) == len(keys):
        raise SetupFailed(f'there is no key "{name}" in {file}.')
    _write(file, remaining)
    return remaining


class ApiKeyStore:
    """Keys and users of `load_api_keys`, reloaded when the file changes.

    A file that is missing or invalid after the start changes nothing.
    """

    def __init__(self, file: Path, users: str, *, is_required: bool):
        self._file, self._users = file, users
        self._stamp, self._checked_at = _stamp(file), time.monotonic()
        self._keys = load_api_keys(file, users, is_required=is_required)
        self.shares = {key.name: key.queue_share for key in self._keys or ()}
        """Fraction of the queue of each owner. It changes with the keys."""

    def keys(self) -> list[Key] | None:
        """Return the current keys, or None if no key is required."""
        if time.monotonic() - self._checked_at < CHECK_EVERY_S:
            return self._keys
        self._checked_at = time.monotonic()
        stamp = _stamp(self._file)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._keys = load_api_keys(self._file, self._users, is_required=True)
                self.shares.update({key.name: key.queue_share for key in self._keys or ()})
            except SetupFailed as error:
                log.error("api_keys.reload_failed", error=str(error))
        return self._keys


def load_api_keys(file: Path, users: str, *, is_required: bool) -> list[Key] | None:
    """Return the keys of a file and of a list of users.

    Args:
        file: The file of keys.
        users: List of "user:password", separated by commas.
        is_required: Whether a missing file is an error.

    Returns:
        The keys. An empty list refuses all clients. None accepts all.

    Raises:
        SetupFailed: The file is missing or invalid, or a name occurs twice.
    """
    keys, basic = read_keys(file), basic_keys(users)
    if keys is None and is_required:
        raise SetupFailed(
            f"setting keys_file: {file} is missing, and without it every client has access.",
            hint=CommandHint(
                "Fix its path, remove the setting, or create it with:", "keys add NAME"
            ),
        )
    duplicates = {key.name for key in keys or []} & {user.name for user in basic}
    if duplicates:
        raise SetupFailed(
            f'"{min(duplicates)}" is a key in {file} and a user in api_auth. '
            "Both would have the same jobs.",
            hint="Rename one of them.",
        )
    return None if keys is None and not basic else [*(keys or []), *basic]


def basic_keys(pairs: str) -> list[Key]:
    """Return the keys of a list of "user:password". Raises `SetupFailed`."""
    keys: list[Key] = []
    for pair in filter(None, (entry.strip() for entry in pairs.split(","))):
        name, colon, _ = pair.partition(":")
        if not colon or not name:
            raise SetupFailed(
                "setting api_auth: it is a list of user:password, separated by commas."
            )
        keys.append(Key(name=name, sha256=digest(pair)))
    return keys


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Return a value that changes with the file or its rights, or None without a file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _describe(error: ErrorDetails) -> str:
    """Return the place and the reason of a validation error."""
    path = ".".join(str(part) for part in error["loc"])
    reason = validation.describe_validation_error(error)
    return f"{path}: {reason}" if path else reason


def _write(file: Path, keys: list[Key]) -> None:
    """Write the file atomically, readable by its owner only. Raises `SetupFailed`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(
            json.dumps([key.model_dump() for key in keys], indent=1) + "\n", encoding="utf-8"
        )
        new.replace(file)
    except OSError as error:
        raise SetupFailed(f"cannot write {file}: {error.strerror}.") from None
