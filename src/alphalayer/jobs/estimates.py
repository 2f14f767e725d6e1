"""How long jobs still take, in seconds: a running one by its steps so far, a waiting one by all that comes before it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from alphalayer.core.job import JobProgress


def rest_s(started_at: float | None, progress: JobProgress) -> float | None:
    """What a running job still takes, if it goes on as it did; None before its first step."""
    if not started_at or not progress.step:
        return None
    return round((time.time() - started_at) / progress.step * (progress.steps - progress.step), 1)


def wait_s(rests: Sequence[float | None], running: int, before: int, usual_s: float) -> float:
    """Until a waiting job is over: the rest of what runs, the jobs before it spread over as many as run at once, and itself.

    `rests` are those of the `running` jobs, or of some of them; one that is not known counts as the usual time of a job.
    """
    known = [usual_s if each is None else each for each in rests]
    rest = sum(known) / len(known) if known else 0.0
    return round(rest + before * usual_s / max(1, running) + usual_s, 1)
