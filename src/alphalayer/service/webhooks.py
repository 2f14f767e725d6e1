"""Webhooks: the JSON of each finished job, signed and posted to the address of its client.

They are signed as https://www.standardwebhooks.com specifies. Pending webhooks are in the
journal, so that they survive a restart. A receiver may get one twice.
Its `webhook-id` is the id of the job.

Addresses in private networks are refused unless they are allowed. The connection goes to the
address that was checked, so that a second lookup cannot change it.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import time
from datetime import datetime, timezone
from typing import Any

import httpx
from standardwebhooks import Webhook

from alphalayer.api.jobs import answer
from alphalayer.core.errors import InvalidRequest, SetupFailed, StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs.base import JobStore, JobView
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics

PAUSES_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
"""Seconds before each retry. After the last one the webhook is given up."""
TIMEOUT_S = 15.0
"""Time limit of one attempt: lookup, connection and response."""
POLL_EVERY_S = 0.5
OUTAGE_PAUSE_S = 5.0
"""Seconds before the next poll after an error of the journal."""
MAX_ATTEMPTS = 200
"""Maximum number of concurrent attempts. A receiver that hangs occupies one until its timeout."""
SECRET_PREFIX = "whsec_"
GONE = 410
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedAddress(Exception):
    """Error for an address that gets no webhook."""


def check_url(url: str, *, allow_private: bool) -> None:
    """Check the address of a webhook. Host names are looked up at the delivery.

    Args:
        url: Address from the client's request.
        allow_private: Whether addresses in private networks are allowed.

    Raises:
        InvalidRequest: The address can never get a webhook.
    """
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


_PRIVATE = "The service sends to private networks only if webhook_allow_private is set."


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is one host on the internet.

    An IPv6 address that contains an IPv4 address is checked as the latter.
    """
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if embedded:
            return is_public(embedded)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def read_secret(secret: str) -> bytes:
    """Return the signing key of a secret.

    Args:
        secret: Base64 after the prefix `whsec_`, or any other text.

    Raises:
        SetupFailed: The text after the prefix is not base64.
    """
    if not secret.startswith(SECRET_PREFIX):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not key:
        raise SetupFailed(
            f"webhook_secret begins with {SECRET_PREFIX}, but the rest is not base64.",
            hint=f"Add the output of `openssl rand -base64 32` to {SECRET_PREFIX}, "
            "or use a text without this prefix.",
        )
    return key


class Webhooks:
    """Sender of one service's webhooks. `run` is one task of its event loop."""

    def __init__(self, job_queue: JobStore, metrics: Metrics, key: bytes, *, allow_private: bool):
        self._job_queue = job_queue
        self._metrics = metrics
        self._signer = Webhook(key)
        self._allow_private = allow_private
        self._attempts: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Send due webhooks until cancelled."""
        pool = httpx.Limits(max_connections=MAX_ATTEMPTS, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, limits=pool) as http:
            try:
                while True:
                    await asyncio.sleep(await self._send_due(http))
            finally:
                attempts = list(self._attempts.values())
                for task in attempts:
                    task.cancel()
                await asyncio.gather(*attempts, return_exceptions=True)

    async def _send_due(self, http: httpx.AsyncClient) -> float:
        """Start an attempt for each due webhook. Return the seconds until the next poll."""
        capacity = MAX_ATTEMPTS - len(self._attempts)
        try:
            due = await self._job_queue.claim_due_webhooks(capacity) if capacity else []
        except StorageFailed as error:
            log.warning("webhook.queue_unreachable", error=str(error), again_in_s=OUTAGE_PAUSE_S)
            return OUTAGE_PAUSE_S
        for job, tries in due:
            self._attempts[job.id] = asyncio.create_task(self._deliver(http, job, tries))
        return POLL_EVERY_S

    async def _deliver(self, http: httpx.AsyncClient, job: Job, tries: int) -> None:
        """Send a webhook once, and store its outcome or the time of the next attempt."""
        try:
            outcome, reason = await self._send(http, job)
            due = None
            if outcome == "retried":
                if tries < len(PAUSES_S):
                    due = time.time() + PAUSES_S[tries]
                else:
                    outcome = "given_up"
            self._metrics.webhooks.labels(outcome).inc()
            log.info(
                f"webhook.{outcome}",
                job=job.id,
                tries=tries + 1,
                **({"reason": reason} if reason else {}),
            )
            await self._job_queue.record_webhook_attempt(job.id, due, tries + 1)
        finally:
            del self._attempts[job.id]

    async def _send(self, http: httpx.AsyncClient, job: Job) -> tuple[str, str]:
        """Send a webhook once.

        Returns:
            "delivered", "retried" or "given_up", and the reason.
        """
        try:
            status = await asyncio.wait_for(self._post(http, job), TIMEOUT_S)
        except (RefusedAddress, httpx.InvalidURL) as error:
            return "given_up", str(error)
        except asyncio.TimeoutError:
            return "retried", f"no response in {TIMEOUT_S:g} s"
        except Exception as error:
            # an unexpected error must not lose the webhook
            return "retried", f"{type(error).__name__}: {error}"
        if 200 <= status < 300:
            return "delivered", ""
        return ("given_up" if status == GONE else "retried"), f"status {status}"

    async def _post(self, http: httpx.AsyncClient, job: Job) -> int:
        """Post a webhook. Return the status.

        Redirects are not followed, and the body of the response is not read.
        """
        webhook = job.delivery.webhook
        if webhook is None:
            raise RefusedAddress("its entry in the journal cannot be read any more.")
        url = httpx.URL(webhook.url)
        address = await self._resolve(url)
        body = answer(JobView.of_finished(job), webhook.service_url).model_dump_json()
        now = datetime.now(timezone.utc)
        headers = {
            "host": url.netloc.decode(),
            "content-type": "application/json",
            "webhook-id": job.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(job.id, now, body),
        }
        # connects to the checked address, and verifies the certificate of the host
        extensions: dict[str, Any] = {"sni_hostname": url.host}
        async with http.stream(
            "POST",
            url.copy_with(host=address),
            content=body.encode(),
            headers=headers,
            extensions=extensions,
        ) as response:
            return response.status_code

    async def _resolve(self, url: httpx.URL) -> str:
        """Return an address of the URL's host.

        Raises:
            RefusedAddress: One of its addresses is private.
            OSError: It has no address.
        """
        port = url.port or (443 if url.scheme == "https" else 80)
        records = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=1)
        addresses = [str(record[4][0]) for record in records]
        for address in addresses:
            plain = ipaddress.ip_address(address.partition("%")[0])
            if not (self._allow_private or is_public(plain)):
                raise RefusedAddress(
                    f"{url.host} is {address}, not an address of the internet. {_PRIVATE}"
                )
        return addresses[0]
