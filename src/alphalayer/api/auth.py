"""Who may ask: API keys as Bearer token or `X-API-Key`, user and password by HTTP Basic, and how often each may ask."""

from __future__ import annotations

import base64
import binascii
import math
import secrets
import time
from collections.abc import Callable, Sequence

from fastapi import Request
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from alphalayer.auth.api_keys import Key, digest
from alphalayer.core.errors import RateLimited, Unauthorized


class Challenge(Unauthorized):
    """Says in HTTP, too, how to send credentials."""

    headers = {"WWW-Authenticate": 'Basic realm="alphalayer"'}  # noqa: RUF012 - never changed


class Authenticator:
    """Lets requests in by the keys that there are now; with None in place of keys, everybody. Rates are counted in this process."""

    def __init__(self, keys: Callable[[], Sequence[Key] | None]):
        self._keys = keys
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def admit(self, request: Request) -> str:
        """The name of who is asking; "" where nobody has to say. Raises `Unauthorized`, `RateLimited`."""
        keys = self._keys()
        if keys is None:
            return ""
        offered = _secrets(request)
        key = self._find(keys, offered)
        if key is None:
            error = Challenge(
                "this key is not known." if offered else "a key is needed.",
                hint="Send it as Bearer token, as X-API-Key, or user and password by HTTP Basic.",
            )
            if "x-requested-with" in request.headers:
                # a page that asks by itself: the browser is not to open its own dialog for passwords
                error.headers = {"WWW-Authenticate": 'Bearer realm="alphalayer"'}
            raise error
        if key.per_minute and request.method == "POST":
            self._count(key)
        return key.name

    @staticmethod
    def _find(keys: Sequence[Key], offered: list[str]) -> Key | None:
        found: Key | None = None
        for secret in offered:
            hashed = digest(secret)
            for key in keys:
                # all are compared, so that the time tells nothing
                if secrets.compare_digest(hashed, key.sha256):
                    found = key
        return found

    def _count(self, key: Key) -> None:
        rate = RateLimitItemPerMinute(key.per_minute)
        if self._limiter.hit(rate, key.name):
            return
        wait = max(
            1, math.ceil(self._limiter.get_window_stats(rate, key.name).reset_time - time.time())
        )
        error = RateLimited(
            f'the key "{key.name}" may ask {key.per_minute} times a minute.',
            hint=f"Try again in {wait} seconds.",
        )
        error.retry_after_s = wait
        raise error


def _secrets(request: Request) -> list[str]:
    """What a request offers: Bearer token, X-API-Key, "user:password", and the password alone, which may be a key."""
    offered = [request.headers["x-api-key"]] if "x-api-key" in request.headers else []
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        offered.append(token.strip())
    elif scheme.lower() == "basic":
        try:
            pair = base64.b64decode(token, validate=True).decode("latin-1")
        except (binascii.Error, ValueError):
            return offered
        offered += [pair, pair.partition(":")[2]]
    return [reading for each in offered for reading in _readings(each)]


def _readings(sent: str) -> list[str]:
    """What bytes, read as Latin-1, may have meant: that, or UTF-8; clients differ in which they send."""
    try:
        return list(dict.fromkeys((sent, sent.encode("latin-1").decode())))
    except UnicodeDecodeError:
        return [sent]
