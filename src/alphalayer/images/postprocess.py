"""Post-processing of generated images: trim, defringe, composite.

Arrays are uint8 (height, width, 4), straight alpha.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alphalayer.core.job import Output
from alphalayer.images.codecs import Rgba, decode, encode

SOLID_ALPHA = 255


def finish(rgba: Rgba, output: Output) -> Rgba:
    """What a request wants done to a finished picture: defringe, trim, composite, in this order."""
    if output.defringe:
        rgba = defringe(rgba)
    if output.trim:
        rgba = trim(rgba, output.trim_threshold, output.trim_padding)
    if output.background:
        red, green, blue = bytes.fromhex(output.background[1:])
        rgba = composite(rgba, (red, green, blue))
    return rgba


def convert(data: bytes, output: Output) -> bytes:
    """A picture file made anew as `output` wants it, with the `parameters` text it had. Raises `InvalidRequest`; see `decode`."""
    rgba, parameters = decode(data)
    return encode(finish(rgba, output), output.format, parameters or "")


def trim(rgba: Rgba, threshold: int = 0, padding: int = 0) -> Rgba:
    """Cut away the border whose alpha is at most `threshold`, keep `padding` pixels; an empty picture stays as it is."""
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
    """Give half-transparent edge pixels the colour of the solid pixels beside them, so that no old background shines through.

    Colour spreads from pixels of full alpha outwards, `reach` pixels at most; alpha stays as it is, and so do pixels that no
    solid one is near to (smoke, glass).
    """
    color = rgba[..., :3].astype(np.float32)
    known = rgba[..., 3] == SOLID_ALPHA
    for _ in range(reach):
        weight = known.astype(np.float32)
        total, count = _neighbours(color * weight[..., None]), _neighbours(weight)
        reached = ~known & (count > 0)
        color[reached] = total[reached] / count[reached][:, None]
        known = known | reached
    changed = known & (rgba[..., 3] < SOLID_ALPHA)
    result = rgba.copy()
    result[changed, :3] = np.rint(color[changed]).astype(np.uint8)
    return result


def _neighbours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sum over the 3x3 square around each pixel."""
    padded: NDArray[np.float32] = np.pad(values, [(1, 1), (1, 1), *[(0, 0)] * (values.ndim - 2)])
    rows: NDArray[np.float32] = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray(rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:], np.float32)


def composite(rgba: Rgba, background: tuple[int, int, int]) -> Rgba:
    """The picture over a colour, opaque."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.array(background, np.float32) * (1 - alpha)
    return np.dstack([np.rint(mixed).astype(np.uint8), np.full_like(rgba[..., 3], 255)])
