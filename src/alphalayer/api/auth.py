"""Authentication and rate limits.

Clients send an API key as Bearer token or `X-API-Key`, or user and password by HTTP Basic.
"""

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
    """Missing or wrong credentials, with the HTTP header that requests them."""

    headers = {"WWW-Authenticate": 'Basic realm="alphalayer"'}  # noqa: RUF012 - never modified


class Authenticator:
    """Check of API keys and of their rates, which are counted in this process.

    Args:
        keys: Function that returns the current keys. None: every client is admitted.
    """

    def __init__(self, keys: Callable[[], Sequence[Key] | None]):
        self._keys = keys
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def admit(self, request: Request) -> str:
        """Return the name of the client, "" if the service has no keys.

        Raises:
            Unauthorized: the credentials are missing or wrong.
            RateLimited: the key exceeded its rate.
        """
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
                # a script of a page: the browser must not open its password dialog
                error.headers = {"WWW-Authenticate": 'Bearer realm="alphalayer"'}
            raise error
        if key.per_minute and request.method == "POST":
            self._count(key)
        return key.name

    @staticmethod
    def _find(keys: Sequence[Key], offered: list[str]) -> Key | None:
        match: Key | None = None
        for secret in offered:
            hashed = digest(secret)
            for key in keys:
                # compare all keys, so that the time does not depend on the match
                if secrets.compare_digest(hashed, key.sha256):
                    match = key
        return match

    def _count(self, key: Key) -> None:
        rate = RateLimitItemPerMinute(key.per_minute)
        if self._limiter.hit(rate, key.name):
            return
        wait = max(
            1, math.ceil(self._limiter.get_window_stats(rate, key.name).reset_time - time.time())
        )
        error = RateLimited(
            f'the key "{key.name}" allows {key.per_minute} requests a minute.',
            hint=f"Try again in {wait} seconds.",
        )
        error.retry_after_s = wait
        raise error


def _secrets(request: Request) -> list[str]:
    """Return the credentials of a request.

    They are the Bearer token, X-API-Key, "user:password", and the password, which may be a key.
    """
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
    return [decoded for secret in offered for decoded in _decode(secret)]


def _decode(sent: str) -> list[str]:
    """Return a header value as Latin-1 and as UTF-8, because clients send either."""
    try:
        return list(dict.fromkeys((sent, sent.encode("latin-1").decode())))
    except UnicodeDecodeError:
        return [sent]
