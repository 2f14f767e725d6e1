"""The vocabulary that every layer shares: what may be asked for. Free of torch, HTTP and files."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from alphalayer.errors import InvalidRequest

SAMPLERS = (
    "DPM++ 2M SDE",
    "DPM++ 2M",
    "DPM++ SDE",
    "DPM++ 3M SDE",
    "Euler",
    "Euler a",
    "Heun",
    "DDIM",
    "UniPC",
    "LCM",
)
SCHEDULERS = ("Karras", "Exponential", "Normal", "SGM Uniform", "Simple", "Beta")

NoiseSource = Literal["nv", "cpu", "gpu"]
DecodeMode = Literal["official", "forge2"]
ImageFormat = Literal["png", "webp", "avif"]

MAX_PROMPT_CHARACTERS = 10_000
MAX_SIDE = 2048
MAX_SEED = 2**63 - 1
OWN_IN_A_BATCH = {
    "prompt",
    "negative_prompt",
    "seed",
    "subseed",
    "subseed_strength",
    "cfg_scale",
    "batch_size",
    "clip_skip",
}
"""What each of several requests that are drawn together has for itself."""


def _known(names: tuple[str, ...], what: str):
    by_lower = {name.lower(): name for name in names}

    def check(value: str) -> str:
        if value.lower() not in by_lower:
            raise ValueError(f'unknown {what} "{value}"; use one of: {", ".join(names)}')
        return by_lower[value.lower()]

    return check


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError('empty. Say what to draw, for instance "an apple, high quality"')
    return value


SamplerName = Annotated[
    str, Field(json_schema_extra={"enum": list(SAMPLERS)}), AfterValidator(_known(SAMPLERS, "sampler"))
]
SchedulerName = Annotated[
    str, Field(json_schema_extra={"enum": list(SCHEDULERS)}), AfterValidator(_known(SCHEDULERS, "scheduler"))
]
Prompt = Annotated[
    str,
    Field(max_length=MAX_PROMPT_CHARACTERS, json_schema_extra={"pattern": r"\S"}),
    AfterValidator(_not_blank),
]
Side = Annotated[int, Field(ge=64, le=MAX_SIDE)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelDefaults(_Frozen):
    """What a request gets where it is silent. The values here are those of SDXL; a model folder may bring its own."""

    width: Annotated[Side, Field(description="Pixels.")] = 1024
    height: Annotated[Side, Field(description="Pixels.")] = 1024
    steps: Annotated[int, Field(description="Sampling steps.")] = 20
    sampler: Annotated[SamplerName, Field(description="One of the samplers below.")] = "DPM++ 2M SDE"
    scheduler: Annotated[SchedulerName, Field(description="One of the schedulers below.")] = "Karras"
    cfg_scale: Annotated[float, Field(description="How strictly the prompt is followed.")] = 5.0


class LayerDiffuse(_Frozen):
    """How transparency is made. `stop_at` is the fraction of the schedule during which the patch is on."""

    enabled: bool = True
    method: Literal["attention", "conv"] = "attention"
    weight: Annotated[float, Field(ge=0, le=2)] = 1.0
    stop_at: Annotated[float, Field(ge=0, le=1)] = 1.0


class Lora(_Frozen):
    """A user's LoRA file (its name without extension, in `models/Lora`) and its weight."""

    name: Annotated[str, Field(min_length=1, max_length=200, description="The file's name without its ending.")]
    weight: Annotated[float, Field(ge=-4, le=4, description="How strongly it works.")] = 1.0


class GenerationRequest(_Frozen):
    """One request for pictures. `None` means "as the model likes it"; see `ModelDefaults` and `resolved`."""

    prompt: Prompt
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] = "bad, ugly"
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = 12345
    subseed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    subseed_strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    steps: Annotated[int, Field(ge=1, le=150)] | None = None
    sampler: SamplerName | None = None
    scheduler: SchedulerName | None = None
    cfg_scale: Annotated[float, Field(ge=1, le=30)] | None = None
    width: Side | None = None
    height: Side | None = None
    batch_size: Annotated[int, Field(ge=1, le=8)] = 1
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    model: Annotated[str, Field(max_length=500)] | None = None
    loras: Annotated[tuple[Lora, ...], Field(max_length=16)] = ()
    noise: NoiseSource = "nv"
    decode: DecodeMode = "official"
    layerdiffuse: LayerDiffuse = LayerDiffuse()

    @property
    def batch_key(self) -> str:
        """Requests of one key may be drawn together: they differ in prompts, seeds, guidance and number of pictures only."""
        return self.model_dump_json(exclude=OWN_IN_A_BATCH)

    def resolved(self, defaults: ModelDefaults) -> GenerationRequest:
        """Fill what is `None` from the model's defaults and draw the seeds that are -1."""
        filled = {name: value for name, value in defaults if getattr(self, name) is None}
        return self.with_seeds().model_copy(update=filled)

    def with_seeds(self) -> GenerationRequest:
        """Draw the seeds that are -1."""
        drawn = {name: secrets.randbelow(4294967294) for name in ("seed", "subseed") if getattr(self, name) == -1}
        return self.model_copy(update=drawn)


def parse_request(fields: dict[str, Any]) -> GenerationRequest:
    """Validate plain data. Raises `InvalidRequest` naming the first field that is wrong, and what is accepted."""
    try:
        return GenerationRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRequest(
            first["msg"].removeprefix("Value error, ") + ".", field=".".join(str(part) for part in first["loc"])
        ) from None


def split_sampler_name(name: str) -> tuple[str, str | None]:
    """Split a name such as "DPM++ 2M SDE Karras" into sampler and scheduler; the scheduler is None if not named."""
    for scheduler in SCHEDULERS:
        if name.lower().endswith(f" {scheduler.lower()}"):
            return name[: -len(scheduler) - 1], scheduler
    return name, None
