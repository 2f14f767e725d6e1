"""Samplers: each takes a noisy latent down a list of noise levels with a denoiser, as one plain function.

Written in the variance-exploding frame: x = x0 + sigma * noise. `sigmas` (n + 1,) falls to 0 and stays on the CPU; everything is float32.
Knows nothing of models, prompts or where noise comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

Denoise = Callable[[Tensor, float, int], Tensor]
"""(x, sigma, step) → predicted clean latent."""
Noise = Callable[[float, float], Tensor]
"""(sigma, sigma_next) → unit-variance noise of that interval, shaped like x."""
OnStep = Callable[[int, Tensor, Tensor], None]
"""(steps done, x, predicted clean latent), after each step."""


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Euler's method on the probability flow (Karras et al. 2022); DDIM with eta 0 (Song et al. 2021) is the same."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        x = x + (x - clean) / sigma * (following - sigma)
        on_step(i + 1, x, clean)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Euler to a level below the next one, then fresh noise up to it."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        down, up = _ancestral(sigma, following)
        x = x + (x - clean) / sigma * (down - sigma)
        if following > 0:
            x = x + noise(sigma, following) * up
        on_step(i + 1, x, clean)
    return x


def heun(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 2 without churn); the last step is Euler's."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        slope = (x - clean) / sigma
        guess = x + slope * (following - sigma)
        if following > 0:
            slope = (slope + (guess - denoise(guess, following, i)) / following) / 2
        x = x + slope * (following - sigma)
        on_step(i + 1, x, clean)
    return x


def lcm(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Latent consistency sampling (Luo et al. 2023): jump to the clean latent, noise it to the next level."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        x = clean + noise(sigma, following) * following if following > 0 else clean
        on_step(i + 1, x, clean)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022)."""
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        if following == 0:
            x = clean
        else:
            h = math.log(sigma / following)
            target = clean
            if previous is not None:
                target = clean + (clean - previous[0]) * (h / (2 * previous[1]))
            x = following / sigma * x - math.expm1(-h) * target
            previous = clean, h
        on_step(i + 1, x, clean)
    return x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form, eta 1 (Lu et al. 2022)."""
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        if following == 0:
            x = clean
        else:
            h = math.log(sigma / following)
            x = following / sigma * math.exp(-h) * x - math.expm1(-2 * h) * clean
            if previous is not None:
                x = x - 0.5 * math.expm1(-2 * h) * (h / previous[1]) * (clean - previous[0])
            x = x + noise(sigma, following) * (following * math.sqrt(-math.expm1(-2 * h)))
            previous = clean, h
        on_step(i + 1, x, clean)
    return x


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """SDE-DPM-Solver++(3M), eta 1: third-order multistep in log sigma, lower order while history is short."""
    history: list[tuple[Tensor, float]] = []
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        if following == 0:
            x = clean
        else:
            h = math.log(sigma / following)
            x = (
                math.exp(-2 * h) * x
                - math.expm1(-2 * h) * clean
                + _higher_orders(clean, h, history)
            )
            x = x + noise(sigma, following) * (following * math.sqrt(-math.expm1(-2 * h)))
            history = [(clean, h), *history[:1]]
        on_step(i + 1, x, clean)
    return x


def _higher_orders(clean: Tensor, h: float, history: list[tuple[Tensor, float]]) -> Tensor | float:
    """What the second and third order add to a step of `dpmpp_3m_sde`; `history` is newest first."""
    if not history:
        return 0.0
    phi_2 = math.expm1(-2 * h) / (2 * h) + 1
    r_0 = history[0][1] / h
    slope = (clean - history[0][0]) / r_0
    if len(history) == 1:
        return phi_2 * slope
    r_1 = history[1][1] / h
    bend = (slope - (history[0][0] - history[1][0]) / r_1) / (r_0 + r_1)
    return phi_2 * (slope + bend * r_0) - (phi_2 / (2 * h) - 0.5) * bend


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """SDE-DPM-Solver++(2S) with the middle at half the log interval, eta 1: two evaluations a step."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        if following == 0:
            x = clean
        else:
            middle = _geometric_middle(sigma, following)
            down, up = _ancestral(sigma, middle)
            half = down / sigma * x + (1 - down / sigma) * clean + noise(sigma, middle) * up
            # weights of the two evaluations: 1 - 1/2r and 1/2r with r = 1/2
            target = denoise(half, middle, i)
            down, up = _ancestral(sigma, following)
            x = down / sigma * x + (1 - down / sigma) * target + noise(sigma, following) * up
        on_step(i + 1, x, clean)
    return x


def unipc(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """UniPC, order 3, B2 (Zhao et al. 2023): diffusers' scheduler, driven by our levels in its variance-preserving frame."""
    scheduler = cast(Any, UniPCMultistepScheduler(solver_order=3, prediction_type="sample"))
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.arange(len(sigmas) - 1)
    sample = x / math.sqrt(sigmas[0] ** 2 + 1)
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(sample * math.sqrt(sigma**2 + 1), sigma, i)
        sample = scheduler.step(clean, i, sample, return_dict=False)[0]
        x = sample * math.sqrt(following**2 + 1)
        on_step(i + 1, x, clean)
    return x


@dataclass(frozen=True)
class Sampler:
    """A row of the table: the function, whether its noise comes from a Brownian tree, from fresh draws or not at all, and whether
    that ecosystem leaves the lowest level of its schedule out."""

    function: Callable[[Denoise, Tensor, Sequence[float], Noise, OnStep], Tensor]
    noise: Literal["none", "fresh", "brownian"]
    skips_lowest: bool = False


SAMPLERS = {
    "DPM++ 2M SDE": Sampler(dpmpp_2m_sde, "brownian"),
    "DPM++ 2M": Sampler(dpmpp_2m, "none"),
    "DPM++ SDE": Sampler(dpmpp_sde, "brownian"),
    "DPM++ 3M SDE": Sampler(dpmpp_3m_sde, "brownian", skips_lowest=True),
    "Euler": Sampler(euler, "none"),
    "Euler a": Sampler(euler_ancestral, "fresh"),
    "Heun": Sampler(heun, "none"),
    "DDIM": Sampler(euler, "none"),
    "UniPC": Sampler(unipc, "none"),
    "LCM": Sampler(lcm, "fresh"),
}


def sample(
    name: str, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, on_step: OnStep
) -> Tensor:
    """Take `x` (B, C, h, w), noised to `sigmas[0]`, to the clean latent with the sampler `name`."""
    return SAMPLERS[name].function(denoise, x, [float(sigma) for sigma in sigmas], noise, on_step)


def brownian_intervals(name: str, sigmas: Tensor) -> list[tuple[float, float]]:
    """The intervals whose Brownian noise a sampler will ask for, in order; empty for samplers without."""
    if SAMPLERS[name].noise != "brownian":
        return []
    steps = [
        (sigma, following)
        for sigma, following in _pairs([float(sigma) for sigma in sigmas])
        if following > 0
    ]
    if name != "DPM++ SDE":
        return steps
    return [each for a, b in steps for each in ((a, _geometric_middle(a, b)), (a, b))]


def _pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(sigmas))


def _geometric_middle(sigma: float, following: float) -> float:
    return math.exp((math.log(sigma) + math.log(following)) / 2)


def _ancestral(sigma: float, following: float) -> tuple[float, float]:
    """(level to go down to, noise to add) so that together they make `following`, eta 1."""
    up = min(following, following * math.sqrt(sigma**2 - following**2) / sigma)
    return math.sqrt(following**2 - up**2), up
