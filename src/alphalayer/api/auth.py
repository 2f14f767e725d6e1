"""Authentication of requests.

Clients send an API key as Bearer token or `X-API-Key`, or user and password by HTTP Basic.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request

from alphalayer.auth.api_keys import Key, Scope, digest
from alphalayer.auth.rates import KeyRates, rate_limited
from alphalayer.auth.wrong_keys import PER_MINUTE, WrongKeys
from alphalayer.core.errors import Forbidden, Unauthorized
from alphalayer.observability.logging import log

RECHECK_S = 1.0
"""Seconds between two checks that the key of an open stream is still accepted."""


class Challenge(Unauthorized):
    """Missing or wrong credentials, with the HTTP header that requests them."""

    headers = {"WWW-Authenticate": 'Basic realm="alphalayer"'}  # noqa: RUF012 - never modified


class Authenticator:
    """Check of API keys.

    Args:
        keys: Function that returns the current keys. None: every client is admitted.
        record_use: Function that records the use of a key by its name.
    """

    def __init__(
        self,
        keys: Callable[[], Sequence[Key] | None],
        record_use: Callable[[str], object] = lambda _name: None,
    ):
        self._keys = keys
        self._record_use = record_use
        self._wrong_keys = WrongKeys()
        self.rates = KeyRates(keys)

    def admit(self, request: Request, scope: Scope, *, is_work: bool = False) -> Key | None:
        """Return the key of a request, or None if the service has no keys.

        Args:
            request: The request. Its body is not read.
            scope: Scope that its route requires.
            is_work: Whether the request counts as a submission or conversion.

        Raises:
            Unauthorized: the credentials are missing or wrong.
            Forbidden: the key does not have the scope.
            RateLimited: the key exceeded its rate, or the address sent too many wrong keys.
        """
        keys = self._keys()
        if keys is None:
            return None
        key = self._identify(keys, request)
        if scope not in key.scopes:
            log.warning("audit.forbidden", key=key.name, scope=scope, path=request.url.path)
            raise Forbidden(
                f'the key "{key.name}" does not have the scope "{scope}".',
                hint=f"It has: {', '.join(key.scopes)}. Use another key, "
                "or request one with this scope from the operator.",
            )
        self.rates.count(key, is_work=is_work)
        self._record_use(key.name)
        return key

    async def while_accepted(
        self, key: Key, scope: Scope, chunks: AsyncIterable[Any]
    ) -> AsyncIterator[Any]:
        """Yield the chunks of an event stream until its key is not accepted any more."""
        iterator = aiter(chunks)
        upcoming = asyncio.ensure_future(anext(iterator, None))
        try:
            while True:
                await asyncio.wait({upcoming}, timeout=RECHECK_S)
                if not self._is_accepted(key, scope):
                    log.info("audit.stream_ended", key=key.name)
                    return
                if not upcoming.done():
                    continue
                if (chunk := upcoming.result()) is None:
                    return
                yield chunk
                upcoming = asyncio.ensure_future(anext(iterator, None))
        finally:
            upcoming.cancel()

    def _is_accepted(self, key: Key, scope: Scope) -> bool:
        """Return whether a secret that was accepted before still is."""
        keys = self._keys()
        return keys is None or any(
            other.sha256 == key.sha256 and scope in other.scopes and not other.is_expired
            for other in keys
        )

    def _identify(self, keys: Sequence[Key], request: Request) -> Key:
        """Return the key of a request's credentials.

        After too many wrong keys of an address, its passwords are not compared any more. Random
        keys are, which cannot be guessed: clients behind one proxy must not lock each other out.
        """
        host = request.client.host if request.client else ""
        offered = _secrets(request)
        wait_s = self._wrong_keys.retry_after_s(host) if offered else 0
        key = _find([key for key in keys if not (wait_s and key.is_guessable)], offered)
        if key and not key.is_expired:
            return key
        if wait_s and not key:
            raise rate_limited("this address sent too many wrong keys.", wait_s)
        if offered and not key:
            self._record_wrong_key(host)
        error = Challenge(
            "this key has expired."
            if key
            else "this key is not known."
            if offered
            else "a key is needed.",
            hint="Send it as Bearer token, as X-API-Key, or user and password by HTTP Basic.",
        )
        if "x-requested-with" in request.headers:
            # a script of a page: the browser must not open its password dialog
            error.headers = {"WWW-Authenticate": 'Bearer realm="alphalayer"'}
        raise error

    def _record_wrong_key(self, host: str) -> None:
        """Count a wrong key. Log the first one of a minute, and the last one allowed."""
        count = self._wrong_keys.record(host)
        if count == 1:
            log.warning("audit.wrong_key", address=host)
        if count == PER_MINUTE:
            log.warning("audit.wrong_keys_limited", address=host, wrong_keys=count)


def _find(keys: Sequence[Key], offered: list[str]) -> Key | None:
    """Return the key of one of the offered secrets."""
    match: Key | None = None
    for secret in offered:
        hashed = digest(secret)
        for key in keys:
            # compare all keys, so that the time does not depend on the match
            if secrets.compare_digest(hashed, key.sha256):
                match = key
    return match


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
