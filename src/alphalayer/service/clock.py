"""Detection of a wall clock that was set."""

from __future__ import annotations

import time

from alphalayer.observability.logging import log

MAX_JUMP_S = 3_600.0
"""Largest change of the clock that counts as a correction."""
PAUSE_S = 86_400.0
"""Seconds after a jump for which the clock is not trusted, so that it can be corrected."""


class ClockWatch:
    """Comparison of the wall clock with the time since the start of the machine."""

    def __init__(self) -> None:
        self._offset = time.time() - _uptime_s()
        self._jumped_at: float | None = None

    def is_trusted(self) -> bool:
        """Return whether the clock shows the real age of files."""
        uptime = _uptime_s()
        offset = time.time() - uptime
        jump, self._offset = offset - self._offset, offset
        if jump > MAX_JUMP_S:
            self._jumped_at = uptime
            log.warning(
                "retention.clock_jumped",
                seconds=round(jump),
                paused_hours=round(PAUSE_S / 3600),
                hint="Check the clock. Nothing is deleted by its age meanwhile.",
            )
        elif jump < -MAX_JUMP_S:
            self._jumped_at = None
            log.warning("retention.clock_set_back", seconds=round(-jump))
        return self._jumped_at is None or uptime - self._jumped_at > PAUSE_S


def _uptime_s() -> float:
    """Return the seconds since the start of the machine, with its time asleep."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
