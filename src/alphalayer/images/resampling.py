"""Fitting of images to a size, in NumPy: by area, by Lanczos, or linear where OpenCV is.

The filters are those of OpenCV's INTER_AREA and INTER_LANCZOS4, one axis after the other.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from alphalayer.core.request import ResizeMode
from alphalayer.images.codecs import Rgba, Size

Image = NDArray[np.float32]
"""RGB or RGBA in [0, 1], (height, width, channels). Resampling may overshoot: it is not clamped."""
Window = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""
Indices = NDArray[np.int_]
Taps = tuple[Indices, NDArray[np.float64]]
"""Pixels that each new one is a sum of, and their weights, (pixels, taps)."""
BLOCK = 32
"""New pixels of one product of matrices."""
LANCZOS_TAPS = np.arange(-3, 5)


def flatten_on_grey(rgba: Rgba) -> Image:
    """Flatten RGBA onto a grey of 0.5."""
    values = rgba.astype(np.float32) / 255
    return np.add((values[..., :3] - 0.5) * values[..., 3:], 0.5, dtype=np.float32)


def fit_condition(image: Image, size: Size, resize_mode: ResizeMode) -> Image:
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
    """Fit a layer to a size as `fit_condition` does, premultiplied meanwhile."""
    height, width = rgba.shape[:2]
    if size == (width, height):
        return rgba
    values = np.divide(rgba, 255, dtype=np.float32)
    values[..., :3] *= values[..., 3:]
    fitted = fit_condition(values, size, resize_mode).clip(0, 1)
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
        find_taps = _lanczos
    elif size[0] > width or size[1] > height:
        find_taps = _linear
    else:
        find_taps = _area
    vertical = 0, find_taps(height, size[1], np.arange(top, top + rows))
    horizontal = 1, find_taps(width, size[0], np.arange(left, left + columns))
    # the axis that shrinks more first
    is_vertical_first = rows * width <= columns * height
    for axis, taps in (vertical, horizontal) if is_vertical_first else (horizontal, vertical):
        image = _resample(image, axis, taps)
    return np.ascontiguousarray(image)


def _resample(image: Image, axis: int, taps: Taps) -> Image:
    """Resample an axis of an image. The border is repeated.

    Each block of new pixels is a product of matrices with the part of the image that it reads.
    """
    lines = np.ascontiguousarray(image.swapaxes(0, axis))
    columns, weights = taps[0].clip(0, len(lines) - 1), taps[1] / taps[1].sum(1, keepdims=True)
    resampled = np.empty((len(columns), *lines.shape[1:]), np.float32)
    for start in range(0, len(columns), BLOCK):
        block = columns[start : start + BLOCK]
        first, end = block.min(), block.max() + 1
        matrix = np.zeros((len(block), end - first), np.float32)
        own = weights[start : start + BLOCK].astype(np.float32)
        np.add.at(matrix, (np.arange(len(block))[:, None], block - first), own)
        resampled[start : start + BLOCK] = np.tensordot(matrix, lines[first:end], 1)
    return resampled.swapaxes(0, axis)


def _lanczos(old: int, new: int, pixels: Indices) -> Taps:
    """Return the taps of a Lanczos filter of 8."""
    centres = (pixels + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int)
    distance = (centres - first)[:, None] - LANCZOS_TAPS
    return first[:, None] + LANCZOS_TAPS, np.sinc(distance) * np.sinc(distance / 4)


def _area(old: int, new: int, pixels: Indices) -> Taps:
    """Return the pixels below each new one, by the area that it covers of them."""
    first, last = pixels * (old / new), (pixels + 1) * (old / new)
    below = first.astype(int)[:, None] + np.arange(math.ceil(old / new) + 1)
    covered = np.minimum(last[:, None], below + 1) - np.maximum(first[:, None], below)
    return below, np.clip(covered, 0, None)


def _linear(old: int, new: int, pixels: Indices) -> Taps:
    """Return the two taps that OpenCV uses if only one side shrinks."""
    first = np.floor(pixels * (old / new)).astype(int)
    part = (pixels + 1) - (first + 1) * (new / old)
    part = np.where(part <= 0, 0.0, part - np.floor(part))
    return first[:, None] + np.arange(2), np.stack([1 - part, part], axis=1)


def border_colour(image: Image) -> NDArray[np.float32]:
    """Return the median of the four outermost lines by channel. Corners count twice."""
    lines = [image[0], image[-1], image[:, 0], image[:, -1]]
    return np.median(np.concatenate(lines), axis=0).astype(np.float32)
