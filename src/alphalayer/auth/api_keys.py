"""API keys and their limits, stored as hashes in a JSON file."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from alphalayer.auth.files import replace_file
from alphalayer.core import validation
from alphalayer.core.errors import CommandHint, SetupFailed

PREFIX = "alk_"
LOCK_WAIT_S = 30.0
"""Seconds that a command waits for other commands that change the file."""

Scope = Literal["generate", "read", "metrics", "admin"]
"""Right of a key. Each route requires one of them."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


class Key(BaseModel, frozen=True):
    """One API key. A limit of 0 means unlimited.

    A file of an earlier version has only the first four fields. Its keys have all scopes.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.@-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    per_minute: Annotated[int, Field(ge=0)] = 0
    queue_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    requests_per_minute: Annotated[int, Field(ge=0)] = 0
    cost_per_minute: Annotated[int, Field(ge=0)] = 0
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = SCOPES
    expires: AwareDatetime | None = None

    @property
    def is_guessable(self) -> bool:
        """Return whether a client chose the secret. Those of `add_key` are random."""
        return False

    @property
    def is_expired(self) -> bool:
        """Return whether the key has expired."""
        return self.expires is not None and self.expires.timestamp() <= time.time()


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


def add_key(file: Path, name: str, **limits: Any) -> str:
    """Create a key and store its hash.

    Args:
        file: The file of keys. It is created if it is missing.
        name: Name of the client.
        limits: Other fields of `Key`.

    Returns:
        The key, which is not stored.

    Raises:
        SetupFailed: The name exists, a value is invalid, or the file is not writable.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(name=name, sha256=digest(secret), **limits)
    except ValidationError as error:
        raise SetupFailed(f"{_describe(error.errors(include_url=False)[0])}.") from None
    with _changing(file) as keys:
        if any(other.name == name for other in keys):
            raise SetupFailed(
                f'there is a key "{name}" already.',
                hint="Choose another name, or remove that one first.",
            )
        keys.append(key)
    return secret


def rotate_key(file: Path, name: str) -> str:
    """Replace the secret of a key. Its limits stay.

    Returns:
        The new key, which is not stored.

    Raises:
        SetupFailed: No key has this name, or the file cannot be read or written.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    with _changing(file) as keys:
        i = _index(keys, name, file)
        keys[i] = keys[i].model_copy(update={"sha256": digest(secret)})
    return secret


def remove_key(file: Path, name: str) -> list[Key]:
    """Remove a key. The file stays without keys, so that no client gets access.

    Returns:
        The remaining keys.

    Raises:
        SetupFailed: No key has this name, or the file cannot be read or written.
    """
    with _changing(file) as keys:
        del keys[_index(keys, name, file)]
    return keys


def _index(keys: Sequence[Key], name: str, file: Path) -> int:
    for i, key in enumerate(keys):
        if key.name == name:
            return i
    raise SetupFailed(f'there is no key "{name}" in {file}.')


@contextmanager
def _changing(file: Path) -> Generator[list[Key]]:
    """Yield the keys of a file to change them, and store them afterwards.

    Other commands wait until this one has finished.

    Raises:
        SetupFailed: The file cannot be read or written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f"{file.name}.lock"), timeout=LOCK_WAIT_S):
            keys = read_keys(file) or []
            yield keys
            rows = [key.model_dump(mode="json", exclude_defaults=True) for key in keys]
            replace_file(file, json.dumps(rows, indent=1) + "\n")
    except Timeout:
        raise SetupFailed(
            f"another command changes {file}, and has not finished for {LOCK_WAIT_S:g} s.",
            hint="Try again.",
        ) from None
    except OSError as error:
        raise SetupFailed(f"cannot write {file}: {error.strerror or error}.") from None


def _describe(error: ErrorDetails) -> str:
    """Return the place and the reason of a validation error."""
    path = ".".join(str(part) for part in error["loc"])
    reason = validation.describe_validation_error(error)
    return f"{path}: {reason}" if path else reason
