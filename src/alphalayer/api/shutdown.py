"""How a service ends, for those who wait for pictures: what is at work here is brought to its end, within one deadline for everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from alphalayer.core.errors import Stopping
from alphalayer.observability.logging import log


@dataclass
class Shutdown:
    """Begins once, by `begin`; ends `drain_s` seconds later. Made and used on the service's event loop."""

    drain_s: float
    stop_accepting: Callable[[], None]
    """Lets the engines here begin nothing new."""
    is_running: Callable[[str], bool]
    """Whether a job is in an engine here."""
    others_draw: bool = False
    """Whether what waits in the queue may be drawn elsewhere."""
    _begun: asyncio.Event = field(default_factory=asyncio.Event)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _deadline: float = 0.0

    def begin(self) -> None:
        """The service is to end: take no more. Again: nothing happens."""
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
        """Whether the service is ending."""
        return self._begun.is_set()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; only once it has begun."""
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def check(self) -> None:
        """Raise `Stopping` if the service is ending."""
        if self.has_begun:
            raise stopping()

    async def wait(self, job_id: str, *, elsewhere: bool = False) -> None:
        """Return when it is no use to wait here for this job any longer. `elsewhere`: another pod that draws it is waited for, too."""
        await self._begun.wait()
        if self.is_running(job_id) or (elsewhere and self.others_draw):
            await self._over.wait()


def stopping() -> Stopping:
    """What those are told who wait in vain."""
    return Stopping(
        "the service is being stopped.",
        hint=f"Ask again in {Stopping.retry_after_s} seconds. What was accepted is kept and drawn later.",
    )
