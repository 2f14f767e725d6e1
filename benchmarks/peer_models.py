"""Random models of SDXL's structure for `benchmarks/peers.py`, the same for all engines.

`full` has the published sizes. `small` has narrow networks and the published decoder. `tiny` is for
tests. The numbers come from one seed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.peer_engines import LORA, OFFSETS
from safetensors.torch import load_file, save_file
from tests.full_size.full_size_models import write_models
from torch import Tensor

from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.parameter_names import ldm_to_diffusers

CONFIGS = "config"
"""Folder beside the checkpoint's with the configs of diffusers."""


def _configs(widths: list[int], depths: list[int], text: tuple[int, int], layers: int, vae: int):
    """Return what differs from SDXL base, by part. Heads have at most 64 channels."""
    first, second = text
    return {
        "unet": {
            "block_out_channels": widths,
            "transformer_layers_per_block": depths,
            "attention_head_dim": [max(width // 64, 1) for width in widths],
            "cross_attention_dim": first + second,
            "projection_class_embeddings_input_dim": second + 6 * 256,
        },
        "vae": {"block_out_channels": [vae, 2 * vae, 2 * vae, 2 * vae]},
        "text_encoder": _text(first, layers),
        "text_encoder_2": _text(second, layers),
    }


def _text(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(width // 64, 1),
        "num_hidden_layers": layers,
        "projection_dim": width,
    }


MODELS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "tiny": (
        _configs([32, 64, 64], [1, 1, 1], (32, 64), 2, 32),
        {"block_out_channels": (8, 8, 16, 16, 32, 32, 32)},
    ),
    "small": (_configs([64, 128, 256], [1, 1, 2], (64, 128), 4, 32), {}),
    "full": ({}, {}),
}
"""Differences of the configs and of the decoder from the published ones, by name."""


def make_models(folder: Path, name: str) -> Path:
    """Write a models folder, unless it is there; return it. `full` takes 7.9 GB."""
    configs, decoder = MODELS[name]
    if not (folder / "layer_model").is_dir():
        shutil.copytree(SHIPPED, folder / CONFIGS)
        for part, changes in configs.items():
            path = folder / CONFIGS / part / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        write_models(folder, folder / CONFIGS, **decoder)
    return folder


def write_patch_forms(models: Path) -> None:
    """Write the attention patch in the forms of other engines, unless they are there.

    The names are those of diffusers: a LoRA as PEFT names it, and products to add to the weights.
    `full` takes 2.5 GB more.
    """
    if (models / OFFSETS).is_file():
        return
    patch = load_file(models / "layer_model" / "layer_xl_transparent_attn.safetensors")
    lora: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    for key in {key.partition("::")[0] for key in patch}:
        up, down = patch[f"{key}::lora::0"], patch[f"{key}::lora::1"]
        name = ldm_to_diffusers(key.removeprefix("diffusion_model."))
        layer = name.removesuffix(".weight")
        lora |= {f"unet.{layer}.lora_B.weight": up, f"unet.{layer}.lora_A.weight": down}
        offsets[name] = (up.float() @ down.float()).half()
    (models / OFFSETS).parent.mkdir(exist_ok=True)
    save_file(lora, models / LORA)
    save_file(offsets, models / OFFSETS)
