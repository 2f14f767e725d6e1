"""Tensors of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from alphalayer import catalog
from alphalayer.engine.families.scaled import apply_scales
from alphalayer.engine.tensors import read_tensors


def read_part(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of one part of a diffusers folder, such as `unet`.

    Raises:
        CorruptFile: A weight file cannot be read.
        ValueError: The weights are stored in a quantized format other than fp8.
    """
    return apply_scales(
        {
            name: tensor
            for file in catalog.weight_files(folder)
            for name, tensor in read_tensors(file).items()
        }
    )
