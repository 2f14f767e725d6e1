"""The vocabulary that every layer shares: what may be asked for. Free of torch, HTTP and files."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest

T = TypeVar("T", bound=BaseModel)
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
AUTOMATIC = "Automatic"
_AUTOMATIC = {"DPM++ 2M": "Karras", "DPM++ SDE": "Karras", "DPM++ 2M SDE": "Exponential", "DPM++ 3M SDE": "Exponential"}
"""The schedule that "Automatic" means for a sampler; "Normal" for the others."""

NoiseSource = Literal["nv", "cpu", "gpu"]
DecodeMode = Literal["official", "forge2"]
ImageFormat = Literal["png", "webp", "avif"]

MAX_PROMPT_CHARACTERS = 10_000
AND = re.compile(r"\bAND\b")
"""Parts a prompt into several, mixed in the picture. Each is another pass through the UNet at every step."""
MAX_PROMPT_PARTS = 8
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_SEED = 2**63 - 1
NOT_BLANK = r"\S"
_LORA = re.compile(r"<(?:lora|lyco):([^<>]*)>")
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


def _few_parts(prompt: str) -> str:
    parts = len(AND.findall(prompt)) + 1
    if parts > MAX_PROMPT_PARTS:
        raise ValueError(
            f"got {parts} parts between ANDs; at most {MAX_PROMPT_PARTS}. Write and in small letters for the word"
        )
    return prompt


SamplerName = Annotated[
    str, Field(json_schema_extra={"enum": list(SAMPLERS)}), AfterValidator(_known(SAMPLERS, "sampler"))
]
SchedulerName = Annotated[
    str, Field(json_schema_extra={"enum": list(SCHEDULERS)}), AfterValidator(_known(SCHEDULERS, "scheduler"))
]
Prompt = Annotated[
    str,
    Field(max_length=MAX_PROMPT_CHARACTERS, json_schema_extra={"pattern": NOT_BLANK}),
    AfterValidator(_not_blank),
    AfterValidator(_few_parts),
]
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE)]


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
    """One request for pictures. `None` means "as the model likes it"; see `ModelDefaults` and `resolved`.

    `<lora:name:weight>` in the prompt is taken out of it and joins `loras`. Raises `InvalidRequest` if such a tag is not whole.
    """

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

    @model_validator(mode="before")
    @classmethod
    def _loras_of_the_prompt(cls, data: Any) -> Any:
        prompt, given = (data.get("prompt"), data.get("loras") or ()) if isinstance(data, dict) else (None, ())
        if not isinstance(prompt, str) or not isinstance(given, (list, tuple)) or not _LORA.search(prompt):
            return data
        loras = [*given, *(_lora(found[1]) for found in _LORA.finditer(prompt))]
        return {**data, "prompt": _LORA.sub("", prompt).strip(), "loras": tuple(loras)}

    @property
    def tagged_prompt(self) -> str:
        """The prompt with its LoRAs as tags: what has to be asked for to get the same."""
        return " ".join([self.prompt, *(f"<lora:{each.name}:{each.weight:.12g}>" for each in self.loras)])

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


def _lora(tag: str) -> Lora:
    """The LoRA that the inside of a tag, "name" or "name:weight", means. Raises `InvalidRequest`."""
    name, _, weight = tag.partition(":")
    try:
        return Lora(name=name.strip(), weight=float(weight or 1))
    except ValueError:
        raise InvalidRequest(
            f'"<lora:{tag[:100]}>" is not a LoRA with its weight.',
            hint="Write <lora:name:0.8>, with a weight from -4 to 4.",
            field="prompt",
        ) from None


def parse_request(fields: dict[str, Any]) -> GenerationRequest:
    """`parse_as`, for a request."""
    return parse_as(GenerationRequest, fields)


def parse_as(kind: type[T], fields: dict[str, Any]) -> T:
    """Validate plain data. Raises `InvalidRequest` naming the first field that is wrong, and what is accepted."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRequest(f"{validation.describe_validation_error(first)}.", field=".".join(str(part) for part in first["loc"])) from None


def split_sampler_name(name: str | None, scheduler: str | None = None) -> tuple[str | None, str | None]:
    """Sampler and scheduler of a sampler's name as that ecosystem writes it, such as "DPM++ 2M SDE Karras".

    The schedule in the name wins over `scheduler`. Schedules go by label or by name ("SGM Uniform", "sgm_uniform"); "Automatic" is
    the sampler's own. What is unknown comes back as it is.
    """
    for label in (*SCHEDULERS, AUTOMATIC):
        for known in (label, scheduler_name(label)):
            if name and name.lower().endswith(f" {known.lower()}"):
                name, scheduler = name[: -len(known) - 1], label
    if scheduler and scheduler.lower() == AUTOMATIC.lower():
        own = {sampler.lower(): schedule for sampler, schedule in _AUTOMATIC.items()}
        return name, own.get(name.lower(), "Normal") if name else None
    return name, next((label for label in SCHEDULERS if scheduler_name(label) == (scheduler or "").lower()), scheduler)


def scheduler_name(label: str) -> str:
    """The name beside a schedule's label: "sgm_uniform" for "SGM Uniform"."""
    return label.lower().replace(" ", "_")
