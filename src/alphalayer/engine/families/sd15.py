"""The SD 1.5 family: single files and diffusers folders, read offline.

The sizes of a single file come from its tensor shapes. Files with the weights of the training
(`model_ema.`) have those for inference under the usual names, too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from alphalayer.catalog import ModelEntry
from alphalayer.engine.families.clip_files import read_clip_l
from alphalayer.engine.families.configs import SHIPPED, fitted_sd15_unet
from alphalayer.engine.families.scaled import load_scaled
from alphalayer.engine.families.stable_diffusion import (
    Parts,
    SingleFile,
    StableDiffusion,
    load,
    read_folder,
)
from alphalayer.engine.memory import Precision
from alphalayer.engine.text.encoders import SD15_OUTPUTS
from alphalayer.engine.text.tokenizer import read_tokenizers

SCALING_FACTOR = 0.18215
_TEXT = "cond_stage_model.transformer."


def load_model(entry: ModelEntry, precision: Precision, models_dir: Path) -> StableDiffusion:
    """Read a model onto the CPU, see `stable_diffusion.load`."""
    from_folder = partial(read_folder, text=("",), outputs=SD15_OUTPUTS)
    read = from_folder if entry.kind == "diffusers" else _from_file
    return load(read, entry, precision, models_dir)


def _from_file(path: Path, precision: Precision) -> Parts:
    """Read an LDM single file. What it does not hold is as in SD 1.5."""
    file = SingleFile(path, precision)
    unet_config = fitted_sd15_unet(file.header.shapes)
    vae_config = file.vae_config() | {"scaling_factor": SCALING_FACTOR}
    return Parts(
        *file.read_unet(unet_config),
        file.read_vae(vae_config),
        vae_config,
        [read_clip_l(load_scaled(path, _TEXT), _TEXT)],
        # the tokenizer of SDXL's first text encoder, which is the same model
        read_tokenizers(SHIPPED / "tokenizer"),
        SD15_OUTPUTS,
        file.read_scheduler(),
    )
