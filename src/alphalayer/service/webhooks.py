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
from alphalayer.core.errors import InvalidRequest, SetupFailed, StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs.base import JobStore, JobView
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics

PAUSES_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
"""Before each new try; after the last one it is given up."""
TIMEOUT_S = 15.0
"""For one try as a whole: name, connection and answer."""
LOOK_EVERY_S = 0.5
AWAY_S = 5.0
"""Before the journal is asked again that could not be reached."""
AT_ONCE = 200
"""So many tries may be on their way; receivers that hang keep their place for the time of one try."""
SECRET_PREFIX = "whsec_"
GONE = 410
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


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
        raise InvalidRequest(
            "use http:// or https:// and a host, without user and password.", field="webhook_url"
        )
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    if not (allow_private or is_public(address)):
        raise InvalidRequest(
            f"{host} is not an address of the internet.", hint=_PRIVATE, field="webhook_url"
        )


_PRIVATE = "The service sends to private networks only where webhook_allow_private is set."


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one host's on the internet. IPv6 that leads to an IPv4 address is what that is."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inside:
            return is_public(inside)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def read_secret(secret: str) -> bytes:
    """The key that signs: what follows whsec_ is base64, any other text is taken as it is. Raises `SetupFailed`."""
    if not secret.startswith(SECRET_PREFIX):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not key:
        raise SetupFailed(
            f"webhook_secret begins with {SECRET_PREFIX}, and what follows is not base64.",
            hint=f"Put what `openssl rand -base64 32` prints behind {SECRET_PREFIX}, or use a text that begins otherwise.",
        )
    return key


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` of a message: v1, HMAC-SHA256 of "id.timestamp.body" in base64."""
    signed = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed).decode()}"


class Webhooks:
    """Tells the receivers of one service. `run` is one task of its event loop."""

    def __init__(self, job_queue: JobStore, metrics: Metrics, key: bytes, *, allow_private: bool):
        self._job_queue = job_queue
        self._metrics = metrics
        self._key = key
        self._allow_private = allow_private
        self._at_work: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Send what is owed as it falls due, until cancelled."""
        pool = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, limits=pool) as http:
            try:
                while True:
                    await asyncio.sleep(await self._send_due(http))
            finally:
                at_work = list(self._at_work.values())
                for task in at_work:
                    task.cancel()
                await asyncio.gather(*at_work, return_exceptions=True)

    async def _send_due(self, http: httpx.AsyncClient) -> float:
        """Begin a try for each job that is due; in how many seconds to look again."""
        room = AT_ONCE - len(self._at_work)
        try:
            owed = await self._job_queue.claim_due_webhooks(room) if room else []
        except StorageFailed as error:
            log.warning("webhook.queue_unreachable", error=str(error), again_in_s=AWAY_S)
            return AWAY_S
        for job, tries in owed:
            self._at_work[job.id] = asyncio.create_task(self._tell(http, job, tries))
        return LOOK_EVERY_S

    async def _tell(self, http: httpx.AsyncClient, job: Job, tries: int) -> None:
        """One try, and what follows from it."""
        try:
            outcome, reason = await self._try(http, job)
            due = None
            if outcome == "retried":
                outcome, due = (
                    ("given_up", None)
                    if tries >= len(PAUSES_S)
                    else (outcome, time.time() + PAUSES_S[tries])
                )
            self._metrics.webhooks.labels(outcome).inc()
            log.info(
                f"webhook.{outcome}",
                job=job.id,
                tries=tries + 1,
                **({"reason": reason} if reason else {}),
            )
            await self._job_queue.record_webhook_attempt(job.id, due, tries + 1)
        finally:
            del self._at_work[job.id]

    async def _try(self, http: httpx.AsyncClient, job: Job) -> tuple[str, str]:
        """Send once: what came of it, delivered, retried or given_up, and why."""
        try:
            status = await asyncio.wait_for(self._post(http, job), TIMEOUT_S)
        except (Refused, httpx.InvalidURL) as error:
            return "given_up", str(error)
        except asyncio.TimeoutError:
            return "retried", f"no answer in {TIMEOUT_S:g} s"
        except Exception as error:
            # whatever it is: a receiver that is not told would never hear of it
            return "retried", f"{type(error).__name__}: {error}"
        if 200 <= status < 300:
            return "delivered", ""
        return ("given_up" if status == GONE else "retried"), f"it answered {status}"

    async def _post(self, http: httpx.AsyncClient, job: Job) -> int:
        """Send; the status. Redirects are not followed, and nothing of the answer is read."""
        webhook = job.delivery.webhook
        if webhook is None:
            raise Refused("its entry in the journal cannot be read any more.")
        url = httpx.URL(webhook.url)
        address = await self._look_up(url)
        body = answer(JobView.of_finished(job), webhook.service_url).model_dump_json().encode()
        now = int(time.time())
        headers = {
            "host": url.netloc.decode(),
            "content-type": "application/json",
            "webhook-id": job.id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(self._key, job.id, now, body),
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
            if not (
                self._allow_private or is_public(ipaddress.ip_address(address.partition("%")[0]))
            ):
                raise Refused(
                    f"{url.host} is {address}, not an address of the internet. {_PRIVATE}"
                )
        return addresses[0]
