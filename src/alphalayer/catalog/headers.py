"""Header of a safetensors file: tensor names and shapes, and the family that they reveal."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphalayer.core.errors import CorruptFile

MAX_HEADER_BYTES = 100_000_000
_AGAIN = "Download it again; a complete file has the size that its page names."

CONTEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"
LATENT_CHANNELS = 4
EDM_MARKS = ("edm_mean", "edm_vpred.sigma_max")
VAE_MARKS = ("first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: the shape of each tensor by name."""

    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """Read and check a safetensors header.

    The file has 8 bytes with the header's length, the header as JSON, then the tensors' bytes.

    Raises:
        CorruptFile: A part is missing or damaged. The message names it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(8)
            length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CorruptFile(
                    f"{path} is not a safetensors file, or only its beginning is there.",
                    hint=_AGAIN,
                )
            entries = json.loads(file.read(length))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise CorruptFile(f"{path} has a damaged safetensors header.", hint=_AGAIN) from None
    except OSError as error:
        raise CorruptFile(
            f"{path} cannot be read: {error.strerror}.", hint="Check the disk and permissions."
        ) from None
    try:
        shapes, end = _shapes(entries)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise CorruptFile(f"{path} has a damaged safetensors header.", hint=_AGAIN) from None
    if 8 + length + end > size:
        missing = 8 + length + end - size
        raise CorruptFile(
            f"{path} is cut off: {missing:,} of {8 + length + end:,} bytes are missing.",
            hint=_AGAIN,
        )
    return Header(shapes)


def _shapes(entries: Any) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes, and the end of the last tensor in bytes."""
    tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in tensors.items()}
    return shapes, max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)


def family_of(header: Header) -> str:
    """Return the family of a file by its tensors: "sdxl", or the name of another kind."""
    shapes = header.shapes
    for mark, kind in _NOT_CHECKPOINTS:
        if any(mark in name for name in shapes):
            return kind
    if shapes.keys() >= _EMBEDDING:
        return "embedding"
    context = shapes.get(CONTEXT) or shapes.get(CONTEXT.removeprefix("model.diffusion_model."))
    if context is None:
        return _without_context(shapes)
    family = _FAMILIES.get(context[1], "unknown")
    channels = shapes.get(FIRST_CONV, (0, LATENT_CHANNELS))[1]
    if channels > LATENT_CHANNELS:
        return f"{family}-inpaint" if channels == 9 else "edit"
    if "conditioner.embedders.1.model.token_embedding.weight" in shapes:
        return _sdxl_variant(shapes)
    return "sdxl-unet" if family == "sdxl" else family


def _sdxl_variant(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the family of a checkpoint that has the text encoders of SDXL."""
    if not _is_full_depth(shapes):
        return "ssd-1b"
    if any(mark in shapes for mark in EDM_MARKS):
        return "sdxl-edm"
    return "sdxl" if all(mark in shapes for mark in VAE_MARKS) else "sdxl-no-vae"


_EMBEDDING = {"clip_l", "clip_g"}
_FAMILIES = {768: "sd15", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
_NOT_CHECKPOINTS = (
    ("::lora::", "layerdiffuse-patch"),
    ("::diff::", "layerdiffuse-patch"),
    ("latent_conv_in.", "transparent-decoder"),
    ("lora_down.", "lora"),
    ("lora_A.", "lora"),
    ("lora_unet_", "lora"),
    (".hada_w", "lora"),
    (".lokr_w", "lora"),
)

SUPPORTED = ("sdxl",)
"""Families that the engine renders."""
FAMILY_NAMES = {
    "sdxl": "Stable Diffusion XL",
    "sdxl-unet": "Stable Diffusion XL UNet (without its text encoders)",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "sdxl-inpaint": "Stable Diffusion XL inpainting",
    "sdxl-edm": "Stable Diffusion XL (EDM-trained, as Playground 2.5 and CosXL)",
    "sdxl-other": "Stable Diffusion XL (trained to predict neither epsilon nor v)",
    "sdxl-no-vae": "Stable Diffusion XL (without its whole VAE)",
    "sd15": "Stable Diffusion 1.5",
    "sd15-inpaint": "Stable Diffusion 1.5 inpainting",
    "sd2": "Stable Diffusion 2",
    "sd2-inpaint": "Stable Diffusion 2 inpainting",
    "edit": "image-to-image (as InstructPix2Pix)",
    "ssd-1b": "SSD-1B or Segmind Vega (a distilled Stable Diffusion XL)",
    "layerdiffuse-patch": "LayerDiffuse patch",
    "transparent-decoder": "LayerDiffuse transparent decoder",
    "lora": "LoRA",
    "embedding": "textual-inversion embedding (clip_l and clip_g)",
    "vae": "VAE",
    "unknown": "unknown kind of",
}


def _is_full_depth(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the middle block has its transformer, unlike SSD-1B and Vega."""
    return any(name.startswith("model.diffusion_model.middle_block.1.") for name in shapes)


def _without_context(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(
        name.startswith(("first_stage_model.", "encoder.conv_in", "decoder.conv_in"))
        for name in shapes
    ):
        return "vae"
    return (
        "sd15"
        if any(name.startswith("cond_stage_model.transformer.") for name in shapes)
        else "unknown"
    )
