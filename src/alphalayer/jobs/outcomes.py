"""Log and metrics of the outcomes of jobs."""

from __future__ import annotations

from alphalayer.core.errors import Cancelled, InvalidRequest
from alphalayer.core.job import JobResult
from alphalayer.jobs.base import Outcome
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics


def record_outcome(metrics: Metrics, job_id: str, outcome: Outcome) -> None:
    """Count and log an outcome. With `metrics` bound it is an `OnOutcome` callback."""
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
        # the message of an invalid request quotes its prompt
        is_invalid = isinstance(outcome, InvalidRequest)
        cause = {"field": outcome.field} if is_invalid else {"error": outcome.message}
        log.warning("job.failed", job=job_id, code=outcome.code, **cause)


def describe_failure(outcome: Outcome) -> str | None:
    """Return why a job failed, for its trace.

    The message of an invalid request may quote its prompt, and is left out.
    """
    if isinstance(outcome, JobResult):
        return None
    return outcome.code if isinstance(outcome, InvalidRequest) else outcome.message
