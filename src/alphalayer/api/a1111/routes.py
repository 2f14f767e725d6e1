"""The AUTOMATIC1111 dialect, `/sdapi/v1`, with LayerDiffuse as its extension for Forge sends it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from alphalayer.api.a1111 import extras, lists
from alphalayer.api.a1111.img2img import Img2ImgRequest
from alphalayer.api.a1111.schemas import (
    FIELDS,
    Detail,
    GenerationBody,
    GenerationResponse,
    ImageFile,
    SdModel,
    Txt2ImgRequest,
    file_title,
)
from alphalayer.api.a1111.script import method_labels
from alphalayer.api.a1111.settings import OverrideSettings, current_options
from alphalayer.api.deps import (
    IdempotencyKey,
    Service,
    ServiceDep,
    convert_preview,
    embed_file,
    error_field,
    find_model,
    run_job,
    while_connected,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.errors import ErrorResponse, Problem
from alphalayer.api.guard import Admitted, Converter, Generator, GuardedRoute, Reader, Submitter
from alphalayer.api.info import webui_info
from alphalayer.api.uploads import (
    decode_base64,
    expect_images,
    release_images,
    store_uploads,
)
from alphalayer.catalog import ModelEntry
from alphalayer.core.errors import NotImplementedYet
from alphalayer.core.job import JobSpec, JobState, Submission
from alphalayer.images import codecs, files, infotext
from alphalayer.jobs.base import JobView
from alphalayer.observability.logging import log

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Detail, "description": "An error."} for status in (422, "4XX")
}
router = APIRouter(
    prefix="/sdapi/v1",
    tags=["AUTOMATIC1111"],
    responses=ERRORS,
    dependencies=[Depends(Admitted("read"))],
    route_class=GuardedRoute,
)
router.include_router(lists.router)
router.include_router(extras.router)


def _render_error(problem: Problem, headers: Mapping[str, str]) -> ErrorResponse:
    """Return the response for an error in AUTOMATIC1111's form."""
    content = {"detail": f"{problem.detail} {problem.hint}".strip()}
    return ErrorResponse(content, problem.status, dict(headers))


DIALECT = Dialect("/sdapi", router, _render_error, FIELDS)


async def options_of(request: Request, service: ServiceDep) -> OverrideSettings:
    """Return the options of the client; those of the service if it has no keys."""
    return OverrideSettings.of_stored(await service.job_queue.load_options(request.state.client))


OptionsDep = Annotated[OverrideSettings, Depends(options_of)]


@router.post("/txt2img", response_model=GenerationResponse, summary="Generate images")
async def txt2img(
    body: Txt2ImgRequest,
    request: Request,
    service: ServiceDep,
    options: OptionsDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Generate images, transparent unless `layerdiffuse_enabled` is false.

    `images` holds the images alone, without a grid.
    """
    return await _generate(body, request, service, options, user, idempotency_key)


@router.post("/img2img", response_model=GenerationResponse, summary="Change an image")
async def img2img(
    body: Img2ImgRequest,
    request: Request,
    service: ServiceDep,
    options: OptionsDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Change an image, or the part that a mask shows.

    The result is transparent if the image is, unless `layerdiffuse_enabled` or the script is set.
    `images` holds the images alone, without a grid.
    """
    return await _generate(body, request, service, options, user, idempotency_key)


async def _generate(
    body: GenerationBody,
    request: Request,
    service: Service,
    options: OverrideSettings,
    user: str,
    idempotency_key: str | None,
) -> Response:
    """Return the response of a request once its job has finished."""
    names = {**FIELDS, "model": body.model_source(options)}
    with wire_names(names), method_labels():
        spec, digests = await _store_images(body, request, service, options)
        key = idempotency_key
        if body.force_task_id:
            key = f"{body.force_task_id}:{body.sent_digest(digests)}"
        submission = Submission(owner=user, idempotency_key=key, digest=body.digest_with(digests))
        parameters = body.echo
        if digests and not getattr(body, "include_init_images", False):
            release_images(request, body, digests)
        job = await run_job(service, request, spec, submission)
    keys = [image.key for image in job.result.images] if job.result and body.send_images else []
    embedded = EmbeddedFiles()
    answer = GenerationResponse(
        images=[await embed_file(service, embedded, key) for key in keys],
        parameters=parameters,
        info=json.dumps(webui_info(job), ensure_ascii=False),
    )
    return embedded.respond(answer)


async def _store_images(
    body: GenerationBody, request: Request, service: Service, options: OverrideSettings
) -> tuple[JobSpec, dict[str, Any]]:
    """Store the images of a request, and return its job and the digests of its images.

    Raises:
        AlphalayerError: An image or a field is not right, see `store_upload`.
    """
    uploads = body.uploads(options)
    spec = body.to_spec(service, options, expect_images(uploads))
    if not uploads:
        return spec, {}
    images = await while_connected(request, store_uploads(service, uploads))
    return body.to_spec(service, options, images), body.digests(images)


@router.post(
    "/interrogate", summary="Refuse to describe an image", status_code=501, response_model=Detail
)
async def interrogate(_user: Generator) -> None:
    """Respond with 501: no model here describes images."""
    raise NotImplementedYet(
        "no model here describes images.",
        hint="/sdapi/v1/png-info returns the prompt of a generated image.",
    )


@router.head("/sd-models", include_in_schema=False)
@router.get("/sd-models", summary="List models")
def sd_models(service: ServiceDep) -> list[SdModel]:
    """Return the usable models. Deployments of Forge use it as a health check."""
    return [
        SdModel.of(entry, service.models_dir)
        for entry in service.list_models()
        if entry.problem is None
    ]


@router.get("/options", summary="Get settings")
def get_options(service: ServiceDep, options: OptionsDep) -> dict[str, Any]:
    """Return the settings of the client, and the defaults of others that clients read."""
    name = options.sd_model_checkpoint or service.readiness()["model"]
    entry = _listed(service, name)
    return {
        **current_options(options, service.noise, comments=service.prompt_comments),
        "sd_model_checkpoint": file_title(entry) if entry else name or "",
        "sd_checkpoint_hash": (entry.sha256 if entry else None) or "",
    }


@router.post("/options", summary="Change settings")
async def set_options(
    body: OverrideSettings, service: ServiceDep, options: OptionsDep, user: Generator
) -> None:
    """Change some or all settings of the client.

    Without keys, all clients share them.
    The model is used for later requests of this dialect that name none.
    An empty one returns to the default model.
    """
    body.reject_unimplemented()
    body.check_range()
    # a client that sends all settings back has not chosen them
    current = current_options(options, service.noise, comments=service.prompt_comments)
    changes = {option: value for option, value in body.values.items() if value != current[option]}
    if name := changes.pop("sd_model_checkpoint", None):
        changes |= await asyncio.to_thread(_choose_model, service, options, name)
    elif body.sd_model_checkpoint == "" and options.sd_model_checkpoint:
        changes["sd_model_checkpoint"] = None
    if changes:
        await service.job_queue.save_options(user, changes)
        log.info("audit.options_changed", key=user, **changes)


def _listed(service: Service, name: str | None) -> ModelEntry | None:
    """Return the model with a stored name, None if it is not listed."""
    return next(
        (model for model in service.list_models() if name in (model.name, model.title)), None
    )


def _choose_model(service: Service, options: OverrideSettings, name: str) -> dict[str, str]:
    """Return the change of the stored model, empty if `name` is the stored one.

    It reads folders.

    Raises:
        InvalidRequest, ModelUnusable: The model cannot be used.
    """
    if not service.knows_models:
        return {"sd_model_checkpoint": name}
    stored = options.sd_model_checkpoint
    # a stored model may be unusable by now, and is sent back with the other settings
    if stored and (entry := _listed(service, stored)) and name == file_title(entry):
        return {}
    with wire_names({"model": "sd_model_checkpoint"}):
        return {"sd_model_checkpoint": find_model(service, name).name}


@router.get("/progress", summary="Get progress")
async def progress(
    service: ServiceDep,
    user: Reader,
    skip_current_image: Annotated[bool, Query(description="Leave the preview out.")] = False,
) -> dict[str, Any]:
    """Return the progress of the client's running job; without one it is 0.

    The preview needs the setting `live_previews_enable`.
    """
    view = await _running(service, user)
    step, steps, count = (
        (view.progress.step, view.progress.steps, view.job.spec.iterations) if view else (0, 0, 0)
    )
    steps_each = steps // count if count else 0
    number = min(step // steps_each, count - 1) if steps_each else 0
    preview = None if skip_current_image or view is None else view.progress.preview
    return {
        "progress": round(step / steps, 4) if steps else 0.0,
        "eta_relative": (view.eta_s or 0.0) if view else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": view.job.id if view else "",
            "job_count": count,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(view.job.created_at))
            if view
            else "0",
            "job_no": number,
            "sampling_step": step - number * steps_each,
            "sampling_steps": steps_each,
        },
        "current_image": await convert_preview(service, preview, _encode_preview)
        if preview
        else None,
        "textinfo": None,
    }


@router.post("/interrupt", summary="Cancel the running job")
@router.post("/skip", summary="Cancel the running job")
async def interrupt(service: ServiceDep, user: Generator) -> dict[str, Any]:
    """Cancel the client's running job with all its iterations. Waiting jobs stay."""
    view = await _running(service, user)
    if view:
        await service.job_queue.cancel(view.job.id)
        log.info("audit.job_cancelled", key=user, job=view.job.id)
    return {}


@router.post("/png-info", summary="Read the settings of an image")
async def png_info(
    body: ImageFile, request: Request, service: ServiceDep, _user: Converter
) -> dict[str, Any]:
    """Return the text as `info` and its parts as `parameters`."""

    async def work() -> dict[str, Any]:
        async with service.pixels.turn():
            with error_field("image"):
                return await service.pixels.run(2 * len(body.image), _read_info, body.image)

    return await while_connected(request, work())


def _read_info(image: str) -> dict[str, Any]:
    text = files.read_settings(decode_base64(image))[1] or ""
    parameters = infotext.complete(infotext.read_parameters(text)) if text else {}
    return {"info": text, "items": {}, "parameters": parameters}


async def _running(service: Service, user: str) -> JobView | None:
    """Return the user's job that has run longest."""
    views = await service.job_queue.list(owner=user, state=JobState.RUNNING)
    return min(views, key=lambda view: view.job.started_at or 0.0, default=None)


def _encode_preview(data: bytes) -> str:
    return base64.b64encode(codecs.encode_input(data).data).decode()
