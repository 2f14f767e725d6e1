"""Sizes of the networks of an SDXL single file, from its tensor shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphalayer import catalog
from alphalayer.engine.families.vae_names import LDM_PREFIX as LDM_VAE

SHIPPED = Path(__file__).parents[2] / "builtin_models" / "sdxl"
HEAD_WIDTH = 64
"""Channels of an attention head in SDXL's networks."""

Shapes = Mapping[str, tuple[int, ...]]
LDM_UNET = "model.diffusion_model."
"""Prefix of the UNet's tensors in an LDM single file."""
_CLIP_G = "conditioner.embedders.1.model."


def fitted_configs(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Return the configs of a checkpoint's UNet and VAE in the layout of diffusers.

    Widths, depths and channel counts come from the shapes. Everything else is as in SDXL base.

    Returns:
        Configs by part: "unet" and "vae".
    """
    fitted = {"unet": _unet(shapes), "vae": _vae(shapes)}
    return {
        part: catalog.read_json(SHIPPED / part / "config.json") | sizes
        for part, sizes in fitted.items()
    }


def _unet(shapes: Shapes) -> dict[str, Any]:
    widths = [
        shapes[f"{LDM_UNET}input_blocks.{block}.0.out_layers.3.weight"][0] for block in (1, 4, 7)
    ]
    depths = [
        max(_count(shapes, rf"{LDM_UNET}input_blocks\.{block}\.1\.transformer_blocks\."), 1)
        for block in (1, 4, 7)
    ]
    added = shapes[f"{LDM_UNET}label_emb.0.0.weight"][1]
    pooled = shapes[f"{_CLIP_G}text_projection"][1]
    context = shapes[f"{LDM_UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"][1]
    return {
        "in_channels": shapes[f"{LDM_UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{LDM_UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "transformer_layers_per_block": depths,
        "attention_head_dim": [heads_of(width) for width in widths],
        "cross_attention_dim": context,
        "projection_class_embeddings_input_dim": added,
        "addition_time_embed_dim": (added - pooled) // 6,
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, rf"{LDM_VAE}encoder\.down\.")
    return {
        "block_out_channels": [
            shapes[f"{LDM_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)
        ],
        "latent_channels": shapes[f"{LDM_VAE}post_quant_conv.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def check_counts(config: Mapping[str, Any], *names: str) -> None:
    """Check numbers that no tensor shows. Raises `ValueError` for those below 1."""
    for name in names:
        value = config.get(name, 1)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is not int or number < 1:
                raise ValueError(f"its {name}: got {str(number)[:20]}; expected 1 or more")


def heads_of(width: int) -> int:
    """Return the number of heads of 64 channels, and one for smaller widths."""
    return max(width // HEAD_WIDTH, 1)


def _count(shapes: Shapes, prefix: str) -> int:
    """Count the numbered parts that follow a prefix."""
    matches = (re.match(rf"{prefix}(\d+)\.", name) for name in shapes)
    return len({int(match[1]) for match in matches if match})
