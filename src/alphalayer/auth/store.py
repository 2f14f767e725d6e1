"""The keys of a running service: those of the keys file, and the users of `api_auth`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from alphalayer.auth.api_keys import Key, digest, read_keys
from alphalayer.core.errors import CommandHint, SetupFailed
from alphalayer.observability.logging import log

CHECK_EVERY_S = 1.0
"""Seconds between two checks of the file for changes."""


class PasswordKey(Key, frozen=True):
    """User and password of `api_auth`."""

    @property
    def is_guessable(self) -> bool:
        """Return True: a person chose the password."""
        return True


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
            self._reload()
        return self._keys

    def _reload(self) -> None:
        try:
            keys = load_api_keys(self._file, self._users, is_required=True)
        except SetupFailed as error:
            log.error("api_keys.reload_failed", error=str(error))
            return
        _log_changes(self._keys or (), keys or ())
        self._keys = keys
        self.shares.update({key.name: key.queue_share for key in keys or ()})


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


def basic_keys(pairs: str) -> list[PasswordKey]:
    """Return the keys of a list of "user:password". Raises `SetupFailed`."""
    keys: list[PasswordKey] = []
    for pair in filter(None, (entry.strip() for entry in pairs.split(","))):
        name, colon, _ = pair.partition(":")
        if not colon or not name:
            raise SetupFailed(
                "setting api_auth: it is a list of user:password, separated by commas."
            )
        keys.append(PasswordKey(name=name, sha256=digest(pair)))
    return keys


def _log_changes(old: Sequence[Key], new: Sequence[Key]) -> None:
    """Log the names of keys that were added, removed or changed."""
    before, after = ({key.name: key for key in keys} for keys in (old, new))
    common = before.keys() & after.keys()
    changes = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(name for name in common if before[name] != after[name]),
    }
    log.warning("audit.keys_changed", **{how: names for how, names in changes.items() if names})


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Return a value that changes with the file or its rights, or None without a file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
