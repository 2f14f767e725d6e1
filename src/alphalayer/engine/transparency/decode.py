"""Transparent decode of LayerDiffuse: a decoded image and its latent become colour and alpha.

The network runs in eight orientations, and the lower median is kept.

Source: Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent Transparency" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphalayer.catalog import printable
from alphalayer.core.errors import (
    CommandHint,
    CorruptFile,
    InvalidRequest,
    LayerDiffuseMissing,
    ModelUnusable,
)
from alphalayer.core.request import Decode
from alphalayer.engine.base import RgbaImage
from alphalayer.engine.networks.blocks import SpatialAttention
from alphalayer.engine.networks.transparent import TransparentDecoder
from alphalayer.engine.networks.weights import NamedWeights, by_sides, limit_parameters
from alphalayer.engine.tensors import read_tensors

ORIENTATIONS = tuple(product((False, True), range(4)))
"""The passes of one decode: mirrored left to right or not, then so many quarter turns."""
MAX_TENSORS = 1000
"""Limit of the weights of a decoder whose file has fewer tensors."""
TENSORS_OF_A_PASS = 100
"""Activations that a pass computes, in tensors of the finest level [counted: 60 to 100]."""


def decoder_inputs(
    vae_sample: Tensor,
    latent_scaled: Tensor,
    scaling_factor: float,
    mode: Decode,
    shift_factor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the decoder's inputs: pixels in [0, 1] and a latent.

    Args:
        vae_sample: Output of the VAE (B, 3, H, W) in [-1, 1].
        latent_scaled: The sampler's latent (B, C, h, w).
        scaling_factor: Scale of the sampler's latent, see `LatentSpec`.
        mode: "official", as LayerDiffuse was published: float pixels and the VAE's own latent.
            "forge2", as later versions of Forge: pixels of 8 bit and the sampler's latent.
        shift_factor: Shift of the sampler's latent, see `LatentSpec`.
    """
    pixel = (vae_sample.float() / 2 + 0.5).clamp(0, 1)
    if mode == "forge2":
        return (pixel * 255).floor() / 255, latent_scaled
    return pixel, latent_scaled / scaling_factor + shift_factor


@torch.inference_mode()
def decode_transparent(
    decoder: TransparentDecoder, pixel: Tensor, latent: Tensor, passes_at_once: int = 8
) -> Tensor:
    """Decode pixels and a latent to alpha and straight colour.

    Args:
        decoder: The network.
        pixel: Pixels (1, 3, H, W) in [0, 1].
        latent: Latent (1, C, h, w).
        passes_at_once: Passes of one call. It trades memory for speed, and changes the result by
            rounding only. Quarter turns swap the sides, so an image that is not square takes at
            least two calls.

    Returns:
        Alpha, then straight RGB (1, 4, H, W) in [0, 1], in the decoder's dtype.

    Raises:
        InvalidRequest: A side is not a multiple of `decoder.multiple_of`.
        ModelUnusable: The latent has another shape than the decoder was made for.
    """
    check_sizes(decoder, pixel, latent)
    weight = decoder.conv_in.weight
    pixel, latent = (values.to(weight.device, weight.dtype) for values in (pixel, latent))
    results: list[Tensor] = []
    for batch in _batches(pixel.shape[-2] == pixel.shape[-1], passes_at_once):
        outputs = decoder(
            torch.cat([_turn(pixel, *way) for way in batch]),
            torch.cat([_turn(latent, *way) for way in batch]),
        ).clamp_(0, 1)
        results += [
            _turn_back(output[None], *way).contiguous()
            for output, way in zip(outputs, batch, strict=True)
        ]
    return lower_median(results)


def choose_passes(decoder: TransparentDecoder, pixel: Tensor, limit: int) -> int:
    """Return how many passes one call of the decoder should compute.

    A GPU takes as many as its memory allows. A CPU takes 2, because the activations of more leave
    its cache [measured]. But each call reads all weights from memory. So it takes more if the
    weights are large beside the image: until they are half as large as the activations of a call.

    Args:
        decoder: The network.
        pixel: Pixels (1, 3, H, W).
        limit: Most passes that the memory mode allows.
    """
    if decoder.conv_in.weight.device.type != "cpu":
        return limit
    weights = sum(weight.numel() for weight in decoder.parameters())
    activations = TENSORS_OF_A_PASS * decoder.conv_in.out_channels * pixel[0, 0].numel()
    return min(limit, max(2, math.ceil(2 * weights / activations)))


def check_sizes(decoder: TransparentDecoder, pixel: Tensor, latent: Tensor) -> None:
    """Raise `InvalidRequest` or `ModelUnusable` for sizes that do not fit."""
    height, width = pixel.shape[-2:]
    if height % decoder.multiple_of or width % decoder.multiple_of:
        raise InvalidRequest(
            f"the transparent decoder cannot read an image of {width}x{height}.",
            hint=f"Use a width and height that are multiples of {decoder.multiple_of}.",
        )
    channels = decoder.latent_conv_in.in_channels
    expected = (channels, height >> decoder.latent_block, width >> decoder.latent_block)
    if tuple(latent.shape[1:]) != expected:
        raise ModelUnusable(
            f"the transparent decoder expects a latent of {by_sides(expected)} for an image of "
            f"{width}x{height}, and the model gives {by_sides(latent.shape[1:])}.",
            hint="Use the decoder that was made for this model's VAE.",
        )


def lower_median(values: list[Tensor]) -> Tensor:
    """Return the elementwise median, of an even count the lower of the middle two.

    A sorting network of minima and maxima returns the values of `torch.median`. It needs no index
    and no transposed copy.

    Args:
        values: Tensors of one shape. They are overwritten.
    """
    for low, high in _sorting_network(len(values)):
        smaller = torch.minimum(values[low], values[high])
        torch.maximum(values[low], values[high], out=values[high])
        values[low] = smaller
    return values[(len(values) - 1) // 2]


def _sorting_network(count: int) -> Iterator[tuple[int, int]]:
    """Yield the compare-exchanges that sort so many values: 19 for 8.

    Source: the odd-even merge sort of Batcher, "Sorting networks and their applications" (1968).
    """
    powers = [2**i for i in range((count - 1).bit_length())]
    for merged in powers:
        for distance in reversed(powers[: powers.index(merged) + 1]):
            for first in range(distance % merged, count - distance, 2 * distance):
                for low in range(first, min(first + distance, count - distance)):
                    if low // (2 * merged) == (low + distance) // (2 * merged):
                        yield low, low + distance


def _batches(square: bool, at_once: int) -> Iterator[Sequence[tuple[bool, int]]]:
    """Yield the orientations in batches of equal shape."""
    upright, lying = (tuple(way for way in ORIENTATIONS if way[1] % 2 == odd) for odd in (0, 1))
    for group in [upright + lying] if square else [upright, lying]:
        for start in range(0, len(group), max(1, at_once)):
            yield group[start : start + max(1, at_once)]


def _turn(image: Tensor, flip: bool, turns: int) -> Tensor:
    return torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))


def _turn_back(image: Tensor, flip: bool, turns: int) -> Tensor:
    back = torch.rot90(image, -turns, (-2, -1))
    return back.flip(-1) if flip else back


def to_uint8(decoded: Tensor) -> RgbaImage:
    """Convert alpha and RGB (1, 4, H, W) in [0, 1] to RGBA (H, W, 4).

    Values are multiplied by 255 in the tensor's own dtype and truncated, as the published decoder
    does. With float16 that changes some values by one.
    """
    scaled = (decoded[0] * 255).float().clamp(0, 255).to(torch.uint8)
    return scaled[[1, 2, 3, 0]].permute(1, 2, 0).contiguous().cpu().numpy()


def to_opaque(rgb: Tensor) -> RgbaImage:
    """Convert RGB (1, 3, H, W) in [-1, 1] to opaque RGBA (H, W, 4) by truncation."""
    image = (
        ((rgb[0].float() + 1) / 2)
        .clamp(0, 1)
        .mul(255)
        .to(torch.uint8)
        .permute(1, 2, 0)
        .cpu()
        .numpy()
    )
    return np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)


def load_decoder(
    path: Path,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> TransparentDecoder:
    """Read a decoder, frozen and on the CPU, from a safetensors file.

    Args:
        path: The file, in float16 or float32.
        config: Arguments of `TransparentDecoder`. Others are read from the shapes in the file, or
            are as published.
        dtype: Number format to run in.
        memory_format: Order of the weights of convolutions in memory.

    Raises:
        LayerDiffuseMissing: The file does not exist.
        CorruptFile: The file is not readable as safetensors.
        ModelUnusable: The file holds something else, or sizes that the config does not describe.
    """
    weights = read_weights(path)
    own = {key: value for key, value in (config or {}).items() if not key.startswith("_")}
    try:
        # a file of another kind is compared with the published network
        with torch.device("meta"), limit_parameters(max(len(weights), MAX_TENSORS)):
            decoder = TransparentDecoder(**{**_sizes(weights), **own})
        _check_runs(decoder, own)
    # a config that is not trusted raises anything, such as divisions by zero
    except Exception as error:
        raise ModelUnusable(
            f"the decoder's config beside {path} does not describe a transparent decoder "
            f"({printable(str(error))[:300]}).",
            hint="Its keys are the sizes of the network, such as block_out_channels and "
            "latent_channels.",
        ) from error
    _check_fit(decoder, weights, path)
    NamedWeights(decoder).assign(weights, dtype, memory_format)
    return decoder.eval()


def _check_runs(decoder: TransparentDecoder, config: Mapping[str, Any]) -> None:
    """Check numbers that no tensor shows, and colours. Raises `ValueError`."""
    for name in ("norm_num_groups", "attention_head_dim"):
        if type(value := config.get(name, 1)) is not int or value < 1:
            raise ValueError(f"{name}: got {value}, expected 1 or more")
    for module in decoder.modules():
        if isinstance(module, SpatialAttention):
            width = module.group_norm.num_channels
            if not module.heads or width % module.heads:
                raise ValueError(f"{module.heads} heads do not divide {width} channels")
    colours = decoder.conv_in.in_channels, decoder.conv_out.out_channels
    if colours != (3, 4):
        raise ValueError(f"it reads and returns {by_sides(colours)} channels, expected 3x4")


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the sizes that a decoder's tensors show, or nothing for other tensors."""
    if "latent_conv_in.weight" not in weights:
        return {}
    levels = sorted(
        {int(name.split(".")[1]) for name in weights if name.startswith("down_blocks.")}
    )
    first = {
        name
        for name in weights
        if name.startswith("down_blocks.0.resnets.") and name.endswith("conv1.weight")
    }
    return {
        "block_out_channels": [
            len(weights[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in levels
        ],
        "layers_per_block": len(first),
        "attention_blocks": sum(
            f"down_blocks.{level}.attentions.0.to_q.weight" in weights for level in levels
        ),
        "latent_channels": weights["latent_conv_in.weight"].shape[1],
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto the CPU.

    Raises:
        LayerDiffuseMissing: The file does not exist.
        CorruptFile: The file is not readable as safetensors.
    """
    if not path.is_file():
        raise LayerDiffuseMissing(
            f"{path} is not there.",
            hint=CommandHint("Get the LayerDiffuse files:", "models pull layerdiffuse"),
        )
    try:
        return read_tensors(path)
    except CorruptFile as error:
        error.hint = CommandHint("Get it again:", "models pull layerdiffuse")
        raise


def _check_fit(decoder: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise `ModelUnusable` unless a file has exactly the decoder's weights."""
    expected = NamedWeights(decoder).shapes()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != shapes:
        raise ModelUnusable(
            f"{path.name} is not the transparent decoder: it holds {_describe(shapes, expected)}.",
            hint=CommandHint("Put the right file under this name:", "models pull layerdiffuse"),
        )


KINDS = (
    ("::lora::", "a LayerDiffuse patch"),
    ("::diff::", "a LayerDiffuse patch"),
    ("model.diffusion_model.", "a Stable Diffusion checkpoint"),
    ("first_stage_model.", "a VAE"),
    ("latent_conv_in.", "a transparent decoder of other sizes"),
    ("blocks.16.", "a transparent encoder"),
    ("quant_conv.", "a VAE"),
    ("time_embedding.", "a UNet"),
    ("lora", "a LoRA"),
)
"""Kind of a file by a part of a tensor's name. The first match counts."""


def _describe(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str:
    kind = next(
        (kind for mark, kind in KINDS if any(mark in name for name in shapes)),
        f"{len(shapes)} unknown tensors",
    )
    names = {*shapes, *expected}
    differing = sorted(name for name in names if shapes.get(name) != expected.get(name))
    first = differing[0]
    return (
        f"{kind} ({len(differing)} tensors differ, first {first}: "
        f"{by_sides(shapes.get(first))}, not {by_sides(expected.get(first))})"
    )
