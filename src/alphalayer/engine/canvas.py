"""Size that is generated, the requested window of it, and its pixels as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZE_MULTIPLE = 64
"""Transparent images are generated at multiples of this and cropped.

The transparent decoder halves each side six times.
"""


@dataclass(frozen=True)
class Canvas:
    """Generated size and the requested window in its middle, in pixels."""

    width: int
    height: int
    full_width: int
    full_height: int

    @classmethod
    def of(cls, width: int, height: int, multiple: int = SIZE_MULTIPLE) -> Canvas:
        """Return the smallest canvas of a multiple that holds width x height."""
        full = [-(-side // multiple) * multiple for side in (width, height)]
        return cls(width, height, *full)

    def extend(self, image: Tensor) -> Tensor:
        """Repeat the border of an image (B, C, height, width) to the full size."""
        return fit_middle(image, self.full_height, self.full_width)

    def crop(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the window out of an image (full_height, full_width, channels)."""
        top, left = (self.full_height - self.height) // 2, (self.full_width - self.width) // 2
        return np.ascontiguousarray(image[top : top + self.height, left : left + self.width])


def fit_middle(image: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle of an image (B, C, H, W) out, or repeat its border."""
    rows, columns = image.shape[-2:]
    top, left = max((rows - height) // 2, 0), max((columns - width) // 2, 0)
    image = image[..., top : top + height, left : left + width]
    above, before = (
        (size - side) // 2 for size, side in zip((height, width), image.shape[-2:], strict=True)
    )
    below, after = height - image.shape[-2] - above, width - image.shape[-1] - before
    return torch.nn.functional.pad(image, (before, after, above, below), mode="replicate")


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Return uint8 (H, W, channels) as float32 (1, channels, H, W) in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
