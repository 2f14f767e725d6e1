"""Input images as conditions of the denoiser: flattened onto grey, fitted to the size, encoded.

Source: the SDXL conditional modes of LayerDiffuse (Zhang and Agrawala, 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from alphalayer.core.request import ResizeMode
from alphalayer.engine.base import RgbaImage
from alphalayer.images.codecs import Size
from alphalayer.images.resampling import fit_condition, flatten_on_grey


def condition_image(rgba: RgbaImage, size: Size, resize_mode: ResizeMode) -> Tensor:
    """Return an input image for the VAE, float32 (1, 3, height, width) in [-1, 1].

    Args:
        rgba: Input image (H, W, 4), uint8.
        size: Size of the generated image.
        resize_mode: How the image is fitted to `size`.
    """
    fitted = fit_condition(flatten_on_grey(rgba), size, resize_mode)
    return torch.from_numpy(fitted).permute(2, 0, 1)[None] * 2 - 1
