"""Textual-inversion files: learned vectors that stand in for a word, one set for each SDXL text encoder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alphalayer.catalog import file_stamp

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextualInversion:
    """`clip_l` (n, width of encoder 1) and `clip_g` (n, width of encoder 2), float32: n vectors under one name."""

    name: str
    clip_l: Tensor
    clip_g: Tensor


class EmbeddingFolder:
    """The embeddings of a folder, read when first asked for and again when its files changed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._read: dict[str, TextualInversion] = {}

    def read(self) -> dict[str, TextualInversion]:
        """All of them by name; the same object as long as the files stay as they are."""
        stamps = {path: file_stamp(path) for path in self._folder.rglob("*.safetensors")}
        if stamps != self._stamps:
            self._stamps, self._read = stamps, read_embeddings(self._folder)
        return self._read


def read_embeddings(folder: Path) -> dict[str, TextualInversion]:
    """All embeddings of a folder and its subfolders by name; files of another kind are skipped with a warning."""
    found: dict[str, TextualInversion] = {}
    for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read and is left out (%s).", path, error)
            continue
        # a single vector may come without a dimension of its own
        sides = [
            torch.atleast_2d(tensors[name].float())
            for name in ("clip_l", "clip_g")
            if name in tensors
        ]
        if (
            len(sides) == 2
            and len(sides[0]) == len(sides[1])
            and all(side.ndim == 2 for side in sides)
        ):
            found[path.stem] = TextualInversion(path.stem, *sides)
        else:
            logger.warning("%s is not an SDXL embedding (clip_l and clip_g) and is left out.", path)
    return found
