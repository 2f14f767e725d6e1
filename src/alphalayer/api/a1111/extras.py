"""Routes of AUTOMATIC1111 that enlarge images."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from alphalayer.api.a1111.settings import is_used
from alphalayer.api.deps import (
    ENCODE_BYTES,
    Service,
    ServiceDep,
    error_field,
    while_connected,
)
from alphalayer.api.document_files import DocumentFile
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.guard import Admitted, GuardedRoute, Submitter
from alphalayer.api.schemas import Body
from alphalayer.api.uploads import MAX_UPLOAD_BYTES, decode_base64
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import IMAGE_UPSCALERS, MAX_HIRES_PIXELS
from alphalayer.images import codecs, enlarging, files
from alphalayer.images.codecs import MAX_INPUT_SIDE, Size

router = APIRouter(dependencies=[Depends(Admitted("read"))], route_class=GuardedRoute)
MAX_IMAGES = 32
"""Most images of a request."""
UNCHANGED = "None"
"""Name of the upscaler that returns images at their own size."""
NOT_IMPLEMENTED = "Only 0: not implemented."


def _check_upscaler(name: str) -> str:
    """Return the name of an upscaler that this process can run. Raises `ValueError`."""
    if name not in IMAGE_UPSCALERS:
        raise ValueError(
            f"only {', '.join(IMAGE_UPSCALERS)} enlarge images here; files of models/ESRGAN "
            "work in txt2img, as hr_upscaler with enable_hr"
        )
    return name


Side = Annotated[int, Field(ge=1, le=MAX_INPUT_SIDE, description="Pixels, with resize_mode 1.")]


class ExtrasBody(Body, frozen=True):
    """Fields of both routes, with the defaults of AUTOMATIC1111. Unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore")

    carries_images: ClassVar[bool] = True

    resize_mode: Annotated[
        int, Field(ge=0, le=1, description="0: by upscaling_resize; 1: to a width and height.")
    ] = 0
    upscaling_resize: Annotated[float, Field(ge=1, le=8, description="Factor of both sides.")] = 2.0
    upscaling_resize_w: Side = 512
    upscaling_resize_h: Side = 512
    upscaling_crop: Annotated[
        bool, Field(description="Cut the middle out. Otherwise the image covers the size.")
    ] = True
    upscaler_1: Annotated[
        str,
        Field(max_length=200, description="None (unchanged), Lanczos or Nearest."),
        AfterValidator(_check_upscaler),
    ] = UNCHANGED
    extras_upscaler_2_visibility: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = 0
    gfpgan_visibility: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = 0
    codeformer_visibility: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = 0

    @property
    def html_info(self) -> str:
        """Return what was done, as AUTOMATIC1111 writes it."""
        if self.upscaler_1 == UNCHANGED:
            return ""
        size = f"{self.upscaling_resize_w}x{self.upscaling_resize_h}"
        done = f"to: {size}" if self.resize_mode else f"by: {self.upscaling_resize:g}"
        return f"Postprocess upscale {done}, Postprocess upscaler: {self.upscaler_1}"

    def check(self) -> None:
        """Raise `InvalidRequest` for fields that are not implemented."""
        for name in ("extras_upscaler_2_visibility", "gfpgan_visibility", "codeformer_visibility"):
            if is_used(getattr(self, name)):
                raise InvalidRequest("this is not implemented.", hint="Leave it out.", field=name)

    def count_pixels(self, pixels: int) -> int:
        """Return the most pixels of the result of an image with so many."""
        if self.upscaler_1 == UNCHANGED:
            return pixels
        if not self.resize_mode:
            return min(round(pixels * self.upscaling_resize**2), MAX_HIRES_PIXELS)
        exact = self.upscaling_resize_w * self.upscaling_resize_h
        return min(exact, MAX_HIRES_PIXELS) if self.upscaling_crop else MAX_HIRES_PIXELS

    def target_size(self, width: int, height: int) -> Size:
        """Return the size of the result of an image.

        Raises:
            InvalidRequest: It is too large.
        """
        factor = self.upscaling_resize
        if self.resize_mode:
            factor = max(self.upscaling_resize_w / width, self.upscaling_resize_h / height)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        if self.upscaler_1 == UNCHANGED:
            size = width, height
        elif self.resize_mode and self.upscaling_crop:
            size = self.upscaling_resize_w, self.upscaling_resize_h
        if math.prod(size) > MAX_HIRES_PIXELS or max(size) > MAX_INPUT_SIDE:
            raise InvalidRequest(
                f"the result would have {size[0]}x{size[1]} pixels; at most {MAX_HIRES_PIXELS:,} "
                f"and {MAX_INPUT_SIDE:,} a side.",
                field="upscaling_resize_w" if self.resize_mode else "upscaling_resize",
            )
        return size


class ExtrasSingleRequest(ExtrasBody, frozen=True):
    """Body of `POST /sdapi/v1/extra-single-image`."""

    image: Annotated[str, Field(description="A file as base64 or as a data URL.")]


class FileData(BaseModel):
    """An image of a list."""

    data: Annotated[str, Field(description="A file as base64 or as a data URL.")]
    name: Annotated[str, Field(description="Ignored.")] = ""


class ExtrasBatchRequest(ExtrasBody, frozen=True):
    """Body of `POST /sdapi/v1/extra-batch-images`."""

    imageList: Annotated[  # noqa: N815 - the name in AUTOMATIC1111
        list[FileData], Field(max_length=MAX_IMAGES, description="The images.")
    ]


class ExtrasSingleResponse(BaseModel):
    """The enlarged image."""

    html_info: Annotated[str, Field(description="What was done.")]
    image: Annotated[str, Field(description="A PNG file as base64.")]


class ExtrasBatchResponse(BaseModel):
    """The enlarged images."""

    html_info: Annotated[str, Field(description="What was done.")]
    images: Annotated[list[str], Field(description="PNG files as base64.")]


@router.post("/extra-single-image", response_model=ExtrasSingleResponse, summary="Enlarge an image")
async def extra_single_image(
    body: ExtrasSingleRequest, request: Request, service: ServiceDep, _user: Submitter
) -> Response:
    """Enlarge an image and its alpha."""
    body.check()
    embedded = EmbeddedFiles()
    file = await while_connected(request, _enlarge(service, body, body.image, "image"))
    image = embedded.add(file.chunks_once)
    return embedded.respond(ExtrasSingleResponse(html_info=body.html_info, image=image))


@router.post("/extra-batch-images", response_model=ExtrasBatchResponse, summary="Enlarge images")
async def extra_batch_images(
    body: ExtrasBatchRequest, request: Request, service: ServiceDep, _user: Submitter
) -> Response:
    """Enlarge images and their alpha."""
    body.check()
    embedded = EmbeddedFiles()
    images: list[str] = []
    with ExitStack() as unsent:
        for index, sent in enumerate(body.imageList):
            work = _enlarge(service, body, sent.data, f"imageList.{index}.data")
            file = await while_connected(request, work)
            unsent.callback(file.close)
            images.append(embedded.add(file.chunks_once))
        unsent.pop_all()
    return embedded.respond(ExtrasBatchResponse(html_info=body.html_info, images=images))


async def _enlarge(service: Service, body: ExtrasBody, image: str, field: str) -> DocumentFile:
    """Return the temporary file of an enlarged image."""
    pixels = service.pixels
    async with pixels.turn():
        with error_field(field):
            data = await pixels.run(len(image), decode_base64, image)
            if len(data) > MAX_UPLOAD_BYTES:
                raise InvalidRequest(
                    f"the file has {len(data):,} bytes; at most {MAX_UPLOAD_BYTES:,}."
                )
        read = await pixels.run(0, files.count_pixels, data)
        memory = ENCODE_BYTES * (read + body.count_pixels(read))
        file = await pixels.run(memory, _enlarge_file, data, body, field)
        return await pixels.run(len(file), service.documents.keep, file)


def _enlarge_file(data: bytes, body: ExtrasBody, field: str) -> bytes:
    """Return an enlarged image as a PNG with the settings text of the file.

    Raises:
        InvalidRequest: The file is not readable, or the result would be too large.
    """
    with error_field(field):
        rgba, parameters = codecs.decode_upright(data), files.read_settings(data)[1]
    height, width = rgba.shape[:2]
    size = body.target_size(width, height)
    if size != (width, height):
        box = enlarging.cover(width, height, size)
        rgba = enlarging.enlarge(rgba, size, box, nearest=body.upscaler_1 == "Nearest")
    return codecs.encode(rgba, parameters=parameters or "")
