"""Webhooks: when a job is over, its JSON is posted to the address that came with it, signed, until somebody takes it.

Signed as https://www.standardwebhooks.com says. What is owed stands in the journal, so that a restart forgets none; a receiver may get
one twice and knows it by its `webhook-id`, the job's. Addresses within private networks are refused unless they are allowed: the host is
looked up here and the connection goes to the very address that was checked.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import time
from typing import Any

import httpx

from alphalayer.api.jobs import answer
from alphalayer.errors import InvalidRequest, StorageFailed
from alphalayer.job import Job
from alphalayer.jobs import Dispatcher, JobView
from alphalayer.telemetry import Metrics, log

PAUSES_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
"""Before each new try; after the last one it is given up."""
TIMEOUT_S = 15.0
LOOK_EVERY_S = 0.5
AWAY_S = 5.0
"""Before the journal is asked again that could not be reached."""
AT_ONCE = 16
SECRET_PREFIX = "whsec_"
GONE = 410


class Refused(Exception):
    """An address that nothing is sent to."""


def check_url(url: str, *, allow_private: bool) -> None:
    """Raise `InvalidRequest` for what can never be sent to; host names are looked up when there is something to send."""
    try:
        parsed = httpx.URL(url)
        scheme, host, userinfo = parsed.scheme, parsed.host, parsed.userinfo
    except (httpx.InvalidURL, TypeError) as error:
        raise InvalidRequest(f"not an address ({error}).", field="webhook_url") from None
    if scheme not in ("http", "https") or not host or userinfo:
        raise InvalidRequest("use http:// or https:// and a host, without user and password.", field="webhook_url")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    if not (allow_private or address.is_global):
        raise InvalidRequest(f"{host} is not an address of the internet.", hint=_PRIVATE, field="webhook_url")


_PRIVATE = "The service sends to private networks only where webhook_allow_private is set."


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` of a message: v1, HMAC-SHA256 of "id.timestamp.body" in base64.

    A secret that begins with whsec_ is base64, any other is taken as it is.
    """
    key = base64.b64decode(secret[len(SECRET_PREFIX) :]) if secret.startswith(SECRET_PREFIX) else secret.encode()
    signed = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed).decode()}"


class Webhooks:
    """Tells the receivers of one service. `run` is one task of its event loop."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics, secret: str, *, allow_private: bool):
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._secret = secret
        self._allow_private = allow_private
        self._at_work: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Send what is owed as it falls due, until cancelled."""
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http:
            try:
                while True:
                    try:
                        owed = await self._dispatcher.owed_webhooks(AT_ONCE)
                    except StorageFailed as error:
                        log.warning("webhooks_wait", error=str(error), again_in_s=AWAY_S)
                        await asyncio.sleep(AWAY_S)
                        continue
                    for job, tries in owed:
                        if job.id not in self._at_work:
                            self._at_work[job.id] = asyncio.create_task(self._tell(http, job, tries))
                    await asyncio.sleep(LOOK_EVERY_S)
            finally:
                for task in self._at_work.values():
                    task.cancel()
                await asyncio.gather(*self._at_work.values(), return_exceptions=True)

    async def _tell(self, http: httpx.AsyncClient, job: Job, tries: int) -> None:
        """One try, and what follows from it."""
        outcome, due, reason = "delivered", None, ""
        try:
            status = await self._post(http, job)
            if not 200 <= status < 300:
                outcome, reason = ("given_up" if status == GONE else "retried"), f"it answered {status}"
        except (Refused, httpx.InvalidURL) as error:
            outcome, reason = "given_up", str(error)
        except (httpx.HTTPError, OSError) as error:
            outcome, reason = "retried", f"{type(error).__name__}: {error}"
        if outcome == "retried":
            outcome, due = ("given_up", None) if tries >= len(PAUSES_S) else (outcome, time.time() + PAUSES_S[tries])
        self._metrics.webhooks.labels(outcome).inc()
        log.info(f"webhook_{outcome}", job=job.id, tries=tries + 1, **({"reason": reason} if reason else {}))
        await self._dispatcher.webhook_told(job.id, due, tries + 1)
        del self._at_work[job.id]

    async def _post(self, http: httpx.AsyncClient, job: Job) -> int:
        """Send; the status. Redirects are not followed, and nothing of the answer is read."""
        webhook = job.spec.webhook
        assert webhook is not None
        url = httpx.URL(webhook.url)
        address = await self._look_up(url)
        body = answer(JobView(job), webhook.service_url).model_dump_json().encode()
        now = int(time.time())
        headers = {
            "host": url.netloc.decode(),
            "content-type": "application/json",
            "webhook-id": job.id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(self._secret, job.id, now, body),
        }
        # to the address that was checked, and by the name that the certificate is for
        named: dict[str, Any] = {"sni_hostname": url.host}
        async with http.stream(
            "POST", url.copy_with(host=address), content=body, headers=headers, extensions=named
        ) as response:
            return response.status_code

    async def _look_up(self, url: httpx.URL) -> str:
        """An address of the URL's host. Raises `Refused` if any that it has is private, `OSError` if it has none."""
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=1)
        addresses = [str(each[4][0]) for each in found]
        for address in addresses:
            if not (self._allow_private or ipaddress.ip_address(address.partition("%")[0]).is_global):
                raise Refused(f"{url.host} is {address}, not an address of the internet. {_PRIVATE}")
        return addresses[0]
