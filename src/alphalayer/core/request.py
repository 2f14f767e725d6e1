"""The vocabulary that every layer shares: what may be asked for. Free of torch, HTTP and files."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import MODES, OPAQUE, InputRole

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
_AUTOMATIC = {
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 3M SDE": "Exponential",
}
"""The schedule that "Automatic" means for a sampler; "Normal" for the others."""

NoiseSource = Literal["nv", "cpu", "gpu"]
DecodeMode = Literal["official", "forge2"]
ImageFormat = Literal["png", "webp", "avif"]
ResizeMode = Literal["Just Resize", "Crop and Resize", "Resize and Fill"]
"""How an input image is fitted to the size of the result."""
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)

MAX_PROMPT_CHARACTERS = 10_000
AND = re.compile(r"\bAND\b")
"""Parts a prompt into several, mixed in the picture. Each is another pass through the UNet at every step."""
MAX_PROMPT_PARTS = 8
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_SEED = 2**63 - 1
NOT_BLANK = r"\S"
_LORA = re.compile(r"<(?:lora|lyco):([^<>]*)>")
FREE_IN_A_BATCH = {
    "prompt",
    "negative_prompt",
    "seed",
    "subseed",
    "subseed_strength",
    "cfg_scale",
    "batch_size",
    "clip_skip",
}
"""Fields in which requests that are generated together may differ."""


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
    str,
    Field(json_schema_extra={"enum": list(SAMPLERS)}),
    AfterValidator(_known(SAMPLERS, "sampler")),
]
ModeName = Annotated[
    str,
    Field(json_schema_extra={"enum": list(MODES)}),
    AfterValidator(_known(tuple(MODES), "mode")),
]
SchedulerName = Annotated[
    str,
    Field(json_schema_extra={"enum": list(SCHEDULERS)}),
    AfterValidator(_known(SCHEDULERS, "scheduler")),
]
Prompt = Annotated[
    str,
    Field(max_length=MAX_PROMPT_CHARACTERS, json_schema_extra={"pattern": NOT_BLANK}),
    AfterValidator(_not_blank),
    AfterValidator(_few_parts),
]
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE)]


class Frozen(BaseModel, frozen=True):
    """Base of immutable values: unknown fields and numbers that are not finite are refused."""

    # errors go into logs, and inputs hold prompts
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class ModelDefaults(Frozen, frozen=True):
    """Values of a request's open fields. The defaults are those of SDXL; a model may bring its own."""

    width: Annotated[Side, Field(description="Pixels.")] = 1024
    height: Annotated[Side, Field(description="Pixels.")] = 1024
    steps: Annotated[int, Field(description="Sampling steps.")] = 20
    sampler: Annotated[SamplerName, Field(description="Name of a sampler.")] = "DPM++ 2M SDE"
    scheduler: Annotated[SchedulerName, Field(description="Name of a noise schedule.")] = "Karras"
    cfg_scale: Annotated[float, Field(description="Classifier-free guidance scale.")] = 5.0


_SDXL = ModelDefaults()


class Lora(Frozen, frozen=True):
    """A LoRA file of `models/Lora` and its weight."""

    name: Annotated[
        str, Field(min_length=1, max_length=200, description="File name without extension.")
    ]
    weight: Annotated[float, Field(ge=-4, le=4, description="Strength of the LoRA.")] = 1.0


INPUT_NAME = r"^input_[0-9a-f]{64}\.png$"
"""Storage keys of input images: the SHA-256 of the file."""


class ImageInput(Frozen, frozen=True):
    """An input image in the storage. Requests hold its name, never its pixels."""

    role: Annotated[InputRole, Field(description="What the image is to the result.")]
    file_name: Annotated[str, Field(pattern=INPUT_NAME, description="Storage key of the image.")]


class ImageSeed(NamedTuple):
    """Seed and variation seed of one image."""

    seed: int
    subseed: int


class GenerationRequest(Frozen, frozen=True):
    """What to generate. `None` means the model's default, see `ModelDefaults`.

    Every field is declared here once, with bounds, default and description. The dialects, the command
    line, the MCP tool and the reference are derived from these declarations.

    A `<lora:name:weight>` tag in the prompt is removed from it and added to `loras`.
    Raises `InvalidRequest` if such a tag is malformed.
    """

    prompt: Annotated[Prompt, Field(description="What to generate.")]
    negative_prompt: Annotated[
        str, Field(max_length=MAX_PROMPT_CHARACTERS, description="What to avoid.")
    ] = "bad, ugly"
    seed: Annotated[
        int,
        Field(ge=-1, le=MAX_SEED, description="Same seed, same image; -1 picks a random seed."),
    ] = 12345
    subseed: Annotated[
        int, Field(ge=-1, le=MAX_SEED, description="Variation seed; -1 picks a random one.")
    ] = -1
    subseed_strength: Annotated[
        float, Field(ge=0, le=1, description="Strength of the variation.")
    ] = 0.0
    steps: Annotated[int, Field(ge=1, le=150, description="Sampling steps; SDXL: 20.")] | None = (
        None
    )
    sampler: Annotated[SamplerName, Field(description="Sampler; SDXL: DPM++ 2M SDE.")] | None = None
    scheduler: (
        Annotated[SchedulerName, Field(description="Noise schedule; SDXL: Karras.")] | None
    ) = None
    cfg_scale: (
        Annotated[float, Field(ge=1, le=30, description="Classifier-free guidance scale; SDXL: 5.")]
        | None
    ) = None
    width: Annotated[Side, Field(description="Width in pixels; SDXL: 1024.")] | None = None
    height: Annotated[Side, Field(description="Height in pixels; SDXL: 1024.")] | None = None
    batch_size: Annotated[
        int, Field(ge=1, le=8, description="Images generated together; seeds count up.")
    ] = 1
    clip_skip: Annotated[
        int, Field(ge=1, le=12, description="Last text encoder layer to use, counted from the end.")
    ] = 1
    model: (
        Annotated[
            str, Field(min_length=1, max_length=500, description="Model name, title or hash.")
        ]
        | None
    ) = None
    loras: Annotated[
        tuple[Lora, ...],
        Field(max_length=16, description="LoRA files of models/Lora with weights."),
    ] = ()
    mode: Annotated[ModeName, Field(description="How transparency is generated.")] = "attention"
    layerdiffuse_weight: Annotated[
        float, Field(ge=0, le=2, description="Strength of the LayerDiffuse patch.")
    ] = 1.0
    layerdiffuse_stop_at: Annotated[
        float,
        Field(ge=0, le=1, description="Fraction of the schedule during which the patch is on."),
    ] = 1.0
    inputs: Annotated[
        tuple[ImageInput, ...], Field(max_length=3, description="Input images that the mode needs.")
    ] = ()
    resize_mode: Annotated[
        ResizeMode, Field(description="How input images are fitted to the size of the result.")
    ] = "Crop and Resize"
    noise: NoiseSource = "nv"
    decode: DecodeMode = "official"

    @model_validator(mode="before")
    @classmethod
    def _move_lora_tags(cls, data: Any) -> Any:
        prompt, loras = (
            (data.get("prompt"), data.get("loras") or ()) if isinstance(data, dict) else (None, ())
        )
        if (
            not isinstance(prompt, str)
            or not isinstance(loras, (list, tuple))
            or not _LORA.search(prompt)
        ):
            return data
        loras = [*loras, *(_parse_lora(tag[1]) for tag in _LORA.finditer(prompt))]
        return {**data, "prompt": _LORA.sub("", prompt).strip(), "loras": tuple(loras)}

    @model_validator(mode="after")
    def _check_inputs(self) -> GenerationRequest:
        needed = MODES[self.mode].needs
        roles = sorted(image.role for image in self.inputs)
        if roles != sorted(needed):
            accepted = f"one image each of: {', '.join(needed)}" if needed else "no input images"
            raise ValueError(f'mode "{self.mode}" takes {accepted}')
        return self

    @property
    def uses_layerdiffuse(self) -> bool:
        """Return whether LayerDiffuse is on."""
        return self.mode != OPAQUE

    @property
    def tagged_prompt(self) -> str:
        """The prompt with its LoRAs as tags, so that it generates the same image again."""
        return " ".join(
            [self.prompt, *(f"<lora:{lora.name}:{lora.weight:.12g}>" for lora in self.loras)]
        )

    @property
    def batch_key(self) -> str:
        """Requests of equal key may be generated together.

        They differ in prompts, seeds, guidance and number of images alone.
        """
        return self.model_dump_json(exclude=FREE_IN_A_BATCH)

    def with_seeds(self) -> GenerationRequest:
        """Replace seeds of -1 by random ones."""
        random = {
            name: secrets.randbelow(4294967294)
            for name in ("seed", "subseed")
            if getattr(self, name) == -1
        }
        return self.model_copy(update=random)

    def image_seeds(self, iterations: int = 1) -> tuple[ImageSeed, ...]:
        """Return the seeds of all images of `iterations` batches.

        With a variation strength the variation seed counts up, else both do.
        """
        numbers = range(iterations * self.batch_size)
        if self.subseed_strength:
            return tuple(ImageSeed(self.seed, self.subseed + i) for i in numbers)
        return tuple(ImageSeed(self.seed + i, self.subseed + i % self.batch_size) for i in numbers)

    def resolve(
        self, defaults: ModelDefaults, images: tuple[ImageSeed, ...] = ()
    ) -> ResolvedRequest:
        """Fill open fields from a model's defaults.

        Args:
            defaults: Values of the fields that are `None`.
            images: Seeds of the images to generate; default: those of one batch.
        """
        request = self.with_seeds()
        values = {name: getattr(request, name) for name in GenerationRequest.model_fields}
        values |= {name: value for name, value in defaults if values[name] is None}
        # both parts were validated
        return ResolvedRequest.model_construct(**values, images=images or request.image_seeds())


class ResolvedRequest(GenerationRequest, frozen=True):
    """A request without open fields, and the seeds of each of its images."""

    steps: int = _SDXL.steps
    sampler: str = _SDXL.sampler
    scheduler: str = _SDXL.scheduler
    cfg_scale: float = _SDXL.cfg_scale
    width: int = _SDXL.width
    height: int = _SDXL.height
    images: tuple[ImageSeed, ...] = ()

    @property
    def settings(self) -> ModelDefaults:
        """The values that the model's defaults filled, or the request itself."""
        return ModelDefaults.model_construct(
            **{name: getattr(self, name) for name in ModelDefaults.model_fields}
        )


def _parse_lora(tag: str) -> Lora:
    """Parse the inside of a tag, "name" or "name:weight". Raises `InvalidRequest`."""
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
        raise InvalidRequest(
            f"{validation.describe_validation_error(first)}.",
            field=".".join(str(part) for part in first["loc"]),
        ) from None


def split_sampler_name(
    name: str | None, scheduler: str | None = None
) -> tuple[str | None, str | None]:
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
    return name, next(
        (label for label in SCHEDULERS if scheduler_name(label) == (scheduler or "").lower()),
        scheduler,
    )


def scheduler_name(label: str) -> str:
    """The name beside a schedule's label: "sgm_uniform" for "SGM Uniform"."""
    return label.lower().replace(" ", "_")
