"""Size that is generated and the requested window of it, without knowledge of models."""

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
        left, top = (self.full_width - self.width) // 2, (self.full_height - self.height) // 2
        right = self.full_width - self.width - left
        bottom = self.full_height - self.height - top
        return torch.nn.functional.pad(image, (left, right, top, bottom), mode="replicate")

    def crop(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the window out of an image (full_height, full_width, channels)."""
        top, left = (self.full_height - self.height) // 2, (self.full_width - self.width) // 2
        return np.ascontiguousarray(image[top : top + self.height, left : left + self.width])
