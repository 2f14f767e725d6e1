"""Parts of a diffusers folder: their weight files, and a check that nothing is missing."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from alphalayer.catalog.completeness import missing_tensor
from alphalayer.catalog.files import printable
from alphalayer.catalog.folders import AGAIN, read_json
from alphalayer.catalog.hashes import file_stamp
from alphalayer.catalog.headers import read_header
from alphalayer.core.errors import CorruptFile

_WITH_WEIGHTS = {
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sd15": ("unet", "vae", "text_encoder"),
}
_TOKENIZERS = {"sdxl": ("tokenizer", "tokenizer_2"), "sd15": ("tokenizer",)}
_WEIGHTS = ("diffusion_pytorch_model", "model")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of one part of a diffusers folder, of one variant.

    Other variants, such as `model.fp16.safetensors`, count only if there is no plain one.
    """
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if not file.name.startswith("."):
            variants.setdefault(_SHARD.sub("", file.stem), []).append(file)

    def rank(variant: str) -> tuple[bool, bool, bool, str]:
        base, _, kind = variant.partition(".")
        return base not in _WEIGHTS, bool(kind), kind != "fp16", variant

    return variants[min(variants, key=rank)] if variants else []


def check_parts(model: Path, family: str) -> None:
    """Check the parts of a diffusers folder by their configs and headers.

    Raises:
        CorruptFile: A part, file or tensor is missing or damaged. The message names it.
    """
    for part in _WITH_WEIGHTS[family]:
        config = read_json(model / part / "config.json")
        _check_weights(model / part, is_regular=config.get("_class_name") != "AutoencoderDC")
    for part in _TOKENIZERS[family]:
        _check_tokenizer(model / part)


def _check_weights(folder: Path, *, is_regular: bool) -> None:
    """Check the headers of a part's weight files, and that all of them are there.

    `is_regular`: all layers of the network have a bias.
    """
    files = weight_files(folder)
    if not files:
        raise CorruptFile(f"{folder} holds no .safetensors file.", hint=AGAIN)
    shards = _SHARD.search(files[0].stem)
    if shards and int(shards[1]) != len(files):
        raise CorruptFile(
            f"{folder} is incomplete: {len(files)} of {int(shards[1])} weight files are there.",
            hint=AGAIN,
        )
    missing = _missing_in(tuple((file, file_stamp(file)) for file in files))
    if missing and is_regular:
        raise CorruptFile(
            f"{folder} is incomplete: {printable(missing)[:200]} is missing.", hint=AGAIN
        )


@lru_cache(1000)
def _missing_in(files: tuple[tuple[Path, tuple[int, int]], ...]) -> str:
    """Return a tensor that is missing in files of these stamps, or ""."""
    shapes = {name: shape for file, _ in files for name, shape in read_header(file).shapes.items()}
    return missing_tensor(shapes, is_part=True)


def _check_tokenizer(folder: Path) -> None:
    names = {path.name for path in folder.glob("*")}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise CorruptFile(
            f"{folder} holds neither tokenizer.json, nor vocab.json and merges.txt.", hint=AGAIN
        )
