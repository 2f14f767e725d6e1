"""The queue of jobs, as the API and the supervisor see it. Knows nothing of engines, HTTP or pictures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from alphalayer.core.errors import AlphalayerError, Cancelled, CommandHint, EngineFailed, QueueFull
from alphalayer.core.job import Delivery, Job, JobProgress, JobResult, JobSpec, JobState, Submission

MAX_STARTS = 3
"""A job that took its engine process down this often is failed, so that it cannot loop."""


USUAL_SECONDS = 20.0
"""What a job is thought to take before one was seen."""


Outcome = JobResult | AlphalayerError
"""How a job ends: with its pictures, or the reason why there are none; `Cancelled` where somebody wanted it to stop."""
OnEnd = Callable[[str, Outcome], None]
"""Told each end of a job once, wherever it ends, after it is written down: the job's id and its outcome."""


def ignore_outcome(_job_id: str, _outcome: Outcome) -> None:
    """Is told and does nothing."""


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """What an outcome changes of a job: state, and result or error."""
    if isinstance(outcome, JobResult):
        return {"state": JobState.DONE, "result": outcome}
    if isinstance(outcome, Cancelled):
        return {"state": JobState.CANCELLED}
    return {"state": JobState.FAILED, "error": outcome.to_dict()}


@dataclass(frozen=True)
class JobView:
    """A job as it stands now: its place in the queue (1 is next; 0 once it runs), progress, and seconds left if that can be said."""

    job: Job
    position: int = 0
    progress: JobProgress = JobProgress()
    eta_s: float | None = None

    @classmethod
    def of_ended(cls, job: Job) -> JobView:
        """A job that is over, as the journal has it; one that is done stands at its last step."""
        steps = job.result.settings.steps * job.spec.iterations if job.result else 0
        return cls(job, progress=JobProgress(step=steps, steps=steps))


class JobQueue(Protocol):
    """Queue of jobs, as the API uses it."""

    @property
    def queue_length(self) -> int:
        """Number of jobs that wait for an engine."""
        ...

    @property
    def oldest_waiting_s(self) -> float:
        """Seconds that the oldest of them has waited; 0 if none waits."""
        ...

    @property
    def retry_after_s(self) -> int:
        """Seconds until a client may try again that found the queue full."""
        ...

    @property
    def is_reachable(self) -> bool:
        """Whether jobs can be stored now."""
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
            job_id: Id of a new job, for clients that may miss the answer. Default: a random id.

        Raises:
            QueueFull: The queue has no room.
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
        """Stop an unfinished job. Return whether there was one to stop.

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

    async def delete_finished(self, finished_before: float) -> int:
        """Delete jobs that finished before a time (Unix seconds).

        Jobs with a pending webhook stay.

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
    """Queue of jobs with all its users' interfaces."""


def too_many_starts(reason: str) -> EngineFailed:
    """The end of a job that was started too often."""
    return EngineFailed(
        f"the job was started {MAX_STARTS} times and did not come to its end ({reason}).",
        hint=CommandHint("Read the service's log. Request a smaller image, or run:", "doctor"),
    )


def check_capacity(
    waiting: int, limit: int, owner: str, theirs: int, share: float, retry_after_s: int
) -> None:
    """Raise `QueueFull` where a queue in which `waiting` jobs wait, `theirs` of them the owner's, has no room for one more: for anybody,
    or in the part of it that the owner may have."""
    hint = f"Try again in {retry_after_s} seconds."
    if waiting >= limit:
        raise QueueFull(f"{waiting} jobs are waiting, and there is room for {limit}.", hint=hint)
    if share < 1.0 and theirs >= max(1, int(share * limit)):
        raise QueueFull(
            f'"{owner}" has {theirs} jobs waiting and may have {share:.0%} of the queue.', hint=hint
        )
