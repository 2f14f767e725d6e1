"""Bodies of `/v1/images/edits`: JSON or a form, the images, and the job."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from alphalayer.api.deps import Service
from alphalayer.api.forms import Form
from alphalayer.api.openai.schemas import Background, ImageFields, Size
from alphalayer.api.schemas import Body
from alphalayer.api.uploads import Images, ImageSource, Upload
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.inputs import check_transparency, size_for_image
from alphalayer.core.job import JobSpec
from alphalayer.core.modes import DEFAULT_MODE, MODES, OPAQUE, InputRole
from alphalayer.core.request import MAX_SIDE, MIN_SIDE
from alphalayer.images import codecs

MAX_IMAGES = 16
FIDELITY_STRENGTH = {"high": 0.5, "low": 0.75}
IMAGE_PARTS = ("image", "image[]")
"""Names of the parts of a form with the images."""


class ImageReference(Body, frozen=True):
    """An input image: the file itself, or the name of a stored image."""

    model_config = ConfigDict(title="OpenAIImageReference")

    image_url: Annotated[
        ImageSource | None, Field(description="The file as a data URL. Other URLs are refused.")
    ] = None
    file_id: Annotated[
        ImageSource | None,
        Field(
            description="File name of an image of this service. If it signs its URLs: with the "
            "query of the URL."
        ),
    ] = None

    @model_validator(mode="after")
    def _validate_choice(self) -> ImageReference:
        if (self.image_url is None) == (self.file_id is None):
            raise ValueError("it must have either image_url or file_id")
        return self

    def upload(self, role: InputRole, field: str, files: Mapping[str, bytes]) -> Upload:
        """Return the image as an input of a job.

        Args:
            role: Its role. The transparent part of a mask is changed.
            field: Field of the request, for errors.
            files: Files of a form by their names in the fields.
        """
        source = self.file_id or self.image_url or ""
        encode = codecs.encode_input
        if role == "mask":
            encode = partial(codecs.encode_mask, reading="transparent")
        return Upload(role, field, files.get(source, source), encode)


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
        Field(
            description="auto is nearly that of the image. "
            f"WxH: sides from {MIN_SIDE} to {MAX_SIDE}."
        ),
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
        fields: dict[str, Any] = {}
        for name, parts in form.items():
            if name not in IMAGE_PARTS and len(parts) > 1:
                raise InvalidRequest("it was sent more than once.", field=validation.cut(name))
            fields[name] = parts[0]
        fields = {name: part for name, part in fields.items() if name not in IMAGE_PARTS}
        fields["images"] = [{"image_url": image} for image in images]
        if "mask" in fields:
            fields["mask"] = {"image_url": fields["mask"]}
        return fields

    def uploads(self, files: Mapping[str, bytes]) -> list[Upload]:
        """Return the images that have an effect.

        Args:
            files: Files of a form by their names in the fields.
        """
        uploads = [self.images[0].upload("init", "image" if files else "images.0", files)]
        if self.mask:
            uploads.append(self.mask.upload("mask", "mask", files))
        return uploads

    def digest_of(self, images: Images) -> str:
        """Return the digest of the request, see `Job.check_repeated`. It needs no pixels."""
        digests: dict[str, Any] = {
            "images": [images["init"].content_digest, len(self.images)],
        }
        if "mask" in images:
            digests["mask"] = images["mask"].content_digest
        return self.digest_with(digests)

    def to_spec(self, service: Service, model: str | None, images: Images) -> JobSpec:
        """Return the job of this request.

        Args:
            service: The service that runs the job.
            model: Name of the model; None for the default.
            images: The stored images.

        Raises:
            InvalidRequest: An image or a field is not right.
        """
        image = images["init"]
        mode = OPAQUE if image.is_opaque else DEFAULT_MODE
        if self.background == "transparent" and image.is_opaque:
            remedy = 'use background "auto" or "opaque"'
            check_transparency(MODES[DEFAULT_MODE], remedy, "background")
        mask = images.get("mask", image)
        if (mask.width, mask.height) != (image.width, image.height):
            raise InvalidRequest(
                f"it has {mask.width}x{mask.height} pixels, and the image "
                f"{image.width}x{image.height}.",
                hint="Send a mask of the size of the first image.",
                field="mask",
            )
        width, height = size_for_image((image.width, image.height))
        return self.build_spec(
            service,
            model,
            width=width,
            height=height,
            inputs=tuple(one.as_role(role) for role, one in images.items()),
            mode=mode,
            strength=FIDELITY_STRENGTH[self.input_fidelity],
            warnings=self._warnings,
        )

    @property
    def _warnings(self) -> tuple[str, ...]:
        """Return what of the request is ignored."""
        others = len(self.images) - 1
        return (f"image: ignored {others}. Only the first is changed.",) if others else ()


def form_schema() -> dict[str, Any]:
    """Return the JSON schema of the form. Several images have the name `image[]`."""
    schema = EditsRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    fields = {name: field for name, field in schema["properties"].items() if name != "images"}
    fields |= {"image": {"type": "array", "items": file, "maxItems": MAX_IMAGES}, "mask": file}
    return {"type": "object", "required": ["prompt", "image"], "properties": fields}
