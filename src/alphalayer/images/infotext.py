"""The `parameters` text of an image, in the format of AUTOMATIC1111."""

from __future__ import annotations

import json
import re

from alphalayer import __version__
from alphalayer.core.modes import MODES
from alphalayer.core.request import GenerationRequest, ResolvedRequest
from alphalayer.core.samplers import WITHOUT_ETA

MAX_LINE = 50_000
"""A longer last line is part of the prompt: no program writes so many settings."""
# the limit on the length of a key keeps the search linear in the length of the line
_PAIR = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
READER_DEFAULTS: dict[str, object] = {
    "Clip skip": "1",
    "Hires resize-1": 0,
    "Hires resize-2": 0,
    "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler",
    "Hires checkpoint": "Use same checkpoint",
    "Hires prompt": "",
    "Hires negative prompt": "",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
    "Inpaint area": "Whole picture",
    "Masked area padding": 32,
    "RNG": "GPU",
    "Schedule type": "Automatic",
    "Schedule max sigma": 0,
    "Schedule min sigma": 0,
    "Schedule rho": 0,
    "VAE Encoder": "Full",
    "VAE Decoder": "Full",
    "FP8 weight": "Disable",
    "Cache FP16 weight for LoRA": False,
    "Emphasis": "Original",
    "Refiner switch by sampling steps": False,
}
"""Pairs that AUTOMATIC1111's reader adds to a text without them."""


def write_parameters(
    request: ResolvedRequest,
    model_name: str,
    model_hash: str,
    seed: int,
    subseed: int | None = None,
) -> str:
    """Write the text for one image.

    It has all settings that another machine needs to reproduce the image.
    The format is: prompt with its LoRAs, negative prompt, then a line of `key: value` pairs.
    """
    varied = request.subseed_strength > 0
    pairs: dict[str, object | None] = {
        "Steps": request.steps,
        "Sampler": request.sampler,
        "Schedule type": request.scheduler,
        "CFG scale": request.cfg_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": model_hash or None,
        "Model": model_name,
        "Variation seed": subseed if varied else None,
        "Variation seed strength": request.subseed_strength if varied else None,
        "Clip skip": request.clip_skip if request.clip_skip > 1 else None,
        "ENSD": request.options.noise_seed_delta or None,
        "Denoising strength": denoising_strength(request),
        "RNG": request.noise.upper() if request.noise != "gpu" else None,
        **extra_pairs(request),
        "Version": f"alphalayer-{__version__}",
    }
    line = ", ".join(f"{key}: {_quote(value)}" for key, value in pairs.items() if value is not None)
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{request.tagged_prompt}{negative}\n{line}"


def denoising_strength(request: GenerationRequest) -> float | None:
    """Return the share of noise that is added to an image, None without an image."""
    if request.uses_hires:
        return request.hires_strength
    return request.strength if request.uses_init else None


def read_parameters(text: str) -> dict[str, str]:
    """Parse a `parameters` text into its pairs, with "Prompt" and "Negative prompt".

    All values are unquoted text.
    """
    lines = text.strip().split("\n")
    last = lines[-1] if len(lines[-1]) <= MAX_LINE else ""
    pairs = {pair[1]: _unquote(pair[2]) for pair in _PAIR.finditer(last)}
    if len(pairs) >= 3:
        lines.pop()
    else:
        pairs = {}
    prompt, _, negative = ("\n" + "\n".join(lines)).partition("\nNegative prompt:")
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **pairs}


def complete(parameters: dict[str, str]) -> dict[str, object]:
    """Return pairs with those that AUTOMATIC1111's reader adds, see `READER_DEFAULTS`."""
    sizes: dict[str, str] = {}
    for key in ("Size", "Hires resize"):
        width, _, height = parameters.get(key, "").partition("x")
        sizes |= {f"{key}-1": width, f"{key}-2": height} if height else {}
    return {**READER_DEFAULTS, **sizes, **parameters}


def extra_pairs(request: ResolvedRequest) -> dict[str, object]:
    """Return the pairs of a mask, LayerDiffuse, and options other than defaults."""
    options = request.options
    pairs = {
        "SDXL crop top": options.crop_top or None,
        "SDXL crop left": options.crop_left or None,
        "Emphasis": options.emphasis if options.emphasis != "Original" else None,
        **_eta_pairs(request),
        "NGMS": options.min_uncond or None,
    }
    used = {name: value for name, value in pairs.items() if value is not None}
    return {
        **_mask_pairs(request),
        **_hires_pairs(request),
        **_layerdiffuse_pairs(request),
        **used,
    }


def _eta_pairs(request: ResolvedRequest) -> dict[str, object | None]:
    """Return the share of fresh noise in each pass. DDIM has its own key."""
    pairs: dict[str, object | None] = {}
    for number, one in enumerate(request.passes):
        if one.sampler in WITHOUT_ETA:
            continue
        key, eta = "Eta DDIM" if one.sampler.startswith("DDIM") else "Eta", one.options.eta
        pairs[f"Hires {key}" if number and pairs.get(key, eta) != eta else key] = eta
    return pairs


def _mask_pairs(request: ResolvedRequest) -> dict[str, object]:
    """Return the pairs of a mask. Those that AUTOMATIC1111's reader adds are left out."""
    if "mask" not in request.roles:
        return {}
    pairs: dict[str, object] = {"Mask blur": request.mask_blur}
    if request.masked_only:
        pairs |= {"Inpaint area": "Only masked", "Masked area padding": request.mask_padding}
    return pairs | (
        {"Masked content": request.mask_fill} if request.mask_fill != "original" else {}
    )


def _hires_pairs(request: ResolvedRequest) -> dict[str, object]:
    """Return the pairs of a second pass that differ from the first."""
    if not request.uses_hires:
        return {}
    resize = request.hires_width or request.hires_height
    pairs: dict[str, object | None] = {
        "Hires upscale": None if resize else request.hires_scale,
        "Hires resize": f"{request.hires_width}x{request.hires_height}" if resize else None,
        "Hires steps": request.hires_steps or None,
        "Hires upscaler": request.hires_upscaler,
        "Hires sampler": request.hires_sampler,
        "Hires schedule type": request.hires_scheduler,
        "Hires CFG Scale": request.hires_cfg_scale,
        "Hires prompt": request.hires_prompt or None,
        "Hires negative prompt": request.hires_negative_prompt or None,
    }
    return {key: value for key, value in pairs.items() if value is not None}


def _layerdiffuse_pairs(request: GenerationRequest) -> dict[str, object]:
    """Return the pairs that LayerDiffuse writes; none of an opaque image."""
    if not request.uses_layerdiffuse:
        return {}
    roles = {image.role for image in request.inputs}
    values = {
        "enabled": True,
        "method": MODES[request.mode].label,
        "weight": request.layerdiffuse_weight,
        "ending_step": request.layerdiffuse_stop_at,
        "fg_image": "foreground" in roles,
        "bg_image": "background" in roles,
        "blend_image": "blended" in roles,
        # without input images it has no effect, and Forge writes its default
        "resize_mode": request.resize_mode if roles else "Crop and Resize",
        "fg_additional_prompt": request.foreground_prompt,
        "bg_additional_prompt": request.background_prompt,
        "blend_additional_prompt": request.blended_prompt,
        **({"decode": request.decode} if request.decode != "official" else {}),
    }
    return {f"layerdiffusion_{key}": value for key, value in values.items()}


def _quote(value: object) -> str:
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _unquote(text: str) -> str:
    if not text.startswith('"'):
        return text.strip()
    try:
        return str(json.loads(text))
    except ValueError:
        return text
