"""Noise levels: the table that a model was trained on, and schedules that select levels from it.

A noise level is sigma = sqrt((1 - alpha_bar) / alpha_bar), in units of the latent's standard
deviation. Tables and schedules stay on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

KARRAS_RHO = 7.0
ZERO_SNR_ALPHA_BAR = 4.8973451890853435e-08
BETA_SHAPE = 0.6
_SERIES_TERMS = 80
"""The sum of the other terms is below 1e-27 up to x = 0.5."""
_NEWTON_STEPS = 8
"""Four are enough for float64."""


class SigmaTable:
    """Noise levels that a model was trained on, lowest first.

    Attributes:
        sigmas: float32 (timesteps,), on the CPU, computed in float64.
    """

    def __init__(self, alpha_bar: Array):
        self.sigmas = torch.from_numpy(np.sqrt((1 - alpha_bar) / alpha_bar)).float()
        self._log_sigmas = self.sigmas.log()

    @classmethod
    def from_betas(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        schedule: str = "scaled_linear",
        timesteps: int = 1000,
        *,
        zero_snr: bool = False,
    ) -> SigmaTable:
        """Compute the table of a beta schedule.

        Args:
            beta_start: Beta of the first training step.
            beta_end: Beta of the last training step.
            schedule: "scaled_linear" is linear in sqrt(beta), as in Stable Diffusion. "linear" is
                linear in beta.
            timesteps: Number of training steps.
            zero_snr: Rescale the schedule so that it ends in pure noise. The square roots of
                alpha_bar are shifted to end at 0, and scaled to keep the first one. The last
                alpha_bar is then 4.9e-8, so that its level is finite.

        Source: Lin et al. 2024, arXiv 2305.08891, algorithm 1, for `zero_snr`.
        """
        power = 2 if schedule == "scaled_linear" else 1
        betas = np.linspace(beta_start ** (1 / power), beta_end ** (1 / power), timesteps) ** power
        alpha_bar = np.cumprod(1 - betas)
        if zero_snr:
            root = np.sqrt(alpha_bar)
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            alpha_bar[-1] = ZERO_SNR_ALPHA_BAR
        return cls(alpha_bar)

    @property
    def sigma_min(self) -> float:
        """Return the lowest level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """Return the highest level."""
        return float(self.sigmas[-1])

    def timestep(self, sigma: float) -> float:
        """Return the training step whose log sigma is nearest, a whole number."""
        log_sigma = torch.tensor(sigma, dtype=torch.float32).log()
        return float((self._log_sigmas - log_sigma).abs().argmin())

    def sigma(self, timestep: float) -> float:
        """Return the level at a training step.

        Between whole steps it is interpolated in log sigma.

        Args:
            timestep: A training step from 0. Values outside the table are clamped to its ends.
        """
        timestep = min(max(timestep, 0.0), len(self.sigmas) - 1)
        low = int(timestep)
        high = min(low + 1, len(self.sigmas) - 1)
        part = timestep - low
        return float(((1 - part) * self._log_sigmas[low] + part * self._log_sigmas[high]).exp())

    def __len__(self) -> int:
        return len(self.sigmas)


def _karras(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in sigma^(1/7), between both ends of the table.

    Source: Karras et al. 2022, arXiv 2206.00364, equation 5.
    """
    high, low = table.sigma_max ** (1 / KARRAS_RHO), table.sigma_min ** (1 / KARRAS_RHO)
    return (high + torch.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO


def _exponential(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in log sigma, between both ends of the table."""
    return torch.linspace(
        float(np.log(table.sigma_max)), float(np.log(table.sigma_min)), steps
    ).exp()


def _normal(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in training steps, both ends included."""
    return _interpolate(np.linspace(len(table) - 1, 0, steps), table)


def _sgm_uniform(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in training steps, without the lower end."""
    return _interpolate(np.linspace(len(table) - 1, 0, steps + 1)[:-1], table)


def _simple(steps: int, table: SigmaTable) -> Tensor:
    """Select every n-th level of the table, from the highest."""
    stride = len(table) / steps
    return torch.stack([table.sigmas[-(1 + int(i * stride))] for i in range(steps)])


def _beta(steps: int, table: SigmaTable) -> Tensor:
    """Select quantiles of Beta(0.6, 0.6), which are dense at both ends.

    The quantiles are spread linearly over sigma, as in AUTOMATIC1111.

    Source: Lee et al. 2024, "Beta Sampling is All You Need", arXiv 2407.12173.
    """
    quantiles = _beta_quantiles(1 - np.linspace(0, 1, steps))
    return torch.from_numpy(
        table.sigma_min + quantiles * (table.sigma_max - table.sigma_min)
    ).float()


def _beta_quantiles(probabilities: Array, a: float = BETA_SHAPE) -> Array:
    """Invert the distribution function of the symmetric distribution Beta(a, a).

    By symmetry the quantile of p is 1 minus that of 1 - p, so Newton's method runs on x <= 0.5.
    There the incomplete beta function has a power series that converges fast:

        a B(x; a, a) = x^a F(a, 1 - a; a + 1; x) = x^a sum_k a / (a + k) (1 - a)_k / k! x^k

    Args:
        probabilities: float64 values in [0, 1], of any shape.
        a: Both shape parameters, above 0 and below 1.

    Returns:
        The quantiles, float64, shaped like `probabilities`.

    Source: NIST Digital Library of Mathematical Functions, 8.17.7 and 15.2.1.
    """
    k = np.arange(_SERIES_TERMS)
    series = a / (a + k) * np.cumprod(np.append(1.0, (k[1:] - a) / k[1:]))
    target = np.minimum(probabilities, 1 - probabilities) * a * math.gamma(a) ** 2
    target /= math.gamma(2 * a)
    # the first term of the series is exact near 0, where the function is steepest
    x = np.minimum(target ** (1 / a), 0.5)
    for _ in range(_NEWTON_STEPS):
        excess = x**a * np.polynomial.polynomial.polyval(x, series) - target
        slope_inverse = (x * (1 - x)) ** (1 - a) / a
        x = np.clip(x - excess * slope_inverse, 0, 0.5)
    return np.where(probabilities <= 0.5, x, 1 - x)


def _interpolate(timesteps: Array, table: SigmaTable) -> Tensor:
    return torch.tensor([table.sigma(float(timestep)) for timestep in timesteps])


SCHEDULES: dict[str, Callable[[int, SigmaTable], Tensor]] = {
    "Karras": _karras,
    "Exponential": _exponential,
    "Normal": _normal,
    "SGM Uniform": _sgm_uniform,
    "Simple": _simple,
    "Beta": _beta,
}


def sigmas_for(
    scheduler: str, steps: int, table: SigmaTable, *, skip_lowest: bool = False
) -> Tensor:
    """Return the noise levels of a schedule, highest first, and a final 0.

    Args:
        scheduler: One of `alphalayer.core.request.SCHEDULERS`.
        steps: Number of levels besides the final 0.
        table: Noise levels that the model was trained on.
        skip_lowest: Take the schedule of one step more, and leave out its lowest level. The last
            step, which goes to 0, is then a long one.

    Returns:
        float32 (steps + 1,), on the CPU.
    """
    levels = SCHEDULES[scheduler](steps + skip_lowest, table)[:steps]
    return torch.cat([levels, torch.zeros(1)])
