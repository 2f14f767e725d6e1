"""Estimates of the remaining time of running and waiting jobs, in seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence

from alphalayer.core.job import JobProgress


def running_s(started_at: float | None, progress: JobProgress) -> float | None:
    """Return the remaining time of a running job, or None before its first step."""
    if not started_at or not progress.step:
        return None
    return round((time.time() - started_at) / progress.step * (progress.steps - progress.step), 1)


def waiting_s(
    remaining: Sequence[float | None], running: int, before: int, usual_s: float
) -> float:
    """Return the time until a waiting job is finished.

    It is the mean remaining time of the running jobs, plus the earlier waiting jobs spread
    over as many engines, plus the job itself.

    Args:
        remaining: Remaining times of all or some running jobs. None counts as `usual_s`.
        running: Number of running jobs.
        before: Number of waiting jobs before this one.
        usual_s: Usual duration of a job.
    """
    times = [usual_s if seconds is None else seconds for seconds in remaining]
    rest = sum(times) / len(times) if times else 0.0
    return round(rest + before * usual_s / max(1, running) + usual_s, 1)
