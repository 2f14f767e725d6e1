"""The queue of jobs, as the API and the supervisor see it. Knows nothing of engines, HTTP or pictures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from alphalayer.errors import AlphalayerError
from alphalayer.job import Job, JobProgress, JobResult, JobSpec, JobState

MAX_STARTS = 3
"""A job that took its engine process down this often is failed, so that it cannot loop."""


@dataclass(frozen=True)
class JobView:
    """A job as it stands now: its place in the queue (1 is next; 0 once it runs), progress, and seconds left if that can be said."""

    job: Job
    position: int = 0
    progress: JobProgress = JobProgress()
    eta_s: float | None = None


class Dispatcher(Protocol):
    """Takes jobs in, hands them out once each, and remembers what came of them."""

    async def submit(self, spec: JobSpec, *, owner: str = "", idempotency_key: str | None = None) -> Job:
        """Accept a job; from then on it is not lost. The same owner and key give the same job again. Raises `QueueFull`."""
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
        """Stop this job, if it is not over; whether there was something to stop."""
        ...

    async def wait(self, job_id: str) -> Job:
        """The job, once it is over."""
        ...

    def watch(self, job_id: str) -> AsyncIterator[JobView]:
        """How the job stands, now and at every change, until it is over."""
        ...

    async def take(self) -> Job:
        """The next job to run; waits for one. Used by supervisors, as all below."""
        ...

    async def take_like(self, job: Job, pixels: int) -> Job | None:
        """The oldest waiting job that may be drawn together with `job` and has at most so many pixels; does not wait for one."""
        ...

    async def started(self, job_id: str) -> None:
        """The engine began with it: counts a start."""
        ...

    async def progressed(self, job_id: str, progress: JobProgress) -> None:
        """The engine is so far."""
        ...

    async def finished(self, job_id: str, outcome: JobResult | AlphalayerError) -> None:
        """It is over: pictures, or the reason why there are none. Says nothing where it was over already."""
        ...

    async def released(self, job_id: str, reason: str) -> None:
        """The engine process is gone: back to the front of the queue, or failed after `MAX_STARTS` starts."""
        ...

    async def cancel_asked(self, job_id: str) -> None:
        """Returns when somebody wants this job to stop."""
        ...
