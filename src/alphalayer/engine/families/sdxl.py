"""The SDXL family: single files and diffusers folders, read offline.

The sizes of a single file come from its tensor shapes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from alphalayer.catalog import ModelEntry
from alphalayer.engine.families.clip_files import read_text_models
from alphalayer.engine.families.configs import SHIPPED, fitted_sdxl_unet
from alphalayer.engine.families.scaled import load_scaled
from alphalayer.engine.families.stable_diffusion import (
    Parts,
    SingleFile,
    StableDiffusion,
    load,
    read_folder,
)
from alphalayer.engine.memory import Precision
from alphalayer.engine.text.encoders import SDXL_OUTPUTS
from alphalayer.engine.text.tokenizer import read_tokenizers

PARTS = ("", "_2")
"""Ends of the names of text encoders and tokenizers in a diffusers folder."""


def load_model(entry: ModelEntry, precision: Precision, models_dir: Path) -> StableDiffusion:
    """Read a model onto the CPU, see `stable_diffusion.load`."""
    from_folder = partial(read_folder, text=PARTS, outputs=SDXL_OUTPUTS)
    read = from_folder if entry.kind == "diffusers" else _from_file
    return load(read, entry, precision, models_dir)


def _from_file(path: Path, precision: Precision) -> Parts:
    """Read an LDM single file. What it does not hold is as in SDXL base."""
    file = SingleFile(path, precision)
    unet_config, vae_config = fitted_sdxl_unet(file.header.shapes), file.vae_config()
    return Parts(
        *file.read_unet(unet_config),
        file.read_vae(vae_config),
        vae_config,
        read_text_models(load_scaled(path, "conditioner.")),
        read_tokenizers(SHIPPED / "tokenizer", SHIPPED / "tokenizer_2"),
        SDXL_OUTPUTS,
        file.read_scheduler(),
    )
