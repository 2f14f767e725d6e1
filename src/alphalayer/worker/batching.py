"""Batches: jobs that are generated together.

A batch holds the oldest job and compatible jobs that fit into a budget of pixels.
The next batch begins with the job that has waited longest, so that no job is passed over.
"""

from __future__ import annotations

import asyncio

from alphalayer.core.job import Job
from alphalayer.jobs.base import JobConsumer

POLL_PAUSE_S = (0.01, 0.25)
"""First and longest pause between two looks for compatible jobs. Each is twice the one before.

Not a retry of `stamina`: no call fails here, and the last pause ends exactly at the deadline.
"""
MAX_BATCH_JOBS = 64
"""Jobs of a batch, so that their message fits into `messages.MAX_LINE_BYTES`."""


async def claim_batch(
    job_queue: JobConsumer, budget_pixels: int, wait_s: float, loaded_model: str | None = None
) -> list[Job]:
    """Wait for a job, then claim compatible jobs until the budget is used up.

    If it is cancelled or fails, the claimed jobs return to the queue in their order.

    Args:
        job_queue: Queue to claim from.
        budget_pixels: Maximum number of pixels of the batch.
        wait_s: Seconds to wait for compatible jobs.
        loaded_model: Name of the model that the engine has loaded.
    """
    batch: list[Job] = []
    try:
        first = await job_queue.claim(loaded_model)
        batch.append(first)
        free_pixels = budget_pixels - first.spec.pixels
        deadline = asyncio.get_running_loop().time() + wait_s
        pause = POLL_PAUSE_S[0]
        image_pixels = first.spec.pixels // first.spec.generation.batch_size
        while first.batch_key and free_pixels >= image_pixels and len(batch) < MAX_BATCH_JOBS:
            job = await job_queue.claim_compatible(first, free_pixels)
            if job:
                batch.append(job)
                free_pixels -= job.spec.pixels
            elif (left := deadline - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, POLL_PAUSE_S[1])
            else:
                break
    except BaseException:
        for job in reversed(batch):
            await job_queue.requeue(job.id, "the supervisor stopped")
        raise
    return batch
