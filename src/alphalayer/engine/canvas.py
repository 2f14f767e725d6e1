"""The size that is drawn, and the window of it that was asked for. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE_MULTIPLE = 64
"""Pictures are drawn at multiples of this and cropped: the transparent decoder halves the side six times."""


@dataclass(frozen=True)
class Canvas:
    """The size that is drawn (multiples of 64) and the window in its middle that was asked for, in pixels."""

    width: int
    height: int
    drawn_width: int
    drawn_height: int

    @classmethod
    def of(cls, width: int, height: int) -> Canvas:
        """The smallest canvas that holds width x height."""
        drawn = [-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (width, height)]
        return cls(width, height, *drawn)

    def crop(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the window out of a drawn picture (drawn_height, drawn_width, channels)."""
        top, left = (self.drawn_height - self.height) // 2, (self.drawn_width - self.width) // 2
        return np.ascontiguousarray(picture[top : top + self.height, left : left + self.width])
