"""Estimates of the remaining time of running and waiting jobs, in seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence

from alphalayer.core.job import JobProgress


def elapsed_s(since: float | None) -> float | None:
    """Return the seconds since a time (Unix seconds); 0 if the clock was set back."""
    return None if since is None else max(0.0, time.time() - since)


def running_s(elapsed: float | None, progress: JobProgress) -> float | None:
    """Return the remaining time of a running job, or None before its first step.

    Args:
        elapsed: Seconds since its start.
        progress: Its progress.
    """
    if elapsed is None or not progress.step:
        return None
    return round(elapsed / progress.step * max(0, progress.steps - progress.step), 1)


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
