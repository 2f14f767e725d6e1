"""The OpenAI Images dialect, `/v1/images` and `/v1/models`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from alphalayer.api.deps import (
    ENCODE_BYTES,
    IdempotencyKey,
    PendingJob,
    Service,
    ServiceDep,
    base_url,
    convert_preview,
    file_chunks,
    follow,
    raise_if_failed,
    run_job,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.errors import ErrorResponse, Problem
from alphalayer.api.file_urls import file_url
from alphalayer.api.guard import EVENT_STREAM, Admitted, Generator, GuardedRoute, Submitter
from alphalayer.api.schemas import Body
from alphalayer.catalog import ModelEntry, resolve_model
from alphalayer.core import validation
from alphalayer.core.errors import (
    AlphalayerError,
    InvalidRequest,
    ModelNotFound,
    ModelUnusable,
    NotImplementedYet,
)
from alphalayer.core.job import Delivery, ImageRef, Job, JobSpec, Output, Submission
from alphalayer.core.request import MAX_SIDE, MIN_SIDE, GenerationRequest, Prompt, Seed
from alphalayer.images import codecs
from alphalayer.jobs.base import JobView
from alphalayer.storage import open_file, read


class ErrorBody(BaseModel):
    """An error. `param` names the field."""

    message: Annotated[str, Field(description="What happened, and what to do.")]
    type: Annotated[str, Field(description="Kind of the error, by its status.")]
    param: Annotated[str | None, Field(description="The wrong field.")]
    code: Annotated[str, Field(description="Stable code for programs.")]


class ErrorAnswer(BaseModel):
    """An error response."""

    error: Annotated[ErrorBody, Field(description="The error.")]


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

FIELDS = {"iterations": "n", "width": "size", "height": "size", "loras": "prompt"}
"""Names of fields on the wire, where they differ from those of `JobSpec`."""
OutputFormat = Literal["png", "webp", "jpeg"]
Quality = Literal["auto", "standard", "low", "medium", "high", "hd", "xhigh", "max"]
QUALITY_STEPS: dict[Quality, int] = {
    "low": 12,
    "medium": 20,
    "high": 30,
    "hd": 30,
    "xhigh": 40,
    "max": 50,
}
"""Sampling steps. For "auto" and "standard" the model's default is used."""
SIZE = re.compile(r"^(auto|\d{1,5}x\d{1,5})$", re.ASCII)
OPENAI_MODELS = re.compile(r"(gpt-|chatgpt-|dall-e|alphalayer$)", re.IGNORECASE)
"""Names that mean the default model."""
URL_MODELS = re.compile(r"dall-e-[23]$", re.IGNORECASE)
"""Models of OpenAI that respond with URLs by default."""
SILENT_S = 15.0
"""Pause after which a comment is sent. Proxies close idle connections."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
WHITE = "#ffffff"
BEST = 100
EVENT_COPIES = 6
"""Memory for an event, in bytes a byte of its file."""
CHUNK_BYTES = 256 * 1024
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Zeros: clients expect the numbers, and this service does not count tokens."""


RETRIED = (
    "queue_full",
    "rate_limited",
    "busy",
    "stopping",
    "storage_failed",
    "database_away",
    "overloaded",
)
"""Codes of errors that a client may retry.

OpenAI's clients retry after every 409 and 5xx. A request that crashes an engine must not be
retried.
"""


def _error_body(problem: Problem) -> dict[str, Any]:
    """Return the JSON of an error in OpenAI's form."""
    kind = {429: "rate_limit_error"}.get(
        problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"
    )
    message = f"{problem.detail} {problem.hint}".strip()
    return {
        "error": {"message": message, "type": kind, "param": problem.field, "code": problem.code}
    }


def _render_error(problem: Problem, headers: Mapping[str, str]) -> ErrorResponse:
    """Return the response for an error; wrong fields and missing features have 400."""
    retry = {} if problem.code in RETRIED else {"x-should-retry": "false"}
    if problem.status in (422, 501):
        problem = problem.model_copy(update={"status": 400})
    return ErrorResponse(_error_body(problem), problem.status, {**headers, **retry})


DIALECT = Dialect("/v1", router, _render_error, FIELDS)


def _check_size(size: str) -> str:
    sides = (
        []
        if size == "auto"
        else [int(side) for side in size.split("x")]
        if SIZE.fullmatch(size)
        else [0]
    )
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        accepted = f"auto or WIDTHxHEIGHT, each a whole number from {MIN_SIDE} to {MAX_SIDE}"
        raise ValueError(f"got {validation.shown(size)}; {accepted}")
    return size


class GenerationsRequest(Body, frozen=True):
    """Body of `POST /v1/images/generations`. Unknown fields are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        title="OpenAIGenerationsRequest",
        json_schema_extra={"examples": [{"prompt": "an apple, high quality"}]},
    )

    prompt: Prompt
    model: Annotated[
        str | None,
        Field(max_length=500, description="One of /v1/models; other names mean the default model."),
    ] = None
    n: Annotated[int, Field(ge=1, le=10, description="Number of images.")] = 1
    size: Annotated[
        str,
        Field(
            json_schema_extra={"pattern": SIZE.pattern},
            description=f'"auto" or WxH, sides from 64 to {MAX_SIDE}.',
        ),
        AfterValidator(_check_size),
    ] = "auto"
    quality: Annotated[
        Quality,
        Field(
            description="Sampling steps: low 12, medium 20, high and hd 30, xhigh 40, max 50; "
            "otherwise the model's default."
        ),
    ] = "auto"
    background: Annotated[
        Literal["transparent", "opaque", "auto"],
        Field(
            description="opaque means a white background; auto is transparent, with jpeg opaque."
        ),
    ] = "auto"
    output_format: Annotated[OutputFormat, Field(description="jpeg has no transparency.")] = "png"
    output_compression: Annotated[
        int, Field(ge=0, le=BEST, description="Quality of webp and jpeg; webp is lossless at 100.")
    ] = BEST
    response_format: Annotated[
        Literal["url", "b64_json"] | None,
        Field(
            description="The images themselves or their URLs. "
            "The default is url for dall-e-2 and dall-e-3, otherwise b64_json."
        ),
    ] = None
    stream: Annotated[bool, Field(description="Respond with server-sent events.")] = False
    partial_images: Annotated[int, Field(ge=0, le=3, description="Previews in a stream.")] = 0
    seed: Seed = -1
    user: Annotated[str | None, Field(description="Ignored.")] = None
    moderation: Annotated[str | None, Field(description="Ignored.")] = None
    style: Annotated[str | None, Field(description="Ignored.")] = None

    @property
    def wants_urls(self) -> bool:
        """Return whether the response has the URLs of the images, not the images."""
        default = "url" if URL_MODELS.match(self.model or "") else "b64_json"
        return (self.response_format or default) == "url"

    @property
    def is_opaque(self) -> bool:
        """Return whether the background is white."""
        return self.background == "opaque" or (
            self.background == "auto" and self.output_format == "jpeg"
        )

    @property
    def is_lossy(self) -> bool:
        """Return whether the stored image is encoded again for the response."""
        return self.output_format == "jpeg" or (
            self.output_format == "webp" and self.output_compression < BEST
        )

    def to_spec(self, service: Service, model: str | None) -> JobSpec:
        """Return the job of this request. Raises `InvalidRequest`.

        Args:
            service: The service that runs the job.
            model: Name of the model; None for the default.
        """
        if self.background == "transparent" and self.output_format == "jpeg":
            raise InvalidRequest(
                "jpeg has no transparency.",
                hint='Use "png" or "webp", or background "opaque".',
                field="output_format",
            )
        sides = self.size.split("x") if self.size != "auto" else []
        generation = GenerationRequest.of(
            self,
            comments=service.prompt_comments,
            model=model,
            steps=QUALITY_STEPS.get(self.quality),
            noise=service.noise,
            decode=service.decode,
            **dict(zip(("width", "height"), map(int, sides), strict=False)),
        )
        lossless = "webp" if self.output_format == "webp" and not self.is_lossy else "png"
        return JobSpec.model_construct(
            generation=generation,
            iterations=self.n,
            output=Output.model_construct(
                format=lossless, background=WHITE if self.is_opaque else None
            ),
            previews=self.stream and self.partial_images > 0,
        )

    def settings(self, image: ImageRef) -> dict[str, Any]:
        """Return the settings that a response repeats."""
        quality = {"auto": "medium", "standard": "medium", "hd": "high"}.get(
            self.quality, self.quality
        )
        return {
            "background": "opaque" if self.is_opaque else "transparent",
            "output_format": self.output_format,
            "quality": quality,
            "size": f"{image.width}x{image.height}",
        }


class ImageData(BaseModel):
    """One image: its bytes or its URL."""

    b64_json: Annotated[str | None, Field(description="The file.")] = None
    url: Annotated[str | None, Field(description="URL of the file.")] = None


class GenerationsResponse(BaseModel):
    """Images and their settings."""

    created: Annotated[int, Field(description="Unix seconds.")]
    data: Annotated[list[ImageData], Field(description="The images.")]
    background: Annotated[str, Field(description="transparent or opaque.")]
    output_format: Annotated[str, Field(description="As requested.")]
    quality: Annotated[str, Field(description="The quality that was used.")]
    size: Annotated[str, Field(description="WxH.")]
    usage: Annotated[dict[str, Any], Field(description="Zeros: tokens are not counted.")] = USAGE
    warnings: Annotated[
        list[str] | None, Field(description="What of the request was ignored, if anything.")
    ] = None


class Model(BaseModel):
    """One model."""

    id: Annotated[str, Field(description="Name.")]
    object: Annotated[Literal["model"], Field(description='Always "model".')] = "model"
    created: Annotated[int, Field(description="Unix seconds.")]
    owned_by: Annotated[str, Field(description='Always "alphalayer".')] = "alphalayer"

    @classmethod
    def of(cls, entry: ModelEntry) -> Model:
        """Return the model of an entry of the models folder."""
        return cls(id=entry.name, created=entry.modified)


class ModelList(BaseModel):
    """All usable models."""

    object: Annotated[Literal["list"], Field(description='Always "list".')] = "list"
    data: Annotated[list[Model], Field(description="The models.")]


@router.post(
    "/images/generations",
    summary="Generate images",
    response_model=GenerationsResponse,
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
    spec = body.to_spec(service, model)
    submission = Submission(owner=user, idempotency_key=idempotency_key, digest=body.digest)
    if body.stream:
        pending = PendingJob(service)
        with wire_names(FIELDS):
            await pending.submit(spec, submission, Delivery())
        events = _with_keepalive(_events(body, service, pending))
        return StreamingResponse(events, media_type=EVENT_STREAM, headers=STREAM_HEADERS)
    with wire_names(FIELDS):
        job = await run_job(service, request, spec, submission)
    assert job.result is not None, job.id
    images, files = job.result.images, EmbeddedFiles()
    if body.wants_urls:
        data = [
            ImageData(
                url=file_url(
                    base_url(service, request),
                    await _stored(body, service, image.key),
                    service.url_signer,
                )
            )
            for image in images
        ]
    else:
        data = [
            ImageData(b64_json=await _embed(body, service, files, image.key)) for image in images
        ]
    answer = GenerationsResponse(
        created=int(time.time()),
        data=data,
        warnings=list(job.result.warnings) or None,
        **body.settings(images[0]),
    )
    return files.respond(answer, exclude_none=True)


@router.post(
    "/images/edits", summary="Not implemented", status_code=400, response_model=ErrorAnswer
)
@router.post(
    "/images/variations", summary="Not implemented", status_code=400, response_model=ErrorAnswer
)
async def edits(_user: Generator) -> None:
    """Respond with 400."""
    raise NotImplementedYet(
        "editing images is not implemented.", hint="Use /v1/images/generations."
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


async def _with_keepalive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the events, and comments while there are none."""
    upcoming = asyncio.ensure_future(anext(events, ""))
    try:
        while True:
            done, _ = await asyncio.wait({upcoming}, timeout=SILENT_S)
            if done:
                if not (event := upcoming.result()):
                    return
                yield event
                upcoming = asyncio.ensure_future(anext(events, ""))
            else:
                yield ": keep-alive\n\n"
    finally:
        upcoming.cancel()


async def _events(
    body: GenerationsRequest, service: Service, pending: PendingJob
) -> AsyncIterator[str]:
    """Yield the events of a job. A client that disconnects withdraws its job."""
    sent, job = 0, None
    try:
        async for view in follow(service, pending.job_id, elsewhere=True):
            job = view.job
            preview = view.progress.preview
            if preview and not job.state.is_final and _is_due(view, sent, body.partial_images):
                image = await convert_preview(service, preview, _convert, body.output_format, BEST)
                if image:
                    yield _event("partial_image", image, partial_image_index=sent, **_echo(body))
                    sent += 1
        async for event in _last_events(body, service, job):
            yield event
    except AlphalayerError as error:
        yield f"event: error\ndata: {json.dumps(_error_body(Problem.of(error)))}\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        await pending.withdraw()
        raise


async def _last_events(
    body: GenerationsRequest, service: Service, job: Job | None
) -> AsyncIterator[str]:
    result = raise_if_failed(job).result if job else None
    warnings = {"warnings": result.warnings} if result and result.warnings else {}
    for image in result.images if result else ():
        fields = {**body.settings(image), "usage": USAGE, **warnings}
        async with service.pixels.turn(limited=False):
            data = await _finished(body, service, image.key)
            event = await service.pixels.run(
                EVENT_COPIES * len(data), partial(_event, "completed", data, **fields)
            )
        yield event


def _is_due(view: JobView, sent: int, requested: int) -> bool:
    """Return whether the next preview is due; they are spread over the steps."""
    step, steps = view.progress.step, view.progress.steps
    return sent < requested and step * (requested + 1) >= steps * (sent + 1)


def _echo(body: GenerationsRequest) -> dict[str, Any]:
    return {
        name: getattr(body, name) for name in ("background", "output_format", "quality", "size")
    }


def _event(name: str, file: bytes, **fields: Any) -> str:
    kind = f"image_generation.{name}"
    image = base64.b64encode(file).decode()
    data = {"type": kind, "b64_json": image, "created_at": int(time.time()), **fields}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def _finished(body: GenerationsRequest, service: Service, key: str) -> bytes:
    """Return an image in the requested format and quality, within a turn of the pool."""
    data = await read(service.storage, key)
    if not body.is_lossy:
        return data
    return await service.pixels.process(
        data, ENCODE_BYTES, _convert, body.output_format, body.output_compression
    )


async def _embed(body: GenerationsRequest, service: Service, files: EmbeddedFiles, key: str) -> str:
    """Return the placeholder of an image in the requested format and quality."""

    async def chunks() -> AsyncIterator[bytes]:
        if not body.is_lossy:
            async for chunk in file_chunks(service, key):
                yield chunk
            return
        async with service.pixels.turn(limited=False):
            data = await _finished(body, service, key)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    # errors later would cut the response off
    await open_file(service.storage, key)
    return files.add(chunks)


async def _stored(body: GenerationsRequest, service: Service, key: str) -> str:
    """Return the storage key of an image in the requested format.

    If it is encoded again, it is stored beside the first.
    """
    if not body.is_lossy:
        return key
    encoded = f"{key.rpartition('.')[0]}.{body.output_format}"
    async with service.pixels.turn(limited=False):
        data = await _finished(body, service, key)
        await service.pixels.run(len(data), service.storage.put, encoded, data)
    return encoded


def _convert(data: bytes, kind: OutputFormat, quality: int) -> bytes:
    """Encode an image file in another format. For jpeg it must be opaque."""
    rgba, parameters = codecs.decode(data)
    if kind == "png":
        return codecs.encode(rgba, "png", parameters or "")
    image, buffer = Image.fromarray(rgba), io.BytesIO()
    if kind == "jpeg":
        image = image.convert("RGB")
    image.save(buffer, format=kind.upper(), quality=max(quality, 1))
    return buffer.getvalue()
