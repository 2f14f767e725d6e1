"""Cost of a request in megapixel-steps, estimated from its fields alone.

A unit is one sampling step of an image of 2^20 pixels with a short prompt. The prompt adds to it:
each AND part is another pass of the UNet, and each chunk of 75 tokens is encoded and read.
The estimate needs neither the model nor its tokenizer, so that the API can refuse a request.
The engine refuses prompts that are longer than `max_chunks`, such as many large embeddings.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from alphalayer.core.modes import MODES
from alphalayer.core.prompts import AND
from alphalayer.core.request import (
    LATENT_UPSCALERS,
    GenerationRequest,
    ModelDefaults,
    ResolvedRequest,
)
from alphalayer.core.samplers import (
    ADAPTIVE,
    CALLS_PER_STEP,
    MAX_ADAPTIVE_CALLS,
    MAX_STRENGTH,
    TRAINING_STEPS,
    total_steps,
)

UNIT_PIXELS = 2**20
DECODE_STEPS = 10
"""Steps that take as long as the decode of an image [counted for both models: 5 to 17]."""
ENCODE_STEPS = 5
"""Steps that take as long as the encode of an image [estimated: half a decode]."""
MAX_ENCODED_PIXELS = 2048**2
"""Most pixels of an image that is encoded at its own size, with "Latent"."""
INIT_ENCODES = 2
"""Encodes of an image to change: itself, and its alpha or masked part in another way."""
READ_STEPS = 5
"""Steps that take as long as reading and fitting an input image, at its size [estimated]."""
PASTE_STEPS = 5
"""Steps that take as long as pasting and storing what surrounds a region [estimated]."""
UPSCALER_STEPS = 10
"""Steps that take as long as an upscaler's network, a result [estimated for ESRGAN]."""
UPSCALER_RUNS = 2
"""Images that an upscaler enlarges: colour and alpha."""
CALLS = {**CALLS_PER_STEP, "HeunPP2": 3}
"""Most calls of the UNet a step; 1 for other samplers."""
LCM_LEVELS = 50
"""Levels of those that SDXL was trained on that LCM uses."""
_STRIDING = ("DDIM", "DDIM CFG++", "PLMS")
_EVENLY_SPACED = ("DPM fast", ADAPTIVE)
_WITHOUT_LOWEST = ("DPM++ 3M SDE", "DPM2", "DPM2 a")
BYTES_OF_A_CHUNK = 150
"""UTF-8 bytes of 75 tokens, at two a token. English has about 4.5, digits and emoji 1 to 2."""
CHUNK_UNITS = 0.01
"""Encoding of a chunk and its projections, an image [counted for SDXL and the embedded model]."""
CHUNK_SHARE = 0.02
"""Part of a step that the attention to another chunk adds [counted for SDXL: 0.01]."""
EMBEDDING_CHUNKS = 16
"""Chunks that embeddings may add to a text. The vectors of a short name may fill one."""
LORA_UNITS = 5.0
"""Units of reading and merging a LoRA file [estimated: 0.2 s on an H200]."""
PREVIEW_PIXELS = 2**16
"""Pixels of a preview, which is decoded at each step."""
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class Cost:
    """Cost of one image in megapixel-steps, by its causes."""

    pixels: float
    """Sampling, enlargement and decode, without what the length of the prompt adds."""
    prompt: float
    """What the length of the prompts adds."""

    @property
    def total(self) -> float:
        """Return the sum of both."""
        return self.pixels + self.prompt


def image_cost(request: GenerationRequest) -> Cost:
    """Return the cost of one image of a request. Open fields count as SDXL's defaults."""
    # an upscaler of images decodes the first pass, too
    costs = [_pass_cost(one) for one in request.resolve(ModelDefaults()).passes]
    pixels = sum(cost.pixels for cost in costs) + _enlargement_cost(request)
    around = max(request.result_pixels - math.prod(request.final_size), 0)
    pixels += around / UNIT_PIXELS * PASTE_STEPS
    return Cost(pixels, sum(cost.prompt for cost in costs))


def inputs_cost(request: GenerationRequest) -> float:
    """Return the cost of reading and encoding the input images of one batch."""
    pixels = sum(image.pixels for image in request.inputs) * READ_STEPS
    if request.init:
        own = min(request.init.pixels or MAX_ENCODED_PIXELS, MAX_ENCODED_PIXELS)
        encoded = own if request.init_resize_mode == "Latent" else math.prod(request.size)
        pixels += encoded * INIT_ENCODES * ENCODE_STEPS
    conditions = len(MODES[request.mode].needs)
    for one in request.resolve(ModelDefaults()).passes:
        pixels += one.width * one.height * conditions * ENCODE_STEPS
    return pixels / UNIT_PIXELS


def _enlargement_cost(request: GenerationRequest) -> float:
    """Return the cost between two passes. Interpolated latents cost nothing."""
    if not request.uses_hires or request.hires_upscaler in LATENT_UPSCALERS:
        return 0.0
    steps = ENCODE_STEPS + (UPSCALER_STEPS * UPSCALER_RUNS if request.upscaler_file else 0)
    return math.prod(request.enlarged_size) / UNIT_PIXELS * steps


def _pass_cost(request: ResolvedRequest) -> Cost:
    """Return the cost of one pass with its decode."""
    megapixels = request.width * request.height / UNIT_PIXELS
    calls = count_calls(request.sampler, _count_pass_steps(request))
    # two short prompts are two rows of the UNet, and each AND part is one more
    rows = (len(AND.findall(request.prompt)) + 2) / 2
    positive = max(map(count_chunks, request.layer_prompts))
    negative = count_chunks(request.negative_prompt)
    texts = max(_text_chunks(text, request.calls) for text in request.layer_prompts)
    texts += _text_chunks(request.negative_prompt, request.calls)
    sampling = megapixels * calls * rows
    longest = max(positive, negative)
    return Cost(
        pixels=sampling + megapixels * DECODE_STEPS,
        prompt=sampling * CHUNK_SHARE * (longest - 1) + texts * CHUNK_UNITS,
    )


def extras_cost(request: GenerationRequest, previews: int) -> float:
    """Return the cost of a request's LoRAs, and of previews of `previews` iterations."""
    preview = sum(
        _count_pass_steps(one)
        * DECODE_STEPS
        * min(one.width * one.height, PREVIEW_PIXELS)
        / UNIT_PIXELS
        for one in request.resolve(ModelDefaults()).passes
    )
    return len(request.loras) * LORA_UNITS + previews * preview


def count_calls(sampler: str, steps: int) -> int:
    """Return the most calls of the UNet in the steps of a sampler.

    The last steps of samplers with several calls have fewer. The first step of PLMS has two.
    DPM adaptive makes a number of calls that the steps do not decide.
    """
    if sampler == ADAPTIVE:
        return MAX_ADAPTIVE_CALLS
    return steps * CALLS.get(sampler, 1) + (sampler == "PLMS")


def count_steps(sampler: str, scheduler: str, steps: int, total: int | None = None) -> int:
    """Return the steps that a sampler takes for a requested number.

    DDIM, PLMS, UniPC and the schedule "DDIM" select training steps with a whole stride, as Forge
    does. So 150 steps become 166 or 167.

    For Restart it is the most: a run below the levels that it repeats has fewer steps.

    Args:
        sampler: Name of the sampler.
        scheduler: Name of the schedule.
        steps: Requested steps.
        total: Steps of a schedule whose last `steps` are taken. None: the whole of `steps`.
    """
    if total is None or sampler in _EVENLY_SPACED:
        return _count_whole(sampler, scheduler, steps)
    if sampler in (*_STRIDING, "UniPC"):
        return max(steps - 1, 2) - (sampler in _STRIDING)
    return max(_count_whole(sampler, scheduler, total) - (total - steps), 1)


class LastSteps(NamedTuple):
    """End of a schedule: how many of its steps are taken, and how many it has."""

    taken: int
    total: int


def last_steps(request: ResolvedRequest) -> LastSteps | None:
    """Return the end of a schedule that a pass runs along. None: the whole.

    Source: AUTOMATIC1111, img2img and the second pass of hires fix. There exact steps are the
    setting `img2img_fix_steps`.
    """
    if request.calls_before:
        return LastSteps(request.steps, total_steps(request.steps, request.hires_strength))
    if not request.uses_init:
        return None
    if request.exact_steps and request.strength:
        return LastSteps(request.steps, total_steps(request.steps, request.strength))
    return LastSteps(int(min(request.strength, MAX_STRENGTH) * request.steps) + 1, request.steps)


def _count_whole(sampler: str, scheduler: str, steps: int) -> int:
    """Return the steps along a whole schedule."""
    if sampler in _STRIDING:
        return _strided(TRAINING_STEPS, max(steps, 2)) - 1
    if sampler == "UniPC":
        return _strided(TRAINING_STEPS, steps)
    if scheduler != "DDIM" or sampler in _EVENLY_SPACED:
        return steps
    if sampler in _WITHOUT_LOWEST:
        return _strided(TRAINING_STEPS, steps + 1, first=1) - 1
    return _strided(LCM_LEVELS if sampler == "LCM" else TRAINING_STEPS, steps, first=1)


def _strided(levels: int, steps: int, first: int = 0) -> int:
    """Count the levels from `first` on, in whole strides of `levels` / `steps`."""
    return len(range(first, levels, max(levels // steps, 1)))


def _count_pass_steps(request: ResolvedRequest) -> int:
    steps, total = last_steps(request) or (request.steps, None)
    return count_steps(request.sampler, request.scheduler, steps, total)


def max_chunks(text: str) -> int:
    """Return the most chunks that the engine encodes for a text.

    It is three times the estimate, which a text of one token a byte does not exceed, and
    `EMBEDDING_CHUNKS`.
    """
    return 3 * count_chunks(text) + EMBEDDING_CHUNKS


def count_chunks(text: str) -> int:
    """Estimate the chunks of 75 tokens of a text, without a tokenizer."""
    return 1 + len(text.encode(errors="replace")) // BYTES_OF_A_CHUNK + len(_BREAK.findall(text))


def _text_chunks(prompt: str, calls: int) -> int:
    """Return the most chunks of all texts of a prompt over `calls`."""
    return count_chunks(prompt) * _count_texts(prompt, calls)


def _count_texts(prompt: str, calls: int) -> int:
    """Return the most texts that the schedules of a prompt can need over `calls`."""
    return calls if "|" in prompt else min(calls, 1 + prompt.count("["))
