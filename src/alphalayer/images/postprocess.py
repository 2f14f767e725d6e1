"""Post-processing of generated images: trim, defringe, composite.

Arrays are uint8 (height, width, 4), straight alpha.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alphalayer.core.job import Output
from alphalayer.core.request import MAX_HIRES_PIXELS
from alphalayer.images.codecs import Rgba, decode, encode, strips

SOLID_ALPHA = 255


def finish(rgba: Rgba, output: Output) -> Rgba:
    """Apply the requested post-processing: defringe, trim, composite, in this order."""
    if output.defringe:
        rgba = defringe(rgba)
    if output.trim:
        rgba = trim(rgba, output.trim_threshold, output.trim_padding)
    if output.background:
        red, green, blue = bytes.fromhex(output.background[1:])
        rgba = composite(rgba, (red, green, blue))
    return rgba


def convert(data: bytes, output: Output) -> bytes:
    """Post-process an image file and encode it, with its `parameters` text.

    Raises:
        InvalidRequest: The file cannot be decoded, or is larger than any generated image.
    """
    rgba, parameters = decode(data, MAX_HIRES_PIXELS)
    return encode(finish(rgba, output), output.format, parameters or "")


def trim(rgba: Rgba, threshold: int = 0, padding: int = 0) -> Rgba:
    """Cut off the border with alpha of at most `threshold`, except `padding` pixels.

    An empty image does not change.
    """
    solid = rgba[..., 3] > threshold
    if not solid.any():
        return rgba
    (top, bottom), (left, right) = (
        np.flatnonzero(solid.any(axis=axis))[[0, -1]] for axis in (1, 0)
    )
    height, width = solid.shape
    return rgba[
        max(top - padding, 0) : min(bottom + 1 + padding, height),
        max(left - padding, 0) : min(right + 1 + padding, width),
    ]


def defringe(rgba: Rgba, reach: int = 3) -> Rgba:
    """Replace the colour of half-transparent edge pixels by that of solid pixels.

    Otherwise the old background would shine through.
    The colour of solid pixels spreads outwards by at most `reach` pixels. Alpha does not change.
    Pixels without a solid pixel nearby do not change either (smoke, glass).
    """
    result = rgba.copy()
    for rows in strips(rgba):
        # colour from more than `reach` rows away does not arrive
        first = max(rows.start - reach, 0)
        strip = _defringe_strip(rgba[first : rows.stop + reach], reach)
        result[rows] = strip[rows.start - first :][: rows.stop - rows.start]
    return result


def _defringe_strip(rgba: Rgba, reach: int) -> Rgba:
    """Replace the colour of half-transparent pixels. See `defringe`."""
    has_color = rgba[..., 3] == SOLID_ALPHA
    if has_color.all() or not has_color.any():
        return rgba
    color = rgba[..., :3].astype(np.float32)
    for _ in range(reach):
        weight = has_color.astype(np.float32)
        total, count = _sum_neighbours(color * weight[..., None]), _sum_neighbours(weight)
        reached = ~has_color & (count > 0)
        color[reached] = total[reached] / count[reached][:, None]
        has_color = has_color | reached
    changed = has_color & (rgba[..., 3] < SOLID_ALPHA)
    result = rgba.copy()
    result[changed, :3] = np.rint(color[changed]).astype(np.uint8)
    return result


def _sum_neighbours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum the 3x3 square around each pixel."""
    padded: NDArray[np.float32] = np.pad(values, [(1, 1), (1, 1), *[(0, 0)] * (values.ndim - 2)])
    rows: NDArray[np.float32] = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray(rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:], np.float32)


def composite(rgba: Rgba, background: tuple[int, int, int]) -> Rgba:
    """Composite the image over a colour. The result is opaque."""
    result = np.full_like(rgba, SOLID_ALPHA)
    for rows in strips(rgba):
        alpha = rgba[rows, :, 3:].astype(np.float32) / 255
        mixed = rgba[rows, :, :3] * alpha + np.array(background, np.float32) * (1 - alpha)
        result[rows, :, :3] = np.rint(mixed)
    return result
