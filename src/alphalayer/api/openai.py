"""The OpenAI Images dialect, `/v1/images` and `/v1/models`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from alphalayer import images
from alphalayer.api.deps import Service, ServiceDep, User, file_url, raise_if_failed, read_file, run_job
from alphalayer.api.problems import NotImplementedYet, Problem, openai_error
from alphalayer.catalog import ModelEntry, resolve_model
from alphalayer.errors import AlphalayerError, FileMissing, InvalidRequest, ModelNotFound
from alphalayer.job import ImageRef, Job, JobSpec, Output
from alphalayer.jobs import JobView
from alphalayer.request import MAX_SEED, MAX_SIDE, parse_request

router = APIRouter(prefix="/v1", tags=["OpenAI"])

OutputFormat = Literal["png", "webp", "jpeg"]
Quality = Literal["auto", "standard", "low", "medium", "high", "hd", "xhigh", "max"]
QUALITY_STEPS: dict[Quality, int] = {"low": 12, "medium": 20, "high": 30, "hd": 30, "xhigh": 40, "max": 50}
"""Sampling steps; "auto" and "standard" are not here and leave them to the model."""
WHITE = "#ffffff"
BEST = 100
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Nothing is counted in tokens here; clients want the numbers."""


class GenerationsRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Fields that are not here are ignored."""

    model_config = ConfigDict(title="OpenAIGenerationsRequest")

    prompt: str
    model: Annotated[
        str | None, Field(max_length=500, description="One of /v1/models; any other name means the usual one.")
    ] = None
    n: Annotated[int, Field(ge=1, le=10, description="How many pictures.")] = 1
    size: Annotated[
        str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$", description=f'"auto" or WxH, sides from 64 to {MAX_SIDE}.')
    ] = "auto"
    quality: Annotated[
        Quality,
        Field(description="Steps: low 12, medium 20, high and hd 30, xhigh 40, max 50; else as the model likes."),
    ] = "auto"
    background: Annotated[
        Literal["transparent", "opaque", "auto"],
        Field(description="opaque lays the picture on white; auto is transparent, with jpeg opaque."),
    ] = "auto"
    output_format: Annotated[OutputFormat, Field(description="jpeg has no transparency.")] = "png"
    output_compression: Annotated[
        int, Field(ge=0, le=BEST, description="Quality of webp and jpeg; webp is lossless at 100.")
    ] = BEST
    response_format: Literal["url", "b64_json"] = "b64_json"
    stream: Annotated[bool, Field(description="Answer with server-sent events.")] = False
    partial_images: Annotated[int, Field(ge=0, le=3, description="Pictures on the way, when streaming.")] = 0
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED, description="Not of that API: same seed, same picture.")] = -1
    user: Annotated[str | None, Field(description="Ignored, as moderation and style are.")] = None
    moderation: str | None = None
    style: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_silence(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @property
    def is_opaque(self) -> bool:
        """Whether the picture is laid on white."""
        return self.background == "opaque" or (self.background == "auto" and self.output_format == "jpeg")

    @property
    def is_lossy(self) -> bool:
        """Whether the stored picture is encoded again for the answer."""
        return self.output_format == "jpeg" or (self.output_format == "webp" and self.output_compression < BEST)

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
        try:
            generation = parse_request(
                {
                    **fields,
                    "steps": QUALITY_STEPS.get(self.quality),
                    "noise": service.noise,
                    "decode": service.decode,
                }
            )
        except InvalidRequest as error:
            field = "size" if error.field in ("width", "height") else error.field
            raise InvalidRequest(error.message, hint=error.hint, field=field) from None
        lossless = "webp" if self.output_format == "webp" and not self.is_lossy else "png"
        output = Output(format=lossless, background=WHITE if self.is_opaque else None)
        return JobSpec(
            generation=_with_seed(generation),
            iterations=self.n,
            output=output,
            previews=self.stream and self.partial_images > 0,
        )

    def settings(self, image: ImageRef) -> dict[str, Any]:
        """What an answer says of itself."""
        quality = {"auto": "medium", "standard": "medium", "hd": "high"}.get(self.quality, self.quality)
        return {
            "background": "opaque" if self.is_opaque else "transparent",
            "output_format": self.output_format,
            "quality": quality,
            "size": f"{image.width}x{image.height}",
        }
