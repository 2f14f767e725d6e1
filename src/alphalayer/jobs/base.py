"""Protocols of the job queue for the API, workers and housekeeping."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from alphalayer.core.errors import AlphalayerError, Cancelled, CommandHint, EngineFailed, QueueFull
from alphalayer.core.job import Delivery, Job, JobProgress, JobResult, JobSpec, JobState, Submission

MAX_STARTS = 3
"""Starts after which a job fails whose engine process stops each time."""

USUAL_SECONDS = 20.0
"""Assumed duration of a job before the first one has finished."""

Outcome = JobResult | AlphalayerError
"""Images of a job or its error. The error is `Cancelled` after a cancel request."""
OnOutcome = Callable[[str, Outcome], None]
"""Callback for a job's id and outcome. It is called once a job, after the outcome is stored."""


def ignore_outcome(_job_id: str, _outcome: Outcome) -> None:
    """Ignore an outcome."""


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """Return the fields of a job that its outcome changes: state, and result or error."""
    if isinstance(outcome, JobResult):
        return {"state": JobState.DONE, "result": outcome}
    if isinstance(outcome, Cancelled):
        return {"state": JobState.CANCELLED}
    return {"state": JobState.FAILED, "error": outcome.to_dict()}


@dataclass(frozen=True)
class JobView:
    """A job with its position in the queue, progress and remaining time.

    `position` is 1 for the next job and 0 for a running one.
    `eta_s` is None while the time cannot be estimated.
    """

    job: Job
    position: int = 0
    progress: JobProgress = JobProgress()
    eta_s: float | None = None

    @classmethod
    def of_finished(cls, job: Job) -> JobView:
        """Return the view of a finished job. A completed one is at its last step."""
        parts = job.spec.iterations * len(job.spec.requests)
        steps = job.result.settings.steps * parts if job.result else 0
        return cls(job, progress=JobProgress(step=steps, steps=steps))


class JobQueue(Protocol):
    """Queue of jobs, as the API uses it."""

    @property
    def queue_length(self) -> int:
        """Return the number of waiting jobs."""
        ...

    @property
    def oldest_waiting_s(self) -> float:
        """Return the age of the oldest waiting job in seconds, or 0 without one."""
        ...

    @property
    def retry_after_s(self) -> int:
        """Return the seconds until a client may retry after a full queue."""
        ...

    @property
    def problem(self) -> str | None:
        """Return why jobs cannot be stored now, or None."""
        ...

    async def close(self) -> None:
        """Release all resources. Unfinished jobs stay in the journal."""
        ...

    async def submit(
        self,
        spec: JobSpec,
        submission: Submission = Submission(),
        delivery: Delivery = Delivery(),
        job_id: str | None = None,
    ) -> Job:
        """Accept and store a job.

        A repeated owner and idempotency key return the first job, even if the queue is full.
        The job then has one more client.

        Args:
            spec: What to generate.
            submission: Where the job came from.
            delivery: How the outcome reaches the client.
            job_id: Id of a new job, for clients that may miss the response. Default: a random id.

        Raises:
            QueueFull: The queue is full.
            InvalidRequest: The key came with another request before.
        """
        ...

    async def view(self, job_id: str) -> JobView | None:
        """Return the job as it is now, or None if no job has this id."""
        ...

    async def list(
        self,
        *,
        owner: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        before: float | None = None,
    ) -> list[JobView]:
        """Return jobs created before a time (Unix seconds), newest first."""
        ...

    async def cancel(self, job_id: str) -> bool:
        """Cancel an unfinished job. Return whether it was unfinished.

        Raises:
            StorageFailed: The request cannot be stored. The job continues.
        """
        ...

    async def withdraw(self, job_id: str) -> None:
        """Remove one of the job's clients.

        Without clients the job is cancelled and gives up its idempotency key.

        Raises:
            StorageFailed: The request cannot be stored. The job continues.
        """
        ...

    async def wait(self, job_id: str) -> Job:
        """Return the job after it has finished."""
        ...

    async def load_options(self, owner: str) -> dict[str, Any]:
        """Return the stored options of a client, by name.

        Raises:
            StorageFailed: They cannot be read.
        """
        ...

    async def save_options(self, owner: str, options: Mapping[str, Any]) -> None:
        """Store options of a client, for all services that share the queue. Others stay.

        Args:
            owner: Name of the client.
            options: JSON-ready values by name, of at most 50 characters.

        Raises:
            StorageFailed: They cannot be written.
        """
        ...

    def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """Yield the job now and at every change until it has finished."""
        ...


class JobConsumer(Protocol):
    """Queue of jobs, as a worker uses it."""

    async def claim(self, holding: str | None = None) -> Job:
        """Wait for the next job and claim it.

        Args:
            holding: Name of the model that the engine has loaded.
        """
        ...

    async def claim_compatible(self, job: Job, pixels: int) -> Job | None:
        """Claim the oldest waiting job that fits into a batch with `job`.

        Args:
            job: A claimed job of the batch.
            pixels: Maximum number of pixels of the other job.

        Returns:
            The claimed job, or None if none fits now.
        """
        ...

    async def mark_started(self, job_id: str) -> None:
        """Count a start of the job in an engine."""
        ...

    async def report_progress(self, job_id: str, progress: JobProgress) -> None:
        """Publish the progress of a running job."""
        ...

    async def complete(self, job_id: str, outcome: Outcome) -> None:
        """Store the outcome of a job. Finished jobs do not change."""
        ...

    async def requeue(self, job_id: str, reason: str, *, is_counted: bool = True) -> None:
        """Return a claimed job to the front of the queue.

        After `MAX_STARTS` starts the job fails instead.

        Args:
            job_id: Id of the job.
            reason: Why its engine process did not finish it.
            is_counted: Whether this start counts. A clean shutdown passes False.
        """
        ...

    async def wait_for_cancel(self, job_id: str) -> None:
        """Return once the job is to be cancelled."""
        ...


class JobStore(Protocol):
    """Stored jobs, as housekeeping uses them."""

    async def unfinished_ids(self) -> set[str]:
        """Return the ids of all unfinished jobs."""
        ...

    async def input_names(self) -> set[str]:
        """Return the names of the input images of all unfinished jobs."""
        ...

    async def count_finished(self) -> int:
        """Return the number of finished jobs."""
        ...

    async def delete_finished(self, finished_before: float, at_most: int) -> int:
        """Delete jobs that finished before a time, the oldest first.

        Jobs with a pending webhook stay.

        Args:
            finished_before: Unix seconds.
            at_most: Maximum number of jobs.

        Returns:
            The number of deleted jobs.
        """
        ...

    async def claim_due_webhooks(self, limit: int) -> list[tuple[Job, int]]:
        """Claim jobs whose webhook is due.

        They are due again in a minute unless `record_webhook_attempt` sets another time.

        Returns:
            Each job and the number of attempts so far.

        Raises:
            StorageFailed: The journal cannot be read or written.
        """
        ...

    async def record_webhook_attempt(self, job_id: str, due: float | None, tries: int) -> None:
        """Store the number of attempts and the time of the next one.

        Args:
            job_id: Id of the job.
            due: Time of the next attempt in Unix seconds. None: no further attempt.
            tries: Number of attempts so far.
        """
        ...


class Jobs(JobQueue, JobConsumer, JobStore, Protocol):
    """Queue of jobs with the interfaces of all its users."""


def too_many_starts(reason: str) -> EngineFailed:
    """Return the error of a job that was started too often."""
    return EngineFailed(
        f"the job was started {MAX_STARTS} times and never finished ({reason}).",
        hint=CommandHint("Check the service's log. Request a smaller image, or run:", "doctor"),
    )


def check_capacity(
    waiting: int, limit: int, owner: str, owned: int, share: float, retry_after_s: int
) -> None:
    """Check that a queue has capacity for one more job of an owner.

    Args:
        waiting: Number of waiting jobs.
        limit: Maximum number of waiting jobs.
        owner: Name of the client.
        owned: Number of waiting jobs of the owner.
        share: Fraction of the queue that the owner may fill, from 0 to 1.
        retry_after_s: Seconds until the client may retry.

    Raises:
        QueueFull: The queue or the owner's share of it is full.
    """
    hint = f"Try again in {retry_after_s} seconds."
    if waiting >= limit:
        raise QueueFull(f"{waiting} jobs are waiting; at most {limit}.", hint=hint)
    if share < 1.0 and owned >= max(1, int(share * limit)):
        raise QueueFull(
            f'"{owner}" has {owned} waiting jobs and may fill {share:.0%} of the queue.', hint=hint
        )
