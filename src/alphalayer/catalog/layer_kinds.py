"""Kinds of LayerDiffuse files, recognized by their tensors."""

from __future__ import annotations

import re

from alphalayer.catalog.kinds import ENCODER_SHAPES, Shapes
from alphalayer.core.modes import DECODER_FILES, ENCODER_FILES, MODES

DECODERS = tuple(names[0].removesuffix(".safetensors") for names in DECODER_FILES.values())
ENCODERS = tuple(names[0].removesuffix(".safetensors") for names in ENCODER_FILES.values())
"""The files of both families have the same shapes."""
RESCALED_ENCODER = "ld_diffusers_sdxl_vae_transparent_encoder.safetensors"
"""Converted encoder. Its output has to be multiplied by 300."""
_FIRST_CONV = ("diffusion_model.input_blocks.0.0.weight::diff::0", "conv_in.weight")
_MARKS = ("::lora::", "hookers.layers.")
_ATTENTION = re.compile(r".+\.attn[12]\.to_(?:[qkv]|out\.0)\.weight")
_PATCHES = {
    (1120, 0): ("layer_xl_transparent_attn",),
    (560, 0): ("layer_xl_transparent_attn",),
    (1252, 4): ("layer_xl_transparent_conv",),
    (206, 8): ("layer_xl_fg2ble", "layer_xl_bg2ble"),
    (206, 12): ("layer_xl_fgble2bg",),
    (1252, 12): ("layer_xl_bgble2fg",),
    (640, 0): ("layer_sd15_transparent_attn",),
    (1180, 0): ("layer_sd15_fg2bg", "layer_sd15_bg2fg"),
    (1152, 0): ("layer_sd15_joint",),
}
"""Patches by the number of tensors and the channels of the first convolution, 0 without one.

The one of 560 tensors is converted, with the names of diffusers.
"""


def layer_names(shapes: Shapes) -> tuple[str, ...]:
    """Return the published names that a LayerDiffuse file may have.

    They have no suffix. Files for the foreground and for the background have the same shapes, and
    so have the decoders. Other files have no names, and so have patches of other sizes.
    """
    if any("latent_conv_in." in name for name in shapes):
        return DECODERS
    if all(shapes.get(name) == shape for name, shape in ENCODER_SHAPES.items()):
        return ENCODERS
    first = next((shapes[name] for name in _FIRST_CONV if name in shapes), ())
    channels = first[1] if len(first) == 4 else 0
    is_patch = (
        channels > 0
        or any(mark in name for name in shapes for mark in _MARKS)
        or all(map(_ATTENTION.fullmatch, shapes))
    )
    return _PATCHES.get((len(shapes), channels), ()) if is_patch else ()


def published_name(name: str) -> str:
    """Return the original name, without suffix, of a converted file."""
    groups = [mode.files for mode in MODES.values()]
    groups += [*DECODER_FILES.values(), *ENCODER_FILES.values()]
    original = next((names[0] for names in groups if name in names), name)
    return original.removesuffix(".safetensors")
