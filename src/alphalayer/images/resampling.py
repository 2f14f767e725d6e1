"""Fitting of images to a size, in NumPy: by area, by Lanczos, or linear where OpenCV is.

The filters are those of OpenCV's INTER_AREA and INTER_LANCZOS4, written as one matrix an axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alphalayer.core.request import ResizeMode
from alphalayer.images.codecs import Rgba

Image = NDArray[np.float32]
"""RGB or RGBA in [0, 1], (height, width, channels). Resampling may overshoot: it is not clamped."""
Size = tuple[int, int]
"""Width and height in pixels."""
Window = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""
Matrix = NDArray[np.float32]
Indices = NDArray[np.int_]
LANCZOS_TAPS = np.arange(-3, 5)


def on_grey(rgba: Rgba) -> Image:
    """Flatten RGBA onto a grey of 0.5."""
    values = rgba.astype(np.float32) / 255
    return np.add((values[..., :3] - 0.5) * values[..., 3:], 0.5, dtype=np.float32)


def fit(image: Image, size: Size, resize_mode: ResizeMode) -> Image:
    """Fit an image to a size.

    "Just Resize" stretches, "Crop and Resize" covers the size and cuts the middle out, "Resize and
    Fill" shows the whole image on the median colour of its border.
    """
    if resize_mode == "Just Resize":
        return resize(image, size)
    height, width = image.shape[:2]
    factors = size[0] / width, size[1] / height
    covers = resize_mode == "Crop and Resize"
    factor = max(factors) if covers else min(factors)
    scaled = max(1, round(width * factor)), max(1, round(height * factor))
    if covers:
        left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
        return resize(image, scaled, (left, top, *size))
    canvas = np.empty((size[1], size[0], image.shape[2]), np.float32)
    canvas[:] = border_colour(image)
    left, top = (size[0] - scaled[0]) // 2, (size[1] - scaled[1]) // 2
    canvas[top : top + scaled[1], left : left + scaled[0]] = resize(image, scaled)
    return canvas


def fit_layer(rgba: Rgba, size: Size, resize_mode: ResizeMode) -> Rgba:
    """Fit a layer to a size as `fit` does. Its colours are premultiplied meanwhile."""
    height, width = rgba.shape[:2]
    if size == (width, height):
        return rgba
    values = np.divide(rgba, 255, dtype=np.float32)
    values[..., :3] *= values[..., 3:]
    fitted = fit(values, size, resize_mode).clip(0, 1)
    alpha = fitted[..., 3:]
    colour = fitted[..., :3] / np.maximum(alpha, 1e-6)
    return np.rint(np.concatenate([colour.clip(0, 1), alpha], axis=2) * 255).astype(np.uint8)


def resize(image: Image, size: Size, window: Window | None = None) -> Image:
    """Resample an image: by area to fewer pixels, by Lanczos over 8 pixels to more.

    Args:
        image: The image.
        size: Size of the whole result.
        window: Part of the result to compute. A thin image that covers a size is many times as
            long as the part that is seen.
    """
    height, width = image.shape[:2]
    left, top, columns, rows = window or (0, 0, *size)
    if size == (width, height):
        return np.ascontiguousarray(image[top : top + rows, left : left + columns])
    if size[0] * size[1] >= width * height:
        matrix = _lanczos
    elif size[0] > width or size[1] > height:
        matrix = _linear
    else:
        matrix = _area
    vertical = matrix(height, size[1], np.arange(top, top + rows))
    horizontal = matrix(width, size[0], np.arange(left, left + columns))
    return np.einsum("yh,hwc,xw->yxc", vertical, image, horizontal, optimize=True)


def _lanczos(old: int, new: int, pixels: Indices) -> Matrix:
    """Return the matrix (pixels, old) of a Lanczos filter with 8 taps."""
    centres = (pixels + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int)
    distance = (centres - first)[:, None] - LANCZOS_TAPS
    weights = np.sinc(distance) * np.sinc(distance / 4)
    return _matrix(old, first[:, None] + LANCZOS_TAPS, weights)


def _area(old: int, new: int, pixels: Indices) -> Matrix:
    """Return the matrix (pixels, old) that averages the pixels below each new one."""
    first, last = pixels * (old / new), (pixels + 1) * (old / new)
    below = np.arange(old)
    covered = np.minimum(last[:, None], below + 1) - np.maximum(first[:, None], below)
    weights = np.clip(covered, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _linear(old: int, new: int, pixels: Indices) -> Matrix:
    """Return the matrix (pixels, old) that OpenCV uses if only one side shrinks."""
    first = np.floor(pixels * (old / new)).astype(int)
    part = (pixels + 1) - (first + 1) * (new / old)
    part = np.where(part <= 0, 0.0, part - np.floor(part))
    weights = np.stack([1 - part, part], axis=1)
    return _matrix(old, first[:, None] + np.arange(2), weights)


def _matrix(old: int, columns: Indices, weights: NDArray[np.float64]) -> Matrix:
    """Return a matrix of normalised weights. The border is repeated."""
    matrix = np.zeros((len(weights), old), np.float32)
    rows = np.broadcast_to(np.arange(len(weights))[:, None], columns.shape)
    normalised = weights / weights.sum(1, keepdims=True)
    np.add.at(matrix, (rows, columns.clip(0, old - 1)), normalised.astype(np.float32))
    return matrix


def border_colour(image: Image) -> NDArray[np.float32]:
    """Return the median of the four outermost lines by channel. Corners count twice."""
    lines = [image[0], image[-1], image[:, 0], image[:, -1]]
    return np.median(np.concatenate(lines), axis=0).astype(np.float32)
