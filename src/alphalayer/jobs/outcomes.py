"""Every end of a job is counted and written down here, once, whoever ended it."""

from __future__ import annotations

from alphalayer.core.errors import Cancelled, InvalidRequest
from alphalayer.core.job import JobResult
from alphalayer.jobs.base import Outcome
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics


def record_outcome(metrics: Metrics, job_id: str, outcome: Outcome) -> None:
    """Count an outcome and log it; with `metrics` bound, an `alphalayer.jobs.OnEnd`."""
    if isinstance(outcome, JobResult):
        metrics.jobs.labels("done").inc()
        metrics.pictures.inc(len(outcome.images))
        for stage, seconds in outcome.seconds.items():
            metrics.stage_seconds.labels(stage).observe(seconds)
        log.info("job.done", job=job_id, images=len(outcome.images), seconds=outcome.seconds)
    elif isinstance(outcome, Cancelled):
        metrics.jobs.labels("cancelled").inc()
        log.info("job.cancelled", job=job_id)
    else:
        metrics.jobs.labels(outcome.code).inc()
        # what is wrong with a request is said in pieces of its prompt
        said = (
            {"field": outcome.field}
            if isinstance(outcome, InvalidRequest)
            else {"error": outcome.message}
        )
        log.warning("job.failed", job=job_id, code=outcome.code, **said)
