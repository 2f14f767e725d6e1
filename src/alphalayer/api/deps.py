"""What the routes share: the service's parts, who is asking, where the client stands, and waiting for a job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from alphalayer.api.auth import Authenticator
from alphalayer.api.shutdown import Shutdown, stopping
from alphalayer.catalog import ModelEntry, check_layerdiffuse_method, find_lora, resolve_model
from alphalayer.core.errors import (
    AlphalayerError,
    Cancelled,
    FileMissing,
    InvalidRequest,
    ModelNotFound,
    ModelUnusable,
)
from alphalayer.core.job import Delivery, Job, JobSpec, JobState, Submission, new_id
from alphalayer.core.request import DecodeMode, GenerationRequest, NoiseSource
from alphalayer.jobs.base import JobQueue, JobView
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics
from alphalayer.observability.tracing import current_traceparent
from alphalayer.storage import Storage, read


@dataclass(frozen=True)
class Service:
    """The parts that routes work with, put together by `alphalayer.service.app`."""

    job_queue: JobQueue
    storage: Storage
    models_dir: Path
    embeddings_dir: Path
    list_models: Callable[[], list[ModelEntry]]
    readiness: Callable[[], dict[str, Any]]
    metrics: Metrics
    authenticator: Authenticator
    shutdown: Shutdown
    default_model: str | None = None
    max_pixels: int = 0
    knows_models: bool = True
    """Whether the models folder here is that of whoever draws. If not, `list_models` is empty and names are taken as they are."""
    noise: NoiseSource = "nv"
    decode: DecodeMode = "official"
    public_url: str | None = None
    log_prompts: bool = False
    redirect_files: bool = False
    check_webhook: Callable[[str], None] | None = None
    """Raises `InvalidRequest` for addresses that cannot be told; None where webhooks are off."""


def service(request: Request) -> Service:
    """The service that this application is."""
    return request.app.state.service


async def _service(request: Request) -> Service:
    # dependencies are coroutines: FastAPI sends plain functions through a thread, which costs more than they do
    return service(request)


ServiceDep = Annotated[Service, Depends(_service)]


async def require_user(request: Request) -> str:
    """The name of who is asking; "" where nobody has to say. Raises `Unauthorized`, `RateLimited`."""
    return service(request).authenticator.admit(request)


User = Annotated[str, Depends(require_user)]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="The same key gives the same job again, whatever became of the first answer; "
        "a new one where all clients that waited for it left before it was done.",
    ),
]


def base_url(request: Request) -> str:
    """The service's address for the client, without a slash at its end: the public URL if one is set, else as it reached us."""
    return (service(request).public_url or str(request.base_url)).rstrip("/")


def file_url(base: str, key: str) -> str:
    """Where a client that knows the service as `base` gets a stored picture."""
    return f"{base}/alpha/v1/file/{key}"


async def read_file(service: Service, key: str) -> bytes:
    """A stored file as a whole. Raises `FileMissing`, `StorageFailed`."""
    return await read(service.storage, key)


async def read_preview(service: Service, key: str) -> bytes | None:
    """A preview as a whole; None once its picture is done. Raises `StorageFailed`."""
    try:
        return await read_file(service, key)
    except FileMissing:
        return None


@contextmanager
def wire_names(names: Mapping[str, str]) -> Generator[None]:
    """Errors from within call a field as the dialect does: `names` has its name for ours."""
    try:
        yield
    except AlphalayerError as error:
        error.field = names.get(error.field or "", error.field)
        raise


def find_model(service: Service, name: str | None) -> ModelEntry:
    """The model of that name, or the usual one. Raises `InvalidRequest` or `ModelUnusable`, of the field `model`. Reads folders."""
    try:
        return resolve_model(name or service.default_model, service.list_models())
    except ModelNotFound as error:
        raise InvalidRequest(error.message, hint=error.hint, field="model") from None
    except ModelUnusable as error:
        error.field = "model"
        raise


def _check_models(service: Service, generation: GenerationRequest) -> None:
    """Raise `InvalidRequest` or `ModelUnusable` for a model, LoRA or LayerDiffuse method that cannot be had here. Reads folders."""
    entry = find_model(service, generation.model)
    for lora in generation.loras:
        find_lora(service.models_dir, lora.name)
    if generation.is_transparent:
        check_layerdiffuse_method(entry, generation.mode)


async def submit_job(
    service: Service,
    spec: JobSpec,
    submission: Submission,
    delivery: Delivery = Delivery(),
    job_id: str | None = None,
) -> Job:
    """Queue a job and log it; see `JobQueue.submit`. Raises `QueueFull`; `InvalidRequest` or `ModelUnusable` for too many pixels or
    what is not there."""
    spec.check_pixels(service.max_pixels)
    asked = spec.generation
    if service.knows_models and (asked.model or asked.loras or asked.mode == "conv"):
        await asyncio.to_thread(_check_models, service, asked)
    traced = submission.model_copy(update={"traceparent": current_traceparent()})
    job = await service.job_queue.submit(spec, traced, delivery, job_id)
    said = {"prompt": spec.generation.prompt} if service.log_prompts else {}
    log.info("job.accepted", job=job.id, owner=submission.owner, **said)
    return job


class PendingJob:
    """What one request waits for: a job that it made, or one that another request made with the same key."""

    def __init__(self, service: Service, job_id: str | None = None):
        self._service = service
        self.job_id = job_id or new_id()

    async def submit(self, spec: JobSpec, submission: Submission, delivery: Delivery) -> None:
        """Queue the job, or find it. Raises `Stopping` where the service ends, and what `submit_job` does."""
        self._service.shutdown.check()
        self.job_id = (await submit_job(self._service, spec, submission, delivery, self.job_id)).id

    async def withdraw(self) -> None:
        """The client left. Not where the service ends, which cancels its requests: that is no wish of the client."""
        if not self._service.shutdown.has_begun:
            await asyncio.shield(self._service.job_queue.withdraw(self.job_id))


async def run_job(
    request: Request, spec: JobSpec, submission: Submission, delivery: Delivery = Delivery()
) -> Job:
    """Queue a job and wait for its end; a client that leaves takes its job along, unless others wait for it.

    Raises:
        AlphalayerError: what the job failed with.
        Cancelled: somebody cancelled it, or the client left.
        Stopping: the service ends before the job; it stays in the queue.
        QueueFull, InvalidRequest, ModelUnusable: see `submit_job`.
    """
    pending = PendingJob(service(request))
    left = asyncio.create_task(_client_left(request))
    try:
        await pending.submit(spec, submission, delivery)
        job = await _end_of(service(request), pending.job_id, left)
    except asyncio.CancelledError:
        await pending.withdraw()
        raise
    finally:
        left.cancel()
    if job is None:
        await pending.withdraw()
        raise Cancelled("the client left.")
    return raise_if_failed(job)


async def _end_of(service: Service, job_id: str, left: asyncio.Task[None]) -> Job | None:
    """The job, once it is over; None where the client leaves before. Raises `Stopping`."""
    done = asyncio.create_task(service.job_queue.wait(job_id))
    ended = asyncio.create_task(service.shutdown.wait(job_id, elsewhere=True))
    try:
        await asyncio.wait((done, left, ended), return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        if left.done():
            return None
        raise stopping()
    finally:
        done.cancel()
        ended.cancel()


async def follow(
    service: Service, job_id: str, *, elsewhere: bool = False
) -> AsyncIterator[JobView]:
    """`JobQueue.watch`; raises `Stopping` where the service ends before the job. `elsewhere`: see `Shutdown.wait`."""
    views = service.job_queue.watch(job_id)
    ended = asyncio.ensure_future(service.shutdown.wait(job_id, elsewhere=elsewhere))
    following: asyncio.Future[JobView | None] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(views, None))
            await asyncio.wait((following, ended), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise stopping()
            view = following.result()
            if view is None:
                return
            yield view
    finally:
        ended.cancel()
        if following:
            following.cancel()


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
