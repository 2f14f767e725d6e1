"""Rates of API keys a minute: requests, submissions and the cost of jobs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter

from alphalayer.auth.api_keys import Key
from alphalayer.core.errors import InvalidRequest, RateLimited

_COST = "megapixel-steps"


class KeyRates:
    """Counts of each key, in this process.

    Args:
        keys: Function that returns the current keys. None: nothing is limited.
    """

    def __init__(self, keys: Callable[[], Sequence[Key] | None]):
        self._keys = keys
        self._counts = MemoryStorage()
        self._submissions = MovingWindowRateLimiter(self._counts)
        # they count thousands a minute: two numbers a key instead of a list of times
        self._sums = SlidingWindowCounterRateLimiter(self._counts)

    def count(self, key: Key, *, is_work: bool) -> None:
        """Count a request, and a submission or conversion if it is one.

        Raises:
            RateLimited: The key exceeded one of its limits.
        """
        _hit(self._sums, key, key.requests_per_minute, "requests")
        if is_work:
            _hit(self._submissions, key, key.per_minute, "submissions and conversions")

    def charge(self, owner: str, cost: float) -> None:
        """Count the cost of a job against the limit of its owner's key.

        Args:
            owner: Name of the client.
            cost: Megapixel-steps.

        Raises:
            InvalidRequest: The job alone costs more than the key allows in a minute.
            RateLimited: The key exceeded its limit.
        """
        key = self._limited_key(owner)
        if key is None:
            return
        if cost > key.cost_per_minute:
            raise InvalidRequest(
                f"the request costs {cost:,.0f} megapixel-steps; "
                f'the key "{key.name}" allows {key.cost_per_minute:,} a minute.',
                hint="Request fewer or smaller images, or fewer steps.",
            )
        _hit(self._sums, key, key.cost_per_minute, _COST, math.ceil(cost))

    def refund(self, owner: str, cost: float) -> None:
        """Subtract the cost of a job that was not queued, see `charge`."""
        if key := self._limited_key(owner):
            rate = RateLimitItemPerMinute(key.cost_per_minute)
            name, window_s = rate.key_for(_COST, key.name), rate.get_expiry()
            _, current = self._counts.sliding_window_keys(name, window_s, time.time())
            # never below zero: a charge of the minute before stays
            self._counts.decr(current, math.ceil(cost))

    def _limited_key(self, owner: str) -> Key | None:
        """Return the key of an owner if it has a limit of cost."""
        keys = self._keys() or ()
        return next((key for key in keys if key.name == owner and key.cost_per_minute), None)


def rate_limited(message: str, wait_s: int) -> RateLimited:
    """Return the error of a client that may try again after some seconds."""
    error = RateLimited(message, hint=f"Try again in {wait_s} seconds.")
    error.retry_after_s = wait_s
    return error


def _hit(limiter: RateLimiter, key: Key, limit: int, what: str, cost: int = 1) -> None:
    """Count against a limit a minute; 0 means no limit. Raises `RateLimited`."""
    rate = RateLimitItemPerMinute(limit)
    if not limit or limiter.hit(rate, what, key.name, cost=cost):
        return
    reset = limiter.get_window_stats(rate, what, key.name).reset_time
    raise rate_limited(
        f'the key "{key.name}" allows {limit:,} {what} a minute.',
        max(1, math.ceil(reset - time.time())),
    )
