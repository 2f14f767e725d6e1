"""Body of `img2img`, which changes an image or the masked part of it."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field

from alphalayer.api.a1111.echo import IMAGES, IMG2IMG
from alphalayer.api.a1111.schemas import FIELDS, NOT_IMPLEMENTED, GenerationBody
from alphalayer.api.a1111.settings import OverrideSettings, is_used
from alphalayer.api.uploads import Images, Upload
from alphalayer.core.edits import INIT_RESIZE_MODES, MASK_FILLS, MaskBlur, MaskPadding, Strength
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import Output
from alphalayer.core.request import GenerationRequest
from alphalayer.images import codecs, postprocess
from alphalayer.images.codecs import InputFile

# a PNG of two pixels, one of them transparent
_EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAYAAAD0In+KAAAAEUlEQVR4XmM6ISf3/4ScHAMAEJIDCnKd"
    "II0AAAAASUVORK5CYII="
)


def _check_one(images: list[str]) -> list[str]:
    """Return the list of the one image that is changed. Raises `ValueError`."""
    if len(images) != 1:
        raise ValueError(f"got {len(images)} images; exactly 1, as only one is changed")
    return images


class Img2ImgRequest(GenerationBody, frozen=True):
    """Body of `POST /sdapi/v1/img2img`.

    Without the script the result is transparent if the image has transparency.
    """

    model_config = ConfigDict(
        title="A1111Img2ImgRequest",
        json_schema_extra={
            "examples": [{"prompt": "a red apple", "init_images": [_EXAMPLE], "steps": 20}]
        },
    )
    echoed: ClassVar[dict[str, Any]] = IMG2IMG

    init_images: Annotated[
        list[str],
        Field(
            json_schema_extra={"minItems": 1, "maxItems": 1},
            description="The image to change: a file as base64 or as a data URL.",
        ),
        AfterValidator(_check_one),
    ]
    mask: Annotated[
        str,
        Field(
            description="What is changed: the white part, or the opaque part of a mask with alpha."
        ),
    ] = ""
    denoising_strength: Strength = 0.75
    resize_mode: Annotated[
        int,
        Field(ge=0, le=3, description="0 stretch, 1 crop, 2 fill, 3 stretch the latent."),
    ] = 0
    mask_blur: Annotated[
        MaskBlur | None, Field(description="Radius of the mask's edge. Null: mask_blur_x.")
    ] = None
    mask_blur_x: MaskBlur = 4
    mask_blur_y: Annotated[MaskBlur, Field(description="Only the same as mask_blur_x.")] = 4
    inpainting_fill: Annotated[
        int,
        Field(
            ge=0,
            le=3,
            description="What is masked at first: 0 blurred surroundings, 1 the image, 2 noise, "
            "3 nothing.",
        ),
    ] = 0
    inpaint_full_res: Annotated[
        bool, Field(description="Generate the box around the mask at full size, and paste it back.")
    ] = True
    inpaint_full_res_padding: MaskPadding = 0
    inpainting_mask_invert: Annotated[
        int, Field(ge=0, le=1, description="1: the other part is changed.")
    ] = 0
    include_init_images: Annotated[
        bool, Field(description="Whether `parameters` repeats the images.")
    ] = False
    layerdiffuse_enabled: Annotated[
        bool | None,
        Field(
            description="Whether the result is transparent. Null: as the script has it; "
            "without it, as the image is."
        ),
    ] = None
    image_cfg_scale: Annotated[
        Any, Field(description="Ignored: only models of InstructPix2Pix have it.")
    ] = None
    initial_noise_multiplier: Annotated[
        float | None, Field(description="1 is ignored; others are not implemented.")
    ] = None
    mask_round: Annotated[bool, Field(description="Only true is implemented.")] = True
    latent_mask: Annotated[Any, Field(description=NOT_IMPLEMENTED)] = None

    @property
    def echo(self) -> dict[str, Any]:
        """Return the request as AUTOMATIC1111 repeats it, with images only if requested."""
        fields = super().echo
        if self.include_init_images:
            return fields | {"alwayson_scripts": self._sent.get("alwayson_scripts", {})}
        return fields | dict.fromkeys(IMAGES)

    def uploads(self, stored: OverrideSettings) -> list[Upload]:
        """Return the image, its mask and the images of the script. See `GenerationBody`."""
        script = self._script()
        encode = codecs.encode_input
        if self.layerdiffuse_enabled is False or (script and not script.enabled):
            settings = self.override_settings.over(stored)
            encode = partial(encode_flattened, background=settings.background)
        uploads = [Upload("init", "init_images", self.init_images[0], encode)]
        if is_used(self.mask):
            invert = bool(self.inpainting_mask_invert)
            encode = partial(codecs.encode_mask, invert=invert)
            uploads.append(Upload("mask", "mask", self.mask, encode))
        return uploads + super().uploads(stored)

    def digests(self, images: Images) -> dict[str, Any]:
        """Return the digests of images by the field that they are in."""
        own = {FIELDS.get(role, role): images[role].content_digest for role in images}
        return super().digests(images) | {name: own[name] for name in IMAGES if name in own}

    def _own_fields(self, settings: OverrideSettings) -> dict[str, Any]:
        """Return the fields of the image to change. Raises `InvalidRequest`."""
        fields: dict[str, Any] = {
            "strength": self.denoising_strength,
            "exact_steps": bool(settings.img2img_fix_steps),
            "init_resize_mode": INIT_RESIZE_MODES[self.resize_mode],
            # fields of the body have these names, and mean something else
            "resize_mode": _default("resize_mode"),
            "mask_blur": _default("mask_blur"),
        }
        if is_used(self.mask):
            fields |= {
                "mask_blur": self._mask_blur(),
                "mask_fill": MASK_FILLS[self.inpainting_fill],
                "masked_only": self.inpaint_full_res,
            }
            if self.inpaint_full_res:
                fields["mask_padding"] = self.inpaint_full_res_padding
        return fields

    def _mask_blur(self) -> int:
        """Return the radius of the mask's edge. Raises `InvalidRequest`."""
        if self.mask_blur is not None:
            return self.mask_blur
        if self.mask_blur_x != self.mask_blur_y:
            raise InvalidRequest(
                f"got {self.mask_blur_y}, and mask_blur_x is {self.mask_blur_x}.",
                hint="Send the same number, or mask_blur.",
                field="mask_blur_y",
            )
        return self.mask_blur_x

    def _reject_unimplemented(self) -> None:
        """Raise `InvalidRequest` for fields that are not implemented."""
        super()._reject_unimplemented()
        for name, is_accepted in (
            ("mask_round", self.mask_round),
            ("latent_mask", not is_used(self.latent_mask)),
            ("initial_noise_multiplier", self.initial_noise_multiplier in (None, 1)),
        ):
            if not is_accepted:
                raise InvalidRequest("this is not implemented.", hint="Leave it out.", field=name)


def _default(name: str) -> Any:
    return GenerationRequest.model_fields[name].default


def encode_flattened(data: bytes, background: str) -> InputFile:
    """Convert an image file to an opaque PNG over a colour, as in AUTOMATIC1111."""
    file = codecs.encode_input(data)
    if file.is_opaque:
        return file
    flat = postprocess.convert(file.data, Output(background=background))
    return InputFile(flat, file.width, file.height, is_opaque=True)
