"""The engine processes of one service, as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from alphalayer.worker.supervisor import Supervisor

REQUEUE_S = 5.0
"""Time to requeue jobs after the deadline, in case the database is unreachable."""


class WorkerPool:
    """Supervisors of a service's engine processes."""

    def __init__(self, supervisors: Sequence[Supervisor]):
        self.supervisors = list(supervisors)

    @property
    def is_ready(self) -> bool:
        """Return whether at least one engine is ready."""
        return any(supervisor.is_ready for supervisor in self.supervisors)

    @property
    def tasks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return the background task of each supervisor by its name."""
        return {supervisor.name: supervisor.run for supervisor in self.supervisors}

    def states(self) -> dict[str, str]:
        """Return the state of each engine: "ready", "starting" or its problem."""
        return {
            supervisor.name: "ready"
            if supervisor.is_ready
            else str(supervisor.problem or "starting")
            for supervisor in self.supervisors
        }

    def stop_accepting(self) -> None:
        """Start no more jobs."""
        for supervisor in self.supervisors:
            supervisor.stop_accepting()

    def is_running(self, job_id: str) -> bool:
        """Return whether a job is in an engine of this service."""
        return any(supervisor.is_running(job_id) for supervisor in self.supervisors)

    async def drain(self, timeout_s: float) -> None:
        """Wait until all running jobs are complete, for `timeout_s` seconds at most."""
        with contextlib.suppress(asyncio.TimeoutError):
            draining = asyncio.gather(*(supervisor.drain() for supervisor in self.supervisors))
            await asyncio.wait_for(draining, timeout_s)

    async def requeue_running(self) -> None:
        """Requeue the jobs that are still running, within `REQUEUE_S` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            requeueing = asyncio.gather(
                *(supervisor.requeue_running() for supervisor in self.supervisors),
                return_exceptions=True,
            )
            await asyncio.wait_for(requeueing, REQUEUE_S)
