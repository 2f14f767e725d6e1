"""Attention sharing of SD 1.5 against numbers of the original code, from seeded weights.

The numbers are rounded to six digits, so a relative 1e-4 of the largest value is the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tests.support.seeded_weights import seeded_weights
from torch import Tensor, nn

from alphalayer.engine.networks.unet import CrossAttention, SelfAttention, UNet, UNetConfig
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.transparency.attention_sharing import (
    ControlEncoder,
    SharedAttention,
    Sharing,
    SharingFile,
    UnitSizes,
    share_attention,
    transformer_blocks,
)
from alphalayer.engine.transparency.conditions import condition_image
from alphalayer.engine.transparency.patch import PatchFile

CONTROL = (32, 32, 64, 64, 128, 128, 256, 256)


def seeded(network: nn.Module, seed: int) -> nn.Module:
    """Fill a network in the order of its names."""
    weights = NamedWeights(network)
    weights.assign(seeded_weights(weights.shapes(), seed), torch.float32)
    return network.eval()


def input_image(width: int, height: int) -> Tensor:
    """Return the test image, flattened onto grey, (1, 3, H, W) in [-1, 1]."""
    y, x = np.mgrid[:height, :width]
    ellipse = (3136 - (2 * x - width + 1) ** 2 - (2 * y - height + 1) ** 2) // 8
    planes = (4 * x % 256, 4 * y % 256, 2 * (x + y) % 256, np.clip(ellipse, 0, 255))
    rgba = np.stack(planes, axis=-1).astype(np.uint8)
    return condition_image(rgba, (width, height), "Just Resize")


def assert_summary(
    values: Tensor, first: Sequence[float], last: Sequence[float], total: float, absolute: float
) -> None:
    flat = values.flatten().double()
    tolerance = 1e-4 * float(flat.abs().max())
    assert flat[: len(first)].tolist() == pytest.approx(first, abs=tolerance)
    assert flat[len(flat) - len(last) :].tolist() == pytest.approx(last, abs=tolerance)
    assert float(flat.abs().sum()) == pytest.approx(absolute, rel=1e-4)
    assert float(flat.sum()) == pytest.approx(total, abs=1e-4 * absolute)


def unit_inputs() -> dict[str, Tensor]:
    random = np.random.RandomState(7)
    shapes = {
        "h": (6, 4, 8),
        "ctx": (6, 5, 6),
        "o0": (1, 5, 6),
        "o2": (1, 5, 6),
        "h2": (4, 16, 8),
    }
    return {
        name: torch.from_numpy(random.standard_normal(shape)).float()
        for name, shape in shapes.items()
    }


def make_unit(
    attention: SelfAttention | CrossAttention,
    seed: int,
    sizes: UnitSizes,
    signal: Tensor | None = None,
) -> SharedAttention:
    entering = 8 if isinstance(attention, SelfAttention) else 6
    unit = SharedAttention(sizes, 8, entering, 2)
    seeded(unit, seed)
    unit.merge(attention)
    unit.replace()
    if signal is not None:
        unit.set_control(signal)
    return unit


def self_attention() -> Any:
    return seeded(SelfAttention(8, 2), 11)


@torch.no_grad()
def test_self_attention_of_three_images():
    unit = make_unit(self_attention(), 12, UnitSizes(3, 3))
    assert_summary(
        unit(unit_inputs()["h"]),
        (-0.262453, -1.398123, -0.879291),
        (-0.984439, -1.813003, 2.783829),
        -6.203536,
        204.806519,
    )


@torch.no_grad()
def test_cross_attention_of_three_images():
    attention: Any = seeded(CrossAttention(8, 2, 6), 13)
    unit, given = make_unit(attention, 14, UnitSizes(3, 3)), unit_inputs()
    assert_summary(
        unit(given["h"], unit.keys_values(given["ctx"])),
        (1.901519, -0.326270, -3.126214),
        (6.849693, 3.418099, 0.844537),
        71.908356,
        270.447845,
    )
    # each image of the set of the prompt has a prompt of its own
    texts = given["ctx"].clone()
    texts[3], texts[5] = given["o0"][0], given["o2"][0]
    assert_summary(
        unit(given["h"], unit.keys_values(texts)),
        (1.901519, -0.326270, -3.126214),
        (2.423169, 1.963211, -1.988226),
        92.156387,
        295.040649,
    )


@torch.no_grad()
def test_self_attention_of_one_image():
    unit = make_unit(self_attention(), 15, UnitSizes(1, 3))
    assert_summary(
        unit(unit_inputs()["h"]),
        (-1.974836, -1.376051, -0.317377),
        (-0.347422, 0.893021, -0.528686),
        -6.466704,
        228.556732,
    )


@torch.no_grad()
def test_self_attention_with_an_input_image():
    encoder = seeded(ControlEncoder(CONTROL), 16)
    signals = encoder(input_image(64, 64))
    assert [signal.shape[2] * signal.shape[3] for signal in signals] == [64, 16, 4, 1]
    assert_summary(signals[0], (0.051529, 0.058376, 0.050618), (), 11.355819, 701.602722)
    first = signals[3].flatten()[:3].tolist()
    assert first == pytest.approx((-0.005504, -0.017284, -0.018860), abs=2e-6)
    assert float(signals[3].abs().sum()) == pytest.approx(10.905878, rel=1e-4)
    unit = make_unit(self_attention(), 17, UnitSizes(2, 3, CONTROL), signals[1])
    assert_summary(
        unit(unit_inputs()["h2"]),
        (-4.736987, 9.104794, -1.473784),
        (1.079847, -0.902843, -0.529502),
        160.844116,
        908.196106,
    )


SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 96, 96),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}


@cache
def whole_unet() -> UNet:
    with torch.device("meta"):
        unet = UNet(UNetConfig.of(SIZES))
        reference = UNet2DConditionModel(**SIZES).state_dict()
    shapes = {name: tensor.shape for name, tensor in reference.items()}
    NamedWeights(unet).assign(seeded_weights(shapes, 100), torch.float32)
    return unet.eval()


def make_file(path: Path, sizes: UnitSizes) -> PatchFile:
    """Write the units of a file for the UNet."""
    with torch.device("meta"):
        blocks = [block for _, block in transformer_blocks(UNet(UNetConfig.of(SIZES)))]
        shapes = NamedWeights(SharingFile(sizes, blocks)).shapes()
    save_file(seeded_weights(shapes, 101), path)
    return PatchFile.at(path)


@torch.no_grad()
def denoise(rows: int) -> Tensor:
    random = np.random.RandomState(102)
    latents, contexts = (
        torch.from_numpy(random.standard_normal(shape)).float()[:rows]
        for shape in ((6, 4, 8, 8), (6, 5, 24))
    )
    unet = whole_unet()
    prepared = unet.prepare(contexts, torch.empty(rows, 0), ())
    return unet(latents, torch.tensor([500.0]), prepared)


WHOLE = {
    3: (
        (-0.026593, -0.378631, -0.586505, -0.749750),
        (0.355383, 0.642750, -0.053497),
        181.16891,
        776.29028,
    ),
    1: (
        (-0.142199, 0.054017, -0.380992, 0.363600),
        (-0.450781, -0.114414, -0.134317),
        120.78169,
        635.59106,
    ),
}
CONTROLLED = (
    (-0.135884, -0.292823, 0.118511, -0.122144),
    (-0.071763, 0.619837, -0.695386),
    169.76065,
    420.40656,
)


@pytest.mark.parametrize("images", WHOLE)
def test_whole_unet_with_units(images: int, tmp_path: Path):
    plain = denoise(6)
    file = make_file(tmp_path / "units.safetensors", UnitSizes(images, 8))
    share_attention(whole_unet(), Sharing(file, images))
    assert_summary(denoise(6), *WHOLE[images])
    share_attention(whole_unet(), None)
    assert torch.equal(denoise(6), plain)


def test_whole_unet_with_units_and_an_input_image(tmp_path: Path):
    file = make_file(tmp_path / "units.safetensors", UnitSizes(2, 8, CONTROL))
    share_attention(whole_unet(), Sharing(file, 2, control=input_image(64, 64)))
    assert_summary(denoise(4), *CONTROLLED)
    share_attention(whole_unet(), None)
