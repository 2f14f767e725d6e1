"""URLs of stored images, with a signature and a time of expiry if the service has a secret."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Query

from alphalayer.core.errors import Forbidden

Expires = Annotated[
    int | None, Query(description="Time of expiry in Unix seconds, of a signed URL.")
]
Signature = Annotated[str | None, Query(description="Signature, of a signed URL.")]


@dataclass(frozen=True)
class UrlSigner:
    """Signer of URLs. All machines of a service have the same secret.

    A URL is valid for `lifetime_s` seconds at least, and for twice as long at most. It is the same
    for some time, so that browsers find the image in their cache.
    """

    secret: bytes
    lifetime_s: int
    clock: Callable[[], float] = time.time

    def query(self, key: str) -> str:
        """Return the query of a signed URL, with its question mark."""
        expires = (int(self.clock()) // self.lifetime_s + 2) * self.lifetime_s
        return f"?expires={expires}&signature={self._sign(key, expires)}"

    def check(self, key: str, expires: int | None, signature: str | None) -> int:
        """Return the seconds for which a URL is valid.

        Raises:
            Forbidden: it has no signature, a wrong one, or has expired.
        """
        hint = "Use the URL of a response; a job's view has a new one."
        if expires is None or signature is None:
            raise Forbidden("the URL of the image is not signed.", hint=hint)
        # as bytes: a text outside ASCII cannot be compared
        if not hmac.compare_digest(signature.encode(), self._sign(key, expires).encode()):
            raise Forbidden("the signature of the URL is wrong.", hint=hint)
        left_s = expires - self.clock()
        if left_s <= 0:
            raise Forbidden("the URL has expired.", hint=hint)
        return int(left_s)

    def _sign(self, key: str, expires: int) -> str:
        return hmac.new(self.secret, f"{key}\n{expires}".encode(), hashlib.sha256).hexdigest()


def file_url(base: str, key: str, signer: UrlSigner | None = None) -> str:
    """Return the URL of a stored image, for a client that uses the address `base`."""
    return f"{base}/alpha/v1/file/{key}{signer.query(key) if signer else ''}"
