"""Transparent encode of LayerDiffuse: colour and alpha become a latent.

Source: Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent Transparency" (2024).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from alphalayer.core.errors import CommandHint, ModelUnusable
from alphalayer.engine.base import RgbaImage
from alphalayer.engine.families.base import LatentSpec
from alphalayer.engine.networks.transparent import TransparentEncoder
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.transparency.decode import read_weights

Pixels = NDArray[np.float32]
SHRINK = 1.2
"""Ratio of the sides of two levels of the pyramid, at most 2 where sides are rounded down."""


def load_encoder(path: Path) -> TransparentEncoder:
    """Read the transparent encoder, frozen, float32 and on the CPU.

    Raises:
        LayerDiffuseMissing, CorruptFile: See `read_weights`.
        ModelUnusable: The file holds something else.
    """
    weights = read_weights(path)
    biases = [weights.get(f"blocks.{2 * i}.bias") for i in range(len(TransparentEncoder.STRIDES))]
    widths = [bias.numel() for bias in biases if bias is not None and bias.numel()]
    with torch.device("meta"):
        # a file of another kind is compared with the published network
        encoder = TransparentEncoder(*([widths] if len(widths) == len(biases) else []))
    if NamedWeights(encoder).shapes() != {name: tuple(w.shape) for name, w in weights.items()}:
        raise ModelUnusable(
            f"{path.name} is not the transparent encoder.",
            hint=CommandHint(
                "Put the right file under this name:", "models pull layerdiffuse-encoder"
            ),
        )
    NamedWeights(encoder).assign(weights, torch.float32)
    return encoder.eval()


def fits_latent(encoder: TransparentEncoder, latent: LatentSpec) -> bool:
    """Return whether the offsets of an encoder have the shape of a model's latent."""
    return (latent.channels, latent.cell) == (encoder.channels, encoder.cell)


def pad_colours(rgba: RgbaImage) -> Pixels:
    """Continue the colours of visible pixels into transparent ones.

    Each level of a pyramid is laid over the coarser one, enlarged. So colours of invisible pixels
    have no effect, also where the image is resampled.

    Args:
        rgba: Image (H, W, 4).

    Returns:
        RGB in [0, 1], (H, W, 3).
    """
    values = rgba.astype(np.float32) / 255
    alpha = values[..., 3:]
    finest: Pixels = np.concatenate([values[..., :3] * alpha, alpha], axis=-1, dtype=np.float32)
    levels = [finest]
    while min(levels[-1].shape[:2]) > 1:
        height, width = levels[-1].shape[:2]
        shrunk = _average(levels[-1], int(height / SHRINK), axis=0)
        levels.append(_average(shrunk, int(width / SHRINK), axis=1))
    coarsest = levels[-1].sum((0, 1))
    colour: Pixels = coarsest[None, None, :3] / max(float(coarsest[3]), 1e-8)
    for level in reversed(levels):
        coarser = _enlarge(colour, level.shape[:2])
        colour = np.add(level[..., :3], coarser * (1 - level[..., 3:]), dtype=np.float32)
    return colour.clip(0, 1)


def _average(image: Pixels, new: int, axis: int) -> Pixels:
    """Shrink an axis of an image to `new` pixels, each the mean of the area below it.

    At a ratio of at most 2, this area touches three pixels.
    """
    old = image.shape[axis]
    edges = np.arange(new + 1) * (old / new)
    result: Pixels = np.zeros((1, 1, 1), np.float32)
    for tap in range(3):
        below = edges[:-1].astype(int) + tap
        covered = np.minimum(edges[1:], below + 1) - np.maximum(edges[:-1], below)
        weights = np.expand_dims(covered.clip(0) * (new / old), (1 - axis, 2))
        touched = image.take(below.clip(max=old - 1), axis)
        touched *= weights.astype(np.float32)
        result = np.add(touched, result, out=touched)
    return result


def _enlarge(image: Pixels, size: tuple[int, ...]) -> Pixels:
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    enlarged = F.interpolate(tensor, size=size[:2], mode="bilinear")
    return enlarged[0].permute(1, 2, 0).numpy()


def on_grey(rgba: Tensor) -> Tensor:
    """Return what the VAE reads: colour premultiplied about grey.

    Args:
        rgba: Straight RGBA (B, 4, H, W) in [0, 1].

    Returns:
        RGB (B, 3, H, W) in [-1, 1].
    """
    return (rgba[:, :3] * 2 - 1) * rgba[:, 3:]


def encode_offset(encoder: TransparentEncoder, rgba: Tensor) -> Tensor:
    """Return the offset of a latent, in standard deviations, (B, 4, H/8, W/8).

    Args:
        encoder: The network.
        rgba: RGBA with padded colours (B, 4, H, W) in [0, 1].
    """
    weight = next(encoder.parameters())
    return encoder(rgba[:, [3, 0, 1, 2]].to(weight.device, weight.dtype))
