"""Shutdown of the service: running jobs finish, within one deadline for all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from alphalayer.core.errors import Stopping
from alphalayer.observability.logging import log


@dataclass
class Shutdown:
    """Shutdown that starts with `begin` and ends `drain_s` seconds later.

    It belongs to the event loop of the service.
    """

    drain_s: float
    stop_accepting: Callable[[], None]
    """Stops the workers of this process from claiming jobs."""
    is_running: Callable[[str], bool]
    """Whether a worker of this process is running a job."""
    is_shared: bool = False
    """Whether workers of other machines claim jobs of the same queue."""
    _begun: asyncio.Event = field(default_factory=asyncio.Event)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _deadline: float = 0.0

    def begin(self) -> None:
        """Start the shutdown and stop accepting jobs. A second call has no effect."""
        if self.has_begun:
            return
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + self.drain_s
        loop.call_later(self.drain_s, self._over.set)
        self.stop_accepting()
        self._begun.set()
        log.info("service.stopping", drain_s=self.drain_s)

    @property
    def has_begun(self) -> bool:
        """Return whether the shutdown has started."""
        return self._begun.is_set()

    @property
    def left_s(self) -> float:
        """Return the seconds until the deadline of a shutdown that has started."""
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def check(self) -> None:
        """Check that the service accepts requests.

        Raises:
            Stopping: the shutdown has started.
        """
        if self.has_begun:
            raise stopping()

    async def wait(self, job_id: str, *, elsewhere: bool = False) -> None:
        """Wait until clients should no longer wait for a job.

        Args:
            job_id: Id of the job.
            elsewhere: Whether to wait until the deadline for workers of other machines, too.
        """
        await self._begun.wait()
        if self.is_running(job_id) or (elsewhere and self.is_shared):
            await self._over.wait()


def stopping() -> Stopping:
    """Return the error for clients whose job has not finished."""
    return Stopping(
        "the service is being stopped.",
        hint=f"Try again in {Stopping.retry_after_s} seconds. Accepted jobs are kept.",
    )
