"""Fields of the native requests, and how a request becomes a job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from fastapi import Request
from pydantic import ConfigDict, Field

from alphalayer.api.deps import Service, find_model, run_job, while_connected, wire_names
from alphalayer.api.forms import Form, uploads_of
from alphalayer.api.schemas import Body, reject_unused_options
from alphalayer.api.uploads import (
    Images,
    StoredInput,
    Upload,
    Uploads,
    expect_images,
    release_images,
    store_uploads,
)
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.inputs import size_for_image
from alphalayer.core.job import Delivery, Iterations, Job, JobSpec, Output, Submission
from alphalayer.core.layers import DEFAULT_FAMILY
from alphalayer.core.modes import DEFAULT_MODE, OPAQUE, InputRole
from alphalayer.core.request import (
    DecodeMode,
    GenerationRequest,
    Height,
    NoiseSource,
    RequestFields,
    TransparencyMethod,
    Width,
)
from alphalayer.core.samplers import choose_sampler
from alphalayer.images import codecs
from alphalayer.images.codecs import InputFile

FIELDS = {
    "model": "checkpoint",
    "iterations": "n_iter",
    "sampler": "sampler_name",
    "mode": "layerdiffuse_method",
    "resize_mode": "layerdiffuse_resize_mode",
    "init_resize_mode": "resize_mode",
    "init": "image",
}
"""Names of fields on the wire, where they differ from those of `JobSpec` and from roles."""
MAX_LIST_CHARACTERS = 20_000
"""Longest JSON list of a form."""


class ImageField(NamedTuple):
    """Field of a body with an image: its role for the engine, and what is stored of it."""

    role: InputRole
    encode: Callable[[bytes], InputFile] = codecs.encode_input


@dataclass(frozen=True)
class SpecContext:
    """What the job of a request depends on besides its body."""

    noise: NoiseSource
    """Source of noise of the service."""
    decode: DecodeMode
    """Decoding of transparency of the service."""
    comments: bool = True
    """Whether "#" starts a comment in the prompts."""
    images: Images = field(default_factory=Images)
    """Stored images."""
    family: str = DEFAULT_FAMILY
    """Family of the model."""


class NativeRequest(Body, RequestFields, frozen=True):
    """Fields that all native requests have. Fields that are null take the model's default."""

    model_config = ConfigDict(alias_generator=lambda name: FIELDS.get(name, name))
    wire_fields: ClassVar[Mapping[str, str]] = FIELDS
    """Names of fields on the wire, see `FIELDS`."""
    image_fields: ClassVar[Mapping[str, ImageField]] = {}
    """Fields with images."""
    is_chain: ClassVar[bool] = False
    """Whether the modes depend on the family of the model."""

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
    response_format: Annotated[
        Literal["url", "base64"],
        Field(description="With base64 the response also holds the images themselves."),
    ] = "url"

    def to_spec(self, context: SpecContext) -> JobSpec:
        """Return the job of this request.

        Raises:
            InvalidRequest: A field is wrong; it has the name of `JobSpec`, see `FIELDS`.
        """
        raise NotImplementedError

    @property
    def with_data(self) -> bool:
        """Return whether the response holds the images themselves."""
        return self.response_format == "base64"

    def uploads(self, files: Mapping[str, bytes] = {}) -> list[Upload]:
        """Return the images.

        Args:
            files: Files of the form by the names in the fields.
        """
        sources = {name: getattr(self, name) for name in self.image_fields}
        return [
            Upload(self.image_fields[name].role, name, files.get(source, source), encode)
            for name, source in sources.items()
            if source is not None
            for encode in [self.image_fields[name].encode]
        ]


class UploadRequest(NativeRequest, frozen=True):
    """Fields of requests with images. They are JSON, or a form with files."""

    carries_images: ClassVar[bool] = True

    width: Annotated[
        Width | None,
        Field(description="Width in pixels. Default: nearly that of the image, else SDXL: 1024."),
    ] = None
    height: Annotated[
        Height | None,
        Field(description="Height in pixels. Default: nearly that of the image, else SDXL: 1024."),
    ] = None

    @classmethod
    def from_form(cls, form: Form) -> dict[str, Any]:
        """Return the JSON body with the fields of a form.

        A field that is a list may be sent several times, or once as a JSON list.

        Raises:
            InvalidRequest: Another field was sent twice, or a list is not valid.
        """
        lists = {
            info.alias or name
            for name, info in cls.model_fields.items()
            if isinstance(info.default, tuple)
        }
        fields: dict[str, Any] = {}
        for name, values in form.items():
            if name not in lists and len(values) > 1:
                raise InvalidRequest("it was sent more than once.", field=validation.cut(name))
            fields[name] = _read_list(name, values) if name in lists else values[0]
        return fields

    def size_for(self, image: StoredInput) -> tuple[int, int]:
        """Return the size to generate for an image. An open side follows from the other."""
        return size_for_image((image.width, image.height), self.width, self.height)


def _read_list(name: str, values: list[str]) -> Any:
    """Return the values of a field of a form that is a list."""
    if len(values) > 1 or not values[0].lstrip().startswith("["):
        return values
    try:
        return json.loads(values[0][:MAX_LIST_CHARACTERS])
    except (ValueError, RecursionError):
        raise InvalidRequest(
            f"it is not a JSON list of at most {MAX_LIST_CHARACTERS:,} characters.", field=name
        ) from None


class LayerdiffuseRequest(Output, NativeRequest, frozen=True):
    """Fields of requests for single images, which LayerDiffuse makes transparent."""

    layerdiffuse_enabled: Annotated[bool, Field(description="Generate with transparency.")] = True
    layerdiffuse_method: Annotated[
        TransparencyMethod, Field(description="How transparency is generated.")
    ] = DEFAULT_MODE
    layerdiffuse_output_origin: Annotated[
        bool, Field(description="Not implemented; true is refused.")
    ] = False

    def generation(self, context: SpecContext, **values: Any) -> GenerationRequest:
        """Return the fields of the engine. `values` replace those of the body."""
        self._reject_conflicts()
        sampler, scheduler = choose_sampler(self.sampler, self.scheduler)
        return GenerationRequest.of(
            self,
            comments=context.comments,
            sampler=sampler,
            scheduler=scheduler,
            mode=self.mode,
            noise=context.noise,
            decode=context.decode,
            **values,
        )

    @property
    def mode(self) -> str:
        """Return the mode of the engine."""
        return self.layerdiffuse_method if self.layerdiffuse_enabled else OPAQUE

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


async def store_images(service: Uploads, body: NativeRequest) -> Images:
    """Store the images of a request that is JSON. Raises `AlphalayerError`."""
    return await store_uploads(service, body.uploads())


async def prepare_job(
    service: Service,
    request: Request,
    body: NativeRequest,
    user: str,
    idempotency_key: str | None,
) -> tuple[JobSpec, Submission]:
    """Store the images of a request, and return its job and where it came from.

    Raises:
        AlphalayerError: A field is wrong, an image cannot be stored, or the client disconnected.
    """
    family = DEFAULT_FAMILY
    if body.is_chain and service.knows_models:
        family = (await asyncio.to_thread(find_model, service, body.model)).family
    uploads = body.uploads(uploads_of(request))
    context = SpecContext(
        service.noise, service.decode, service.prompt_comments, expect_images(uploads), family
    )
    spec, digests = body.to_spec(context), dict[str, str]()
    if uploads:
        images = await while_connected(request, store_uploads(service, uploads))
        spec = body.to_spec(replace(context, images=images))
        digests = {upload.field: images[upload.role].content_digest for upload in uploads}
    digest = body.digest_with(digests)
    if uploads:
        release_images(request, body, digests)
    return spec, Submission(owner=user, idempotency_key=idempotency_key, digest=digest)


async def run_request(
    service: Service,
    request: Request,
    body: NativeRequest,
    user: str,
    idempotency_key: str | None,
) -> Job:
    """Run the job of a request and return it. A client that disconnects cancels it."""
    with wire_names(body.wire_fields):
        spec, submission = await prepare_job(service, request, body, user, idempotency_key)
        delivery = Delivery(with_data=body.with_data)
        return await run_job(service, request, spec, submission, delivery)


def describe_form(schema: str, *files: str) -> dict[str, Any]:
    """Return the OpenAPI description of a body that can be a form with files.

    Args:
        schema: Name of the model of the body.
        files: Fields that can be files.
    """
    binary = {name: {"type": "string", "format": "binary"} for name in files}
    reference = {"$ref": f"#/components/schemas/{schema}"}
    form = {"allOf": [reference, {"type": "object", "properties": binary}]}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": form}}}}
