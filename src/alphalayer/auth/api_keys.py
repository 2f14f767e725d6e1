"""API keys: who may ask, how often, and how much of the queue each may fill. Kept as hashes in a JSON file; the keys themselves nowhere."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from alphalayer.core import validation
from alphalayer.core.errors import CommandHint, SetupFailed
from alphalayer.observability.logging import log

PREFIX = "alk_"
LOOK_EVERY_S = 1.0
"""How often it is looked whether the file of keys has changed."""


class Key(BaseModel):
    """One key. `per_minute` 0 means as often as wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.@-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    per_minute: Annotated[int, Field(ge=0)] = 0
    queue_share: Annotated[float, Field(gt=0, le=1)] = 1.0


_KEYS: TypeAdapter[list[Key]] = TypeAdapter(list[Key])


def digest(secret: str) -> str:
    """How a key, or a "user:password", is kept."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_keys(file: Path) -> list[Key] | None:
    """The keys of a file; None if there is no file. Raises `SetupFailed`."""
    try:
        return _KEYS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        why = error.strerror or str(error)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        why = (
            ".".join(str(part) for part in first["loc"])
            + (": " if first["loc"] else "")
            + validation.describe_validation_error(first)
        )
    raise SetupFailed(
        f"{file} cannot be read: {why}.",
        hint=CommandHint("Fix it, or move it away and make keys with:", "keys add NAME"),
    )


def add_key(file: Path, name: str, per_minute: int = 0, queue_share: float = 1.0) -> str:
    """Make a key, keep its hash, and give the key itself, once. Raises `SetupFailed`."""
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
        first = error.errors(include_url=False)[0]
        raise SetupFailed(
            f"{first['loc'][0]}: {validation.describe_validation_error(first)}."
        ) from None
    _write(file, keys)
    return secret


def remove_key(file: Path, name: str) -> list[Key]:
    """Forget a key, and give those that are left; the file stays, so that nobody is let in after the last one. Raises `SetupFailed`."""
    keys = read_keys(file) or []
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise SetupFailed(f'there is no key "{name}" in {file}.')
    _write(file, left)
    return left


class ApiKeyStore:
    """The keys and users of `load_api_keys`, read anew when the file has changed. One that is gone or broken by then changes nothing.

    Raises what that raises.
    """

    def __init__(self, file: Path, users: str, *, must_be: bool):
        self._file, self._users = file, users
        self._stamp, self._looked_at = _stamp(file), time.monotonic()
        self._keys = load_api_keys(file, users, must_be=must_be)
        self.shares = {key.name: key.queue_share for key in self._keys or ()}
        """Which part of the queue may be whose; changes with the keys."""

    def keys(self) -> list[Key] | None:
        """Who may ask now; None: everybody."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return self._keys
        self._looked_at = time.monotonic()
        stamp = _stamp(self._file)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._keys = load_api_keys(self._file, self._users, must_be=True)
                self.shares.update({key.name: key.queue_share for key in self._keys or ()})
            except SetupFailed as error:
                log.error("api_keys.reload_failed", error=str(error))
        return self._keys


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes with the file, and with who may read it; None where it is not there."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ctime_ns, about.st_size


def load_api_keys(file: Path, users: str, *, must_be: bool) -> list[Key] | None:
    """The keys of a file, and the users of a list of "user:password"; None where everybody may ask, for there is neither.

    A file without a key lets nobody in. Raises `SetupFailed`, also where the file `must_be` and is not there.
    """
    keys, basic = read_keys(file), basic_keys(users)
    if keys is None and must_be:
        raise SetupFailed(
            f"setting keys_file: {file} is not there, and without it everybody might ask.",
            hint=CommandHint(
                "Fix its path, leave the setting out, or make it with:", "keys add NAME"
            ),
        )
    doubled = {key.name for key in keys or []} & {user.name for user in basic}
    if doubled:
        raise SetupFailed(
            f'"{min(doubled)}" is a key in {file} and a user in api_auth: each would see the jobs of the other.',
            hint="Give one of them another name.",
        )
    return None if keys is None and not basic else [*(keys or []), *basic]


def basic_keys(pairs: str) -> list[Key]:
    """The keys that a comma-separated list of "user:password" is."""
    found: list[Key] = []
    for pair in filter(None, (each.strip() for each in pairs.split(","))):
        name, colon, _ = pair.partition(":")
        if not colon or not name:
            raise SetupFailed(
                "setting api_auth: it is a list of user:password, separated by commas."
            )
        found.append(Key(name=name, sha256=digest(pair)))
    return found


def _write(file: Path, keys: list[Key]) -> None:
    """Readable by the owner alone, written as a whole."""
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
