"""The native dialect, `/alpha/v1`: a prompt in, the URL of a transparent PNG out; and the pictures themselves."""

from __future__ import annotations

import base64
import json
from pathlib import PurePath
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from alphalayer.api.deps import (
    IdempotencyKey,
    Service,
    ServiceDep,
    User,
    base_url,
    file_url,
    read_file,
    run_job,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.errors import PROBLEMS
from alphalayer.api.schemas import Body
from alphalayer.catalog import ModelEntry, model_defaults
from alphalayer.core.errors import CorruptFile, InvalidRequest
from alphalayer.core.job import (
    MAX_ITERATIONS,
    PREVIEW_PREFIX,
    Delivery,
    Job,
    JobSpec,
    Output,
    Submission,
)
from alphalayer.core.request import (
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    OPAQUE,
    DecodeMode,
    ImageFormat,
    Lora,
    ModelDefaults,
    NoiseSource,
    Prompt,
    ResizeMode,
    SchedulerName,
    Side,
    parse_request,
    split_sampler_name,
)
from alphalayer.core.validation import COLOUR
from alphalayer.images import codecs, infotext, postprocess
from alphalayer.images.codecs import MIME_TYPES
from alphalayer.storage import check_key

router = APIRouter(prefix="/alpha/v1", tags=["Alphalayer"], responses=PROBLEMS)
FIELDS = {"model": "checkpoint", "iterations": "n_iter", "sampler": "sampler_name"}
"""What a field is called here, where that differs from `GenerationRequest`."""
DIALECT = Dialect("/alpha", router, field_names=FIELDS)


class Txt2ImgRequest(Body):
    """The body of `POST /alpha/v1/txt2img`. Only the prompt must be given; what is left out is drawn as the model likes it."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"prompt": "an apple, high quality"}]},
    )

    other_names = FIELDS

    prompt: Annotated[Prompt, Field(description="What to draw.")]
    negative_prompt: Annotated[
        str, Field(max_length=MAX_PROMPT_CHARACTERS, description="What to keep out.")
    ] = "bad, ugly"
    seed: Annotated[
        int, Field(ge=-1, le=MAX_SEED, description="Same seed, same picture; -1 draws a fresh one.")
    ] = 12345
    steps: Annotated[int, Field(ge=1, le=150, description="Sampling steps; SDXL: 20.")] | None = (
        None
    )
    sampler_name: (
        Annotated[
            str, Field(max_length=100, description='SDXL: "DPM++ 2M SDE"; may carry its scheduler.')
        ]
        | None
    ) = None
    scheduler: Annotated[SchedulerName, Field(description='SDXL: "Karras".')] | None = None
    cfg_scale: (
        Annotated[
            float, Field(ge=1, le=30, description="How strictly the prompt is followed; SDXL: 5.")
        ]
        | None
    ) = None
    width: Annotated[Side, Field(description="Pixels; SDXL: 1024.")] | None = None
    height: Annotated[Side, Field(description="Pixels; SDXL: 1024.")] | None = None
    batch_size: Annotated[
        int, Field(ge=1, le=8, description="Pictures drawn together; seeds count up.")
    ] = 1
    n_iter: Annotated[
        int, Field(ge=1, le=MAX_ITERATIONS, description="Batches drawn one after another.")
    ] = 1
    subseed: Annotated[int, Field(ge=-1, le=MAX_SEED, description="Variation seed.")] = -1
    subseed_strength: Annotated[
        float, Field(ge=0, le=1, description="How far to go to the variation.")
    ] = 0.0
    checkpoint: (
        Annotated[
            str, Field(min_length=1, max_length=500, description="A model by name, title or hash.")
        ]
        | None
    ) = None
    loras: Annotated[
        list[Lora], Field(max_length=16, description="LoRA files of models/Lora, with weights.")
    ] = []  # noqa: RUF012 - copied
    layerdiffuse_enabled: Annotated[bool, Field(description="Draw with transparency.")] = True
    layerdiffuse_method: Annotated[
        Literal["attention", "conv"], Field(description="Which LayerDiffuse patch.")
    ] = "attention"
    layerdiffuse_weight: Annotated[
        float, Field(ge=0, le=2, description="Strength of the patch.")
    ] = 1.0
    layerdiffuse_stop_at: Annotated[
        float, Field(ge=0, le=1, description="Part of the schedule it is on.")
    ] = 1.0
    layerdiffuse_resize_mode: Annotated[
        ResizeMode, Field(description="Means nothing yet: no picture is given.")
    ] = "Just Resize"
    layerdiffuse_output_origin: Annotated[
        bool, Field(description="Not there yet: true is refused.")
    ] = False
    format: Annotated[ImageFormat, Field(description="All three have alpha.")] = "png"
    defringe: Annotated[
        bool, Field(description="Take the old background's colour out of soft edges.")
    ] = False
    trim: Annotated[bool, Field(description="Cut empty borders away.")] = False
    trim_threshold: Annotated[
        int, Field(ge=0, le=254, description="Alpha up to this is empty.")
    ] = 0
    trim_padding: Annotated[
        int, Field(ge=0, le=1024, description="Pixels left around the object.")
    ] = 0
    background: (
        Annotated[str, Field(pattern=COLOUR, description="Lay the picture on this colour.")] | None
    ) = None
    response_format: Annotated[
        Literal["url", "base64"],
        Field(description="With base64 the answer holds the pictures themselves, too."),
    ] = "url"

    def to_spec(self, noise: NoiseSource, decode: DecodeMode) -> JobSpec:
        """The job that does this, with the noise and the decoding that the service is set to. Raises `InvalidRequest`."""
        self._refuse_what_cannot_be_done()
        sampler, scheduler = split_sampler_name(self.sampler_name, self.scheduler)
        same = (
            "prompt",
            "negative_prompt",
            "seed",
            "steps",
            "cfg_scale",
            "width",
            "height",
            "batch_size",
        )
        generation = parse_request(
            {
                **{name: getattr(self, name) for name in (*same, "subseed", "subseed_strength")},
                "sampler": sampler,
                "scheduler": scheduler,
                "model": self.checkpoint,
                "loras": tuple(self.loras),
                "noise": noise,
                "decode": decode,
                "mode": self.layerdiffuse_method if self.layerdiffuse_enabled else OPAQUE,
                "layerdiffuse_weight": self.layerdiffuse_weight,
                "layerdiffuse_stop_at": self.layerdiffuse_stop_at,
            }
        )
        output = Output(**{name: getattr(self, name) for name in Output.model_fields})
        return JobSpec(generation=generation, iterations=self.n_iter, output=output)

    @property
    def with_data(self) -> bool:
        """Whether the answer holds the images themselves."""
        return self.response_format == "base64"

    def _refuse_what_cannot_be_done(self) -> None:
        """What is not there yet, or means nothing beside another field; at its default a field is no wish."""
        if self.layerdiffuse_output_origin:
            raise InvalidRequest(
                "the picture before decoding is not there yet.",
                hint="Leave it out.",
                field="layerdiffuse_output_origin",
            )
        reject_unused_options(self, "trim", "trim_threshold", "trim_padding")
        reject_unused_options(
            self,
            "layerdiffuse_enabled",
            "layerdiffuse_method",
            "layerdiffuse_weight",
            "layerdiffuse_stop_at",
        )


def reject_unused_options(asked: BaseModel, switch: str, *names: str) -> None:
    """Raise `InvalidRequest` for fields that mean something only with `switch`, where that is off and they are not at their default."""
    for name in names:
        if (
            not getattr(asked, switch)
            and getattr(asked, name) != type(asked).model_fields[name].default
        ):
            raise InvalidRequest(
                f"it has no effect without {switch}.", hint="Leave it out.", field=name
            )


class ImageAnswer(BaseModel):
    """One picture of several."""

    url: Annotated[str, Field(description="Where the picture is.")]
    filename: Annotated[str, Field(description="Its name in the storage.")]
    seed: Annotated[int, Field(description="Its own seed.")]
    width: Annotated[int, Field(description="Pixels.")]
    height: Annotated[int, Field(description="Pixels.")]
    base64: Annotated[str | None, Field(description="The file itself, where it was asked for.")] = (
        None
    )


class Txt2ImgResponse(BaseModel):
    """The picture's URL and name, and `info`, a JSON string with everything that made it."""

    url: Annotated[str, Field(description="Where the first picture is.")]
    filename: Annotated[str, Field(description="Its name in the storage.")]
    info: Annotated[
        str, Field(description="A JSON string: seeds, size, sampler, model and the infotexts.")
    ]
    base64: Annotated[str | None, Field(description="The picture, where it was asked for.")] = None
    images: Annotated[
        list[ImageAnswer] | None, Field(description="All pictures, where there are several.")
    ] = None


@router.post("/txt2img", response_model_exclude_none=True, summary="Draw a transparent picture")
async def txt2img(
    body: Txt2ImgRequest,
    request: Request,
    service: ServiceDep,
    user: User,
    idempotency_key: IdempotencyKey = None,
) -> Txt2ImgResponse:
    """Waits for the picture. While it waits it stands in the queue as a job; a client that leaves gives its place up."""
    with wire_names(FIELDS):
        submission = Submission(owner=user, idempotency_key=idempotency_key, digest=body.digest)
        spec = body.to_spec(service.noise, service.decode)
        job = await run_job(request, spec, submission, Delivery(with_data=body.with_data))
    return await _answer(job, request, service)


FileName = Annotated[str, Path(description="The name of a picture, as an answer gave it.")]
REDIRECT_S = 3600
"""How long a signed URL opens a picture."""
FROM = "Sec-Fetch-Site"
"""The header in which browsers say whether a page of this service asks."""


@router.head("/file/{filename}", include_in_schema=False)
@router.get(
    "/file/{filename}",
    summary="A finished picture",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {mime: {} for mime in MIME_TYPES.values()},
            "description": "The picture itself.",
        },
        307: {"description": "Where the picture is, for an hour; where the service is set so."},
    },
)
async def file(filename: FileName, request: Request, service: ServiceDep) -> Response:
    """Needs no password: the name is the secret, so that the URL opens wherever it is pasted."""
    key = check_key(filename)
    # the page's own policy, and a bucket without CORS, would keep the picture from it; HEAD does not open a URL signed for GET
    is_page = request.headers.get(FROM) == "same-origin"
    if (
        request.method == "GET"
        and service.redirect_files
        and not is_page
        and (url := service.storage.presign(key, REDIRECT_S))
    ):
        return RedirectResponse(
            url, 307, {"Cache-Control": f"max-age={REDIRECT_S // 2}", "Vary": FROM}
        )
    found = await service.storage.open(key)
    # a preview is written over at every step; a picture never changes
    caching = (
        "no-store" if filename.startswith(PREVIEW_PREFIX) else "public, max-age=31536000, immutable"
    )
    headers = {"Cache-Control": caching, "Content-Length": str(found.size_bytes)}
    headers |= {"Vary": FROM} if service.redirect_files else {}
    mime = codecs.mime_type(filename)
    if request.method == "HEAD":
        return Response(media_type=mime, headers=headers)
    return StreamingResponse(found.chunks, media_type=mime, headers=headers)


@router.get(
    "/convert/{filename}",
    summary="A finished picture in another form",
    response_class=Response,
    responses={
        200: {
            "content": {mime: {} for mime in MIME_TYPES.values()},
            "description": "The picture made anew.",
        }
    },
)
async def convert(
    filename: FileName, output: Annotated[Output, Query()], service: ServiceDep, _user: User
) -> Response:
    """Another format, trimmed, defringed or laid on a colour; the settings inside stay. The stored picture does not change."""
    reject_unused_options(output, "trim", "trim_threshold", "trim_padding")
    data = await read_file(service, check_key(filename))
    made = await run_in_threadpool(postprocess.convert, data, output)
    name = f"{PurePath(filename).stem}.{output.format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(made, media_type=MIME_TYPES[output.format], headers=headers)


class Model(BaseModel):
    """One model: what a request that leaves fields out is drawn with, or why it cannot be drawn with."""

    name: Annotated[str, Field(description="What a request calls it.")]
    title: Annotated[str, Field(description="The name, with the short hash once it is known.")]
    is_default: Annotated[bool, Field(description="Taken where a request names none.")]
    defaults: Annotated[
        ModelDefaults, Field(description="What it draws with where a request is silent.")
    ]
    problem: Annotated[str | None, Field(description="Why it cannot be drawn with.")] = None


class ModelList(BaseModel):
    """The models of this service."""

    models: Annotated[list[Model], Field(description="By name.")]


@router.get("/models", summary="The models, with the defaults of each")
def models(service: ServiceDep, _user: User) -> ModelList:
    """Those that cannot be used are there, too, with the reason."""
    default = service.readiness()["model"]
    return ModelList(models=[_model(entry, default) for entry in service.list_models()])


def _model(entry: ModelEntry, default: str | None) -> Model:
    problem, defaults = entry.problem, ModelDefaults()
    try:
        defaults = model_defaults(entry.path)
    except CorruptFile as error:
        problem = problem or error
    return Model(
        name=entry.name,
        title=entry.title,
        is_default=entry.title == default,
        defaults=defaults,
        problem=f"{problem.message} {problem.hint}".strip() if problem else None,
    )


def image_answers(job: Job, base: str) -> list[ImageAnswer]:
    """The pictures of a job with their URLs; none before it is done."""
    return [
        ImageAnswer(
            url=file_url(base, image.key),
            filename=image.key,
            seed=image.seed,
            width=image.width,
            height=image.height,
        )
        for image in (job.result.images if job.result else ())
    ]


async def add_data(pictures: list[ImageAnswer], service: Service) -> None:
    """Put the files themselves into the answers. Raises `FileMissing`, `StorageFailed`."""
    for each in pictures:
        each.base64 = base64.b64encode(await read_file(service, each.filename)).decode()


async def _answer(job: Job, request: Request, service: Service) -> Txt2ImgResponse:
    pictures = image_answers(job, base_url(request))
    if job.delivery.with_data:
        await add_data(pictures, service)
    first = pictures[0]
    return Txt2ImgResponse(
        url=first.url,
        filename=first.filename,
        info=json.dumps(infotext.webui_info(job), ensure_ascii=False),
        base64=first.base64,
        images=pictures if len(pictures) > 1 else None,
    )
