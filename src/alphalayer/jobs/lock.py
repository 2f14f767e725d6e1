"""A journal file is opened by one service at a time: two would draw each job twice."""

from __future__ import annotations

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from alphalayer.core.errors import SetupFailed, StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs.table import Journal


async def check(file: Path) -> None:
    """Open a journal, bring it up to date, and close it again; no job changes.

    Raises:
        SetupFailed: another service has this journal, it is damaged, or see `Journal.open`.
    """
    journal, lock, _ = await open_exclusively(file)
    await journal.close()
    lock.release()


async def open_exclusively(file: Path) -> tuple[Journal, FileLock, list[Job]]:
    """A journal for this service alone, and the jobs in it that are not over. Raises `SetupFailed`, see `check`."""
    async with contextlib.AsyncExitStack() as undo:
        lock = _lock(file)
        undo.callback(lock.release)
        journal = await Journal.open(file)
        undo.push_async_callback(journal.close)
        try:
            unfinished = await journal.unfinished()
        except StorageFailed as error:
            raise SetupFailed(error.message, hint=error.hint) from None
        undo.pop_all()
    return journal, lock, unfinished


def _lock(file: Path) -> FileLock:
    """Keep other services off a journal until this one ends, however it ends. Raises `SetupFailed`."""
    lock = FileLock(file.with_name(f"{file.name}.lock"), timeout=0, thread_local=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise SetupFailed(
            f"another service uses the folder {file.parent.resolve()}.",
            hint="Stop it, or give each its own data_dir (ALPHALAYER_DATA_DIR); outputs_dir may be shared.",
        ) from None
    except OSError as error:
        raise SetupFailed(
            f"{file.parent.resolve()} cannot be used: {error}.",
            hint="Check the folder's rights and space.",
        ) from None
    return lock
