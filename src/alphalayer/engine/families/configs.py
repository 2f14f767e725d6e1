"""Sizes of the networks of an LDM single file, from its tensor shapes.

Configs have the layout of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphalayer import catalog
from alphalayer.engine.families.vae_names import LDM_PREFIX as LDM_VAE

SHIPPED = Path(__file__).parents[2] / "builtin_models" / "sdxl"
HEAD_WIDTH = 64
"""Channels of an attention head in SDXL's networks, and in CLIP's text models."""

Shapes = Mapping[str, tuple[int, ...]]
LDM_UNET = "model.diffusion_model."
"""Prefix of the UNet's tensors in an LDM single file."""
_CLIP_G = "conditioner.embedders.1.model."


def fitted_sdxl_unet(shapes: Shapes) -> dict[str, Any]:
    """Return the config of SDXL's UNet in any width and depth."""
    depths = [
        max(_count(shapes, rf"{LDM_UNET}input_blocks\.{block}\.1\.transformer_blocks\."), 1)
        for block in (1, 4, 7)
    ]
    sizes = _unet_sizes(shapes, levels=3)
    added = shapes[f"{LDM_UNET}label_emb.0.0.weight"][1]
    pooled = shapes[f"{_CLIP_G}text_projection"][1]
    return (
        catalog.read_json(SHIPPED / "unet" / "config.json")
        | sizes
        | {
            "transformer_layers_per_block": depths,
            "attention_head_dim": [heads_of(width) for width in sizes["block_out_channels"]],
            "projection_class_embeddings_input_dim": added,
            "addition_time_embed_dim": (added - pooled) // 6,
        }
    )


def fitted_sd15_unet(shapes: Shapes) -> dict[str, Any]:
    """Return the config of SD 1.5's UNet in any width."""
    return _unet_sizes(shapes, levels=4) | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "layers_per_block": 2,
        "attention_head_dim": 8,
    }


def _unet_sizes(shapes: Shapes, levels: int) -> dict[str, Any]:
    context = f"{LDM_UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    return {
        "in_channels": shapes[f"{LDM_UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{LDM_UNET}out.2.weight"][0],
        "block_out_channels": [
            shapes[f"{LDM_UNET}input_blocks.{3 * level + 1}.0.out_layers.3.weight"][0]
            for level in range(levels)
        ],
        "cross_attention_dim": shapes[context][1],
    }


def fitted_vae(shapes: Shapes) -> dict[str, Any]:
    """Return the config of a VAE. What no shape shows is as in SDXL base."""
    levels = _count(shapes, rf"{LDM_VAE}encoder\.down\.")
    return catalog.read_json(SHIPPED / "vae" / "config.json") | {
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
