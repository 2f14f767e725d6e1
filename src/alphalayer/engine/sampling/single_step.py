"""Samplers that start each step afresh. With eta above 0 they add noise after it (ancestral)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from alphalayer.engine.sampling.levels import solver_orders
from alphalayer.engine.sampling.run import Run, geometric_mean, split_step


def euler(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with Euler's method.

    DDIM is the same update in this frame, also with noise.

    Source: Karras et al. 2022, arXiv 2206.00364. Song et al. 2021, arXiv 2010.02502, equation 12.
    k-diffusion, `sample_euler_ancestral`.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        down, up = split_step(sigma, following, run.eta)
        x = x + (x - clean) / sigma * (down - sigma)
        if up:
            x = x + run.noise(sigma, following) * up
        run.on_step(i + 1, x, clean)
    return x


def ddim_cfgpp(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Step as DDIM does, with the noise that is predicted without the prompt (CFG++).

    Source: Chung et al. 2024, "CFG++", arXiv 2406.08070, algorithm 1.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        down, up = split_step(sigma, following, run.eta)
        x = clean + (x - run.unconditional()) / sigma * down
        if up:
            x = x + run.noise(sigma, following) * up
        run.on_step(i + 1, x, clean)
    return x


def ddpm(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Sample the posterior of the forward process: `euler` with eta 1.

    Source: Ho et al. 2020, arXiv 2006.11239, equation 7.
    """
    return euler(replace(run, eta=1.0), x, sigmas)


def lcm(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Jump to the clean latent, then add noise up to the next level.

    Source: Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        x = clean + run.noise(sigma, following) * following if following > 0 else clean
        run.on_step(i + 1, x, clean)
    return x


def heun(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with Heun's second-order method.

    The step to level 0 is Euler's, because the slope there is undefined. Where the levels rise,
    noise is added instead.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn. Xu et al. 2023,
    "Restart Sampling for Improving Generative Processes", arXiv 2306.14878, for rising levels.
    """
    steps = 0
    for sigma, following in pairwise(sigmas):
        if following > sigma:
            x = x + run.noise(sigma, following) * math.sqrt(following**2 - sigma**2)
            continue
        clean = run.denoise(x, sigma)
        slope = (x - clean) / sigma
        if following > 0:
            predicted = x + slope * (following - sigma)
            slope = (slope + (predicted - run.denoise(predicted, following)) / following) / 2
        x = x + slope * (following - sigma)
        steps += 1
        run.on_step(steps, x, clean)
    return x


def heun_plus(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with Heun++.

    The slope is a mean over three levels, weighted by level. The step before the last has two
    slopes, and the last one has one.

    Source: Carzit, sd-webui-samplers-scheduler (MIT), `sample_heunpp2`.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        first = (x - clean) / sigma
        ahead = sigmas[i + 1 : min(i + 3, len(sigmas) - 1)]
        weights = [level / ((len(ahead) + 1) * sigmas[0]) for level in ahead]
        slope = (1 - sum(weights)) * first
        predicted, last, latest = x, sigma, first
        for level, weight in zip(ahead, weights, strict=True):
            predicted = predicted + latest * (level - last)
            latest, last = (predicted - run.denoise(predicted, level)) / level, level
            slope = slope + weight * latest
        x = x + slope * (following - sigma)
        run.on_step(i + 1, x, clean)
    return x


def dpm2(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Step with the slope at the middle of the step in log sigma.

    Source: Karras et al. 2022, arXiv 2206.00364. Lu et al. 2022, arXiv 2206.00927, DPM-Solver-2.
    k-diffusion, `sample_dpm_2_ancestral`.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        slope = (x - clean) / sigma
        down, up = split_step(sigma, following, run.eta)
        if down > 0:
            middle = geometric_mean(sigma, down)
            half = x + slope * (middle - sigma)
            slope = (half - run.denoise(half, middle)) / middle
        x = x + slope * (down - sigma)
        if up:
            x = x + run.noise(sigma, following) * up
        run.on_step(i + 1, x, clean)
    return x


def dpmpp_2s(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Step with the clean latent at the middle of the step: DPM-Solver++(2S).

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 1. k-diffusion,
    `sample_dpmpp_2s_ancestral`.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = target = run.denoise(x, sigma)
        down, up = split_step(sigma, following, run.eta)
        if down > 0:
            middle = geometric_mean(sigma, down)
            target = run.denoise(_move(x, clean, middle / sigma), middle)
        x = _move(x, target, down / sigma)
        if up:
            x = x + run.noise(sigma, following) * up
        run.on_step(i + 1, x, clean)
    return x


def dpmpp_sde(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Solve the reverse SDE with SDE-DPM-Solver++(2S): single-step.

    Each step evaluates the denoiser twice. The second level is the geometric mean of both ends.

    Source: Lu et al. 2022, arXiv 2211.01095. k-diffusion, `sample_dpmpp_sde`.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        if following == 0:
            x = clean
        else:
            start, middle, end = sde_levels(sigma, following)
            down, up = split_step(sigma, middle, run.eta)
            half = _move(x, clean, down / sigma)
            if up:
                half = half + run.noise(start, middle) * up
            # The weights are 1 - 1/2r and 1/2r. With r = 1/2 only the second evaluation counts.
            target = run.denoise(half, middle)
            down, up = split_step(sigma, following, run.eta)
            x = _move(x, target, down / sigma)
            if up:
                x = x + run.noise(start, end) * up
        run.on_step(i + 1, x, clean)
    return x


def sde_levels(sigma: float, following: float) -> tuple[float, float, float]:
    """Return start, middle and end of a step of `dpmpp_sde`, rounded to float32.

    The Brownian path is queried at these levels. A level that is off by 1e-6 has other noise.
    """
    start, end = -torch.tensor([sigma, following]).log()
    middle = start + (end - start) * 0.5
    start, middle, end = torch.stack([start, middle, end]).neg().exp().tolist()
    return start, middle, end


def dpm_fast(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with DPM-Solver-fast, in steps of order 3.

    The last steps have a lower order. Each call of the denoiser counts as a step.

    Args:
        run: What the sampler calls.
        x: Latent with noise of level `sigmas[0]`.
        sigmas: Levels of `dpm_fast_sigmas`: one for each call, and the last one.

    Source: Lu et al. 2022, arXiv 2206.00927, algorithms 1, 2 and appendix D.4. k-diffusion,
    `dpm_solver_fast`.
    """
    calls = 0
    for order in solver_orders(len(sigmas) - 1):
        sigma, following = sigmas[calls], sigmas[calls + order]
        down = max(split_step(sigma, following, run.eta)[0], sigmas[-1])
        clean = run.denoise(x, sigma)
        x = _solver_step(run, x, (x - clean) / sigma, (sigma, down), order)
        if down < following:
            x = x + run.noise(sigma, following) * math.sqrt(following**2 - down**2)
        calls += order
        run.on_step(calls, x, clean)
    return x


def _solver_step(
    run: Run, x: Tensor, first: Tensor, levels: tuple[float, float], order: int
) -> Tensor:
    """Return the latent after a step of DPM-Solver.

    Args:
        run: What the sampler calls.
        x: Latent at the start of the step.
        first: Noise that is predicted at the start of the step.
        levels: Noise levels at the start and at the end of the step.
        order: 1, 2 or 3: number of calls of the step, with the one of `first`.
    """
    sigma, following = levels
    h = math.log(sigma / following)

    def move(share: float, slope: Tensor | float) -> Tensor:
        """Return the latent at a share of the step. The noise changes by `slope`."""
        growth = math.expm1(share * h)
        change = share * (growth / (share * h) - 1)
        return x - sigma * math.exp(-share * h) * (growth * first + change * slope)

    def find_slope(share: float, slope: Tensor | float) -> Tensor:
        moved, level = move(share, slope), sigma * math.exp(-share * h)
        return ((moved - run.denoise(moved, level)) / level - first) / share

    if order == 1:
        return move(1, 0.0)
    if order == 2:
        return x - following * math.expm1(h) * (first + find_slope(1 / 2, 0.0) / 2)
    return move(1, find_slope(2 / 3, find_slope(1 / 3, 0.0)))


def _move(x: Tensor, clean: Tensor, share: float) -> Tensor:
    """Move a latent toward a clean one, to a share of its noise."""
    return share * x + (1 - share) * clean
