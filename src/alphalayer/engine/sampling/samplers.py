"""Samplers: one plain function each, from a noisy latent to a clean one.

All are in the variance-exploding frame: x = x0 + sigma * noise. Latents are float32 (B, C, h, w).
Noise levels are Python floats. A list of n + 1 levels falls to 0 and gives n steps.
This module is independent of models, prompts and the source of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

Denoise = Callable[[Tensor, float, int], Tensor]
"""Function (x, sigma, step) → predicted clean latent, shaped like x. Steps count from 0."""
Noise = Callable[[float, float], Tensor]
"""Function (sigma, sigma_next) → unit-variance noise of that interval, shaped like x."""
OnStep = Callable[[int, Tensor, Tensor], None]
"""Callback (completed steps, x, predicted clean latent), called after each step."""


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Follow the probability flow with Euler's method.

    DDIM with eta 0 is the same update.

    Source: Karras et al. 2022, arXiv 2206.00364. Song et al. 2021, arXiv 2010.02502.
    """
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        x = x + (x - clean) / sigma * (following - sigma)
        on_step(i + 1, x, clean)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Step below the next level with Euler's method, then add fresh noise up to it.

    Source: k-diffusion, `sample_euler_ancestral`.
    """
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
    """Follow the probability flow with Heun's second-order method.

    The last step is Euler's, because the slope at level 0 is undefined.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn.
    """
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        slope = (x - clean) / sigma
        predicted = x + slope * (following - sigma)
        if following > 0:
            slope = (slope + (predicted - denoise(predicted, following, i)) / following) / 2
        x = x + slope * (following - sigma)
        on_step(i + 1, x, clean)
    return x


def lcm(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Jump to the clean latent, then add noise up to the next level.

    Source: Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378.
    """
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        x = clean + noise(sigma, following) * following if following > 0 else clean
        on_step(i + 1, x, clean)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Follow the probability flow with DPM-Solver++(2M): second-order multistep.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """
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
    """Solve the reverse SDE with SDE-DPM-Solver++(2M): midpoint form, eta 1.

    Source: Lu et al. 2022, arXiv 2211.01095. k-diffusion, `sample_dpmpp_2m_sde`.
    """
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
    """Solve the reverse SDE with SDE-DPM-Solver++(3M): third-order multistep, eta 1.

    The first two steps have a lower order, because their history is short.

    Source: Lu et al. 2022, arXiv 2211.01095. k-diffusion, `sample_dpmpp_3m_sde`.
    """
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
    """Return the second- and third-order terms of a step of `dpmpp_3m_sde`.

    Args:
        clean: Predicted clean latent of this step.
        h: Length of this step in log sigma.
        history: Clean latents and step lengths of up to two steps before, newest first.
    """
    if not history:
        return 0.0
    phi_2 = math.expm1(-2 * h) / (2 * h) + 1
    r_0 = history[0][1] / h
    slope = (clean - history[0][0]) / r_0
    if len(history) == 1:
        return phi_2 * slope
    r_1 = history[1][1] / h
    curvature = (slope - (history[0][0] - history[1][0]) / r_1) / (r_0 + r_1)
    return phi_2 * (slope + curvature * r_0) - (phi_2 / (2 * h) - 0.5) * curvature


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Solve the reverse SDE with SDE-DPM-Solver++(2S): single-step, eta 1.

    Each step evaluates the denoiser twice. The second level is the geometric mean of both ends.

    Source: Lu et al. 2022, arXiv 2211.01095. k-diffusion, `sample_dpmpp_sde`.
    """
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        if following == 0:
            x = clean
        else:
            middle = _geometric_middle(sigma, following)
            down, up = _ancestral(sigma, middle)
            half = down / sigma * x + (1 - down / sigma) * clean + noise(sigma, middle) * up
            # The weights are 1 - 1/2r and 1/2r. With r = 1/2 only the second evaluation counts.
            target = denoise(half, middle, i)
            down, up = _ancestral(sigma, following)
            x = down / sigma * x + (1 - down / sigma) * target + noise(sigma, following) * up
        on_step(i + 1, x, clean)
    return x


def unipc(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep
) -> Tensor:
    """Follow the probability flow with UniPC of order 3, variant B2.

    A new clean latent first corrects the step that led to it, then predicts the next one.
    The order is lower at the start, where the history is short, and in the last two steps.

    Source: Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8.
    """
    history: list[tuple[Tensor, float]] = []
    before, order = x, 0
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(x, sigma, i)
        if following == 0:
            x = clean
        else:
            if history:
                x = _unified_step(before, sigma, history[:order], [(clean, sigma)])
            history = [(clean, sigma), *history[:2]]
            order = min(len(history), len(sigmas) - 1 - i)
            before, x = x, _unified_step(x, following, history[:order], [])
        on_step(i + 1, x, clean)
    return x


def _unified_step(
    x: Tensor,
    following: float,
    history: Sequence[tuple[Tensor, float]],
    ahead: Sequence[tuple[Tensor, float]],
) -> Tensor:
    """Predict or correct a step of `unipc`.

    In half-log-SNR lambda = -log sigma, the clean latent is a polynomial through the known ones.
    The weights of its divided differences solve a Vandermonde system in the distances r:
    sum_m w_m r_m^(k-1) = k! h phi_(k+1)(-h) / (1 - exp(-h)), where phi_1(z) = (e^z - 1) / z and
    phi_(k+1)(z) = (phi_k(z) - 1 / k!) / z.

    Args:
        x: Latent at the start of the step.
        following: Noise level at the end of the step.
        history: Clean latents and their levels up to the start of the step, newest first.
        ahead: To predict: nothing. To correct: the clean latent at the end, and its level.
    """
    (clean, sigma), *others = [*history, *ahead]
    h = math.log(sigma / following)
    x = following / sigma * x - math.expm1(-h) * clean
    distances = [math.log(sigma / level) / h for _, level in others]
    if len(others) == 1:
        # the paper fixes the weight of a single difference for B2
        weights = [0.5]
    else:
        weights = np.linalg.solve(
            np.vander(distances, increasing=True).T, _unified_moments(-h, len(others))
        ).tolist()
    for (other, _), distance, weight in zip(others, distances, weights, strict=True):
        x = x - math.expm1(-h) * weight / distance * (other - clean)
    return x


def _unified_moments(z: float, count: int) -> list[float]:
    """Return k! z phi_(k+1)(z) / (e^z - 1) for k from 1 to `count`."""
    phi = math.expm1(z) / z
    moments: list[float] = []
    for k in range(1, count + 1):
        phi = (phi - 1 / math.factorial(k)) / z
        moments.append(math.factorial(k) * phi * z / math.expm1(z))
    return moments


@dataclass(frozen=True)
class Sampler:
    """Sampling function and how to call it."""

    function: Callable[[Denoise, Tensor, Sequence[float], Noise, OnStep], Tensor]
    noise: Literal["none", "fresh", "brownian"]
    """Source of its noise: none, independent samples or a Brownian path."""
    skips_lowest: bool = False
    """Whether AUTOMATIC1111 leaves out the lowest level of its schedule."""


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
    """Sample a clean latent.

    Args:
        name: A key of `SAMPLERS`.
        denoise: Predicts the clean latent.
        x: Latent with noise of level `sigmas[0]`, float32 (B, C, h, w).
        sigmas: Noise levels, falling, the last one 0: float32 (n + 1,), on the CPU.
        noise: Returns the noise of an interval. Samplers without noise do not call it.
        on_step: Called after each of the n steps.

    Returns:
        The clean latent, float32 (B, C, h, w).
    """
    return SAMPLERS[name].function(denoise, x, [float(sigma) for sigma in sigmas], noise, on_step)


def brownian_intervals(name: str, sigmas: Tensor) -> list[tuple[float, float]]:
    """List the intervals of Brownian noise that a sampler requests.

    Args:
        name: A key of `SAMPLERS`.
        sigmas: Noise levels as for `sample`.

    Returns:
        Pairs (sigma, sigma_next) in the order of the requests. Empty without Brownian noise.
    """
    if SAMPLERS[name].noise != "brownian":
        return []
    steps = [
        (sigma, following)
        for sigma, following in _pairs([float(sigma) for sigma in sigmas])
        if following > 0
    ]
    if name != "DPM++ SDE":
        return steps
    return [interval for a, b in steps for interval in ((a, _geometric_middle(a, b)), (a, b))]


def _pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(sigmas))


def _geometric_middle(sigma: float, following: float) -> float:
    return math.exp((math.log(sigma) + math.log(following)) / 2)


def _ancestral(sigma: float, following: float) -> tuple[float, float]:
    """Split a step with eta 1 into its deterministic and its random part.

    Returns:
        The level to step down to, and the noise to add. Their squares sum to `following` squared.
    """
    up = min(following, following * math.sqrt(sigma**2 - following**2) / sigma)
    return math.sqrt(following**2 - up**2), up
