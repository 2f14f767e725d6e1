"""Webhooks: the JSON of each finished job, signed and posted to the address of its client.

They are signed as https://www.standardwebhooks.com specifies. Pending webhooks are in the
journal, so that they survive a restart. A receiver may get one twice.
Its `webhook-id` is the id of the job.

Addresses in private networks are refused unless they are allowed. The connection goes to the
address that was checked, so that a second lookup cannot change it. No log line has the path or
the query of an address, which may be a secret of the client.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import httpx
from standardwebhooks import Webhook

from alphalayer.api.file_urls import UrlSigner
from alphalayer.api.jobs import answer
from alphalayer.core.errors import InvalidRequest, SetupFailed, StorageFailed
from alphalayer.core.job import Job
from alphalayer.jobs.base import JobStore, JobView
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics
from alphalayer.service.public_addresses import is_public

PAUSES_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
"""Seconds before each retry. After the last one the webhook is given up."""
TIMEOUT_S = 15.0
"""Time limit of one attempt: lookup, connection and response."""
POLL_EVERY_S = 0.5
OUTAGE_PAUSE_S = 5.0
"""Seconds before the next poll after an error of the journal."""
MAX_ATTEMPTS = 200
"""Maximum number of concurrent attempts. A receiver that hangs occupies one until its timeout."""
MAX_ATTEMPTS_OF_ONE = 20
"""Maximum number of concurrent attempts for one key, or for one host without keys."""
POSTPONED_S = 2.0
"""Seconds until a webhook above that number is due again."""
SECRET_PREFIX = "whsec_"
GONE = 410
OPEN_PORTS = (80, 443)
FIRST_USER_PORT = 1024
"""Ports below it belong to other protocols, such as mail, unless they are in `OPEN_PORTS`."""
LOOKUP_THREADS = 100
"""Maximum number of concurrent lookups. One that hangs occupies its thread after the attempt."""
Lookup = Callable[[str, int, int, int], Sequence[Any]]
"""Function with the first arguments and the result of `socket.getaddrinfo`."""
_PRIVATE = "The service sends to private networks only if webhook_allow_private is set."


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
        scheme, host, port = parsed.scheme, parsed.host, parsed.port
    except (httpx.InvalidURL, TypeError) as error:
        raise InvalidRequest(f"not an address ({error}).", field="webhook_url") from None
    if scheme not in ("http", "https") or not host or parsed.userinfo:
        raise InvalidRequest(
            "use http:// or https:// and a host, without user and password.", field="webhook_url"
        )
    if allow_private:
        return
    if port and port < FIRST_USER_PORT and port not in OPEN_PORTS:
        raise InvalidRequest(
            f"port {port} is refused.",
            hint=f"Use 80, 443, or a port from {FIRST_USER_PORT}.",
            field="webhook_url",
        )
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    if not is_public(address):
        raise InvalidRequest(
            f"{host} is not an address of the internet.", hint=_PRIVATE, field="webhook_url"
        )


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

    def __init__(
        self,
        job_queue: JobStore,
        metrics: Metrics,
        key: bytes,
        *,
        allow_private: bool,
        lookup: Lookup = socket.getaddrinfo,
        url_signer: UrlSigner | None = None,
    ):
        self._url_signer = url_signer
        self._job_queue = job_queue
        self._metrics = metrics
        self._signer = Webhook(key)
        self._allow_private = allow_private
        self._lookup = lookup
        # apart from the threads of the loop, which other work would miss during slow lookups
        self._lookup_threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup")
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
        # an attempt may end while the claim is made, which does not know its outcome yet
        running = set(self._attempts)
        try:
            due = await self._job_queue.claim_due_webhooks(capacity) if capacity else []
            new = [(job, tries) for job, tries in due if job.id not in running]
            await asyncio.gather(*(self._start(http, job, tries) for job, tries in new))
        except StorageFailed as error:
            log.warning("webhook.queue_unreachable", error=str(error), again_in_s=OUTAGE_PAUSE_S)
            return OUTAGE_PAUSE_S
        return POLL_EVERY_S

    async def _start(self, http: httpx.AsyncClient, job: Job, tries: int) -> None:
        """Start an attempt, or postpone one too many of a client. Raises `StorageFailed`."""
        group = _group_of(job)
        if [task.get_name() for task in self._attempts.values()].count(group) < MAX_ATTEMPTS_OF_ONE:
            attempt = self._deliver(http, job, tries)
            self._attempts[job.id] = asyncio.create_task(attempt, name=group)
        else:
            await self._job_queue.record_webhook_attempt(job.id, time.time() + POSTPONED_S, tries)

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
            self._attempts.pop(job.id, None)

    async def _send(self, http: httpx.AsyncClient, job: Job) -> tuple[str, str]:
        """Send a webhook once.

        Returns:
            "delivered", "retried" or "given_up", and the reason.
        """
        webhook = job.delivery.webhook
        if webhook is None:
            return "given_up", "its entry in the journal cannot be read any more."
        try:
            view = JobView.of_finished(job)
            body = answer(view, webhook.service_url, self._url_signer).model_dump_json()
            attempt = self._resolve_and_post(http, job.id, httpx.URL(webhook.url), body)
            status = await asyncio.wait_for(attempt, TIMEOUT_S)
        except (RefusedAddress, httpx.InvalidURL) as error:
            return "given_up", str(error)
        except asyncio.TimeoutError:
            return "retried", f"no response in {TIMEOUT_S:g} s"
        except (OSError, httpx.NetworkError, httpx.TimeoutException) as error:
            return "retried", f"{type(error).__name__}: {error}"
        except Exception as error:
            # An unexpected error must not lose the webhook. Its message may quote the receiver,
            # and with it the path of the address.
            return "retried", type(error).__name__
        if 200 <= status < 300:
            return "delivered", ""
        return ("given_up" if status == GONE else "retried"), f"status {status}"

    async def _resolve_and_post(
        self, http: httpx.AsyncClient, job_id: str, url: httpx.URL, body: str
    ) -> int:
        return await self._post(http, job_id, url, await self._resolve(url), body)

    async def _post(
        self, http: httpx.AsyncClient, job_id: str, url: httpx.URL, address: str, body: str
    ) -> int:
        """Post a webhook to an address of its host. Return the status.

        Redirects are not followed, and the body of the response is not read.
        """
        now = datetime.now(timezone.utc)
        headers = {
            "host": url.netloc.decode(),
            "content-type": "application/json",
            "webhook-id": job_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(job_id, now, body),
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
        records = await asyncio.get_running_loop().run_in_executor(
            self._lookup_threads, self._lookup, url.host, port, 0, socket.SOCK_STREAM
        )
        addresses = [str(record[4][0]) for record in records]
        for address in addresses:
            plain = ipaddress.ip_address(address.partition("%")[0])
            if not (self._allow_private or is_public(plain)):
                raise RefusedAddress(
                    f"{url.host} is {address}, not an address of the internet. {_PRIVATE}"
                )
        return addresses[0]


def _group_of(job: Job) -> str:
    """Return the key of a job's client, without keys the origin of its webhook."""
    url = job.delivery.webhook.url if job.delivery.webhook else ""
    return job.owner or "/".join(url.split("/")[:3])
