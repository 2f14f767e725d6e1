"""Noise levels of samplers that change the schedule or choose levels themselves.

Each function takes the name of a schedule, the number of steps and the table of the model. It
returns levels as `schedules.sigmas_for` does.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from alphalayer.engine.sampling.schedules import SigmaTable, karras_between, sigmas_for

LCM_STRIDE = 20
"""LCM models are distilled on every 20th training step."""
RESTART_FROM, RESTART_TWICE_FROM = 20, 36
RESTART_INTERVAL = (2.0, 0.1)
"""Levels between which Restart repeats its steps: the higher one, the lower one."""


def sigmas_without_lowest(scheduler: str, steps: int, table: SigmaTable) -> Tensor:
    """Return the levels of `sigmas_for` without the lowest one."""
    return sigmas_for(scheduler, steps, table, skip_lowest=True)


def lcm_sigmas(scheduler: str, steps: int, table: SigmaTable) -> Tensor:
    """Return the levels of a schedule over every 20th training step.

    Source: Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378.
    """
    return sigmas_for(scheduler, steps, table.every(LCM_STRIDE))


def ddim_sigmas(_scheduler: str, steps: int, table: SigmaTable) -> Tensor:
    """Return the levels of the training steps 1, 1 + stride, 1 + 2 stride and so on.

    The stride is a whole number, so the number of steps differs from `steps`. For 1,000 training
    steps it is 19 for 20 and 166 for 150. There is at least one step.

    Source: Song et al. 2021, arXiv 2010.02502, section D.3, in the form of Stable Diffusion.
    """
    return table.sigmas[ddim_timesteps(steps, table)].flip(0)


def ddim_timesteps(steps: int, table: SigmaTable) -> Tensor:
    """Return the training steps of `ddim_sigmas`, lowest first."""
    timesteps = torch.arange(0, len(table), len(table) // max(steps, 2)) + 1
    return timesteps.clamp(max=len(table) - 1)


def unipc_sigmas(_scheduler: str, steps: int, table: SigmaTable) -> Tensor:
    """Return levels spaced evenly in time from 1 to 0.001, both ends included.

    There is a step for each level of a whole stride. For 1,000 training steps it is 20 steps for 20
    and 167 for 150.

    Source: Zhao et al. 2023, arXiv 2302.04867, `NoiseScheduleVP` of its code.
    """
    size = len(table)
    steps = -(-size // (size // steps))  # one for each training step that DDIM selects
    return sigmas_in_time(1.0, steps, table)


def sigmas_in_time(start: float, steps: int, table: SigmaTable) -> Tensor:
    """Return levels spaced evenly in time, from `start` to the first training step.

    Between training steps the logarithm of alpha_bar is linear in time.
    """
    size = len(table)
    times = np.linspace(start, 1 / size, steps + 1)
    alpha_bar = np.exp(np.interp(times * size - 1, np.arange(size), np.log(table.alpha_bar)))
    return torch.from_numpy(np.sqrt((1 - alpha_bar) / alpha_bar)).float()


def restart_sigmas(scheduler: str, steps: int, table: SigmaTable) -> Tensor:
    """Return levels that rise again from about 0.1 to about 2.

    From 20 steps on, part of the steps repeats that interval once; from 36 steps on, twice. The
    levels are then those of Karras. Fewer steps follow the schedule.

    Source: Xu et al. 2023, "Restart Sampling for Improving Generative Processes", arXiv 2306.14878.
    The numbers are those of AUTOMATIC1111.
    """
    return add_restarts(sigmas_for(scheduler, steps, table))


def add_restarts(sigmas: Tensor) -> Tensor:
    """Return the levels of `restart_sigmas` for those of a schedule.

    There is no restart, and so fewer steps, if all levels are below those that it repeats.
    """
    steps = len(sigmas) - 1
    if steps < RESTART_FROM:
        return sigmas
    length, times = (9, 1) if steps < RESTART_TWICE_FROM else (steps // 4, 2)
    falling = karras_between(steps - length * times, float(sigmas[0]), float(sigmas[-2]))
    high, low = (int((falling - level).abs().argmin()) for level in RESTART_INTERVAL)
    restarts: list[Tensor] = []
    if high < low:
        restarts = [karras_between(length + 1, float(falling[high]), float(falling[low]))] * times
    return torch.cat([falling[: low + 1], *restarts, falling[low + 1 :], torch.zeros(1)])


def dpm_fast_sigmas(_scheduler: str, steps: int, table: SigmaTable) -> Tensor:
    """Return levels for DPM-Solver-fast: one for each call, and the lowest one.

    A step of order k has k calls. The steps are evenly spaced in log sigma, and so are the calls of
    a step. The orders are 3, and lower in the last two steps.

    Source: Lu et al. 2022, arXiv 2206.00927, appendix D.4.
    """
    return dpm_fast_between(steps, table.sigma_max, table.sigma_min)


def dpm_fast_between(steps: int, high: float, low: float) -> Tensor:
    """Return the levels of `dpm_fast_sigmas` between two levels."""
    orders = solver_orders(steps)
    ends = np.linspace(math.log(high), math.log(low), len(orders) + 1)
    calls = [
        np.linspace(start, end, order, endpoint=False)
        for (start, end), order in zip(pairwise(ends), orders, strict=True)
    ]
    return torch.from_numpy(np.exp(np.concatenate([*calls, ends[-1:]]))).float()


def dpm_adaptive_sigmas(_scheduler: str, steps: int, table: SigmaTable) -> Tensor:
    """Return levels evenly spaced in log sigma.

    DPM adaptive uses the first and the last one.
    """
    return evenly_spaced(steps, table.sigma_max, table.sigma_min)


def evenly_spaced(steps: int, high: float, low: float) -> Tensor:
    """Return the levels of `dpm_adaptive_sigmas` between two levels."""
    return (
        torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64).exp().float()
    )


def solver_orders(calls: int) -> list[int]:
    """Return the orders of the steps of DPM-Solver-fast, which sum to `calls`."""
    full, rest = divmod(calls, 3)
    return [3] * full + [rest] if rest else [3] * (full - 1) + [2, 1]
