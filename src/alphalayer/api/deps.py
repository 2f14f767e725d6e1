"""Shared parts of the routes: the service, the client, addresses, and waiting for a job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter
from fastapi import Depends, Header, Request
from pydantic import AfterValidator

from alphalayer.api.auth import Authenticator
from alphalayer.api.document_files import DocumentFiles
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.file_urls import UrlSigner
from alphalayer.api.pixel_pool import PixelPool
from alphalayer.api.shutdown import Shutdown, stopping
from alphalayer.catalog import (
    ModelEntry,
    check_modes,
    find_lora,
    find_upscaler,
    resolve_model,
    shorten_paths,
)
from alphalayer.core.errors import (
    AlphalayerError,
    Busy,
    Cancelled,
    FileMissing,
    InvalidRequest,
    ModelNotFound,
    ModelUnusable,
)
from alphalayer.core.job import Delivery, Job, JobSpec, JobState, Submission, new_id
from alphalayer.core.modes import DEFAULT_MODE
from alphalayer.core.request import DecodeMode, NoiseSource
from alphalayer.core.validation import check_printable
from alphalayer.jobs.base import JobQueue, JobView
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics
from alphalayer.observability.tracing import current_traceparent
from alphalayer.storage import Storage, open_file, read

ENCODE_BYTES = 16
"""Memory for encoding an image again, in bytes a pixel. Measured: 9, and 16 for WebP."""
PROBES = 4
"""Readiness probes that run at one time."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Service:
    """Parts that routes use, assembled by `alphalayer.service.app`."""

    job_queue: JobQueue
    storage: Storage
    models_dir: Path
    embeddings_dir: Path
    list_models: Callable[[], list[ModelEntry]]
    readiness: Callable[[], dict[str, Any]]
    metrics: Metrics
    authenticator: Authenticator
    shutdown: Shutdown
    pixels: PixelPool
    requires_key: Callable[[], bool]
    default_model: str | None = None
    max_pixels: int = 0
    max_cost: float = 0.0
    knows_models: bool = True
    """Whether the workers use the models folder of this machine.

    If not, `list_models` is empty and names of models are not checked.
    """
    noise: NoiseSource = "nv"
    decode: DecodeMode = "official"
    prompt_comments: bool = True
    public_url: str | None = None
    log_prompts: bool = False
    redirect_files: bool = False
    url_signer: UrlSigner | None = None
    """Signer of the URLs of images. None: the name alone opens an image."""
    check_webhook: Callable[[str], None] | None = None
    """Raises `InvalidRequest` for addresses that webhooks may not use. None: webhooks are off."""
    documents: DocumentFiles = field(default_factory=DocumentFiles)
    """Documents that clients download."""
    probes: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(PROBES))
    """Threads of the readiness probes."""


async def _service(request: Request) -> Service:
    # a coroutine, because FastAPI runs plain functions in a thread, which costs more
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(_service)]


IdempotencyKey = Annotated[
    Annotated[str, AfterValidator(check_printable)] | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="Requests with the same key return the same job. A job that all waiting "
        "clients have left is cancelled, and its key starts a new job.",
    ),
]


def base_url(service: Service, request: Request) -> str:
    """Return the address of the service for the client, without a slash at the end.

    It is the public URL if one is set, else the address of the request.
    """
    return (service.public_url or str(request.base_url)).rstrip("/")


async def file_chunks(service: Service, key: str) -> AsyncIterator[bytes]:
    """Yield the content of a stored image.

    Raises:
        FileMissing, StorageFailed: see `alphalayer.storage.open_file`.
    """
    async for chunk in (await open_file(service.storage, key)).chunks:
        yield chunk


async def embed_file(service: Service, files: EmbeddedFiles, key: str) -> str:
    """Return the placeholder of a stored image in an answer.

    Raises:
        FileMissing, StorageFailed: see `alphalayer.storage.open_file`.
    """
    # errors later would cut the response off
    await open_file(service.storage, key)
    return files.add(lambda: file_chunks(service, key))


async def convert_preview(
    service: Service, key: str, work: Callable[..., _T], *arguments: Any
) -> _T | None:
    """Return a preview in another form, None while busy or once its job has finished.

    Args:
        service: The service.
        key: Key of the preview.
        work: Function of the file that runs in the pool.
        arguments: Its other arguments.

    Raises:
        StorageFailed: see `alphalayer.storage`.
    """
    try:
        async with service.pixels.turn():
            data = await read(service.storage, key)
            return await service.pixels.process(data, ENCODE_BYTES, work, *arguments)
    except (Busy, FileMissing):
        return None


@contextmanager
def error_field(name: str) -> Generator[None]:
    """Name the field of wrong values found inside."""
    try:
        yield
    except InvalidRequest as error:
        error.field = name
        raise


@contextmanager
def wire_names(names: Mapping[str, str]) -> Generator[None]:
    """Rename the field of errors raised inside.

    Args:
        names: The dialect's names of fields, by our names.
    """
    try:
        yield
    except AlphalayerError as error:
        error.field = names.get(error.field or "", error.field)
        raise


def find_model(service: Service, name: str | None) -> ModelEntry:
    """Return the model with a name, or the default model.

    It reads folders.

    Raises:
        InvalidRequest: no model has that name; the field is `model`.
        ModelUnusable: it cannot be used; the field is `model`.
    """
    folder = service.models_dir
    try:
        return resolve_model(name or service.default_model, service.list_models(), folder)
    except ModelNotFound as error:
        shorten_paths(error, folder)
        raise InvalidRequest(error.message, hint=error.hint, field="model") from None
    except ModelUnusable as error:
        error.field = "model"
        raise


def _check_models(service: Service, spec: JobSpec) -> None:
    """Check that the model, LoRAs, upscaler and LayerDiffuse files are available.

    It reads folders.

    Raises:
        InvalidRequest, ModelUnusable, LayerDiffuseMissing: one of them is not.
    """
    generation = spec.generation
    entry = find_model(service, generation.model)
    try:
        for lora in generation.loras:
            find_lora(service.models_dir, lora.name)
        if generation.upscaler_file:
            find_upscaler(service.models_dir, generation.upscaler_file)
        check_modes(entry, spec, service.models_dir)
    except AlphalayerError as error:
        raise shorten_paths(error, service.models_dir) from None


async def submit_job(
    service: Service,
    spec: JobSpec,
    submission: Submission,
    delivery: Delivery = Delivery(),
    job_id: str | None = None,
) -> Job:
    """Queue a job and log it, see `JobQueue.submit`.

    Raises:
        QueueFull: the queue has reached its limit.
        RateLimited: the key exceeded its limit of cost.
        InvalidRequest, ModelUnusable: the request is too large, or a model is not available.
    """
    spec.check_pixels(service.max_pixels)
    spec.check_cost(service.max_cost)
    generation, modes = spec.generation, [one.mode for one in spec.requests]
    needs_files = generation.loras or generation.upscaler_file or generation.inputs
    if service.knows_models and (generation.model or needs_files or modes != [DEFAULT_MODE]):
        await asyncio.to_thread(_check_models, service, spec)
    job = await _submit_charged(service, spec, submission, delivery, job_id or new_id())
    prompt = {"prompt": generation.prompt} if service.log_prompts else {}
    log.info("job.accepted", job=job.id, owner=submission.owner, **prompt)
    return job


async def _submit_charged(
    service: Service, spec: JobSpec, submission: Submission, delivery: Delivery, job_id: str
) -> Job:
    """Queue a job and charge its cost, unless an earlier job has its idempotency key."""
    rates, owner = service.authenticator.rates, submission.owner
    traced = submission.model_copy(update={"traceparent": current_traceparent()})
    rates.charge(owner, spec.cost)
    try:
        job = await service.job_queue.submit(spec, traced, delivery, job_id)
    except Exception:
        rates.refund(owner, spec.cost)
        raise
    if job.id != job_id:
        rates.refund(owner, spec.cost)
    return job


class PendingJob:
    """Job that a request waits for.

    The request or another one with the same key submitted it.
    """

    def __init__(self, service: Service, job_id: str | None = None):
        self._service = service
        self.job_id = job_id or new_id()

    async def submit(self, spec: JobSpec, submission: Submission, delivery: Delivery) -> None:
        """Queue the job, or find the job with the same key.

        Raises:
            Stopping: the service is shutting down.
            QueueFull, InvalidRequest, ModelUnusable: see `submit_job`.
        """
        self._service.shutdown.check()
        self.job_id = (await submit_job(self._service, spec, submission, delivery, self.job_id)).id

    async def withdraw(self) -> None:
        """Withdraw the request of a client that disconnected.

        A service that shuts down cancels its requests; their jobs stay in the queue.
        """
        if not self._service.shutdown.has_begun:
            await asyncio.shield(self._service.job_queue.withdraw(self.job_id))


async def run_job(
    service: Service,
    request: Request,
    spec: JobSpec,
    submission: Submission,
    delivery: Delivery = Delivery(),
) -> Job:
    """Queue a job and wait until it has finished.

    If the client disconnects, the job is cancelled unless other clients wait for it.

    Raises:
        AlphalayerError: the error of the failed job.
        Cancelled: a client cancelled it, or the client disconnected.
        Stopping: the service shuts down first; the job stays in the queue.
        QueueFull, InvalidRequest, ModelUnusable: see `submit_job`.
    """
    pending = PendingJob(service)
    disconnected = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await pending.submit(spec, submission, delivery)
        job = await _wait_for_job(service, pending.job_id, disconnected)
    except asyncio.CancelledError:
        await pending.withdraw()
        raise
    finally:
        disconnected.cancel()
    if job is None:
        await pending.withdraw()
        raise Cancelled("the client disconnected.")
    return raise_if_failed(job)


async def _wait_for_job(
    service: Service, job_id: str, disconnected: asyncio.Task[None]
) -> Job | None:
    """Return the finished job, or None if the client disconnects first.

    Raises:
        Stopping: the service shuts down first.
    """
    finished = asyncio.create_task(service.job_queue.wait(job_id))
    stopped = asyncio.create_task(service.shutdown.wait(job_id, elsewhere=True))
    try:
        await asyncio.wait((finished, disconnected, stopped), return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            return finished.result()
        if disconnected.done():
            return None
        raise stopping()
    finally:
        finished.cancel()
        stopped.cancel()


async def follow(
    service: Service, job_id: str, *, elsewhere: bool = False
) -> AsyncIterator[JobView]:
    """Yield the views of a job, see `JobQueue.watch`.

    Args:
        service: The service.
        job_id: Id of the job.
        elsewhere: See `Shutdown.wait`.

    Raises:
        Stopping: the service shuts down before the job has finished.
    """
    views = service.job_queue.watch(job_id)
    stopped = asyncio.ensure_future(service.shutdown.wait(job_id, elsewhere=elsewhere))
    next_view: asyncio.Future[JobView | None] | None = None
    try:
        while True:
            next_view = asyncio.ensure_future(anext(views, None))
            await asyncio.wait((next_view, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not next_view.done():
                raise stopping()
            view = next_view.result()
            if view is None:
                return
            yield view
    finally:
        stopped.cancel()
        if next_view:
            next_view.cancel()


def raise_if_failed(job: Job) -> Job:
    """Return a finished job, or raise its error.

    Raises:
        AlphalayerError: the error of the failed job.
        Cancelled: the job was cancelled.
    """
    if job.state is JobState.FAILED and job.error:
        raise AlphalayerError.from_dict(job.error)
    if job.state is JobState.CANCELLED:
        raise Cancelled("the job was cancelled.")
    return job


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of work that is dropped if the client disconnects.

    Raises:
        Cancelled: the client disconnected.
    """
    task = asyncio.ensure_future(work)
    disconnected = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client disconnected.")
    finally:
        task.cancel()
        disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
