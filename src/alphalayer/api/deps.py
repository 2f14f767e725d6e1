"""What the routes share: the service's parts, who is asking, where the client stands, and waiting for a job."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from alphalayer.catalog import ModelEntry
from alphalayer.errors import AlphalayerError, Cancelled
from alphalayer.job import Job, JobSpec, JobState
from alphalayer.jobs import Dispatcher
from alphalayer.request import DecodeMode, NoiseSource
from alphalayer.storage import Storage


class Unauthorized(AlphalayerError):
    """No credentials, or wrong ones."""

    code = "unauthorized"
    headers = {"WWW-Authenticate": 'Basic realm="alphalayer"'}  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class Service:
    """The parts that routes work with, put together by `alphalayer.app`."""

    dispatcher: Dispatcher
    storage: Storage
    models_dir: Path
    list_models: Callable[[], list[ModelEntry]]
    is_ready: Callable[[], bool]
    readiness: Callable[[], dict[str, Any]]
    retry_after_s: Callable[[], int]
    noise: NoiseSource = "nv"
    decode: DecodeMode = "official"
    public_url: str | None = None
    credentials: Sequence[bytes] = ()
    """SHA-256 of each allowed "user:password"; none: everybody may."""


def service(request: Request) -> Service:
    """The service that this application is."""
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(service)]


def credential_digests(pairs: str) -> list[bytes]:
    """SHA-256 of each "user:password" of a comma-separated list."""
    return [hashlib.sha256(pair.strip().encode()).digest() for pair in pairs.split(",") if pair.strip()]


def require_user(request: Request) -> str:
    """The name of who is asking; "" where no credentials are set up. Raises `Unauthorized`."""
    allowed = service(request).credentials
    if not allowed:
        return ""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(token, validate=True)
        except (binascii.Error, ValueError):
            pair = b""
        digest = hashlib.sha256(pair).digest()
        # every one is compared, so that the time tells nothing
        if any([secrets.compare_digest(digest, each) for each in allowed]):
            return pair.partition(b":")[0].decode(errors="replace")
    raise Unauthorized("user and password are needed.", hint="Send them by HTTP Basic authentication.")


User = Annotated[str, Depends(require_user)]


def file_url(request: Request, key: str) -> str:
    """Where the client gets a stored picture: below the public URL if one is set, else as the client reached us."""
    base = service(request).public_url or str(request.base_url)
    return f"{base.rstrip('/')}/alpha/v1/file/{key}"


async def run_job(request: Request, spec: JobSpec, owner: str) -> Job:
    """Queue a job and wait for its end; a client that leaves takes its job along.

    Raises:
        AlphalayerError: what the job failed with.
        Cancelled: somebody cancelled it, or the client left.
        QueueFull: see `Dispatcher.submit`.
    """
    dispatcher = service(request).dispatcher
    job = await dispatcher.submit(spec, owner=owner)
    done, left = asyncio.create_task(dispatcher.wait(job.id)), asyncio.create_task(_client_left(request))
    try:
        await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Cancelled("the client left.")
        return raise_if_failed(await done)
    except (Cancelled, asyncio.CancelledError):
        await asyncio.shield(dispatcher.cancel(job.id))
        raise
    finally:
        done.cancel()
        left.cancel()


def raise_if_failed(job: Job) -> Job:
    """The job, if it has its pictures; else raises what it ended with."""
    if job.state is JobState.FAILED and job.error:
        raise AlphalayerError.from_dict(job.error)
    if job.state is JobState.CANCELLED:
        raise Cancelled("the job was cancelled.")
    return job


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
