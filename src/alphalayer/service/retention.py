"""Retention: deletes old images, jobs, previews and input images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from alphalayer.core.errors import AlphalayerError, FileMissing
from alphalayer.core.job import PREVIEW_PREFIX, job_prefix_of
from alphalayer.jobs.base import JobStore
from alphalayer.observability.logging import log
from alphalayer.service.clock import ClockWatch
from alphalayer.storage import Storage, is_input, read
from alphalayer.storage.inputs import INPUT_PREFIX

DAY_S = 86_400.0
PREVIEW_S = 60.0
"""Seconds that a preview stays after its last change, for clients that have its name."""
MIN_OLD, OLD_SHARE = 100, 0.1
"""Number and share of images or jobs that one sweep may delete by their age.

A clock that is wrong then deletes a part, and the log has warnings.
"""
INPUT_GRACE_S = 3_600.0
"""Seconds that an input image stays after its upload, for a job that follows."""
_LIMITED = "The rest follows with the next sweeps. Check the clock if this is unexpected."


@dataclass(frozen=True)
class Limits:
    """Limits of stored images and jobs. 0 means unlimited."""

    images_days: float = 0.0
    images_bytes: int = 0
    jobs_days: float = 0.0


def select_expired(
    files: Iterable[tuple[str, int, float]],
    limits: Limits,
    now: float,
    is_kept: Callable[[str], bool],
) -> list[str]:
    """Return the keys of the images to delete.

    Old images are deleted first, then the oldest ones until the rest fits.
    The number of old images is limited, see `MIN_OLD`.

    Args:
        files: Key, size in bytes and time of writing of each file.
        limits: Limits of all images.
        now: Unix seconds.
        is_kept: Function that returns whether to keep a file in any case.
    """
    deletable = sorted((modified, key, size) for key, size, modified in files if not is_kept(key))
    total = sum(size for _, _, size in deletable)
    expired: list[str] = []
    old, most_old = 0, max(MIN_OLD, int(OLD_SHARE * len(deletable)))
    for modified, key, size in deletable:
        if key.startswith(PREVIEW_PREFIX):
            is_old = now - modified > PREVIEW_S
        else:
            is_old = 0 < limits.images_days < (now - modified) / DAY_S
            old += is_old
            is_old = is_old and old <= most_old
        if is_old or 0 < limits.images_bytes < total:
            expired.append(key)
            total -= size
    if old > most_old:
        log.warning("retention.limited", old_images=old, deleted=most_old, hint=_LIMITED)
    return expired


async def sweep(
    storage: Storage, job_queue: JobStore, limits: Limits, *, is_clock_trusted: bool = True
) -> int:
    """Delete everything that exceeds the limits.

    Images of unfinished jobs and files of other programs stay.

    Args:
        storage: Storage of the images.
        job_queue: Jobs of the service.
        limits: Limits of images and jobs.
        is_clock_trusted: Whether to delete by age.

    Returns:
        The number of deleted files.
    """
    jobs = 0
    if is_clock_trusted:
        # comes first, as it works even if the storage does not
        jobs = await _sweep_jobs(job_queue, limits.jobs_days) if limits.jobs_days else 0
        await asyncio.to_thread(storage.delete_unfinished)
    else:
        limits = Limits(images_bytes=limits.images_bytes)
    # without limits a bucket does not have to list all images
    is_limited = limits.images_days or limits.images_bytes
    files = await asyncio.to_thread(storage.list, "" if is_limited else INPUT_PREFIX)
    # read after the listing, so that no listed file belongs to a later job
    unfinished = {job_id[:10] for job_id in await job_queue.unfinished_ids()}
    images = [file for file in files if job_prefix_of(file[0])]
    expired = await asyncio.to_thread(
        select_expired, images, limits, time.time(), lambda key: job_prefix_of(key) in unfinished
    )
    errors = {
        key: error for key in expired if (error := await asyncio.to_thread(_delete, storage, key))
    }
    if errors:
        log.warning(
            "retention.images_kept", pictures=len(errors), error=str(next(iter(errors.values())))
        )
    deleted = [key for key in expired if key not in errors]
    previews = sum(key.startswith(PREVIEW_PREFIX) for key in deleted)
    inputs = await _sweep_inputs(storage, job_queue, files) if is_clock_trusted else 0
    if deleted or jobs or inputs:
        log.info(
            "retention.completed",
            pictures=len(deleted) - previews,
            previews=previews,
            inputs=inputs,
            jobs=jobs,
        )
    return len(deleted) + inputs


async def _sweep_jobs(job_queue: JobStore, days: float) -> int:
    """Delete old jobs, as many as one sweep may delete. Return their number."""
    oldest = time.time() - days * DAY_S
    deleted = await job_queue.delete_finished(oldest, MIN_OLD)
    if deleted < MIN_OLD:
        return deleted
    most = int(OLD_SHARE * (await job_queue.count_finished() + deleted))
    if most > deleted:
        deleted += await job_queue.delete_finished(oldest, most - deleted)
    if deleted >= most:
        log.warning("retention.limited", deleted_jobs=deleted, hint=_LIMITED)
    return deleted


async def _sweep_inputs(
    storage: Storage, job_queue: JobStore, files: Iterable[tuple[str, int, float]]
) -> int:
    """Delete old input images that no unfinished job names. Return their number.

    Images that are named get a new age, as another service with a queue of its own may share
    the storage.
    """
    now = time.time()
    ages = {key: now - modified for key, _, modified in files if is_input(key)}
    aging = {key for key, age in ages.items() if age > INPUT_GRACE_S / 2}
    if not aging:
        return 0
    named = await job_queue.input_names()
    deleted, errors = 0, list[AlphalayerError]()
    for key in aging:
        try:
            if key in named:
                data = await read(storage, key)
                await asyncio.to_thread(partial(storage.put, key, data, renew=True))
            # a new upload may have renewed it since the listing
            elif (await storage.open(key)).modified_at < now - INPUT_GRACE_S:
                await asyncio.to_thread(storage.delete, key)
                deleted += 1
        except FileMissing:
            pass
        except AlphalayerError as error:
            errors.append(error)
    if errors:
        log.warning("retention.inputs_kept", inputs=len(errors), error=str(errors[0]))
    return deleted


def _delete(storage: Storage, key: str) -> AlphalayerError | None:
    """Delete a file. Return the error if it stays."""
    try:
        storage.delete(key)
    except AlphalayerError as error:
        return error
    return None


async def keep_sweeping(
    storage: Storage, job_queue: JobStore, limits: Limits, every_s: float = 600.0
) -> None:
    """Sweep regularly until cancelled. Errors are logged."""
    clock = ClockWatch()
    while True:
        try:
            await sweep(storage, job_queue, limits, is_clock_trusted=clock.is_trusted())
        except AlphalayerError as error:
            log.warning("retention.failed", error=str(error))
        await asyncio.sleep(every_s)
