"""Which jobs are drawn together: always the oldest one, and with it those like it that fit into a budget of pixels.

A job is never passed over for a batch: the next batch begins with the job that has waited longest, whatever it is. What joins it
costs those behind it only the time that a larger batch takes longer.
"""

from __future__ import annotations

import asyncio

from alphalayer.core.job import Job
from alphalayer.jobs.base import JobConsumer

LOOK_AGAIN_S = (0.01, 0.25)
"""The pauses between two looks for more: the first, each next one twice as long, and the longest."""


async def claim_batch(
    job_queue: JobConsumer, budget_pixels: int, wait_s: float, holding: str | None = None
) -> list[Job]:
    """Wait for a job, then up to `wait_s` seconds for more that may be drawn with it; stops as soon as the budget is used up.

    When it is cancelled or fails, what was taken goes back to the queue in its order.
    """
    batch: list[Job] = []
    try:
        first = await job_queue.claim(holding)
        batch.append(first)
        room = budget_pixels - first.spec.pixels
        deadline = asyncio.get_running_loop().time() + wait_s
        pause = LOOK_AGAIN_S[0]
        while first.batch_key and room >= first.spec.pixels // first.spec.generation.batch_size:
            mate = await job_queue.claim_compatible(first, room)
            if mate:
                batch.append(mate)
                room -= mate.spec.pixels
            elif (left := deadline - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, LOOK_AGAIN_S[1])
            else:
                break
    except BaseException:
        for job in reversed(batch):
            await job_queue.requeue(job.id, "the supervisor stopped")
        raise
    return batch
