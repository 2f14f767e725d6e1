"""Random numbers of an image: its initial latent and the noise of each step, from its seed.

There are three sources:

- `nv` evaluates NVIDIA's Philox generator in float64. The numbers are the same on every machine.
- `cpu` is torch's CPU generator. Its values depend on the shape.
- `gpu` is torch's generator on the engine's device. Its values differ between GPUs.

Every image has its own generators, so a batch does not change its images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import NoiseSource

Shape = tuple[int, ...]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_UNIT = float(np.float32(2.3283064e-10))
_TURN = float(np.float32(2.3283064e-10 * 6.2831855))
_VALUES_PER_CALL = 1 << 20
"""Limit of one Philox evaluation on a GPU, which holds about ten 8-byte words for each value."""


def philox_normal(
    seeds: Sequence[int], count: int, call: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Generate the standard normal values of a `randn` call on CUDA generators.

    The generator is Philox-4x32-10 with the counter (call, 0, element, 0). Its first two words go
    through Box-Muller. It uses integers and float64 only, so every device gives the same values.
    A GPU's own generator gives them in float32 arithmetic, if it has a thread for each element.

    Args:
        seeds: One seed for each generator, below 2^64.
        count: Values of each generator.
        call: Number of `randn` calls on the generators before this one.
        device: Where to compute.

    Returns:
        float32 (seeds, count), on `device`.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". PyTorch's CUDA
        kernels, for Box-Muller and the counter.
    """
    words = [
        torch.full((count,), call, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.arange(count, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
    ]
    first_keys = torch.tensor(
        [[seed & _LOW for seed in seeds], [(seed >> 32) & _LOW for seed in seeds]]
    )[..., None]
    keys = (
        first_keys + torch.arange(10)[:, None, None, None] * torch.tensor(_KEY_STEPS)[:, None, None]
    ) & _LOW
    # the copy does not wait for the work that the GPU has queued
    round_keys = keys.flatten(0, 1).to(device, non_blocking=True).unbind()
    for key, other_key in zip(round_keys[::2], round_keys[1::2], strict=True):
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((second >> 32) & _LOW) ^ words[1] ^ key,
            second & _LOW,
            ((first >> 32) & _LOW) ^ words[3] ^ other_key,
            first & _LOW,
        ]
    u = words[0].double() * _UNIT + _UNIT / 2
    v = words[1].double() * _TURN + _TURN / 2
    return (torch.sqrt(-2.0 * torch.log(u)) * torch.sin(v)).float()


class ImageGenerator:
    """Generator of the random numbers of one image.

    Raises:
        InvalidRequest: The source is "gpu" and the device is the CPU.
    """

    def __init__(self, seed: int, source: NoiseSource, device: torch.device | str = "cpu"):
        self._seed = seed
        self._source: NoiseSource = source
        self._device = torch.device(device)
        self._calls = 0
        if source == "gpu" and self._device.type == "cpu":
            raise InvalidRequest(
                '"gpu" needs a GPU and this engine runs on the CPU.',
                hint='Use "nv" or "cpu".',
                field="noise",
            )
        self._torch = torch.Generator(self._device if source == "gpu" else "cpu").manual_seed(seed)

    def randn(self, shape: Shape) -> Tensor:
        """Return the next standard normal values, float32, on the generator's device."""
        if self._source != "nv":
            source_device = self._torch.device
            return torch.randn(shape, generator=self._torch, device=source_device).to(self._device)
        values = philox_normal(
            [self._seed], math.prod(shape), self._calls, _philox_device(self._device)
        )
        self._calls += 1
        return values.reshape(shape).to(self._device)


def randn(
    seeds: Sequence[int], shape: Shape, source: NoiseSource, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the first standard normal values of new generators.

    Args:
        seeds: One seed for each generator.
        shape: Shape of the values of one generator.
        source: Kind of generator.
        device: Device of the result.

    Returns:
        float32 (seeds, *shape).

    Raises:
        InvalidRequest: The source is "gpu" and the device is the CPU.
    """
    if source != "nv":
        return torch.stack([ImageGenerator(seed, source, device).randn(shape) for seed in seeds])
    count, philox_device = math.prod(shape), _philox_device(torch.device(device))
    # a CPU is fastest with one seed at a time
    group = max(1, _VALUES_PER_CALL // count) if philox_device.type == "cuda" else 1
    values = [
        philox_normal(seeds[i : i + group], count, 0, philox_device)
        for i in range(0, len(seeds), group)
    ]
    return torch.cat(values).reshape(-1, *shape).to(device)


def _philox_device(device: torch.device) -> torch.device:
    # MPS has no float64
    return device if device.type == "cuda" else torch.device("cpu")


def initial_noise(
    generators: Sequence[ImageGenerator],
    shape: Shape,
    variations: Sequence[ImageGenerator] = (),
    variation_strength: float = 0.0,
) -> Tensor:
    """Generate the initial noise of a batch, with unit variance.

    Args:
        generators: One generator for each of B images.
        shape: Shape of one image's noise, (C, h, w).
        variations: With a variation strength: a second generator for each image.
        variation_strength: Share of the way from the first to the second noise, from 0 to 1.

    Returns:
        float32 (B, *shape).
    """
    images: list[Tensor] = []
    for i, generator in enumerate(generators):
        noise = generator.randn(shape)
        images.append(
            slerp(variation_strength, noise, variations[i].randn(shape))
            if variation_strength
            else noise
        )
    return torch.stack(images)


def slerp(strength: float, low: Tensor, high: Tensor) -> Tensor:
    """Interpolate two noises on the sphere, along their height axis.

    Nearly parallel noise (mean cosine above 0.9995) is interpolated linearly.

    Args:
        strength: Share of the way from `low` to `high`, from 0 to 1.
        low: Noise (C, h, w).
        high: Noise shaped like `low`.

    Returns:
        Noise shaped like `low`.

    Source: AUTOMATIC1111, variation seeds (`slerp` in `modules/rng.py`).
    """
    low_unit, high_unit = (noise / noise.norm(dim=1, keepdim=True) for noise in (low, high))
    cosine = (low_unit * high_unit).sum(1)
    if cosine.mean() > 0.9995:
        return low * (1 - strength) + high * strength
    omega = cosine.acos().unsqueeze(1)
    return (((1 - strength) * omega).sin() * low + (strength * omega).sin() * high) / omega.sin()
