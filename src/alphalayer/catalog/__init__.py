"""Model files: what a models folder contains, and how names in requests refer to it.

The package reads headers, never weights, and does not import torch.

models/Stable-diffusion/   checkpoints: .safetensors files, or diffusers folders (model_index.json)
models/layer_model/        LayerDiffuse files under their published names
models/Lora/               LoRA files
models/ESRGAN/             upscalers
"""

from alphalayer.catalog.entries import (
    CHECKPOINTS,
    EMBEDDED_MODEL,
    PICKLE_SUFFIXES,
    ModelEntry,
    find_models,
    hash_model,
    separate_vae,
)
from alphalayer.catalog.files import printable, public_path, shorten_paths, usable_files
from alphalayer.catalog.folders import read_config, read_json
from alphalayer.catalog.hashes import SHORT_HASH_DIGITS, file_stamp
from alphalayer.catalog.headers import Header, read_header, summarize
from alphalayer.catalog.kinds import FAMILY_NAMES
from alphalayer.catalog.mode_files import MissingFile, check_modes, missing_files
from alphalayer.catalog.model_config import (
    check_layerdiffuse_mode,
    layer_config,
    layer_file,
    model_defaults,
)
from alphalayer.catalog.parts import weight_files
from alphalayer.catalog.resolve import (
    PULL,
    PULL_LAYERS,
    find_lora,
    lora_alias,
    lora_metadata,
    resolve_model,
)
from alphalayer.catalog.sidecars import scheduler_of
from alphalayer.catalog.upscalers import find_upscaler, upscaler_files

__all__ = [
    "CHECKPOINTS",
    "EMBEDDED_MODEL",
    "FAMILY_NAMES",
    "PICKLE_SUFFIXES",
    "PULL",
    "PULL_LAYERS",
    "SHORT_HASH_DIGITS",
    "Header",
    "MissingFile",
    "ModelEntry",
    "check_layerdiffuse_mode",
    "check_modes",
    "file_stamp",
    "find_lora",
    "find_models",
    "find_upscaler",
    "hash_model",
    "layer_config",
    "layer_file",
    "lora_alias",
    "lora_metadata",
    "missing_files",
    "model_defaults",
    "printable",
    "public_path",
    "read_config",
    "read_header",
    "read_json",
    "resolve_model",
    "scheduler_of",
    "separate_vae",
    "shorten_paths",
    "summarize",
    "upscaler_files",
    "usable_files",
    "weight_files",
]
