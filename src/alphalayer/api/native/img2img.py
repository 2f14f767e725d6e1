"""Change of images: img2img and inpaint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from alphalayer.api.deps import IdempotencyKey, ServiceDep
from alphalayer.api.guard import GuardedRoute, Submitter
from alphalayer.api.native.answers import Txt2ImgResponse, answer_images
from alphalayer.api.native.fields import (
    ImageField,
    LayerdiffuseRequest,
    SpecContext,
    UploadRequest,
    describe_form,
    run_request,
)
from alphalayer.api.schemas import reject_unused_options
from alphalayer.api.uploads import ImageSource
from alphalayer.core.edits import EditFields
from alphalayer.core.inputs import check_transparency
from alphalayer.core.job import JobSpec, Output
from alphalayer.core.modes import MODES
from alphalayer.core.values import copy_fields
from alphalayer.images import codecs

router = APIRouter(route_class=GuardedRoute)
_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mM4"
    "oSHXAAAEWQGPhu3qXwAAAABJRU5ErkJggg=="
)
"""PNG of one pixel that is half transparent, as an example."""


class Img2ImgRequest(EditFields, UploadRequest, LayerdiffuseRequest, frozen=True):
    """Body of `POST /alpha/v1/img2img`: the fields of txt2img, and the image to change.

    It is JSON, or a form with files. The default size is nearly that of the image.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a ripe apple", "image": _PIXEL}]},
    )
    image_fields: ClassVar[Mapping[str, ImageField]] = {
        "image": ImageField("init"),
        "mask": ImageField("mask", codecs.encode_mask),
    }

    image: Annotated[
        ImageSource,
        Field(
            description="Image to change: a PNG, WebP, AVIF or JPEG file as base64 or data URL, "
            "or the name of a stored image. In a form: the file. With LayerDiffuse it needs "
            "transparency."
        ),
    ]
    mask: Annotated[
        ImageSource | None,
        Field(
            description="Mask in the same forms: white is changed. If it has transparency, its "
            "opaque part is."
        ),
    ] = None

    def to_spec(self, context: SpecContext) -> JobSpec:
        """Return the job of this request. See `NativeRequest.to_spec`."""
        reject_unused_options(self, "mask", "mask_blur", "mask_fill", "masked_only", "mask_padding")
        image = context.images["init"]
        if image.is_opaque:
            check_transparency(MODES[self.mode], "set layerdiffuse_enabled to false")
        width, height = self.size_for(image)
        generation = self.generation(
            context,
            width=width,
            height=height,
            inputs=tuple(one.as_role(role) for role, one in context.images.items()),
        )
        return copy_fields(self, JobSpec, generation=generation, output=copy_fields(self, Output))


@router.post(
    "/img2img",
    response_model=Txt2ImgResponse,
    response_model_exclude_none=True,
    summary="Change an image",
    openapi_extra=describe_form("Img2ImgRequest", *Img2ImgRequest.image_fields),
)
async def img2img(
    body: Img2ImgRequest,
    request: Request,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Change an image, or the part of it under a mask, and keep it transparent.

    The body is JSON or multipart/form-data. A client that disconnects cancels its job.
    """
    job = await run_request(service, request, body, user, idempotency_key)
    return await answer_images(job, request, service)
