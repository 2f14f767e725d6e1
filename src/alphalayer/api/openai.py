"""The OpenAI Images dialect, `/v1/images` and `/v1/models`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from alphalayer.api.deps import (
    IdempotencyKey,
    PendingJob,
    Service,
    ServiceDep,
    User,
    base_url,
    file_url,
    follow,
    raise_if_failed,
    read_file,
    read_preview,
    require_user,
    run_job,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.errors import ErrorResponse, Problem
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
from alphalayer.core.request import MAX_SEED, MAX_SIDE, MIN_SIDE, parse_request
from alphalayer.images import codecs
from alphalayer.jobs.base import JobView


class ErrorBody(BaseModel):
    """What went wrong. `param` names the field."""

    message: Annotated[str, Field(description="What happened, and what to do.")]
    type: Annotated[str, Field(description="By the status, as that API has it.")]
    param: Annotated[str | None, Field(description="The field that is wrong.")]
    code: Annotated[str, Field(description="Stable, for programs.")]


class ErrorAnswer(BaseModel):
    """What every error answers."""

    error: Annotated[ErrorBody, Field(description="The error.")]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": "What is wrong."} for status in (400, "4XX")
}
router = APIRouter(
    prefix="/v1", tags=["OpenAI"], responses=ERRORS, dependencies=[Depends(require_user)]
)

FIELDS = {"iterations": "n", "width": "size", "height": "size", "loras": "prompt"}
"""What a field is called here, where that differs from `GenerationRequest` and `JobSpec`."""
RETRIED = ("queue_full", "rate_limited", "stopping", "storage_failed", "database_away")
"""Codes of errors that a client may retry.

OpenAI's clients retry after every 409 and 5xx. A request that crashes an engine must not be retried.
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
    """Return the response for an error, with status 400 for a wrong field as OpenAI has it."""
    retry = {} if problem.code in RETRIED else {"x-should-retry": "false"}
    status = 400 if problem.status == 422 else problem.status
    return ErrorResponse(_error_body(problem), status, {**headers, **retry})


DIALECT = Dialect("/v1", router, _render_error, FIELDS)
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
"""Sampling steps; "auto" and "standard" are not here and leave them to the model."""
SIZE = re.compile(r"^(auto|\d{1,5}x\d{1,5})$", re.ASCII)
THEIRS = re.compile(r"(gpt-|chatgpt-|dall-e|alphalayer$)", re.IGNORECASE)
"""Models that clients name which know nothing of ours."""
SILENT_S = 15.0
"""After so long without an event a comment is sent: proxies end connections in which nothing is said."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
WHITE = "#ffffff"
BEST = 100
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Nothing is counted in tokens here; clients want the numbers."""


def _checked_size(size: str) -> str:
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


class GenerationsRequest(Body):
    """The body of `POST /v1/images/generations`. Fields that are not here are ignored."""

    model_config = ConfigDict(
        title="OpenAIGenerationsRequest",
        json_schema_extra={"examples": [{"prompt": "an apple, high quality"}]},
    )

    prompt: Annotated[str, Field(description="What to draw.")]
    model: Annotated[
        str | None,
        Field(max_length=500, description="One of /v1/models; any other name means the usual one."),
    ] = None
    n: Annotated[int, Field(ge=1, le=10, description="How many pictures.")] = 1
    size: Annotated[
        str,
        Field(
            json_schema_extra={"pattern": SIZE.pattern},
            description=f'"auto" or WxH, sides from 64 to {MAX_SIDE}.',
        ),
        AfterValidator(_checked_size),
    ] = "auto"
    quality: Annotated[
        Quality,
        Field(
            description="Steps: low 12, medium 20, high and hd 30, xhigh 40, max 50; else as the model likes."
        ),
    ] = "auto"
    background: Annotated[
        Literal["transparent", "opaque", "auto"],
        Field(
            description="opaque lays the picture on white; auto is transparent, with jpeg opaque."
        ),
    ] = "auto"
    output_format: Annotated[OutputFormat, Field(description="jpeg has no transparency.")] = "png"
    output_compression: Annotated[
        int, Field(ge=0, le=BEST, description="Quality of webp and jpeg; webp is lossless at 100.")
    ] = BEST
    response_format: Annotated[
        Literal["url", "b64_json"], Field(description="The pictures themselves or their URLs.")
    ] = "b64_json"
    stream: Annotated[bool, Field(description="Answer with server-sent events.")] = False
    partial_images: Annotated[
        int, Field(ge=0, le=3, description="Pictures on the way, when streaming.")
    ] = 0
    seed: Annotated[
        int, Field(ge=-1, le=MAX_SEED, description="Not of that API: same seed, same picture.")
    ] = -1
    user: Annotated[str | None, Field(description="Ignored, as moderation and style are.")] = None
    moderation: Annotated[str | None, Field(description="Ignored.")] = None
    style: Annotated[str | None, Field(description="Ignored.")] = None

    @property
    def is_opaque(self) -> bool:
        """Whether the picture is laid on white."""
        return self.background == "opaque" or (
            self.background == "auto" and self.output_format == "jpeg"
        )

    @property
    def is_lossy(self) -> bool:
        """Whether the stored picture is encoded again for the answer."""
        return self.output_format == "jpeg" or (
            self.output_format == "webp" and self.output_compression < BEST
        )

    def to_spec(self, service: Service, model: str | None) -> JobSpec:
        """The job that does this. Raises `InvalidRequest`."""
        if self.background == "transparent" and self.output_format == "jpeg":
            raise InvalidRequest(
                "jpeg has no transparency.",
                hint='Use "png" or "webp", or background "opaque".',
                field="output_format",
            )
        fields: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, "model": model}
        if self.size != "auto":
            fields["width"], fields["height"] = (int(side) for side in self.size.split("x"))
        fields |= {
            "steps": QUALITY_STEPS.get(self.quality),
            "noise": service.noise,
            "decode": service.decode,
        }
        with wire_names(FIELDS):
            generation = parse_request(fields)
        lossless = "webp" if self.output_format == "webp" and not self.is_lossy else "png"
        output = Output(format=lossless, background=WHITE if self.is_opaque else None)
        return JobSpec(
            generation=generation,
            iterations=self.n,
            output=output,
            previews=self.stream and self.partial_images > 0,
        )

    def settings(self, image: ImageRef) -> dict[str, Any]:
        """What an answer says of itself."""
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
    """One picture: its bytes or its URL."""

    b64_json: Annotated[str | None, Field(description="The file itself.")] = None
    url: Annotated[str | None, Field(description="Where it is.")] = None


class GenerationsResponse(BaseModel):
    """The pictures, and what they are."""

    created: Annotated[int, Field(description="Unix seconds.")]
    data: Annotated[list[ImageData], Field(description="The pictures.")]
    background: Annotated[str, Field(description="transparent or opaque.")]
    output_format: Annotated[str, Field(description="As asked for.")]
    quality: Annotated[str, Field(description="As understood.")]
    size: Annotated[str, Field(description="WxH.")]
    usage: Annotated[dict[str, Any], Field(description="Zeros: nothing is counted in tokens.")] = (
        USAGE
    )


class Model(BaseModel):
    """One model."""

    id: Annotated[str, Field(description="The name.")]
    object: Annotated[Literal["model"], Field(description='Always "model".')] = "model"
    created: Annotated[int, Field(description="Unix seconds.")]
    owned_by: Annotated[str, Field(description='Always "alphalayer".')] = "alphalayer"

    @classmethod
    def of(cls, entry: ModelEntry) -> Model:
        """The model that an entry of the models folder is."""
        return cls(id=entry.name, created=int(entry.path.stat().st_mtime))


class ModelList(BaseModel):
    """All models that can be drawn with."""

    object: Annotated[Literal["list"], Field(description='Always "list".')] = "list"
    data: Annotated[list[Model], Field(description="Those that can be drawn with.")]


@router.post(
    "/images/generations",
    summary="Draw pictures",
    response_model=GenerationsResponse,
    response_model_exclude_none=True,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def generations(
    body: GenerationsRequest,
    request: Request,
    service: ServiceDep,
    user: User,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """With transparency, unless the background is opaque. With `stream` the answer is events."""
    model = await asyncio.to_thread(_known_model, body.model, service)
    spec = body.to_spec(service, model)
    submission = Submission(owner=user, idempotency_key=idempotency_key, digest=body.digest)
    if body.stream:
        pending = PendingJob(service)
        with wire_names(FIELDS):
            await pending.submit(spec, submission, Delivery())
        events = _never_silent(_events(body, service, pending))
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
    with wire_names(FIELDS):
        job = await run_job(request, spec, submission)
    assert job.result is not None, job.id
    pictures = job.result.images
    if body.response_format == "url":
        data = [
            ImageData(url=file_url(base_url(request), await _stored(body, service, image.key)))
            for image in pictures
        ]
    else:
        data = [ImageData(b64_json=await _base64(body, service, image.key)) for image in pictures]
    return GenerationsResponse(created=int(time.time()), data=data, **body.settings(pictures[0]))


@router.post("/images/edits", summary="Not there yet", status_code=501, response_model=ErrorAnswer)
@router.post(
    "/images/variations", summary="Not there yet", status_code=501, response_model=ErrorAnswer
)
async def edits() -> None:
    """Answers 501."""
    raise NotImplementedYet(
        "editing pictures is not there yet.", hint="Use /v1/images/generations."
    )


@router.get("/models", summary="The models that can be asked for")
def models(service: ServiceDep) -> ModelList:
    """Those that can be drawn with."""
    return ModelList(
        data=[Model.of(entry) for entry in service.list_models() if entry.problem is None]
    )


@router.get("/models/{model_id}", summary="One model")
def model(model_id: Annotated[str, Path(description="Its name.")], service: ServiceDep) -> Model:
    """By its name."""
    return Model.of(resolve_model(model_id, service.list_models()))


def _known_model(name: str | None, service: Service) -> str | None:
    """The model of that name; None, which means the usual one, where there is none, for clients always name one of theirs.

    Where the models are not known, names of that API's own models mean the usual one, and any other has to be there when it is drawn.

    Raises:
        ModelUnusable: it is there and cannot be drawn with.
    """
    if not service.knows_models:
        return None if not name or THEIRS.match(name) else name
    try:
        return resolve_model(name, service.list_models()).name if name else None
    except ModelNotFound:
        return None
    except ModelUnusable as error:
        error.field = "model"
        raise


async def _never_silent(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events, with comments where there are none for a while."""
    following = asyncio.ensure_future(anext(events, ""))
    try:
        while True:
            said, _ = await asyncio.wait({following}, timeout=SILENT_S)
            if said:
                if not (event := following.result()):
                    return
                yield event
                following = asyncio.ensure_future(anext(events, ""))
            else:
                yield ": still here\n\n"
    finally:
        following.cancel()


async def _events(
    body: GenerationsRequest, service: Service, pending: PendingJob
) -> AsyncIterator[str]:
    """The events of a job; a client that leaves takes its job along, unless others wait for it."""
    sent, job = 0, None
    try:
        async for view in follow(service, pending.job_id, elsewhere=True):
            job = view.job
            preview = view.progress.preview
            if preview and not job.state.is_final and _is_due(view, sent, body.partial_images):
                picture = await _partial(body, service, preview)
                if picture:
                    yield _event("partial_image", picture, partial_image_index=sent, **_asked(body))
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
    for image in result.images if result else ():
        picture = await _base64(body, service, image.key)
        yield _event("completed", picture, **body.settings(image), usage=USAGE)


def _is_due(view: JobView, sent: int, wanted: int) -> bool:
    """Whether the next of the wanted pictures on the way is to be sent: they are spread evenly over the steps."""
    return sent < wanted and view.progress.step * (wanted + 1) >= view.progress.steps * (sent + 1)


def _asked(body: GenerationsRequest) -> dict[str, Any]:
    return {
        name: getattr(body, name) for name in ("background", "output_format", "quality", "size")
    }


def _event(name: str, picture: str, **fields: Any) -> str:
    kind = f"image_generation.{name}"
    data = {"type": kind, "b64_json": picture, "created_at": int(time.time()), **fields}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def _partial(body: GenerationsRequest, service: Service, key: str) -> str | None:
    """A preview in the format that was asked for."""
    data = await read_preview(service, key)
    if data is None:
        return None
    return base64.b64encode(
        await asyncio.to_thread(_convert, data, body.output_format, BEST)
    ).decode()


async def _finished(body: GenerationsRequest, service: Service, key: str) -> bytes:
    """A picture as it was asked for."""
    data = await read_file(service, key)
    if body.is_lossy:
        data = await asyncio.to_thread(_convert, data, body.output_format, body.output_compression)
    return data


async def _base64(body: GenerationsRequest, service: Service, key: str) -> str:
    return base64.b64encode(await _finished(body, service, key)).decode()


async def _stored(body: GenerationsRequest, service: Service, key: str) -> str:
    """The storage key of a picture as it was asked for; one that is encoded again is stored beside the first."""
    if not body.is_lossy:
        return key
    own = f"{key.rpartition('.')[0]}.{body.output_format}"
    await asyncio.to_thread(service.storage.put, own, await _finished(body, service, key))
    return own


def _convert(data: bytes, kind: OutputFormat, quality: int) -> bytes:
    """A picture file in another format; what jpeg cannot hold of it was laid on white before."""
    rgba, parameters = codecs.decode(data)
    if kind == "png":
        return codecs.encode(rgba, "png", parameters or "")
    image, buffer = Image.fromarray(rgba), io.BytesIO()
    if kind == "jpeg":
        image = image.convert("RGB")
    image.save(buffer, format=kind.upper(), quality=max(quality, 1))
    return buffer.getvalue()
