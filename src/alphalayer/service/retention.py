"""Nothing grows without bound: old pictures and old jobs are removed, by age and by the size of all; and previews that served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from alphalayer.core.errors import AlphalayerError
from alphalayer.core.job import PREVIEW_PREFIX, job_prefix_of
from alphalayer.jobs.base import JobStore
from alphalayer.observability.logging import log
from alphalayer.storage import Storage

DAY_S = 86_400.0
PREVIEW_S = 60.0
"""How long a preview stays after its last change: whoever was told of it may still come for it."""


@dataclass(frozen=True)
class Limits:
    """What may stay. 0 means without bound."""

    pictures_days: float = 0.0
    pictures_bytes: int = 0
    jobs_days: float = 0.0


def select_expired(
    files: Iterable[tuple[str, int, float]],
    limits: Limits,
    now: float,
    is_kept: Callable[[str], bool],
) -> list[str]:
    """The keys to remove of (key, bytes, time of writing): those too old, then the oldest until the rest fits; never those kept."""
    free = sorted((modified, key, size) for key, size, modified in files if not is_kept(key))
    total = sum(size for _, _, size in free)
    gone: list[str] = []
    for modified, key, size in free:
        days = PREVIEW_S / DAY_S if key.startswith(PREVIEW_PREFIX) else limits.pictures_days
        is_old = days > 0 and now - modified > days * DAY_S
        if is_old or 0 < limits.pictures_bytes < total:
            gone.append(key)
            total -= size
    return gone


async def sweep(storage: Storage, job_queue: JobStore, limits: Limits) -> int:
    """Remove what is over the limits; how many files went. Pictures of jobs that are not over stay, and so do others' files."""
    # first, as the database may do what the place of the pictures does not
    jobs = (
        await job_queue.delete_finished(time.time() - limits.jobs_days * DAY_S)
        if limits.jobs_days
        else 0
    )
    await asyncio.to_thread(storage.tidy)
    # without limits only previews go: a bucket need not tell of each picture then
    all_of_them = limits.pictures_days or limits.pictures_bytes
    files = await asyncio.to_thread(storage.list, "" if all_of_them else PREVIEW_PREFIX)
    # asked after the files are listed: a file of a job that came meanwhile is not among them
    unfinished = {job_id[:10] for job_id in await job_queue.unfinished_ids()}
    ours = [(key, size, modified) for key, size, modified in files if job_prefix_of(key)]
    gone = await asyncio.to_thread(
        select_expired, ours, limits, time.time(), lambda key: job_prefix_of(key) in unfinished
    )
    faults = {
        key: fault for key in gone if (fault := await asyncio.to_thread(_delete, storage, key))
    }
    if faults:
        log.warning(
            "retention.images_kept", pictures=len(faults), error=str(next(iter(faults.values())))
        )
    swept = [key for key in gone if key not in faults]
    previews = sum(key.startswith(PREVIEW_PREFIX) for key in swept)
    if swept or jobs:
        log.info(
            "retention.completed", pictures=len(swept) - previews, previews=previews, jobs=jobs
        )
    return len(swept)


def _delete(storage: Storage, key: str) -> AlphalayerError | None:
    """Remove a file; why it stays."""
    try:
        storage.delete(key)
    except AlphalayerError as error:
        return error
    return None


async def keep_sweeping(
    storage: Storage, job_queue: JobStore, limits: Limits, every_s: float = 600.0
) -> None:
    """Sweep now and then until cancelled; what fails is tried again the next time."""
    while True:
        try:
            await sweep(storage, job_queue, limits)
        except AlphalayerError as error:
            log.warning("retention.failed", error=str(error))
        await asyncio.sleep(every_s)
