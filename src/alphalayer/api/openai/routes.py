"""Routes of the OpenAI dialect."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from alphalayer.api.deps import (
    IdempotencyKey,
    PendingJob,
    Service,
    ServiceDep,
    base_url,
    run_job,
    while_connected,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.file_urls import file_url
from alphalayer.api.forms import uploads_of
from alphalayer.api.guard import EVENT_STREAM, Admitted, Generator, GuardedRoute, Submitter
from alphalayer.api.openai.edits import EditsRequest, form_schema
from alphalayer.api.openai.errors import ErrorAnswer, render_error
from alphalayer.api.openai.files import embed, store_converted
from alphalayer.api.openai.schemas import (
    GenerationsRequest,
    ImageData,
    ImageFields,
    ImagesResponse,
    Model,
    ModelList,
    settings_of,
)
from alphalayer.api.openai.streaming import stream_events
from alphalayer.api.uploads import expect_images, release_images, store_uploads
from alphalayer.catalog import resolve_model
from alphalayer.core.errors import ModelNotFound, ModelUnusable, NotImplementedYet
from alphalayer.core.job import Delivery, Job, JobSpec, Submission

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": "An error."} for status in (400, "4XX")
}
router = APIRouter(
    prefix="/v1",
    tags=["OpenAI"],
    responses=ERRORS,
    dependencies=[Depends(Admitted("read"))],
    route_class=GuardedRoute,
)

FIELDS = {
    "iterations": "n",
    "batch_size": "n",
    "width": "size",
    "height": "size",
    "loras": "prompt",
    "init": "image",
}
"""Names of fields on the wire, where they differ from those of `JobSpec`."""
OPENAI_MODELS = re.compile(r"(gpt-|chatgpt-|dall-e|alphalayer$)", re.IGNORECASE)
"""Names that mean the default model."""


DIALECT = Dialect("/v1", router, render_error, FIELDS)


@router.post(
    "/images/generations",
    summary="Generate images",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses={200: {"content": {EVENT_STREAM: {}}}},
)
async def generations(
    body: GenerationsRequest,
    request: Request,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Generate images, transparent unless the background is opaque.

    With `stream` the response is server-sent events.
    """
    model = await asyncio.to_thread(_find_model, body.model, service)
    spec = body.build_spec(service, model)
    submission = Submission(owner=user, idempotency_key=idempotency_key, digest=body.digest)
    return await _respond(body, request, service, spec, submission)


@router.post(
    "/images/edits",
    summary="Change an image",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses={200: {"content": {EVENT_STREAM: {}}}},
    openapi_extra={
        "requestBody": {"content": {"multipart/form-data": {"schema": form_schema()}}},
    },
)
async def edits(
    body: EditsRequest,
    request: Request,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Change an image, or the part of it where the mask is transparent.

    The result has transparency if the image has some, unless the background is opaque.
    The body is JSON or a form with the files as `image` or `image[]` and `mask`.
    With `stream` the response is server-sent events.
    """
    model = await asyncio.to_thread(_find_model, body.model, service)
    with wire_names(FIELDS):
        spec, digest = await _store_images(body, request, service, model)
    submission = Submission(owner=user, idempotency_key=idempotency_key, digest=digest)
    return await _respond(body, request, service, spec, submission)


async def _store_images(
    body: EditsRequest, request: Request, service: Service, model: str | None
) -> tuple[JobSpec, str]:
    """Store the images of an edit, and return its job and its digest.

    Raises:
        AlphalayerError: An image or a field is not right, see `store_upload`.
    """
    uploads = body.uploads(uploads_of(request))
    body.to_spec(service, model, expect_images(uploads))
    images = await while_connected(request, store_uploads(service, uploads))
    spec, digest = body.to_spec(service, model, images), body.digest_of(images)
    release_images(request, body, ("images", "mask"))
    return spec, digest


@router.post(
    "/images/variations", summary="Not implemented", status_code=400, response_model=ErrorAnswer
)
async def variations(_user: Generator) -> None:
    """Respond with 400."""
    raise NotImplementedYet(
        "variations of images are not implemented.", hint="Use /v1/images/edits."
    )


@router.get("/models", summary="List models")
def models(service: ServiceDep) -> ModelList:
    """Return the usable models."""
    return ModelList(
        data=[Model.of(entry) for entry in service.list_models() if entry.problem is None]
    )


@router.get("/models/{model_id}", summary="Get a model")
def model(
    model_id: Annotated[str, Path(description="Name of the model.")], service: ServiceDep
) -> Model:
    """Return one model."""
    return Model.of(resolve_model(model_id, service.list_models()))


def _find_model(name: str | None, service: Service) -> str | None:
    """Return the model of a name; None for the default model.

    Clients always name a model, often one of OpenAI's. If the service does not know the models
    of its workers, only the names of OpenAI's models mean the default.

    Raises:
        ModelUnusable: It exists and cannot be used.
    """
    if not service.knows_models:
        return None if not name or OPENAI_MODELS.match(name) else name
    try:
        return resolve_model(name, service.list_models()).name if name else None
    except ModelNotFound:
        return None
    except ModelUnusable as error:
        error.field = "model"
        raise


async def _respond(
    body: ImageFields, request: Request, service: Service, spec: JobSpec, submission: Submission
) -> Response:
    """Submit a job, and return its images or a stream of its events."""
    if body.stream:
        pending = PendingJob(service)
        with wire_names(FIELDS):
            await pending.submit(spec, submission, Delivery())
        return stream_events(body, service, pending)
    with wire_names(FIELDS):
        job = await run_job(service, request, spec, submission)
    return await _answer(body, request, service, job)


async def _answer(body: ImageFields, request: Request, service: Service, job: Job) -> Response:
    """Return the images of a finished job, or their URLs."""
    assert job.result is not None, job.id
    images, files = job.result.images, EmbeddedFiles()
    if body.wants_urls:
        data = [
            ImageData(
                url=file_url(
                    base_url(service, request),
                    await store_converted(body, service, image.key),
                    service.url_signer,
                )
            )
            for image in images
        ]
    else:
        data = [
            ImageData(b64_json=await embed(body, service, files, image.key)) for image in images
        ]
    answer = ImagesResponse(
        created=int(time.time()),
        data=data,
        warnings=list(job.result.warnings) or None,
        **settings_of(body, job, images[0]),
    )
    return files.respond(answer, exclude_none=True)
