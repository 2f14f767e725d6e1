"""Bodies of `/v1/images/edits`: JSON or a form, the images, and the job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from alphalayer.api.deps import Service
from alphalayer.api.forms import Form
from alphalayer.api.openai.schemas import Background, ImageFields, Size
from alphalayer.api.schemas import Body
from alphalayer.api.uploads import MAX_NAME, StoredInput, store_upload
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import JobSpec, job_prefix_of
from alphalayer.core.modes import DEFAULT_MODE, OPAQUE
from alphalayer.core.request import MAX_SIDE, MIN_SIDE
from alphalayer.images import codecs
from alphalayer.storage import is_input

MAX_IMAGES = 16
FIDELITY_STRENGTH = {"high": 0.5, "low": 0.75}
IMAGE_PARTS = ("image", "image[]")
"""Names of the parts of a form with the images."""
_ADDRESS = re.compile(r"(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def _check_address(text: str) -> str:
    if _ADDRESS.match(text):
        raise ValueError("URLs are not fetched; send the file itself as a data URL")
    return text


class ImageReference(Body, frozen=True):
    """An input image: the file itself, or the name of a stored image."""

    model_config = ConfigDict(title="OpenAIImageReference")

    image_url: Annotated[
        Annotated[str, AfterValidator(_check_address)] | None,
        Field(description="The file as a data URL. Other URLs are refused."),
    ] = None
    file_id: Annotated[
        str | None,
        Field(max_length=MAX_NAME, description="File name of an image of this service."),
    ] = None

    @model_validator(mode="after")
    def _validate_choice(self) -> ImageReference:
        if (self.image_url is None) == (self.file_id is None):
            raise ValueError("it must have either image_url or file_id")
        return self

    @classmethod
    def of_part(cls, text: str) -> dict[str, str]:
        """Return the JSON of an image in a form. A name has a dot, and base64 has none."""
        is_name = len(text) <= MAX_NAME and "." in text and ":" not in text
        return {"file_id" if is_name else "image_url": text}

    async def store(
        self, service: Service, uploads: Mapping[str, bytes], field: str, *, is_mask: bool = False
    ) -> StoredInput:
        """Store the image for a job.

        Args:
            service: The service that runs the job.
            uploads: Files of the request by their `file_id`.
            field: Field of the request, for errors.
            is_mask: Whether it is a mask. Its transparent part is changed.

        Raises:
            AlphalayerError: See `store_upload`.
        """
        name = self.file_id or ""
        source = uploads.get(name) or self.image_url or name
        if source is name and not (is_input(name) or job_prefix_of(name)):
            raise InvalidRequest(
                f'"{name}" is no image of this service.',
                hint="Send the file itself, or the name of an image that the service stores.",
                field=field,
            )
        encode_mask = partial(codecs.encode_mask, reading="transparent")
        encode = encode_mask if is_mask else codecs.encode_input
        return await store_upload(service, source, field, encode)


class EditsRequest(ImageFields, frozen=True):
    """Body of `POST /v1/images/edits`. Unknown fields are ignored."""

    model_config = ConfigDict(title="OpenAIEditsRequest")
    event = "image_edit"
    carries_images: ClassVar[bool] = True
    image_fields: ClassVar[tuple[str, ...]] = (*IMAGE_PARTS, "mask")

    images: Annotated[
        tuple[ImageReference, ...],
        Field(
            min_length=1,
            max_length=MAX_IMAGES,
            description="The first one is changed. Others have no effect, with a warning.",
        ),
    ]
    mask: Annotated[
        ImageReference | None,
        Field(description="Image of the same size, transparent where the first image is changed."),
    ] = None
    size: Annotated[
        Size,
        Field(description=f"auto is that of the image. WxH: sides from {MIN_SIDE} to {MAX_SIDE}."),
    ] = "auto"
    background: Annotated[
        Background,
        Field(
            description="auto is transparent if the image has transparency, with jpeg opaque. "
            "opaque is white behind it. An opaque image cannot become transparent."
        ),
    ] = "auto"
    input_fidelity: Annotated[
        Literal["high", "low"], Field(description="Strength of the change: high 0.5, low 0.75.")
    ] = "low"

    @model_validator(mode="before")
    @classmethod
    def refuse_markup(cls, data: Any) -> Any:
        """Refuse the field that would have an effect on the image."""
        if isinstance(data, dict) and data.get("markup"):
            raise InvalidRequest("it is not supported.", hint='Send a "mask".', field="markup")
        return data

    @classmethod
    def from_form(cls, form: Form) -> dict[str, Any]:
        """Return the JSON body with the fields and images of a form.

        Raises:
            InvalidRequest: It has no image or too many.
        """
        images = [part for name in IMAGE_PARTS for part in form.get(name, ())]
        if not images:
            raise InvalidRequest("it must be given.", field="image")
        if len(images) > MAX_IMAGES:
            raise InvalidRequest(f"got {len(images)} images; at most {MAX_IMAGES}.", field="image")
        fields: dict[str, Any] = {
            name: parts[-1] for name, parts in form.items() if name not in IMAGE_PARTS
        }
        fields["images"] = [ImageReference.of_part(image) for image in images]
        if "mask" in fields:
            fields["mask"] = ImageReference.of_part(fields["mask"])
        return fields

    async def create_spec(
        self, service: Service, model: str | None, uploads: Mapping[str, bytes]
    ) -> JobSpec:
        """Store the images and return the job of this request.

        Args:
            service: The service that runs the job.
            model: Name of the model; None for the default.
            uploads: Files of a form by their `file_id`.

        Raises:
            AlphalayerError: An image or a field is not right, see `store_upload`.
        """
        field = "image" if uploads else "images"
        image = await self.images[0].store(service, uploads, field)
        if self.background == "transparent" and image.is_opaque:
            raise InvalidRequest(
                "the image is opaque, so its background cannot become transparent.",
                hint='Send an image without its background, or use "auto" or "opaque".',
                field="background",
            )
        inputs = (image.as_role("init"),)
        if self.mask:
            mask = await self.mask.store(service, uploads, "mask", is_mask=True)
            if (mask.width, mask.height) != (image.width, image.height):
                raise InvalidRequest(
                    f"it has {mask.width}x{mask.height} pixels, and the image "
                    f"{image.width}x{image.height}.",
                    hint="Send a mask of the size of the first image.",
                    field="mask",
                )
            inputs += (mask.as_role("mask"),)
        width, height = fit_size(image.width, image.height)
        return self.build_spec(
            service,
            model,
            width=width,
            height=height,
            inputs=inputs,
            mode=OPAQUE if image.is_opaque else DEFAULT_MODE,
            strength=FIDELITY_STRENGTH[self.input_fidelity],
            warnings=self._warnings,
        )

    @property
    def _warnings(self) -> tuple[str, ...]:
        """Return what of the request is ignored."""
        others = len(self.images) - 1
        return (f"image: ignored {others}. Only the first is changed.",) if others else ()


def fit_size(width: int, height: int) -> tuple[int, int]:
    """Return the size of an image, fitted to the sizes that can be generated."""
    factor = min(max(1, MIN_SIDE / min(width, height)), MAX_SIDE / max(width, height))
    width, height = (max(MIN_SIDE, round(side * factor)) for side in (width, height))
    return width, height


def form_schema() -> dict[str, Any]:
    """Return the JSON schema of the form. Several images have the name `image[]`."""
    schema = EditsRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    fields = {name: field for name, field in schema["properties"].items() if name != "images"}
    fields |= {"image": {"type": "array", "items": file, "maxItems": MAX_IMAGES}, "mask": file}
    return {"type": "object", "required": ["prompt", "image"], "properties": fields}
