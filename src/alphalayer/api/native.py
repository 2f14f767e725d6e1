"""The native dialect, `/alpha/v1`: from a prompt to the URL of a transparent image."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from alphalayer.api.deps import (
    IdempotencyKey,
    Service,
    ServiceDep,
    base_url,
    embed_file,
    error_field,
    run_job,
    while_connected,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.errors import PROBLEMS
from alphalayer.api.file_urls import Expires, Signature, UrlSigner, file_url
from alphalayer.api.guard import Converter, GuardedRoute, Reader, Submitter
from alphalayer.api.info import webui_info
from alphalayer.api.schemas import Body, StageSeconds, reject_unused_options
from alphalayer.catalog import ModelEntry, model_defaults, shorten_paths
from alphalayer.core.errors import CorruptFile, InvalidRequest
from alphalayer.core.job import (
    PREVIEW_PREFIX,
    Delivery,
    Iterations,
    Job,
    JobSpec,
    Output,
    Submission,
)
from alphalayer.core.modes import DEFAULT_MODE, OPAQUE
from alphalayer.core.request import (
    DecodeMode,
    GenerationRequest,
    ModelDefaults,
    NoiseSource,
    RequestFields,
    TransparencyMethod,
)
from alphalayer.core.samplers import choose_sampler
from alphalayer.core.values import copy_fields
from alphalayer.images import codecs, postprocess
from alphalayer.images.codecs import MIME_TYPES
from alphalayer.storage import check_image_key, read

router = APIRouter(
    prefix="/alpha/v1", tags=["Alphalayer"], responses=PROBLEMS, route_class=GuardedRoute
)
FIELDS = {
    "model": "checkpoint",
    "iterations": "n_iter",
    "sampler": "sampler_name",
    "mode": "layerdiffuse_method",
    "resize_mode": "layerdiffuse_resize_mode",
}
"""Names of fields on the wire, where they differ from those of `RequestFields` and `JobSpec`."""
DIALECT = Dialect("/alpha", router, field_names=FIELDS)


class Txt2ImgRequest(Body, Output, RequestFields, frozen=True):
    """Body of `POST /alpha/v1/txt2img`. Only the prompt is required.

    Fields that are null take the model's default.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: FIELDS.get(name, name),
        json_schema_extra={"examples": [{"prompt": "an apple, high quality"}]},
    )

    sampler: (
        Annotated[
            str,
            Field(
                max_length=100,
                description="Sampler, also with its schedule; SDXL: DPM++ 2M SDE.",
            ),
        ]
        | None
    ) = None
    iterations: Iterations = 1
    layerdiffuse_enabled: Annotated[bool, Field(description="Generate with transparency.")] = True
    layerdiffuse_method: Annotated[
        TransparencyMethod, Field(description="How transparency is generated.")
    ] = DEFAULT_MODE
    layerdiffuse_output_origin: Annotated[
        bool, Field(description="Not implemented; true is refused.")
    ] = False
    response_format: Annotated[
        Literal["url", "base64"],
        Field(description="With base64 the response also holds the images themselves."),
    ] = "url"

    def to_spec(self, noise: NoiseSource, decode: DecodeMode, *, comments: bool = True) -> JobSpec:
        """Return the job of this request.

        Args:
            noise: Source of noise of the service.
            decode: Decoding of transparency of the service.
            comments: Whether "#" starts a comment in the prompts.

        Raises:
            InvalidRequest: A field is wrong; it has the name of `JobSpec`, see `FIELDS`.
        """
        self._reject_conflicts()
        sampler, scheduler = choose_sampler(self.sampler, self.scheduler)
        generation = GenerationRequest.of(
            self,
            comments=comments,
            sampler=sampler,
            scheduler=scheduler,
            mode=self.layerdiffuse_method if self.layerdiffuse_enabled else OPAQUE,
            noise=noise,
            decode=decode,
        )
        return copy_fields(self, JobSpec, generation=generation, output=copy_fields(self, Output))

    @property
    def with_data(self) -> bool:
        """Return whether the response holds the images themselves."""
        return self.response_format == "base64"

    def _reject_conflicts(self) -> None:
        if self.layerdiffuse_output_origin:
            raise InvalidRequest(
                "the image before decoding is not implemented.",
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


class ImageAnswer(BaseModel):
    """One image."""

    url: Annotated[str, Field(description="URL of the image.")]
    filename: Annotated[str, Field(description="Storage key of the image.")]
    seed: Annotated[int, Field(description="Seed of the image.")]
    width: Annotated[int, Field(description="Pixels.")]
    height: Annotated[int, Field(description="Pixels.")]
    base64: Annotated[str | None, Field(description="The file, if requested.")] = None


class Txt2ImgResponse(BaseModel):
    """The image's URL and name, and `info`, a JSON string of all its settings."""

    url: Annotated[str, Field(description="URL of the first image.")]
    filename: Annotated[str, Field(description="Storage key of the first image.")]
    info: Annotated[
        str, Field(description="JSON string: seeds, size, sampler, model and infotexts.")
    ]
    base64: Annotated[str | None, Field(description="The first file, if requested.")] = None
    images: Annotated[
        list[ImageAnswer] | None, Field(description="All images, if there are several.")
    ] = None
    seconds: StageSeconds = {}
    warnings: Annotated[
        list[str] | None, Field(description="What of the request was ignored, if anything.")
    ] = None


@router.post(
    "/txt2img",
    response_model=Txt2ImgResponse,
    response_model_exclude_none=True,
    summary="Generate a transparent image",
)
async def txt2img(
    body: Txt2ImgRequest,
    request: Request,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Wait for the image. A client that disconnects cancels its job."""
    with wire_names(FIELDS):
        submission = Submission(owner=user, idempotency_key=idempotency_key, digest=body.digest)
        spec = body.to_spec(service.noise, service.decode, comments=service.prompt_comments)
        job = await run_job(service, request, spec, submission, Delivery(with_data=body.with_data))
    return await _answer(job, request, service)


FileName = Annotated[str, Path(description="Name of an image, from a response.")]
REDIRECT_S = 3600
"""Lifetime of a signed URL."""
FOREVER_S = 31_536_000
"""Lifetime of an image in caches, a year: it never changes."""
CONVERT_BYTES = 40
"""Memory for a conversion, in bytes a pixel: as measured for WebP and AVIF, the largest."""
FROM = "Sec-Fetch-Site"
"""Header with which browsers mark requests of this service's own page."""


@router.head("/file/{filename}", include_in_schema=False)
@router.get(
    "/file/{filename}",
    summary="Download an image",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {mime: {} for mime in MIME_TYPES.values()},
            "description": "The image.",
        },
        307: {"description": "URL of the image for an hour, if the service redirects."},
    },
)
async def file(
    filename: FileName,
    request: Request,
    service: ServiceDep,
    expires: Expires = None,
    signature: Signature = None,
) -> Response:
    """Return a stored image without a key.

    The name is the secret, or the URL is signed. Other files of the folder or bucket are not
    served.
    """
    key = check_image_key(filename)
    signer = service.url_signer
    lifetime_s = signer.check(filename, expires, signature) if signer else FOREVER_S
    # the page's policy and a bucket without CORS would block a redirect
    # a URL that is signed for GET does not open with HEAD
    is_page = request.headers.get(FROM) == "same-origin"
    if (
        request.method == "GET"
        and service.redirect_files
        and not is_page
        and (url := service.storage.presign(key, min(lifetime_s + 1, REDIRECT_S)))
    ):
        caching = f"max-age={min(lifetime_s, REDIRECT_S // 2)}"
        return RedirectResponse(url, 307, {"Cache-Control": caching, "Vary": FROM})
    stored = await service.storage.open(key)
    # a preview is overwritten at every step; an image never changes
    scope = "private" if signer else "public"
    caching = (
        "no-store"
        if filename.startswith(PREVIEW_PREFIX)
        else f"{scope}, max-age={lifetime_s}, immutable"
    )
    headers = {"Cache-Control": caching, "Content-Length": str(stored.size_bytes)}
    headers |= {"Vary": FROM} if service.redirect_files else {}
    mime = codecs.mime_type(filename)
    if request.method == "HEAD":
        return Response(media_type=mime, headers=headers)
    return StreamingResponse(stored.chunks, media_type=mime, headers=headers)


class ConvertQuery(Output, frozen=True):
    """Query of `convert`: the output, and the signature of the image's URL if it has one."""

    expires: Expires = None
    signature: Signature = None


@router.get(
    "/convert/{filename}",
    summary="Convert an image",
    response_class=Response,
    responses={
        200: {
            "content": {mime: {} for mime in MIME_TYPES.values()},
            "description": "The converted image.",
        }
    },
)
async def convert(
    filename: FileName,
    output: Annotated[ConvertQuery, Query()],
    request: Request,
    service: ServiceDep,
    _user: Converter,
) -> Response:
    """Return an image in another format, trimmed, defringed or on a colour.

    Its embedded settings stay. The stored image does not change.
    """
    reject_unused_options(output, "trim", "trim_threshold", "trim_padding")
    if service.url_signer:
        service.url_signer.check(filename, output.expires, output.signature)
    key = check_image_key(filename)

    async def work() -> bytes:
        async with service.pixels.turn():
            data = await read(service.storage, key)
            with error_field("filename"):
                return await service.pixels.process(
                    data, CONVERT_BYTES, postprocess.convert, output
                )

    converted = await while_connected(request, work())
    name = f"{PurePath(filename).stem}.{output.format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(converted, media_type=MIME_TYPES[output.format], headers=headers)


class Model(BaseModel):
    """One model: its defaults, or why it cannot be used."""

    name: Annotated[str, Field(description="Name for requests.")]
    title: Annotated[str, Field(description="Name, with the short hash once it is known.")]
    is_default: Annotated[bool, Field(description="Used if a request names none.")]
    defaults: Annotated[
        ModelDefaults, Field(description="Values of fields that a request leaves out.")
    ]
    problem: Annotated[str | None, Field(description="Why it cannot be used.")] = None


class ModelList(BaseModel):
    """The models of this service."""

    models: Annotated[list[Model], Field(description="Sorted by name.")]


@router.get("/models", summary="List models")
def models(service: ServiceDep, _user: Reader) -> ModelList:
    """Return all models. Unusable ones have a reason."""
    default = service.readiness()["model"]
    return ModelList(models=[_model(entry, default, service) for entry in service.list_models()])


def _model(entry: ModelEntry, default: str | None, service: Service) -> Model:
    problem, defaults = entry.problem, ModelDefaults()
    try:
        defaults = model_defaults(entry.path, entry.family)
    except CorruptFile as error:
        problem = problem or shorten_paths(error, service.models_dir)
    return Model(
        name=entry.name,
        title=entry.title,
        is_default=entry.title == default,
        defaults=defaults,
        problem=f"{problem.message} {problem.hint}".strip() if problem else None,
    )


def image_answers(job: Job, base: str, signer: UrlSigner | None) -> list[ImageAnswer]:
    """Return the images of a job with their URLs; none before it is done."""
    return [
        ImageAnswer(
            url=file_url(base, image.key, signer),
            filename=image.key,
            seed=image.seed,
            width=image.width,
            height=image.height,
        )
        for image in (job.result.images if job.result else ())
    ]


async def add_data(images: list[ImageAnswer], service: Service, files: EmbeddedFiles) -> None:
    """Add placeholders of files to images. Raises `FileMissing`, `StorageFailed`."""
    for image in images:
        image.base64 = await embed_file(service, files, image.filename)


async def _answer(job: Job, request: Request, service: Service) -> Response:
    assert job.result is not None, job.id
    images = image_answers(job, base_url(service, request), service.url_signer)
    files = EmbeddedFiles()
    if job.delivery.with_data:
        await add_data(images, service, files)
    first = images[0]
    answer = Txt2ImgResponse(
        url=first.url,
        filename=first.filename,
        info=json.dumps(webui_info(job), ensure_ascii=False),
        base64=first.base64,
        images=images if len(images) > 1 else None,
        seconds=job.result.seconds,
        warnings=list(job.result.warnings) or None,
    )
    return files.respond(answer, exclude_none=True)
