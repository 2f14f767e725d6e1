"""Kinds of LayerDiffuse files, recognized by the names and shapes of their tensors.

The published files have 1,120 tensors (attention), 1,252 (conv and bgble2fg) and 206 (the other
three of SDXL). Those of SD 1.5 have 640, 1,152 and 1,180, the encoder 18 and the decoders 538.
"""

from __future__ import annotations

import re

from alphalayer.catalog.kinds import ENCODER_SHAPES, Shapes
from alphalayer.core.modes import DECODER_FILES, ENCODER_FILES, MODES

DECODERS: tuple[str, ...] = ("vae_transparent_decoder", "layer_sd15_vae_transparent_decoder")
ENCODERS: tuple[str, ...] = ("vae_transparent_encoder", "layer_sd15_vae_transparent_encoder")
"""The files of both families have the same shapes."""
RESCALED_ENCODER = "ld_diffusers_sdxl_vae_transparent_encoder.safetensors"
"""Converted encoder. Its output has to be multiplied by 300."""
_FIRST_CONV = (
    "diffusion_model.input_blocks.0.0.weight::diff::0",
    "conv_in.weight",
    "unet.conv_in.weight",
)
_BY_CHANNELS = {
    (4, True): ("layer_xl_transparent_conv",),
    (8, False): ("layer_xl_fg2ble", "layer_xl_bg2ble"),
    (12, False): ("layer_xl_fgble2bg",),
    (12, True): ("layer_xl_bgble2fg",),
}
"""Files by the channels of the first convolution, and whether transformers are changed."""
_FRAMES = {
    1: ("layer_sd15_transparent_attn",),
    2: ("layer_sd15_fg2bg", "layer_sd15_bg2fg"),
    3: ("layer_sd15_joint",),
}
"""Files by the images of a set."""
_FRAME = re.compile(r"hookers\.layers\.[0-9]+\.to_q_lora\.([0-9]+)\.down\.weight")
_ATTENTION = re.compile(r".+\.attn[12]\.to_(?:[qkv]|out\.0)\.weight")


def layer_names(shapes: Shapes) -> tuple[str, ...]:
    """Return the published names that a LayerDiffuse file may have.

    They have no suffix. Files for the foreground and for the background have the same shapes, and
    so have the decoders. Other files have none, and so have patches without a first convolution.
    """
    if any("latent_conv_in." in name for name in shapes):
        return DECODERS
    if all(shapes.get(name) == shape for name, shape in ENCODER_SHAPES.items()):
        return ENCODERS
    if frames := {match[1] for name in shapes if (match := _FRAME.fullmatch(name))}:
        return _FRAMES.get(len(frames), ())
    if any("::lora::" in name for name in shapes) or all(map(_ATTENTION.fullmatch, shapes)):
        return ("layer_xl_transparent_attn",)
    first = next((shapes[name] for name in _FIRST_CONV if name in shapes), ())
    # a whole network has layers that no patch changes
    if len(first) != 4 or any("time_embed" in name for name in shapes):
        return ()
    changes_transformers = any(".transformer_blocks." in name for name in shapes)
    return _BY_CHANNELS.get((first[1], changes_transformers), ())


def published_name(name: str) -> str:
    """Return the original name, without suffix, of a converted file."""
    groups = [mode.files for mode in MODES.values()]
    groups += [*DECODER_FILES.values(), *ENCODER_FILES.values()]
    original = next((names[0] for names in groups if name in names), name)
    return original.removesuffix(".safetensors")
