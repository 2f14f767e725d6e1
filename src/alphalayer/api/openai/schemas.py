"""Bodies and answers of the OpenAI dialect."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from alphalayer.api.deps import Service
from alphalayer.api.schemas import Body
from alphalayer.catalog import ModelEntry
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import ImageRef, Job, JobSpec, Output
from alphalayer.core.modes import OPAQUE
from alphalayer.core.request import MAX_SIDE, MIN_SIDE, GenerationRequest, Prompt, Seed

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
URL_MODELS = re.compile(r"dall-e-[23]$", re.IGNORECASE)
"""Models of OpenAI that respond with URLs by default."""
WHITE = "#ffffff"
BEST = 100
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Zeros: clients expect the numbers, and this service does not count tokens."""
REPEATED_QUALITY: dict[str, str] = {"auto": "medium", "standard": "medium", "hd": "high"}
"""Qualities of responses, where they differ from those of requests."""


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


Size = Annotated[
    str, Field(json_schema_extra={"pattern": SIZE.pattern}), AfterValidator(_check_size)
]
Background = Literal["transparent", "opaque", "auto"]


class ImageFields(Body, frozen=True):
    """Fields of all requests for images. Unknown fields are ignored."""

    event: ClassVar[str]
    """Start of the names of its events."""
    model_config = ConfigDict(extra="ignore")

    prompt: Prompt
    model: Annotated[
        str | None,
        Field(max_length=500, description="One of /v1/models; other names mean the default model."),
    ] = None
    n: Annotated[int, Field(ge=1, le=10, description="Number of images.")] = 1
    size: Annotated[
        Size,
        Field(description=f'"auto" is the model\'s default. WxH: sides from 64 to {MAX_SIDE}.'),
    ] = "auto"
    quality: Annotated[
        Quality,
        Field(
            description="Sampling steps: low 12, medium 20, high and hd 30, xhigh 40, max 50; "
            "otherwise the model's default."
        ),
    ] = "auto"
    background: Annotated[
        Background,
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
    safety_identifier: Annotated[str | None, Field(description="Ignored.")] = None
    moderation: Annotated[str | None, Field(description="Ignored.")] = None

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

    def build_spec(self, service: Service, model: str | None, **values: Any) -> JobSpec:
        """Return the job of this request. Raises `InvalidRequest`.

        Args:
            service: The service that runs the job.
            model: Name of the model; None for the default.
            values: Other fields of the `GenerationRequest`.
        """
        if self.background == "transparent" and self.output_format == "jpeg":
            raise InvalidRequest(
                "jpeg has no transparency.",
                hint='Use "png" or "webp", or background "opaque".',
                field="output_format",
            )
        if self.size != "auto":
            values |= zip(("width", "height"), map(int, self.size.split("x")), strict=True)
        generation = GenerationRequest.of(
            self,
            comments=service.prompt_comments,
            model=model,
            steps=QUALITY_STEPS.get(self.quality),
            noise=service.noise,
            decode=service.decode,
            **values,
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


class GenerationsRequest(ImageFields, frozen=True):
    """Body of `POST /v1/images/generations`. Unknown fields are ignored."""

    model_config = ConfigDict(
        title="OpenAIGenerationsRequest",
        json_schema_extra={"examples": [{"prompt": "an apple, high quality"}]},
    )
    event = "image_generation"

    style: Annotated[str | None, Field(description="Ignored.")] = None


def settings_of(body: ImageFields, job: Job, image: ImageRef) -> dict[str, Any]:
    """Return the settings that a response repeats."""
    is_opaque = job.spec.output.background or job.spec.generation.mode == OPAQUE
    return {
        "background": "opaque" if is_opaque else "transparent",
        "output_format": body.output_format,
        "quality": REPEATED_QUALITY.get(body.quality, body.quality),
        "size": f"{image.width}x{image.height}",
    }


class ImageData(BaseModel):
    """One image: its bytes or its URL."""

    b64_json: Annotated[str | None, Field(description="The file.")] = None
    url: Annotated[str | None, Field(description="URL of the file.")] = None


class ImagesResponse(BaseModel):
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
