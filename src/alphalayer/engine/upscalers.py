"""Upscalers of images, by name: resampling, or a network of `models/ESRGAN`.

Files are read by the package spandrel, which knows the layouts of ESRGAN, Real-ESRGAN, SwinIR, DAT
and others. It is an optional dependency, because it needs torchvision.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from alphalayer import catalog
from alphalayer.core.errors import CorruptFile, ModelUnusable
from alphalayer.core.optional_dependencies import require
from alphalayer.core.request import IMAGE_UPSCALERS
from alphalayer.engine.families.base import check_finite
from alphalayer.engine.memory import is_out_of_memory
from alphalayer.engine.tensors import read_tensors
from alphalayer.images.codecs import Size

RgbImage = NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""
Window = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""
Upscale = Callable[[RgbImage, Size, Window], RgbImage]
"""Function (image, size, window) → the window of the image of that size."""

TILE, MARGIN = 192, 16
"""Pixels of a tile that a network computes at once, and of the context around it."""
MAX_PASSES, MAX_SCALE = 3, 4
"""Most passes of a network, and the most by which one pass may enlarge a side.

The last pass may return up to `MAX_SCALE` squared times the pixels of the result.
"""


def load_upscaler(
    models_dir: Path,
    name: str,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Upscale:
    """Return an upscaler by its name.

    Args:
        models_dir: The models folder.
        name: One of `IMAGE_UPSCALERS`, or the name of a file of `models/ESRGAN`.
        device: Where a network runs.
        check: Called before each tile to report progress. It may raise.

    Raises:
        InvalidRequest: There is no upscaler of this name.
        SetupFailed: The file needs the package spandrel.
        CorruptFile, ModelUnusable: The file cannot be read, or holds no upscaler.
    """
    if name in IMAGE_UPSCALERS:
        nearest = name == "Nearest"
        return _Resampling(Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)
    path = catalog.find_upscaler(models_dir, name)
    require("spandrel", "upscalers")
    return _Network(_load_network(path), device, check)


class _Resampling:
    """Upscaler that resamples."""

    def __init__(self, method: Image.Resampling):
        self._method = method

    def __call__(self, image: RgbImage, size: Size, window: Window) -> RgbImage:
        """Return a window of the image of another size."""
        return _resample(image, _scale(window, image, size), window, self._method)


class _Network:
    """Upscaler that runs a network until the image is large enough, then shrinks it to the size.

    A network of scale 1, such as one that removes noise, runs once.

    Source: AUTOMATIC1111, the upscalers with files.
    """

    def __init__(self, network: Any, device: torch.device, check: Callable[[], None]):
        on_gpu = device.type == "cuda" and network.supports_half
        self._network = network.to(device, torch.float16 if on_gpu else torch.float32).eval()
        self._check = check

    def __call__(self, image: RgbImage, size: Size, window: Window) -> RgbImage:
        """Return a window of the image of another size."""
        scale, (height, width) = self._network.scale, image.shape[:2]
        left, top, right, bottom = _scale(window, image, size)
        first_row, first_column = max(int(top) - MARGIN, 0), max(int(left) - MARGIN, 0)
        enlarged = image[
            first_row : math.ceil(bottom) + MARGIN, first_column : math.ceil(right) + MARGIN
        ]
        passes = _count_passes(scale, max(size[0] / width, size[1] / height))
        for _ in range(passes):
            enlarged = self._enlarge(enlarged)
        box = left - first_column, top - first_row, right - first_column, bottom - first_row
        scaled = [edge * scale**passes for edge in box]
        return _resample(enlarged, scaled, window, Image.Resampling.LANCZOS)

    @torch.inference_mode()
    def _enlarge(self, image: RgbImage) -> RgbImage:
        """Return an image enlarged by the scale of the network."""
        scale, (height, width) = self._network.scale, image.shape[:2]
        result = np.empty((height * scale, width * scale, 3), np.uint8)
        for top, bottom in _tiles(height):
            for left, right in _tiles(width):
                self._check()
                first_row, first_column = max(top - MARGIN, 0), max(left - MARGIN, 0)
                part = image[first_row : bottom + MARGIN, first_column : right + MARGIN]
                y, x = (top - first_row) * scale, (left - first_column) * scale
                rows, columns = (bottom - top) * scale, (right - left) * scale
                result[top * scale : bottom * scale, left * scale : right * scale] = self._run(
                    part
                )[y : y + rows, x : x + columns]
        return result

    def _run(self, part: RgbImage) -> RgbImage:
        """Return the output of the network for a part of an image.

        Raises:
            EngineFailed: It holds numbers that are not finite.
        """
        pixels = torch.from_numpy(part.copy()).to(self._network.device, self._network.dtype)
        output = self._network(pixels.permute(2, 0, 1)[None] / 255)
        values = check_finite(output, "the upscaler")[0].clamp(0, 1) * 255
        return values.round().byte().permute(1, 2, 0).cpu().numpy()


def _count_passes(scale: int, ratio: float) -> int:
    """Return how often a network runs to enlarge by a ratio of sides."""
    if scale == 1:
        return 1
    return next((n for n in range(MAX_PASSES) if scale**n >= ratio), MAX_PASSES)


def _scale(window: Window, image: RgbImage, size: Size) -> list[float]:
    """Return the edges in an image of a window of the image resized to `size`."""
    height, width = image.shape[:2]
    return [
        edge * old / new
        for edge, old, new in zip(window, (width, height) * 2, size * 2, strict=True)
    ]


def _resample(
    image: RgbImage, edges: Sequence[float], window: Window, method: Image.Resampling
) -> RgbImage:
    """Resample the part of an image between edges to the size of a window."""
    left, top, right, bottom = window
    size = right - left, bottom - top
    box = edges[0], edges[1], edges[2], edges[3]
    return np.array(Image.fromarray(image).resize(size, method, box))


def _tiles(side: int) -> Iterator[tuple[int, int]]:
    for start in range(0, side, TILE):
        yield start, min(start + TILE, side)


def _load_network(path: Path) -> Any:
    """Read a network. Raises `CorruptFile` or `ModelUnusable`."""
    spandrel = importlib.import_module("spandrel")
    tensors = _read_pickle(path) if path.suffix.lower() == ".pth" else read_tensors(path)
    try:
        state = spandrel.canonicalize_state_dict(tensors)
        network = spandrel.ModelLoader().load_from_state_dict(state)
    # a file that is not trusted raises anything
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first_line, _, _ = str(error).strip().partition("\n")
        reason = catalog.printable(first_line)[:300]
        raise ModelUnusable(
            f"{path.name} is no upscaler that spandrel knows ({reason}).",
            hint="Use a file of ESRGAN, Real-ESRGAN, SwinIR, DAT or another upscaler of images.",
        ) from error
    colours = network.input_channels, network.output_channels
    if not isinstance(network, spandrel.ImageModelDescriptor) or colours != (3, 3):
        raise ModelUnusable(
            f"{path.name} does not enlarge RGB images.", hint="Use an upscaler of images."
        )
    if network.scale > MAX_SCALE:
        raise ModelUnusable(
            f"{path.name} enlarges by {network.scale}; at most {MAX_SCALE}.",
            hint="Use an upscaler of a lower scale. It runs again until the image is large enough.",
        )
    return network


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return the tensors of a .pth file. Raises `CorruptFile` if it holds code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # the unpickler raises errors of many kinds
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CorruptFile(
            f"{path.name} holds more than tensors, or is damaged.",
            hint="Only tensors are read from .pth files. Use the file as .safetensors.",
        ) from error
