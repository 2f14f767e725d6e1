"""Random numbers of an image: its initial latent and the noise of each step, from its seed.

There are three sources:

- `nv` is NVIDIA's Philox generator, see `philox`. The numbers are the same on every machine.
- `cpu` is torch's CPU generator. Its values depend on the shape.
- `gpu` is torch's generator on the engine's device. Its values differ between GPUs.

Every image has its own generators, so a batch does not change its images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import NoiseSource
from alphalayer.engine.sampling.philox import philox_normal

Shape = tuple[int, ...]


SEEDS = 2**64
"""Number of seeds of a generator. Sums of seeds start again at 0."""


class ImageGenerator:
    """Generator of the random numbers of one image.

    Raises:
        InvalidRequest: The source is "gpu" and the device is the CPU.
    """

    def __init__(self, seed: int, source: NoiseSource, device: torch.device | str = "cpu"):
        self._seed = seed = seed % SEEDS
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
            source = self._torch.device
            # a copy from pinned memory does not wait for the work that the GPU has queued
            pinned = source.type == "cpu" and self._device.type == "cuda"
            values = torch.randn(shape, generator=self._torch, device=source, pin_memory=pinned)
            return values.to(self._device, non_blocking=pinned)
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
    values = philox_normal(seeds, math.prod(shape), 0, _philox_device(torch.device(device)))
    return values.reshape(-1, *shape).to(device)


def _philox_device(device: torch.device) -> torch.device:
    # MPS has no float64
    return torch.device("cpu") if device.type == "mps" else device


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
    omega = cosine.acos().unsqueeze(1)
    arc = (((1 - strength) * omega).sin() * low + (strength * omega).sin() * high) / omega.sin()
    # both are computed: a branch would wait for the device
    return torch.where(cosine.mean() > 0.9995, low * (1 - strength) + high * strength, arc)
