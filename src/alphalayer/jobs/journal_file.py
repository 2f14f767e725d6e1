"""The file of the embedded journal: its rights, its loss, and its return."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from alphalayer.core.errors import SetupFailed
from alphalayer.observability.logging import log

FOLDER_RIGHTS, FILE_RIGHTS = 0o700, 0o600
"""Rights for the owner alone: the journal holds prompts and addresses of webhooks."""
SIDE_FILES = ("", "-wal", "-shm", ".lock")
RESTORE = "Restore its backup, or move it away (its jobs are lost then): docs/guides/backup.md."


def create_folder(file: Path) -> None:
    """Create the folder of a journal, for its owner alone. Raises `OSError`."""
    file.parent.mkdir(FOLDER_RIGHTS, parents=True, exist_ok=True)


def prepare(file: Path) -> None:
    """Create a journal's file, or restrict the rights of an existing one.

    SQLite would begin an empty journal where the content was lost, and would delete the log.
    A new file is never empty: it gets its name after its first page.

    Raises:
        SetupFailed: The content of an earlier journal is lost.
        OSError, sqlite3.Error: The file cannot be created.
    """
    create_folder(file)
    wal = file.with_name(f"{file.name}-wal")
    is_new = not file.exists()
    has_changes = wal.exists() and wal.stat().st_size > 0
    if (is_new and has_changes) or (not is_new and file.stat().st_size == 0):
        lost = f"missing, and its changes are in {wal.name}" if is_new else "empty"
        raise SetupFailed(f"the journal {file} is {lost}. Its jobs are lost.", hint=RESTORE)
    if is_new:
        new = file.with_name(f"{file.name}.new")
        _create(new)
        with closing(sqlite3.connect(new)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        new.rename(file)
    for suffix in SIDE_FILES:
        _restrict(file.with_name(file.name + suffix))


def _create(file: Path) -> None:
    """Create an empty file for its owner alone, in place of an unfinished one."""
    for suffix in ("", "-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_RIGHTS))


def _restrict(path: Path) -> None:
    """Take the rights of other users away from an own file."""
    if os.name == "nt" or not path.exists():
        return
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(FILE_RIGHTS)


class JournalFile:
    """An open journal's file, which may be removed from its folder meanwhile."""

    def __init__(self, path: Path):
        self._path = path
        self._identity = _identity(path)

    @property
    def is_in_place(self) -> bool:
        """Return whether the path still names the open file."""
        return _identity(self._path) == self._identity

    def restore(self, connection: sqlite3.Connection) -> None:
        """Write the removed journal again from an open connection to it.

        Raises:
            OSError: Another file has taken its place, or the folder cannot be written to.
            sqlite3.Error: The content cannot be copied.
        """
        if self._path.exists():
            raise OSError(errno.EEXIST, "another file has taken the place of the journal")
        copy = self._path.with_name(f"{self._path.name}.copy")
        _create(copy)
        with closing(sqlite3.connect(copy)) as target:
            connection.backup(target)
        copy.rename(self._path)
        self._identity = _identity(self._path)
        log.error("journal.restored", journal=str(self._path), reason="it was removed")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
