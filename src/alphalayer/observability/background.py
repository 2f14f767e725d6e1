"""Background tasks and retries that do not give up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import stamina

from alphalayer.observability.logging import log

PAUSE_S = 5.0
"""Seconds between an error of a background task and its next start."""

# each retry logs an event of its own, which the library's line would repeat
stamina.instrumentation.set_on_retry_hooks(())


def retry_until_success(
    errors: type[Exception] | tuple[type[Exception], ...],
    report: Callable[[Exception], object],
    pause_s: float,
    max_pause_s: float | None = None,
) -> AsyncIterator[stamina.Attempt]:
    """Yield attempts until one succeeds. Each is a context manager.

    Args:
        errors: Errors after which to try again. Other errors are raised.
        report: Function that logs such an error.
        pause_s: Seconds before the second attempt, up to twice as long by a random part.
        max_pause_s: Bound of the pauses in seconds. They double up to it. None: constant.
    """

    def is_retried(error: Exception) -> bool:
        if not isinstance(error, errors):
            return False
        report(error)
        return True

    return stamina.retry_context(
        on=is_retried,
        attempts=None,
        timeout=None,
        wait_initial=pause_s,
        wait_max=max_pause_s or 2 * pause_s,
        wait_jitter=pause_s,
        wait_exp_base=2 if max_pause_s else 1,
    )


async def keep_running(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run a background task until it returns. After an error, log it and run it again.

    Args:
        name: Name of the task in the log.
        work: The task.
    """

    def report(error: Exception) -> None:
        log.error("task.failed", task=name, exc_info=error)

    async for attempt in retry_until_success(Exception, report, PAUSE_S):
        with attempt:
            await work()
