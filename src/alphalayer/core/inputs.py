"""Rules for the image that a request changes: the size of the result, and transparency."""

from __future__ import annotations

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import MODES, OPAQUE
from alphalayer.core.request import MAX_SIDE, MIN_SIDE

SIDE_STEP = 8
"""Pixels of an image for one of its latent, along a side."""


def size_from_image(width: int, height: int) -> tuple[int, int]:
    """Return the size to generate for an image: nearly its own, within the limits."""
    factor = min(max(1, MIN_SIDE / min(width, height)), MAX_SIDE / max(width, height))
    sides = (round(side * factor / SIDE_STEP) * SIDE_STEP for side in (width, height))
    width, height = (min(max(side, MIN_SIDE), MAX_SIDE) for side in sides)
    return width, height


def check_opaque_init(mode: str, *, is_opaque: bool, field: str = "image") -> None:
    """Check that an image to change has transparency if the mode generates it.

    The networks of LayerDiffuse change the colours of opaque images.

    Raises:
        InvalidRequest: The image is opaque.
    """
    if is_opaque and MODES[mode].has_alpha:
        raise InvalidRequest(
            f'the image is opaque, and mode "{mode}" generates transparency.',
            hint=f'Remove its background first, or use mode "{OPAQUE}".',
            field=field,
        )
