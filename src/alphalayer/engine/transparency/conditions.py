"""Input images as conditions of the denoiser: flattened onto grey, fitted to the size, encoded.

Source: the SDXL conditional modes of LayerDiffuse (Zhang and Agrawala, 2024). The filters are those
of OpenCV's INTER_AREA and INTER_LANCZOS4, written as one matrix an axis.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphalayer.core.request import ResizeMode
from alphalayer.engine.base import RgbaImage

Image = NDArray[np.float32]
"""RGB in [0, 1], shape (height, width, 3). Resampling may overshoot, and is not clamped."""
Size = tuple[int, int]
"""Width and height in pixels."""
LANCZOS_TAPS = np.arange(-3, 5)


def condition_image(rgba: RgbaImage, size: Size, resize_mode: ResizeMode) -> Tensor:
    """Return an input image for the VAE, float32 (1, 3, height, width) in [-1, 1].

    Args:
        rgba: Input image (H, W, 4), uint8.
        size: Size of the generated image.
        resize_mode: How the image is fitted to `size`.
    """
    fitted = fit(on_grey(rgba), size, resize_mode)
    return torch.from_numpy(fitted).permute(2, 0, 1)[None] * 2 - 1


def on_grey(rgba: RgbaImage) -> Image:
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
    factor = max(factors) if resize_mode == "Crop and Resize" else min(factors)
    resized = resize(image, (round(width * factor), round(height * factor)))
    left, top = (resized.shape[1] - size[0]) // 2, (resized.shape[0] - size[1]) // 2
    if resize_mode == "Crop and Resize":
        return np.ascontiguousarray(resized[top : top + size[1], left : left + size[0]])
    canvas = np.empty((size[1], size[0], 3), np.float32)
    canvas[:] = border_colour(image)
    left, top = (size[0] - resized.shape[1]) // 2, (size[1] - resized.shape[0]) // 2
    canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return canvas


def resize(image: Image, size: Size) -> Image:
    """Resample an image: by area to fewer pixels, by Lanczos over 8 pixels to more."""
    height, width = image.shape[:2]
    if size == (width, height):
        return image
    if size[0] * size[1] >= width * height:
        rows, columns = _lanczos(height, size[1]), _lanczos(width, size[0])
    elif size[0] > width or size[1] > height:
        rows, columns = _linear(height, size[1]), _linear(width, size[0])
    else:
        rows, columns = _area(height, size[1]), _area(width, size[0])
    return np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True).astype(np.float32)


def _lanczos(old: int, new: int) -> NDArray[np.float64]:
    """Return the matrix (new, old) of a Lanczos filter with 8 taps."""
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int)
    distance = (centres - first)[:, None] - LANCZOS_TAPS
    weights = np.sinc(distance) * np.sinc(distance / 4)
    return _matrix(old, first[:, None] + LANCZOS_TAPS, weights)


def _area(old: int, new: int) -> NDArray[np.float64]:
    """Return the matrix (new, old) that averages the pixels below each new one."""
    edges = np.arange(new + 1) * (old / new)
    pixels = np.arange(old)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.clip(covered, 0, None)
    return weights / weights.sum(1, keepdims=True)


def _linear(old: int, new: int) -> NDArray[np.float64]:
    """Return the matrix (new, old) that OpenCV takes by area where one side grows."""
    first = np.floor(np.arange(new) * (old / new)).astype(int)
    part = (np.arange(new) + 1) - (first + 1) * (new / old)
    part = np.where(part <= 0, 0.0, part - np.floor(part))
    weights = np.stack([1 - part, part], axis=1)
    return _matrix(old, first[:, None] + np.arange(2), weights)


def _matrix(
    old: int, columns: NDArray[np.int_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return a matrix with normalised weights at these columns, clamped to the image."""
    matrix = np.zeros((len(weights), old))
    rows = np.broadcast_to(np.arange(len(weights))[:, None], columns.shape)
    np.add.at(matrix, (rows, columns.clip(0, old - 1)), weights)
    return matrix / matrix.sum(1, keepdims=True)


def border_colour(image: Image) -> NDArray[np.float32]:
    """Return the median of the four outermost lines by channel. Corners count twice."""
    lines = [image[0], image[-1], image[:, 0], image[:, -1]]
    return np.median(np.concatenate(lines), axis=0).astype(np.float32)
