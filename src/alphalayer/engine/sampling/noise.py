"""Random numbers of a picture: the starting latent and the noise of each step, reproducible from an image seed.

Three sources. `nv` evaluates NVIDIA's Philox generator in float64: the same numbers on every machine. `cpu` is torch's CPU
generator (its values depend on the shape). `gpu` is torch's generator on the device at hand, which differs between GPUs.
Every image has generators of its own, so that a batch does not change its images.
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
_PHILOX_AT_ONCE = 1 << 20
"""Values of one evaluation on a GPU, which holds some ten words of 8 bytes each meanwhile; a CPU is quickest with one seed at a time."""
_TURN = float(np.float32(2.3283064e-10 * 6.2831855))


def philox_normal(
    seeds: Sequence[int], count: int, draw: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """`count` standard normal values a seed, float32 (seeds, count): those of the `draw`-th `randn` call on CUDA generators with these
    seeds.

    Philox-4x32-10 (Salmon et al. 2011) with counter (draw, 0, element, 0), the first two words through Box-Muller as in
    PyTorch's CUDA kernels. Integers and float64 only, so every device gives the same values; a GPU's own generator equals
    them up to its float32 arithmetic, where it has a thread for each element.
    """
    words = [
        torch.full((count,), draw, device=device),
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
    # so that it does not wait for what the GPU has to do before
    of_rounds = keys.flatten(0, 1).to(device, non_blocking=True).unbind()
    for key, other_key in zip(of_rounds[::2], of_rounds[1::2], strict=True):
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
    """The generator of one image: `randn` after `randn`, each a float32 tensor on `device`."""

    def __init__(self, seed: int, source: NoiseSource, device: torch.device | str = "cpu"):
        self._seed = seed
        self._source: NoiseSource = source
        self._device = torch.device(device)
        self._draws = 0
        if source == "gpu" and self._device.type == "cpu":
            raise InvalidRequest(
                '"gpu" needs a GPU and this engine works on the CPU.',
                hint='Use "nv" or "cpu".',
                field="noise",
            )
        self._torch = torch.Generator(self._device if source == "gpu" else "cpu").manual_seed(seed)

    def randn(self, shape: Shape) -> Tensor:
        """The next standard normal values."""
        if self._source != "nv":
            place = self._torch.device
            return torch.randn(shape, generator=self._torch, device=place).to(self._device)
        values = philox_normal(
            [self._seed], math.prod(shape), self._draws, _place_of_philox(self._device)
        )
        self._draws += 1
        return values.reshape(shape).to(self._device)


def randn(
    seeds: Sequence[int], shape: Shape, source: NoiseSource, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal values of fresh generators, float32 (seeds, *shape)."""
    if source != "nv":
        return torch.stack([ImageGenerator(seed, source, device).randn(shape) for seed in seeds])
    count, place = math.prod(shape), _place_of_philox(torch.device(device))
    at_once = max(1, _PHILOX_AT_ONCE // count) if place.type == "cuda" else 1
    drawn = [
        philox_normal(seeds[i : i + at_once], count, 0, place)
        for i in range(0, len(seeds), at_once)
    ]
    return torch.cat(drawn).reshape(-1, *shape).to(device)


def _place_of_philox(device: torch.device) -> torch.device:
    """MPS has no float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def initial_noise(
    generators: Sequence[ImageGenerator],
    shape: Shape,
    variations: Sequence[ImageGenerator] = (),
    variation_strength: float = 0.0,
) -> Tensor:
    """The starting noise of a batch, (B, *shape), unit variance: each image's first draw.

    With a variation strength it is turned towards the first draw of the image's variation generator (`slerp`).
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
    """Spherical interpolation of (C, h, w) noise along its height axis, as webui's variation seeds do.

    Nearly parallel noise (mean cosine above 0.9995) is mixed linearly.
    """
    low_unit, high_unit = (each / each.norm(dim=1, keepdim=True) for each in (low, high))
    cosine = (low_unit * high_unit).sum(1)
    if cosine.mean() > 0.9995:
        return low * (1 - strength) + high * strength
    omega = cosine.acos().unsqueeze(1)
    return (((1 - strength) * omega).sin() * low + (strength * omega).sin() * high) / omega.sin()
