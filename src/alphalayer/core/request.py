"""Vocabulary of generation requests: every field with bounds, default and description.

Free of torch, HTTP and files.
"""

from __future__ import annotations

import math
import secrets
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, Field, model_validator

from alphalayer.core import validation
from alphalayer.core.edits import EditFields, LayerFields
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import DEFAULT_MODE, MODES, OPAQUE, InputRole
from alphalayer.core.prompts import (
    AND,
    MAX_LORAS,
    MAX_PROMPT_BYTES,
    MAX_PROMPT_CHARACTERS,
    Lora,
    check_prompt,
    check_text,
    remove_comments,
    split_tags,
)
from alphalayer.core.samplers import (
    CALLS_PER_STEP,
    SAMPLERS,
    SCHEDULERS,
    TRAINING_STEPS,
    sampler_named,
    scheduler_named,
    total_steps,
)
from alphalayer.core.values import Frozen, copy_fields, one_of, parse_as

NoiseSource = Literal["nv", "cpu", "gpu"]
Decode = Literal["official", "forge2"]
"""Mathematics of the transparent decode."""
DecodeMode = Literal["auto", "official", "forge2"]
"""A `Decode`, or the model's own with "auto"."""
ImageFormat = Literal["png", "webp", "avif"]
Emphasis = Literal["Original", "No norm", "Ignore", "None"]
"""How attention weights act: scaled with or without the mean restored, dropped, or as text."""
ResizeMode = Literal["Just Resize", "Crop and Resize", "Resize and Fill"]
"""How an input image is fitted to the size of the result."""
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)

MIN_SIDE, MAX_SIDE = 64, 2048
MAX_HIRES_SIDE, MAX_HIRES_PIXELS = 4096, 16_000_000
"""Limits of a second pass."""
MAX_HIRES_SCALE = 4
LATENT_UPSCALERS = {
    "Latent": ("bilinear", False),
    "Latent (antialiased)": ("bilinear", True),
    "Latent (bicubic)": ("bicubic", False),
    "Latent (bicubic antialiased)": ("bicubic", True),
    "Latent (nearest)": ("nearest", False),
    "Latent (nearest-exact)": ("nearest-exact", False),
}
"""Upscalers of latents: interpolation of torch, and whether it is antialiased."""
IMAGE_UPSCALERS = ("None", "Lanczos", "Nearest")
"""Upscalers of images without a file. The files of models/ESRGAN are the others."""
MAX_SEED = 2**63 - 1
MAX_BATCH = 8
NOT_BLANK = r"\S"
PROMPTS = ("prompt", "negative_prompt", "hires_prompt", "hires_negative_prompt")
"""Fields with prompts."""
LAYER_PROMPTS = tuple(LayerFields.model_fields)
"""Fields with additional prompts."""
FREE_IN_A_BATCH = {
    "prompt",
    "negative_prompt",
    *LAYER_PROMPTS,
    "seed",
    "subseed",
    "subseed_strength",
    "cfg_scale",
    "hires_cfg_scale",
    "hires_prompt",
    "hires_negative_prompt",
    "batch_size",
    "clip_skip",
    "inputs",
    "resize_mode",
    "warnings",
}
"""Fields in which requests that are generated together may differ."""


_METHODS = tuple(mode.name for mode in MODES.values() if mode.files and not mode.needs)
TransparencyMethod = Annotated[
    str,
    Field(json_schema_extra={"enum": list(_METHODS)}),
    AfterValidator(one_of(_METHODS, "method")),
]
"""Name of a mode without input images."""
ModeName = Annotated[
    str,
    Field(json_schema_extra={"enum": list(MODES)}),
    AfterValidator(one_of(tuple(MODES), "mode")),
]


INPUT_NAME = r"^input_[0-9a-f]{64}\.png$"
"""Storage keys of input images: the SHA-256 of the file."""


class ImageInput(Frozen, frozen=True):
    """An input image in the storage. Requests hold its name, never its pixels."""

    role: Annotated[InputRole, Field(description="What the image is to the result.")]
    file_name: Annotated[str, Field(pattern=INPUT_NAME, description="Storage key of the image.")]
    width: Annotated[int, Field(ge=0, description="Width in pixels. 0: unknown.")] = 0
    height: Annotated[int, Field(ge=0, description="Height in pixels. 0: unknown.")] = 0

    @property
    def pixels(self) -> int:
        """Return its number of pixels, 0 if its size is unknown."""
        return self.width * self.height


# Types of the fields: bounds and description. Models whose defaults or names differ share them.
Prompt = Annotated[
    str,
    Field(
        max_length=MAX_PROMPT_CHARACTERS,
        json_schema_extra={"pattern": NOT_BLANK},
        description="What to generate.",
    ),
    AfterValidator(check_prompt),
]
NegativePrompt = Annotated[
    str, Field(max_length=MAX_PROMPT_CHARACTERS, description="What to avoid.")
]
Seed = Annotated[
    int,
    Field(ge=-1, le=MAX_SEED, description="Same seed, same image; -1 picks a random seed."),
]
Subseed = Annotated[
    int, Field(ge=-1, le=MAX_SEED, description="Variation seed; -1 picks a random one.")
]
SubseedStrength = Annotated[float, Field(ge=0, le=1, description="Strength of the variation.")]
Steps = Annotated[int, Field(ge=1, le=150, description="Sampling steps; SDXL: 20.")]
SamplerName = Annotated[
    str,
    Field(json_schema_extra={"enum": list(SAMPLERS)}, description="Sampler; SDXL: DPM++ 2M SDE."),
    AfterValidator(sampler_named),
]
SchedulerName = Annotated[
    str,
    Field(
        json_schema_extra={"enum": list(SCHEDULERS)}, description="Noise schedule; SDXL: Karras."
    ),
    AfterValidator(scheduler_named),
]
CfgScale = Annotated[
    float, Field(ge=0, le=30, description="Classifier-free guidance scale; SDXL: 5.")
]
Width = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE, description="Width in pixels; SDXL: 1024.")]
Height = Annotated[
    int, Field(ge=MIN_SIDE, le=MAX_SIDE, description="Height in pixels; SDXL: 1024.")
]
BatchSize = Annotated[
    int, Field(ge=1, le=MAX_BATCH, description="Images generated together; seeds count up.")
]
ClipSkip = Annotated[
    int, Field(ge=1, le=12, description="Last text encoder layer to use, counted from the end.")
]
LayerdiffuseWeight = Annotated[
    float, Field(ge=0, le=2, description="Strength of the LayerDiffuse patch.")
]
LayerdiffuseStopAt = Annotated[
    float, Field(ge=0, le=1, description="Fraction of the schedule during which the patch is on.")
]
HiresScale = Annotated[
    float,
    Field(
        ge=1,
        le=MAX_HIRES_SCALE,
        description="Second pass at a larger size: factor of both sides; 1 is off.",
    ),
]
HiresUpscaler = Annotated[
    str,
    Field(
        min_length=1,
        max_length=200,
        description="How the second pass enlarges the first: "
        f"{', '.join((*LATENT_UPSCALERS, *IMAGE_UPSCALERS))}, or a file of models/ESRGAN.",
    ),
]
HiresSteps = Annotated[
    int, Field(ge=0, le=150, description="Steps of the second pass; 0: as many as the first.")
]
HiresStrength = Annotated[
    float,
    Field(
        ge=0.01,
        le=1,
        description="Share of the noise that the second pass adds: more changes more.",
    ),
]
HiresSide = Annotated[int, Field(ge=0, le=MAX_HIRES_SIDE)]
HiresPrompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
ResizeModeName = Annotated[
    ResizeMode, Field(description="How input images are fitted to the size of the result.")
]


class ModelDefaults(Frozen, frozen=True):
    """Values of a request's open fields. A model may have its own; these are SDXL's."""

    width: Width = 1024
    height: Height = 1024
    steps: Annotated[Steps, Field(description="Sampling steps.")] = 20
    sampler: SamplerName = "DPM++ 2M SDE"
    scheduler: SchedulerName = "Karras"
    cfg_scale: Annotated[CfgScale, Field(description="Classifier-free guidance scale.")] = 5.0
    decode: Annotated[
        Decode, Field(description="Transparent decode of the setting `decode` auto.")
    ] = "forge2"


_SDXL = ModelDefaults()


class GenerationOptions(Frozen, frozen=True):
    """Settings of AUTOMATIC1111 that change the image. The defaults are those of Forge.

    Source: A1111's settings of the same meaning, named in each description.
    """

    eta: (
        Annotated[
            float,
            Field(
                ge=0,
                le=1,
                description="Share of fresh noise in each step (eta, eta_ancestral, eta_ddim) of "
                "the SDE and ancestral samplers, DPM fast, DPM adaptive, DDIM and DDIM CFG++. "
                "Others ignore it. Null: 0 for DDIM and DDIM CFG++, else 1.",
            ),
        ]
        | None
    ) = None
    hires_eta: (
        Annotated[
            float,
            Field(
                ge=0,
                le=1,
                description="Share of fresh noise in the second pass. Null: as in the first.",
            ),
        ]
        | None
    ) = None
    noise_seed_delta: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_SEED,
            description="Added to the seed of the sampler's noise (eta_noise_seed_delta).",
        ),
    ] = 0
    emphasis: Annotated[Emphasis, Field(description="How attention weights act.")] = "Original"
    crop_top: Annotated[
        int, Field(ge=0, le=MAX_SIDE, description="Crop that SDXL sees (sdxl_crop_top).")
    ] = 0
    crop_left: Annotated[
        int, Field(ge=0, le=MAX_SIDE, description="Crop that SDXL sees (sdxl_crop_left).")
    ] = 0
    min_uncond: Annotated[
        float,
        Field(
            ge=0,
            le=100,
            description="Noise level below which every second step has no guidance (s_min_uncond).",
        ),
    ] = 0.0


class ImageSeed(NamedTuple):
    """Seed and variation seed of one image."""

    seed: int
    subseed: int


class RequestFields(Frozen, frozen=True):
    """Fields that a client chooses under these names, each declared here once.

    The native API, the MCP tool, the command line and the reference take them from here.
    `None` means the model's default, see `ModelDefaults`.
    """

    prompt: Prompt
    negative_prompt: NegativePrompt = "bad, ugly"
    seed: Seed = 12345
    steps: Steps | None = None
    sampler: SamplerName | None = None
    scheduler: SchedulerName | None = None
    cfg_scale: CfgScale | None = None
    width: Width | None = None
    height: Height | None = None
    batch_size: BatchSize = 1
    subseed: Subseed = -1
    subseed_strength: SubseedStrength = 0.0
    clip_skip: ClipSkip = 1
    model: (
        Annotated[
            str, Field(min_length=1, max_length=500, description="Model name, title or hash.")
        ]
        | None
    ) = None
    loras: Annotated[
        tuple[Lora, ...],
        Field(max_length=MAX_LORAS, description="LoRA files of models/Lora with weights."),
    ] = ()
    layerdiffuse_weight: LayerdiffuseWeight = 1.0
    layerdiffuse_stop_at: LayerdiffuseStopAt = 1.0
    resize_mode: ResizeModeName = "Crop and Resize"


class HiresFields(Frozen, frozen=True):
    """Fields of a second pass that a client chooses under these names, each declared here once."""

    hires_scale: HiresScale = 1.0
    hires_upscaler: HiresUpscaler = "Latent"
    hires_steps: HiresSteps = 0
    hires_strength: HiresStrength = 0.75


class GenerationRequest(RequestFields, HiresFields, EditFields, LayerFields, frozen=True):
    """What to generate: the fields of clients and those that the service adds.

    Comments and tags are read once, by `of` and `parse_request`. The text of a stored request is
    not read again.
    """

    mode: Annotated[ModeName, Field(description="How transparency is generated.")] = DEFAULT_MODE
    inputs: Annotated[
        tuple[ImageInput, ...],
        Field(
            max_length=5,
            description="Input images: those that the mode needs, one to change (init), its mask.",
        ),
    ] = ()
    noise: Annotated[
        NoiseSource,
        Field(description="Source of noise: nv (the same on every machine), cpu or gpu."),
    ] = "nv"
    decode: Annotated[
        DecodeMode,
        Field(
            description="Transparent decode: official, forge2 as Forge 2 does it, or auto, the "
            "model's own."
        ),
    ] = "official"
    options: Annotated[
        GenerationOptions, Field(description="Settings of AUTOMATIC1111 that change the image.")
    ] = GenerationOptions()
    hires_width: Annotated[
        HiresSide,
        Field(description="Width of the second pass instead of the scale. 0: by the height."),
    ] = 0
    hires_height: Annotated[
        HiresSide,
        Field(description="Height of the second pass instead of the scale. 0: by the width."),
    ] = 0
    hires_sampler: Annotated[
        SamplerName | None, Field(description="Sampler of the second pass. Null: as the first.")
    ] = None
    hires_scheduler: Annotated[
        SchedulerName | None, Field(description="Schedule of the second pass. Null: as the first.")
    ] = None
    hires_cfg_scale: Annotated[
        CfgScale | None, Field(description="Guidance of the second pass. Null: as the first.")
    ] = None
    hires_prompt: Annotated[
        HiresPrompt, Field(description="Prompt of the second pass. Empty: as in the first.")
    ] = ""
    hires_negative_prompt: Annotated[
        HiresPrompt,
        Field(description="Negative prompt of the second pass. Empty: as in the first."),
    ] = ""
    warnings: Annotated[
        tuple[str, ...],
        Field(description="What of the client's request was ignored, in its order."),
    ] = ()

    @model_validator(mode="after")
    def _validate_inputs(self) -> GenerationRequest:
        problem = self._input_problem or self._batch_problem
        if problem := problem or self._hires_problem or self._strength_problem:
            raise ValueError(problem)
        return self

    @property
    def roles(self) -> set[InputRole]:
        """Return the roles of the input images."""
        return {image.role for image in self.inputs}

    @property
    def layer_prompts(self) -> tuple[str, ...]:
        """Return the prompt of each layer of the mode. A layer may have an additional one."""
        roles = MODES[self.mode].layers
        additional = [getattr(self, f"{role}_prompt", "") for role in roles]
        if len(roles) == 1:
            return (self.prompt,)
        return tuple(f"{text}, {self.prompt}" if text else self.prompt for text in additional)

    @property
    def uses_init(self) -> bool:
        """Return whether the request changes an image."""
        return "init" in self.roles

    @property
    def uses_hires(self) -> bool:
        """Return whether there is a second pass at a larger size."""
        return self.hires_scale > 1 or self.hires_width > 0 or self.hires_height > 0

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height of the first pass. An open side counts as SDXL's."""
        return self.width or _SDXL.width, self.height or _SDXL.height

    @property
    def enlarged_size(self) -> tuple[int, int]:
        """Return the size to which the second pass enlarges the image of the first.

        With both `hires_width` and `hires_height` it covers them, and the middle is used.
        """
        width, height = self.size
        if not (self.hires_width or self.hires_height):
            return int(width * self.hires_scale), int(height * self.hires_scale)
        by_width = self.hires_width, self.hires_width * height // width
        by_height = self.hires_height * width // height, self.hires_height
        return max(by_width, by_height)

    @property
    def final_size(self) -> tuple[int, int]:
        """Return width and height of the result."""
        if self.hires_width and self.hires_height:
            return self.hires_width, self.hires_height
        return self.enlarged_size if self.uses_hires else self.size

    @property
    def largest_size(self) -> tuple[int, int]:
        """Return width and height of the pass with more pixels."""
        return max(self.size, self.final_size, key=math.prod)

    @property
    def init(self) -> ImageInput | None:
        """Return the image to change."""
        return next((image for image in self.inputs if image.role == "init"), None)

    @property
    def result_pixels(self) -> int:
        """Return the pixels of a result.

        With `masked_only` it has the size of the image to change.
        """
        keeps_size = self.masked_only and "mask" in self.roles
        pixels = self.init.pixels if keeps_size and self.init else 0
        return pixels or math.prod(self.final_size)

    @property
    def size_field(self) -> str:
        """Return the field to reduce for a smaller image."""
        if self.result_pixels > math.prod(self.largest_size):
            return "inputs"
        return "width" if self.largest_size == self.size else self._hires_field

    @property
    def _hires_field(self) -> str:
        """Return the field that sets the size of the second pass."""
        sides = ("hires_width", "hires_height")
        return next((name for name in sides if getattr(self, name)), "hires_scale")

    @property
    def upscaler_file(self) -> str | None:
        """Return the name of the file that enlarges the first pass, if it needs one."""
        is_built_in = self.hires_upscaler in (*LATENT_UPSCALERS, *IMAGE_UPSCALERS)
        return self.hires_upscaler if self.uses_hires and not is_built_in else None

    def check_hires(self) -> None:
        """Raise `InvalidRequest` for a second pass of a size that is not generated."""
        if problem := self._hires_problem:
            raise InvalidRequest(f"{problem}.", field=self._hires_field)

    @property
    def _hires_problem(self) -> str | None:
        """Return what is wrong with the size of the second pass."""
        if not self.uses_hires:
            return None
        width, height = self.enlarged_size
        fits = max(width, height) <= MAX_HIRES_SIDE and width * height <= MAX_HIRES_PIXELS
        if fits and min(self.final_size) >= MIN_SIDE:
            return None
        return (
            f"the second pass has {width}x{height}; a side has from {MIN_SIDE} to "
            f"{MAX_HIRES_SIDE} pixels, and an image at most {MAX_HIRES_PIXELS:,}"
        )

    @property
    def _strength_problem(self) -> str | None:
        """Return what is wrong with the strength for the steps.

        Open steps are not checked.
        """
        steps = (self.hires_steps or self.steps) if self.uses_hires else self.steps
        strength = self.hires_strength if self.uses_hires else self.strength
        is_share = self.uses_hires or (self.uses_init and self.exact_steps and strength > 0)
        if not is_share or not steps or (total := total_steps(steps, strength)) <= TRAINING_STEPS:
            return None
        return (
            f"{steps} steps at a strength of {strength:g} are the end of a schedule of {total:,}; "
            f"at most {TRAINING_STEPS:,}. Use fewer steps or a higher strength"
        )

    @property
    def _input_problem(self) -> str | None:
        """Return what is wrong with the input images for the mode."""
        needed, roles = MODES[self.mode].needs, self.roles
        if len(roles) < len(self.inputs):
            return "there are two images of one role"
        if "mask" in roles and "init" not in roles:
            return "a mask needs an image to change (init)"
        if "init" in roles and self.uses_hires:
            return "an image to change (init) takes no second pass"
        if roles - {"init", "mask"} == set(needed):
            return None
        accepted = f"one image each of: {', '.join(needed)}" if needed else "no input images"
        return f'mode "{self.mode}" takes {accepted}'

    @property
    def _batch_problem(self) -> str | None:
        """Return what is wrong with the number of images for the mode."""
        layers = len(MODES[self.mode].layers)
        if self.batch_size % layers == 0:
            return None
        sizes = ", ".join(map(str, range(layers, MAX_BATCH + 1, layers)))
        return (
            f'mode "{self.mode}" generates {layers} images together: '
            f"got a batch_size of {self.batch_size}; use one of {sizes}"
        )

    @classmethod
    def of(cls, body: BaseModel, *, comments: bool = True, **values: Any) -> GenerationRequest:
        """Build a request from a validated body without a second validation.

        Args:
            body: Fields of these names and types. Its prompts are read as in `read_prompts`.
            comments: Whether "#" starts a comment in the prompts.
            values: Valid values of other fields, or instead of those of the body.

        Raises:
            InvalidRequest: A prompt is not right, see `read_prompts`, or the input images are not
                those that the mode needs, or its batch is no multiple of the mode's images, or the
                size or strength of a pass is not accepted.
        """
        request = copy_fields(body, cls, **values)
        if problem := request._input_problem:
            raise InvalidRequest(f"{problem}.", field="inputs")
        if problem := request._batch_problem:
            raise InvalidRequest(f"{problem}.", field="batch_size")
        request.check_hires()
        if problem := request._strength_problem:
            field = "hires_strength" if request.uses_hires else "strength"
            raise InvalidRequest(f"{problem}.", field=field)
        return request.read_prompts(comments=comments)

    def read_prompts(self, *, comments: bool = True) -> GenerationRequest:
        """Return the request without comments and tags in its prompts.

        A comment goes from "#" to the end of its line. `<lora:name:weight>` in the prompt is added
        to `loras`. What has no effect is left out, with a sentence in `warnings`: tags `<word:...>`
        of other words, and LoRAs of the second prompt that the first does not have. Additional
        prompts of layers have neither tags nor AND: the word is read in small letters.

        Args:
            comments: Whether "#" starts a comment.

        Raises:
            InvalidRequest: The prompt is empty or has too many parts, a prompt is too long in
                UTF-8, a tag is malformed, or the tags and `loras` together are too many.
        """
        self._check_bytes()
        prompt, negative, hires_prompt, hires_negative = (
            (remove_comments(getattr(self, name)) if comments else getattr(self, name)).strip()
            for name in PROMPTS
        )
        text, tagged, ignored = split_tags(prompt, "prompt")
        check_text(text, "prompt")
        hires_text, hires_tagged, hires_ignored = split_tags(hires_prompt, "hires_prompt")
        check_text(hires_text or text, "hires_prompt")
        layer_texts, layer_tags = self._read_layer_prompts(comments=comments)
        loras = (*self.loras, *tagged)
        if len(loras) > MAX_LORAS:
            raise InvalidRequest(
                f"got {len(loras)} LoRAs; at most {MAX_LORAS}.",
                field="loras" if self.loras else "prompt",
            )
        warnings = self.warnings
        for field, tags in (
            ("prompt", ignored),
            ("hires_prompt", hires_ignored),
            *layer_tags.items(),
        ):
            if tags:
                warnings += (f"{field}: ignored {validation.cut(', '.join(tags))}.",)
        if others := [lora.tag for lora in hires_tagged if lora not in loras]:
            warnings += (
                f"hires_prompt: ignored {validation.cut(', '.join(others))}. "
                "Both passes have the LoRAs of the prompt.",
            )
        values = {
            **dict(zip(PROMPTS, (text, negative, hires_text, hires_negative), strict=True)),
            **layer_texts,
            "loras": loras,
            "warnings": warnings,
        }
        return self.model_copy(update=values)

    def _read_layer_prompts(self, *, comments: bool) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Return text and ignored tags of each additional prompt; see `read_prompts`."""
        texts: dict[str, str] = {}
        tags: dict[str, list[str]] = {}
        for field in LAYER_PROMPTS:
            prompt = getattr(self, field)
            prompt = (remove_comments(prompt) if comments else prompt).strip()
            text, loras, ignored = split_tags(prompt, field)
            texts[field] = AND.sub("and", text)
            tags[field] = [*(lora.tag for lora in loras), *ignored]
        return texts, tags

    def _check_bytes(self) -> None:
        for field in (*PROMPTS, *LAYER_PROMPTS):
            size = len(getattr(self, field).encode(errors="replace"))
            if size > MAX_PROMPT_BYTES:
                raise InvalidRequest(
                    f"got {size:,} bytes of UTF-8; at most {MAX_PROMPT_BYTES:,}. "
                    "A letter outside ASCII has 2 or 3, an emoji 4.",
                    field=field,
                )

    @property
    def uses_layerdiffuse(self) -> bool:
        """Return whether LayerDiffuse is on."""
        return self.mode != OPAQUE

    @property
    def tagged_prompt(self) -> str:
        """Return the prompt with its LoRAs as tags; it generates the same image again."""
        return " ".join([self.prompt, *(lora.tag for lora in self.loras)])

    @property
    def batch_key(self) -> str:
        """Return a key that is equal for requests that may be generated together.

        They differ in prompts, seeds, guidance, input images of the same roles and number of images
        alone, and in the fields of a second pass or a change that they do not have. Modes that
        share attention have the same input images.
        """
        fields = GenerationRequest.model_fields
        unused = [name for name in fields if name.startswith("hires_") and not self.uses_hires]
        unused += [] if self.uses_init else EditFields.model_fields
        free = FREE_IN_A_BATCH
        if MODES[self.mode].shares_attention:
            free = free - {"inputs", "resize_mode"}
        shared = self.model_dump_json(exclude={*free, *unused})
        return f"{shared} {sorted(self.roles)}"

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
        values |= {name: value for name, value in defaults if values[name] in (None, "auto")}
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
    decode: Decode = _SDXL.decode
    images: tuple[ImageSeed, ...] = ()
    calls_before: int = 0
    """Calls of the first pass, in the request of the second. Prompt schedules count on."""

    @property
    def calls(self) -> int:
        """Return the calls that prompt schedules count, as Forge counts them.

        Samplers that choose levels themselves make a few more or fewer, see `cost.count_steps`.
        """
        return self.steps * CALLS_PER_STEP.get(self.sampler, 1)

    @property
    def passes(self) -> tuple[ResolvedRequest, ...]:
        """Return the request of each pass. That of a second pass has the final size."""
        if not self.uses_hires:
            return (self,)
        width, height = self.final_size
        options = self.options
        if options.hires_eta is not None:
            options = options.model_copy(update={"eta": options.hires_eta})
        second = {
            "width": width,
            "height": height,
            "steps": self.hires_steps or self.steps,
            "sampler": self.hires_sampler or self.sampler,
            "scheduler": self.hires_scheduler or self.scheduler,
            "cfg_scale": self.cfg_scale if self.hires_cfg_scale is None else self.hires_cfg_scale,
            "prompt": self.hires_prompt or self.prompt,
            "negative_prompt": self.hires_negative_prompt or self.negative_prompt,
            "options": options,
            "calls_before": self.calls,
        }
        return self, self.model_copy(update=second)

    @property
    def settings(self) -> ModelDefaults:
        """Return the values that the request or the model's defaults gave."""
        return ModelDefaults.model_construct(
            **{name: getattr(self, name) for name in ModelDefaults.model_fields}
        )


def parse_request(fields: dict[str, Any], *, comments: bool = True) -> GenerationRequest:
    """Validate the fields of a new request; see `parse_as` and `read_prompts`."""
    return parse_as(GenerationRequest, fields).read_prompts(comments=comments)
