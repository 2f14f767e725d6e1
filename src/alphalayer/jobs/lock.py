"""Lock of a journal file: one service at a time, so that no job is generated twice."""

from __future__ import annotations

import contextlib
import errno
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from alphalayer.core.errors import SetupFailed, StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs.databases import SqliteDatabase
from alphalayer.jobs.journal_file import FILE_RIGHTS, create_folder
from alphalayer.jobs.table import Journal


async def check(file: Path) -> None:
    """Open, migrate and close a journal. No job changes.

    Raises:
        SetupFailed: Another service uses the journal, it is damaged, or see `Journal.open`.
    """
    journal, lock, _ = await open_exclusively(file)
    await journal.close()
    lock.release()


async def open_exclusively(file: Path) -> tuple[Journal, FileLock, list[Job]]:
    """Open a journal for this service alone.

    Returns:
        The journal, its lock and its unfinished jobs.

    Raises:
        SetupFailed: see `check`.
    """
    async with contextlib.AsyncExitStack() as undo:
        lock = _lock(file)
        undo.callback(lock.release)
        journal = await Journal.open(file)
        undo.push_async_callback(journal.close)
        if isinstance(journal.database, SqliteDatabase):
            journal.database.on_removed = partial(_lock_again, lock)
        try:
            unfinished = await journal.unfinished()
        except StorageFailed as error:
            raise SetupFailed(error.message, hint=error.hint) from None
        undo.pop_all()
    return journal, lock, unfinished


def _lock(file: Path) -> FileLock:
    """Lock a journal until this process ends. Raises `SetupFailed`."""
    lock = FileLock(
        file.with_name(f"{file.name}.lock"), timeout=0, mode=FILE_RIGHTS, thread_local=False
    )
    try:
        create_folder(file)
        lock.acquire()
    except Timeout:
        raise SetupFailed(
            f"another service uses the folder {file.parent.resolve()}.",
            hint="Stop it, or set another data_dir (ALPHALAYER_DATA_DIR). "
            "Services can share outputs_dir.",
        ) from None
    except OSError as error:
        raise SetupFailed(
            f"{file.parent.resolve()} cannot be used: {error}.",
            hint="Check the folder's rights and space.",
        ) from None
    return lock


def _lock_again(lock: FileLock) -> None:
    """Lock a journal whose folder was removed with the file of the lock.

    Raises:
        OSError: Another service has the lock, or the folder cannot be created.
    """
    lock.release(force=True)
    create_folder(Path(lock.lock_file))
    try:
        lock.acquire()
    except Timeout:
        raise OSError(errno.EBUSY, "another service uses its folder now") from None
