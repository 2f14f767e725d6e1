"""Header of a safetensors file: tensor names and shapes, and the family that they reveal."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from alphalayer.catalog.files import open_file, parse_json, printable
from alphalayer.core.errors import CorruptFile

MAX_HEADER_BYTES = 16_000_000
"""Limit of a header. That of an SDXL checkpoint has 0.4 MB, that of a LoRA some MB of metadata."""
MAX_RANK = 64
_AGAIN = "Download it again; a complete file has the size that its page names."
_SMALLER = "Save it again with less metadata."
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
"""Bits of a number in each supported format."""

CONTEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"
LATENT_CHANNELS = 4
EDM_MARKS = ("edm_mean", "edm_vpred.sigma_max")
VAE_MARKS = ("first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: the shape of each tensor by name."""

    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Summary:
    """Family of a file, and the shapes of an embedding's tensors by name."""

    family: str
    embedding: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


def summarize(path: Path) -> Summary:
    """Return the summary of a safetensors file, read once and after each change.

    Raises:
        CorruptFile: See `read_header`. A damaged header is not read again either.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    version = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    # one at a time: parsing a header may take 100 MB
    with _reading:
        summary = _summarize(path, version)
    if isinstance(summary, CorruptFile):
        # a new one, because each raise adds its traceback to an error
        raise CorruptFile(summary.message, hint=summary.hint)
    return summary


_reading = Lock()


@lru_cache(10_000)
def _summarize(path: Path, _version: tuple[int, ...]) -> Summary | CorruptFile:
    try:
        header = read_header(path)
    except CorruptFile as error:
        if isinstance(error.__cause__, OSError):
            raise  # a failing disk may recover
        return error.with_traceback(None)
    embedding = {name: header.shapes[name] for name in _EMBEDDING if name in header.shapes}
    return Summary(family_of(header), embedding)


def read_header(path: Path) -> Header:
    """Read and check a safetensors header.

    The file has 8 bytes with the header's length, the header as JSON, then the tensors' bytes.

    Raises:
        CorruptFile: A part is missing or damaged. The message names it.
    """
    shown = printable(str(path))
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            raw = file.read(8)
            length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
            if not 2 <= length <= size - 8:
                raise CorruptFile(
                    f"{shown} is not a safetensors file, or only its beginning is there.",
                    hint=_AGAIN,
                )
            if length > MAX_HEADER_BYTES:
                raise CorruptFile(
                    f"{shown} has a header of {length:,} bytes; "
                    f"at most {MAX_HEADER_BYTES:,} are read.",
                    hint=_SMALLER,
                )
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        shapes, end = _read_tensors(text)
    except ValueError as error:
        raise CorruptFile(
            f"{shown} has a damaged safetensors header: {error}.", hint=_AGAIN
        ) from None
    missing = 8 + length + end - size
    if missing > 0:
        raise CorruptFile(
            f"{shown} is cut off: {missing:,} of {8 + length + end:,} bytes are missing.",
            hint=_AGAIN,
        )
    if missing < 0:
        raise CorruptFile(f"{shown} has {-missing:,} bytes after its tensors.", hint=_AGAIN)
    return Header(shapes)


def _unreadable(path: Path, error: OSError) -> CorruptFile:
    return CorruptFile(
        f"{printable(str(path))} cannot be read: {error.strerror}.",
        hint="Check the disk and permissions.",
    )


def _read_tensors(text: bytes) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes, and the end of the last tensor in bytes. Raises `ValueError`."""
    if not text.startswith(b"{"):
        raise ValueError("it does not begin with {")
    entries: dict[str, Any] = parse_json(
        text, object_pairs_hook=_unique, parse_float=_refuse_number, parse_constant=_refuse_number
    )
    entries.pop("__metadata__", None)
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        try:
            shapes[name], span = _read_tensor(entry)
        except ValueError as error:
            raise ValueError(f"{printable(name)[:100]} has {error}") from None
        spans.append(span)
    end = 0
    for first, after in sorted(spans):
        if first != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = after
    return shapes, end


def _read_tensor(entry: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the shape of a tensor, and its first byte and the one after its last."""
    if not isinstance(entry, dict):
        raise ValueError("no description")
    kind = entry.get("dtype")
    if not isinstance(kind, str) or kind not in BITS:
        raise ValueError(f"a number format that is not one of {', '.join(BITS)}")
    shape, span = (_read_sizes(entry.get(name)) for name in ("shape", "data_offsets"))
    if shape is None or len(shape) > MAX_RANK:
        raise ValueError("a shape that is not a list of sizes")
    if span is None or len(span) != 2:
        raise ValueError("data_offsets that are not two positions")
    if math.prod(shape) * BITS[kind] != (span[1] - span[0]) * 8:
        raise ValueError("data_offsets that differ from the size of its shape")
    return shape, (span[0], span[1])


def _read_sizes(values: Any) -> tuple[int, ...] | None:
    """Return a list of sizes or positions, or None for anything else."""
    if isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    ):
        return tuple(values)
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise ValueError("a name occurs twice")
    return entry


def _refuse_number(number: str) -> None:
    raise ValueError(f"it holds the number {number[:20]}")


def family_of(header: Header) -> str:
    """Return the family of a file by its tensors: "sdxl", or the name of another kind."""
    shapes = header.shapes
    for mark, kind in _NOT_CHECKPOINTS:
        if any(mark in name for name in shapes):
            return kind
    if shapes.keys() >= {*_EMBEDDING}:
        return "embedding"
    context = shapes.get(CONTEXT) or shapes.get(CONTEXT.removeprefix("model.diffusion_model."))
    if context is None:
        return _without_context(shapes)
    first = shapes.get(FIRST_CONV, (0, LATENT_CHANNELS))
    if len(context) != 2 or len(first) < 2:
        return "unknown"
    family, channels = _FAMILIES.get(context[1], "unknown"), first[1]
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


_EMBEDDING = ("clip_l", "clip_g")
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
