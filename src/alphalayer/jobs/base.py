"""The queue of jobs, as the API and the supervisor see it. Knows nothing of engines, HTTP or pictures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from alphalayer.core.errors import AlphalayerError, Cancelled, EngineFailed, QueueFull
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


class Dispatcher(Protocol):
    """Takes jobs in, hands them out once each, and remembers what came of them."""

    @property
    def queue_length(self) -> int:
        """Jobs that wait for an engine."""
        ...

    @property
    def oldest_waiting_s(self) -> float:
        """Seconds that the oldest of them has waited; 0 with none."""
        ...

    @property
    def retry_after_s(self) -> int:
        """When a client that found no room may try again, in seconds."""
        ...

    @property
    def is_reachable(self) -> bool:
        """Whether jobs can be written down now."""
        ...

    async def close(self) -> None:
        """Give everything back; what is not over stays in the journal."""
        ...

    async def submit(
        self,
        spec: JobSpec,
        submission: Submission = Submission(),
        delivery: Delivery = Delivery(),
        job_id: str | None = None,
    ) -> Job:
        """Accept a job; from then on it is not lost. The same owner and key give the same job again, however full the queue is, and it
        is wanted by one more. `job_id` is the id that a new one gets (see `alphalayer.core.job.new_id`), for those who may not hear the answer.

        Raises:
            QueueFull: no room.
            InvalidRequest: the key came with another request before.
        """
        ...

    async def view(self, job_id: str) -> JobView | None:
        """How a job stands; None if there is none of that id."""
        ...

    async def list(
        self, *, owner: str | None = None, state: JobState | None = None, limit: int = 50, before: float | None = None
    ) -> list[JobView]:
        """Jobs, newest first, created before a time."""
        ...

    async def cancel(self, job_id: str) -> bool:
        """Stop this job, if it is not over; whether there was something to stop. Raises `StorageFailed` where the job goes on, as that
        cannot be written down."""
        ...

    async def withdraw(self, job_id: str) -> None:
        """One of those who submitted this job wants it no more. With the last of them it is cancelled, and gives up its idempotency key,
        so that the same request is a new job. Raises as `cancel` does."""
        ...

    async def wait(self, job_id: str) -> Job:
        """The job, once it is over."""
        ...

    def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """How the job stands, now and at every change, until it is over."""
        ...

    async def claim(self, holding: str | None = None) -> Job:
        """The next job to run; waits for one. `holding` names the model that the engine has loaded. Used by supervisors, as all below."""
        ...

    async def claim_compatible(self, job: Job, pixels: int) -> Job | None:
        """The oldest waiting job that may be drawn together with `job` and has at most so many pixels; does not wait for one."""
        ...

    async def mark_started(self, job_id: str) -> None:
        """The engine began with it: counts a start."""
        ...

    async def report_progress(self, job_id: str, progress: JobProgress) -> None:
        """The engine is so far."""
        ...

    async def complete(self, job_id: str, outcome: Outcome) -> None:
        """It is over. Says nothing where it was over already."""
        ...

    async def requeue(self, job_id: str, reason: str, *, is_counted: bool = True) -> None:
        """The engine process is gone: back to the front of the queue, or failed after `MAX_STARTS` starts. Where it was ended in good
        order, this start is not counted."""
        ...

    async def wait_for_cancel(self, job_id: str) -> None:
        """Returns when somebody wants this job to stop."""
        ...

    async def unfinished_ids(self) -> set[str]:
        """The ids of all jobs that are not over. Used by housekeeping, as all below."""
        ...

    async def delete_finished(self, finished_before: float) -> int:
        """Remove jobs that were over before a time (Unix seconds) and owe nobody a webhook; how many."""
        ...

    async def claim_due_webhooks(self, limit: int) -> list[tuple[Job, int]]:
        """Jobs whose receivers are to be told now, with how often that was tried; due again in a minute, unless `record_webhook_attempt` says
        something else. Raises `StorageFailed`."""
        ...

    async def record_webhook_attempt(self, job_id: str, due: float | None, tries: int) -> None:
        """Note a try, and when (Unix seconds) the next one is due; None: no more."""
        ...


def too_many_starts(reason: str) -> EngineFailed:
    """The end of a job that was started too often."""
    return EngineFailed(
        f"the job was started {MAX_STARTS} times and did not come to its end ({reason}).",
        hint="Look at the service's log; ask for a smaller picture, or run: alphalayer doctor",
    )


def check_capacity(waiting: int, limit: int, owner: str, theirs: int, share: float, retry_after_s: int) -> None:
    """Raise `QueueFull` where a queue in which `waiting` jobs wait, `theirs` of them the owner's, has no room for one more: for anybody,
    or in the part of it that the owner may have."""
    hint = f"Try again in {retry_after_s} seconds."
    if waiting >= limit:
        raise QueueFull(f"{waiting} jobs are waiting, and there is room for {limit}.", hint=hint)
    if share < 1.0 and theirs >= max(1, int(share * limit)):
        raise QueueFull(f'"{owner}" has {theirs} jobs waiting and may have {share:.0%} of the queue.', hint=hint)
