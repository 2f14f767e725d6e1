"""Textual-inversion files: learned vectors that replace a word, for each text encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alphalayer.catalog import file_stamp, printable, usable_files
from alphalayer.catalog.kinds import EMBEDDING
from alphalayer.core.errors import CorruptFile
from alphalayer.engine.tensors import read_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextualInversion:
    """Learned vectors of one name.

    Attributes:
        name: Word that the vectors replace: the name of the file.
        vectors: float32 (n, width of the encoder) for each text encoder.
    """

    name: str
    vectors: tuple[Tensor, ...]


class EmbeddingFolder:
    """Embeddings of a folder, read at the first request and whenever its files have changed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._read: dict[str, TextualInversion] = {}

    def read(self) -> dict[str, TextualInversion]:
        """Return all embeddings by name.

        Returns:
            The same object as long as the files do not change.
        """
        stamps = {path: file_stamp(path) for path in usable_files(self._folder)}
        if stamps != self._stamps:
            self._stamps, self._read = stamps, read_embeddings(self._folder)
        return self._read


def read_embeddings(folder: Path) -> dict[str, TextualInversion]:
    """Read all embeddings of a folder and its subfolders.

    Other files are skipped with a warning.

    Returns:
        The embeddings by name. Empty if there is no such folder.
    """
    embeddings: dict[str, TextualInversion] = {}
    for path in usable_files(folder):
        shown = printable(str(path))
        try:
            tensors = read_tensors(path)
        except CorruptFile as error:
            logger.warning("%s is left out: %s", shown, error)
            continue
        # a single vector may lack the first dimension
        vectors = tuple(torch.atleast_2d(tensors[name].float()) for name in _names(tensors))
        if (
            vectors
            and all(matrix.ndim == 2 and matrix.isfinite().all() for matrix in vectors)
            and 0 < len(vectors[0]) == len(vectors[-1])
        ):
            embeddings[path.stem] = TextualInversion(path.stem, vectors)
        else:
            logger.warning(
                "%s is neither an SDXL embedding (clip_l and clip_g) nor one of SD 1.5 "
                "(one tensor), and is left out.",
                shown,
            )
    return embeddings


def _names(tensors: Mapping[str, Tensor]) -> Sequence[str]:
    """Return the names of the vectors in a file: two for SDXL, one for SD 1.5."""
    if tensors.keys() >= {*EMBEDDING}:
        return EMBEDDING
    return [*tensors] if len(tensors) == 1 else []
