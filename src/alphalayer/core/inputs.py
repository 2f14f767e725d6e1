"""Size of the result for an image that a request changes or completes."""

from __future__ import annotations

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import Mode
from alphalayer.core.request import MAX_SIDE, MIN_SIDE

SIDE_STEP = 8
"""Pixels of an image for one of its latent, along a side."""


def check_transparency(mode: Mode, remedy: str, field: str = "init") -> None:
    """Raise `InvalidRequest` if a mode cannot change an opaque image.

    Args:
        mode: The mode of the request.
        remedy: What to do without transparency, for the error.
        field: Field of the error.
    """
    if mode.has_alpha:
        raise InvalidRequest(
            "the image is opaque, and LayerDiffuse changes images with transparency.",
            hint=f"Remove its background first, or {remedy}.",
            field=field,
        )


def size_for_image(
    image: tuple[int, int], width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """Return the size to generate for an image: nearly its own, within the limits.

    Args:
        image: Its width and height.
        width: Requested width.
        height: Requested height. If one is requested, the other follows from it.
    """
    if width is None and height is None:
        factor = min(max(1, MIN_SIDE / min(image)), MAX_SIDE / max(image))
        return _side(image[0] * factor), _side(image[1] * factor)
    if width is None:
        width = _side((height or 0) * image[0] / image[1])
    return width, height or _side(width * image[1] / image[0])


def _side(pixels: float) -> int:
    return min(max(round(pixels / SIDE_STEP) * SIDE_STEP, MIN_SIDE), MAX_SIDE)
