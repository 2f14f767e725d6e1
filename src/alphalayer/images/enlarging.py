"""Enlarging of images with transparency, by Pillow. Arrays are uint8 (height, width, 4)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from alphalayer.images.codecs import OPAQUE_ALPHA, Rgba, Size

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels, also between them."""
LANCZOS, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST


def cover(width: int, height: int, size: Size) -> Box:
    """Return the middle part of an image that has the proportions of `size`."""
    factor = min(width / size[0], height / size[1])
    left, top = (width - size[0] * factor) / 2, (height - size[1] * factor) / 2
    return left, top, width - left, height - top


def enlarge(rgba: Rgba, size: Size, box: Box, *, nearest: bool = False) -> Rgba:
    """Resample a part of an image: its colours, and its alpha beside them.

    Args:
        rgba: Image with straight alpha.
        size: Size of the result.
        box: Part of the image to resample.
        nearest: Whether pixels are repeated. The default is Lanczos.
    """
    image = Image.fromarray(rgba)
    if nearest:
        return np.asarray(image.resize(size, NEAREST, box))
    colours = fill_invisible(image).resize(size, LANCZOS, box)
    colours.putalpha(image.getchannel("A").resize(size, LANCZOS, box))
    return np.asarray(colours)


def fill_invisible(image: Image.Image) -> Image.Image:
    """Return RGB in which invisible pixels have the colours of visible ones.

    The image is halved again and again. Its invisible pixels show the next smaller one, enlarged.
    """
    visible = image.getchannel("A").point(lambda alpha: OPAQUE_ALPHA if alpha else 0)
    if max(image.size) == 1 or visible.getextrema()[0]:
        return image.convert("RGB")
    # Pillow averages colours by their alpha, which has 8 bits
    solid = image.copy()
    solid.putalpha(visible)
    half = max(1, image.width // 2), max(1, image.height // 2)
    smaller = fill_invisible(solid.resize(half, Image.Resampling.BOX))
    filled = smaller.resize(image.size, Image.Resampling.BILINEAR)
    filled.paste(image, mask=visible)
    return filled
