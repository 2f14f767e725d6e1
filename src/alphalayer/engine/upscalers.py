"""Upscalers of images, by name: resampling, or a network of `models/ESRGAN`.

Files are read by the package spandrel, which knows the layouts of ESRGAN, Real-ESRGAN, SwinIR, DAT
and others. It is an optional dependency, because it needs torchvision.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alphalayer import catalog
from alphalayer.core.errors import CorruptFile, ModelUnusable
from alphalayer.core.optional_dependencies import require
from alphalayer.core.request import IMAGE_UPSCALERS
from alphalayer.engine.tensors import read_tensors

RgbImage = NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""
Size = tuple[int, int]
"""Width and height in pixels."""
Upscale = Callable[[RgbImage, Size], RgbImage]
"""Function (image, size) → image of that size."""

TILE, MARGIN = 192, 16
"""Pixels of a tile that a network computes at once, and of the context around it."""
MAX_PASSES = 3
"""Most passes of a network. One pass enlarges by its scale, mostly 4."""


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
        check: Called before each tile. It may raise.

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

    def __call__(self, image: RgbImage, size: Size) -> RgbImage:
        """Return the image of another size."""
        return np.array(Image.fromarray(image).resize(size, self._method))


class _Network:
    """Upscaler that runs a network until the image is large enough, then shrinks it to the size.

    Source: AUTOMATIC1111, the upscalers with files.
    """

    def __init__(self, network: Any, device: torch.device, check: Callable[[], None]):
        on_gpu = device.type == "cuda" and network.supports_half
        self._network = network.to(device, torch.float16 if on_gpu else torch.float32).eval()
        self._check = check

    def __call__(self, image: RgbImage, size: Size) -> RgbImage:
        """Return the image of another size."""
        enlarged = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        for _ in range(MAX_PASSES):
            height, width = enlarged.shape[-2:]
            if (width >= size[0] and height >= size[1]) or self._network.scale == 1:
                break
            enlarged = self._enlarge(enlarged)
        pixels = (enlarged[0] * 255).round().byte().permute(1, 2, 0).numpy()
        return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

    @torch.inference_mode()
    def _enlarge(self, image: Tensor) -> Tensor:
        """Return an image (1, 3, H, W) enlarged by the scale of the network, on the CPU."""
        scale, (height, width) = self._network.scale, image.shape[-2:]
        result = torch.empty(1, 3, height * scale, width * scale)
        for top, bottom in _tiles(height):
            for left, right in _tiles(width):
                self._check()
                first_row, first_column = max(top - MARGIN, 0), max(left - MARGIN, 0)
                part = image[..., first_row : bottom + MARGIN, first_column : right + MARGIN].to(
                    self._network.device, self._network.dtype
                )
                output = self._network(part).float().cpu()
                y, x = (top - first_row) * scale, (left - first_column) * scale
                rows, columns = (bottom - top) * scale, (right - left) * scale
                result[..., top * scale : bottom * scale, left * scale : right * scale] = output[
                    ..., y : y + rows, x : x + columns
                ]
        return result


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
        reason = catalog.printable(str(error).strip().splitlines()[0])[:300] if str(error) else ""
        raise ModelUnusable(
            f"{path.name} is no upscaler that spandrel knows ({reason}).",
            hint="Use a file of ESRGAN, Real-ESRGAN, SwinIR, DAT or another upscaler of images.",
        ) from error
    colours = network.input_channels, network.output_channels
    if not isinstance(network, spandrel.ImageModelDescriptor) or colours != (3, 3):
        raise ModelUnusable(
            f"{path.name} does not enlarge RGB images.", hint="Use an upscaler of images."
        )
    return network


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return the tensors of a .pth file. Raises `CorruptFile` if it holds code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # the unpickler raises errors of many kinds
    except Exception as error:
        raise CorruptFile(
            f"{path.name} holds more than tensors, or is damaged.",
            hint="Only tensors are read from .pth files. Use the file as .safetensors.",
        ) from error
