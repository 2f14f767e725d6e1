"""Samplers that start each step afresh. With eta above 0 they add noise after it (ancestral)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.samplers import MAX_ADAPTIVE_CALLS
from alphalayer.engine.sampling.levels import solver_orders
from alphalayer.engine.sampling.run import Run, geometric_mean, split_step

ADAPTIVE_FIRST_LENGTH = 0.05
"""Length of the first step of DPM adaptive, in log sigma."""
RELATIVE_ERROR, ABSOLUTE_ERROR = 0.05, 0.0078
"""Errors of a step that DPM adaptive tolerates."""
ACCEPTED_FACTOR = 0.81
"""Change of the length below which DPM adaptive repeats a step."""


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
        step = _SolverStep(run, x, (x - clean) / sigma, sigma, down)
        if order == 1:
            x = step.move(1)
        elif order == 2:
            x = step.second_order(step.find_slope(1 / 2))
        else:
            x = step.third_order(step.find_slope(1 / 3))
        if down < following:
            x = x + run.noise(sigma, following) * math.sqrt(following**2 - down**2)
        calls += order
        run.on_step(calls, x, clean)
    return x


def dpm_adaptive(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow in steps of order 3 whose length the error decides.

    The difference to a step of order 2 is the error. It is a mean over all latents, so that each
    image runs alone. `sigmas` between the first and the last one only measure the progress.

    Raises:
        InvalidRequest: There are more than `MAX_ADAPTIVE_CALLS` calls.

    Source: Lu et al. 2022, arXiv 2206.00927, section 3.4 and appendix C. Step lengths: k-diffusion,
    `dpm_solver_adaptive` and `PIDStepSizeController`, with an integral part of 1.
    """
    sigma, last = sigmas[0], sigmas[-1]
    before, length, calls = x, ADAPTIVE_FIRST_LENGTH, 0
    order = 1.5 if run.eta else 3.0
    while sigma > last * math.exp(1e-5):
        calls += 3
        if calls > MAX_ADAPTIVE_CALLS:
            raise InvalidRequest(
                f"DPM adaptive needs more than {MAX_ADAPTIVE_CALLS} calls for this image.",
                hint="Use another sampler.",
                field="sampler",
            )
        following = max(last, sigma * math.exp(-length))
        down = max(split_step(sigma, following, run.eta)[0], last)
        clean = run.denoise(x, sigma)
        step = _SolverStep(run, x, (x - clean) / sigma, sigma, down)
        slope = step.find_slope(1 / 3)
        low, high = step.second_order(slope), step.third_order(slope)
        scale = (low.abs().maximum(before.abs()) * RELATIVE_ERROR).clamp(min=ABSOLUTE_ERROR)
        error = float(((low - high) / scale).square().mean().sqrt())
        if not math.isfinite(error):
            return low  # the caller reports numbers that are not finite
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / order) - 1)
        length *= factor
        if factor >= ACCEPTED_FACTOR:
            before, x = low, high
            if down < following:
                x = x + run.noise(sigma, following) * math.sqrt(following**2 - down**2)
            sigma = following
            run.on_step(sum(level >= sigma for level in sigmas[1:]), x, clean)
    return x


@dataclass(frozen=True)
class _SolverStep:
    """A step of DPM-Solver: its start, the noise predicted there, and its levels."""

    run: Run
    x: Tensor
    first: Tensor
    sigma: float
    following: float

    @property
    def h(self) -> float:
        """Return the length of the step in log sigma."""
        return math.log(self.sigma / self.following)

    def move(self, share: float, slope: Tensor | float = 0.0) -> Tensor:
        """Return the latent at a share of the step. The noise changes by `slope`."""
        growth = math.expm1(share * self.h)
        change = share * (growth / (share * self.h) - 1)
        level = self.sigma * math.exp(-share * self.h)
        return self.x - level * (growth * self.first + change * slope)

    def find_slope(self, share: float, slope: Tensor | float = 0.0) -> Tensor:
        """Return the change of the noise over the step, by a call at a share of it."""
        moved, level = self.move(share, slope), self.sigma * math.exp(-share * self.h)
        return ((moved - self.run.denoise(moved, level)) / level - self.first) / share

    def second_order(self, slope: Tensor) -> Tensor:
        """Return the latent at the end of the step, by a slope of any share."""
        return self.x - self.following * math.expm1(self.h) * (self.first + slope / 2)

    def third_order(self, slope: Tensor) -> Tensor:
        """Return the latent at the end of the step, by a slope at a third of it."""
        return self.move(1, self.find_slope(2 / 3, slope))


def _move(x: Tensor, clean: Tensor, share: float) -> Tensor:
    """Move a latent toward a clean one, to a share of its noise."""
    return share * x + (1 - share) * clean
