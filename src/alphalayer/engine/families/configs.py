"""Configs of diffusers for SDXL single files, fitted to the tensor shapes of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[2] / "builtin_models" / "sdxl"
HEAD_WIDTH = 64

Shapes = Mapping[str, tuple[int, ...]]
_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP_L = "conditioner.embedders.0.transformer.text_model."
_CLIP_G = "conditioner.embedders.1.model."


def fitted_configs(shapes: Shapes) -> dict[str, str]:
    """Return the files of a model folder for a checkpoint: contents by relative path.

    Widths, depths and channel counts come from the shapes; everything else is as in SDXL base.
    """
    fitted = {
        "unet/config.json": _unet(shapes),
        "vae/config.json": _vae(shapes),
        "text_encoder/config.json": _clip_l(shapes),
        "text_encoder_2/config.json": _clip_g(shapes),
    }
    contents: dict[str, str] = {}
    for path in sorted(SHIPPED.rglob("*")):
        relative = path.relative_to(SHIPPED).as_posix()
        if path.is_file() and path.suffix in (".json", ".txt"):
            text = path.read_text(encoding="utf-8")
            contents[relative] = (
                json.dumps({**json.loads(text), **fitted[relative]}) if relative in fitted else text
            )
    return contents


def _unet(shapes: Shapes) -> dict[str, Any]:
    widths = [
        shapes[f"{_UNET}input_blocks.{block}.0.out_layers.3.weight"][0] for block in (1, 4, 7)
    ]
    depths = [
        max(_count(shapes, rf"{_UNET}input_blocks\.{block}\.1\.transformer_blocks\."), 1)
        for block in (1, 4, 7)
    ]
    added = shapes[f"{_UNET}label_emb.0.0.weight"][1]
    pooled = shapes[f"{_CLIP_G}text_projection"][1]
    context = shapes[f"{_UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"][1]
    return {
        "in_channels": shapes[f"{_UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{_UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "transformer_layers_per_block": depths,
        "attention_head_dim": [_heads(width) for width in widths],
        "cross_attention_dim": context,
        "projection_class_embeddings_input_dim": added,
        "addition_time_embed_dim": (added - pooled) // 6,
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, rf"{_VAE}encoder\.down\.")
    return {
        "block_out_channels": [
            shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)
        ],
        "latent_channels": shapes[f"{_VAE}post_quant_conv.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _clip_l(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes[f"{_CLIP_L}embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{_CLIP_L}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, rf"{_CLIP_L}encoder\.layers\."),
        "num_attention_heads": _heads(width),
    }


def _clip_g(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes[f"{_CLIP_G}token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{_CLIP_G}transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": _count(shapes, rf"{_CLIP_G}transformer\.resblocks\."),
        "num_attention_heads": _heads(width),
        "projection_dim": shapes[f"{_CLIP_G}text_projection"][1],
    }


def _heads(width: int) -> int:
    """Return the number of heads of 64 channels; at least one, for small models."""
    return max(width // HEAD_WIDTH, 1)


def _count(shapes: Shapes, prefix: str) -> int:
    """Count the numbered parts that follow a prefix."""
    numbers = {int(found[1]) for name in shapes if (found := re.match(rf"{prefix}(\d+)\.", name))}
    return len(numbers)
