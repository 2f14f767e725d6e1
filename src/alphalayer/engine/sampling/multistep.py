"""Samplers that use the clean latents or the slopes of earlier steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphalayer.engine.sampling.run import Run

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the latest slopes, newest first, for even steps."""
QUADRATURE_NODES = 32

Array = NDArray[np.float64]
History = Sequence[tuple[Tensor, float]]
"""Values of earlier calls and their noise levels, newest first."""
MeanSlope = Callable[[History, float], Tensor]
"""Function (slopes, sigma_next) → mean slope of the step that starts at the newest one."""


def dpmpp_2m(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with DPM-Solver++(2M): second-order multistep.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        if following == 0:
            x = clean
        else:
            h = math.log(sigma / following)
            target = clean
            if previous is not None:
                target = clean + (clean - previous[0]) * (h / (2 * previous[1]))
            x = following / sigma * x - math.expm1(-h) * target
            previous = clean, h
        run.on_step(i + 1, x, clean)
    return x


def dpmpp_2m_sde(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Solve the reverse SDE with SDE-DPM-Solver++(2M) in its midpoint form.

    Source: Lu et al. 2022, arXiv 2211.01095. k-diffusion, `sample_dpmpp_2m_sde`.
    """
    return _dpmpp_2m_sde(run, x, sigmas, lambda growth, _h: growth / 2)


def dpmpp_2m_sde_heun(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Solve the reverse SDE with SDE-DPM-Solver++(2M) in its Heun form.

    Source: Lu et al. 2022, arXiv 2211.01095. k-diffusion, `sample_dpmpp_2m_sde`.
    """
    return _dpmpp_2m_sde(run, x, sigmas, lambda growth, h: 1 - growth / h)


def _dpmpp_2m_sde(
    run: Run, x: Tensor, sigmas: Sequence[float], weigh: Callable[[float, float], float]
) -> Tensor:
    """Sample with SDE-DPM-Solver++(2M).

    `weigh` returns the weight of the difference of clean latents, from 1 - exp(-h) and h, where h
    is the step in log sigma with its noise.
    """
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        if following == 0:
            x = clean
        else:
            h = math.log(sigma / following)
            whole = (1 + run.eta) * h
            growth = -math.expm1(-whole)
            x = following / sigma * math.exp(-run.eta * h) * x + growth * clean
            if previous is not None:
                x = x + weigh(growth, whole) * (h / previous[1]) * (clean - previous[0])
            x = _add_noise(run, x, sigma, following)
            previous = clean, h
        run.on_step(i + 1, x, clean)
    return x


def dpmpp_3m_sde(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Solve the reverse SDE with SDE-DPM-Solver++(3M): third-order multistep.

    The first two steps have a lower order, because their history is short.

    Source: Lu et al. 2022, arXiv 2211.01095. k-diffusion, `sample_dpmpp_3m_sde`.
    """
    history: list[tuple[Tensor, float]] = []
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        if following == 0:
            x = clean
        else:
            h = math.log(sigma / following)
            whole = (1 + run.eta) * h
            x = (
                math.exp(-whole) * x
                - math.expm1(-whole) * clean
                + _higher_orders(clean, h, whole, history)
            )
            x = _add_noise(run, x, sigma, following)
            history = [(clean, h), *history[:1]]
        run.on_step(i + 1, x, clean)
    return x


def _add_noise(run: Run, x: Tensor, sigma: float, following: float) -> Tensor:
    """Add the noise of a step of a multistep SDE solver."""
    if not run.eta:
        return x
    share = -math.expm1(-2 * run.eta * math.log(sigma / following))
    return x + run.noise(sigma, following) * (following * math.sqrt(share))


def _higher_orders(
    clean: Tensor, h: float, whole: float, history: list[tuple[Tensor, float]]
) -> Tensor | float:
    """Return the second- and third-order terms of a step of `dpmpp_3m_sde`.

    Args:
        clean: Predicted clean latent of this step.
        h: Length of this step in log sigma.
        whole: Its length with the noise.
        history: Clean latents and step lengths of up to two steps before, newest first.
    """
    if not history:
        return 0.0
    phi_2 = math.expm1(-whole) / whole + 1
    r_0 = history[0][1] / h
    slope = (clean - history[0][0]) / r_0
    if len(history) == 1:
        return phi_2 * slope
    r_1 = history[1][1] / h
    curvature = (slope - (history[0][0] - history[1][0]) / r_1) / (r_0 + r_1)
    return phi_2 * (slope + curvature * r_0) - (phi_2 / whole - 0.5) * curvature


def lms(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with the Adams-Bashforth method of order 4.

    The weights are those of uneven steps.

    Source: k-diffusion, `sample_lms`.
    """

    def mean_slope(history: History, following: float) -> Tensor:
        return _integrate(history, following, lambda sigma: sigma)

    return _follow_slopes(run, x, sigmas, mean_slope, order=4, last_order=4)


def deis(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with tAB-DEIS of order 3.

    The slope is a polynomial in the time of the variance-preserving SDE whose levels are 0.002 at
    time 0.001 and 80 at time 1.

    Source: Zhang and Chen 2023, arXiv 2204.13902. diff-sampler (zju-pi), `deis_tab`.
    """
    low, high = (math.log(level**2 + 1) for level in (0.002, 80.0))
    growth = 2 * (low / 0.001 - high) / (0.001 - 1)
    start = high - growth / 2

    def time(sigma: Array) -> Array:
        return (np.sqrt(start**2 + 2 * growth * np.log(sigma**2 + 1)) - start) / growth

    def mean_slope(history: History, following: float) -> Tensor:
        return _integrate(history, following, time)

    return _follow_slopes(run, x, sigmas, mean_slope, order=3)


def ipndm(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with iPNDM.

    The weights are those of the Adams-Bashforth method of order 4 for even steps.

    Source: Zhang and Chen 2023, arXiv 2204.13902, section 3.3. diff-sampler (zju-pi).
    """
    return _follow_slopes(run, x, sigmas, _mean_of_even_steps, order=4)


def ipndm_v(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with iPNDM and its weights for uneven steps.

    The published weights are not those of the Adams-Bashforth method, which `lms` has.

    Source: diff-sampler (zju-pi), `ipndm_v_sampler`.
    """
    return _follow_slopes(run, x, sigmas, _mean_of_uneven_steps, order=4)


def plms(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with PLMS.

    This is iPNDM whose first step is Heun's, with two calls.

    Source: Liu et al. 2022, arXiv 2202.09778, as in the code of Stable Diffusion.
    """

    def mean_slope(history: History, following: float) -> Tensor:
        slope, sigma = history[0]
        if len(history) > 1:
            return _mean_of_even_steps(history, following)
        predicted = x + slope * (following - sigma)
        return (slope + (predicted - run.denoise(predicted, following)) / following) / 2

    return _follow_slopes(run, x, sigmas, mean_slope, order=4)


def _follow_slopes(
    run: Run,
    x: Tensor,
    sigmas: Sequence[float],
    mean_slope: MeanSlope,
    *,
    order: int,
    last_order: int = 1,
) -> Tensor:
    """Step along the mean slope, which is extrapolated from the latest slopes.

    Args:
        run: What the sampler calls.
        x: Latent with noise of level `sigmas[0]`.
        sigmas: Noise levels.
        mean_slope: Returns the mean slope of a step.
        order: Most slopes that are used.
        last_order: Most slopes in the step to level 0. 1 is Euler's method.
    """
    history: list[tuple[Tensor, float]] = []
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        history = [((x - clean) / sigma, sigma), *history[: order - 1]]
        if following == 0:
            history = history[:last_order]
        x = x + mean_slope(history, following) * (following - sigma)
        run.on_step(i + 1, x, clean)
    return x


def _mean_of_even_steps(history: History, _following: float) -> Tensor:
    return _mix(ADAMS_BASHFORTH[len(history)], [slope for slope, _ in history])


def _mean_of_uneven_steps(history: History, following: float) -> Tensor:
    levels = [following, *(sigma for _, sigma in history)]
    h, *before = (end - start for end, start in pairwise(levels))
    h_1, h_2, h_3 = [*before, math.inf, math.inf, math.inf][:3]
    ratio, scale = h_1 / h_2, h_1 * (h_1 + h_2) / (h_2 * (h_2 + h_3))
    weights = np.array([1.0, 0.0, 0.0, 0.0])
    if len(history) > 1:
        weights += np.array([1, -1, 0, 0]) * h / h_1 / 2
    if len(history) > 2:
        change = (1 - h**2 / (3 * h_1 * (h_1 + h_2))) / 2
        weights += np.array([1, -1 - ratio, ratio, 0]) * change
    if len(history) > 3:
        two, three = h + h_1, h + h_1 + h_2
        change = 1 / 2 - h / (6 * two) + (1 - h / (2 * two)) * h / (6 * three)
        change *= h * two * three / (h_1 * (h_1 + h_2) * (h_1 + h_2 + h_3))
        third = ratio + scale * (1 + h_2 / h_3)
        weights += np.array([1, -1 - ratio - scale, third, -scale * ratio]) * change
    return _mix(weights[: len(history)].tolist(), [slope for slope, _ in history])


def _integrate(history: History, following: float, time: Callable[[Array], Array]) -> Tensor:
    """Return the mean over a step of the polynomial through slopes.

    Args:
        history: Slopes and their levels, newest first.
        following: Level at the end of the step.
        time: Variable of the polynomial, a function of the noise levels.
    """
    sigma = history[0][1]
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    points = time(sigma + (nodes + 1) / 2 * (following - sigma))
    known = time(np.array([level for _, level in history]))
    means: list[float] = []
    for j in range(len(known)):
        others = np.delete(known, j)
        basis = ((points[:, None] - others) / (known[j] - others)).prod(1)
        means.append(float((weights / 2 * basis).sum()))
    return _mix(means, [slope for slope, _ in history])


def _mix(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of tensors."""
    return reduce(
        torch.add, [weight * value for weight, value in zip(weights, values, strict=True)]
    )


def unipc(run: Run, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the probability flow with UniPC of order 3, variant B1.

    A new clean latent first corrects the step that led to it, then predicts the next one.
    The order is lower at the start, where the history is short, and in the last two steps.

    Source: Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8.
    """
    history: list[tuple[Tensor, float]] = []
    before, order = x, 0
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = run.denoise(x, sigma)
        if history:
            x = _unified_step(before, sigma, history[:order], [(clean, sigma)])
        history = [(clean, sigma), *history[:2]]
        order = min(len(history), len(sigmas) - 1 - i)
        before, x = x, _unified_step(x, following, history[:order], [])
        run.on_step(i + 1, x, clean)
    return x


def _unified_step(x: Tensor, following: float, history: History, ahead: History) -> Tensor:
    """Predict or correct a step of `unipc`.

    In half-log-SNR lambda = -log sigma, the clean latent is a polynomial through the known ones.
    The weights of its divided differences solve a Vandermonde system in the distances r:
    sum_m w_m r_m^(k-1) = k! phi_(k+1)(-h), where phi_1(z) = (e^z - 1) / z and
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
        # the paper fixes the weight of a single difference
        weights = [0.5]
    else:
        weights = np.linalg.solve(
            np.vander(distances, increasing=True).T, _unified_moments(-h, len(others))
        ).tolist()
    for (other, _), distance, weight in zip(others, distances, weights, strict=True):
        x = x + h * weight / distance * (other - clean)
    return x


def _unified_moments(z: float, count: int) -> list[float]:
    """Return k! phi_(k+1)(z) for k from 1 to `count`."""
    phi = math.expm1(z) / z
    moments: list[float] = []
    for k in range(1, count + 1):
        phi = (phi - 1 / math.factorial(k)) / z
        moments.append(math.factorial(k) * phi)
    return moments
