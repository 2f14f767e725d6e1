"""Noise levels: the table that a model was trained on, and schedules that select levels from it.

A noise level is sigma = sqrt((1 - alpha_bar) / alpha_bar), in units of the latent's standard
deviation. Tables and schedules stay on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating[Any]]

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
        alpha_bar: Share of the clean latent's variance in each level, float64 (timesteps,).
        sigmas: float32 (timesteps,), on the CPU, computed in float64.
    """

    def __init__(self, alpha_bar: Array):
        sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
        self.alpha_bar = alpha_bar
        self.sigmas = torch.from_numpy(sigmas).float()
        self._log_sigmas = torch.from_numpy(np.log(sigmas)).float()

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
            # in float32, from the rounded levels: as Forge does
            levels = cls(alpha_bar).sigmas.numpy()
            root = np.sqrt(1 / (levels * levels + 1))
            alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
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
        """Return the level at a training step, see `interpolate`."""
        return float(self.interpolate(torch.tensor([timestep], dtype=torch.float32)))

    def interpolate(self, timesteps: Tensor) -> Tensor:
        """Return the levels at training steps.

        Between whole steps they are interpolated in log sigma, in float32.

        Args:
            timesteps: Training steps from 0, float32 (n,). Values outside the table are clamped to
                its ends.

        Returns:
            float32 (n,).
        """
        timesteps = timesteps.clamp(0, len(self) - 1)
        low, high = (
            self._log_sigmas[side.long()] for side in (timesteps.floor(), timesteps.ceil())
        )
        part = timesteps.frac()
        return ((1 - part) * low + part * high).exp()

    def every(self, stride: int) -> SigmaTable:
        """Return a table of every n-th level, up to the highest one."""
        return SigmaTable(self.alpha_bar[stride - 1 :: stride])

    def __len__(self) -> int:
        return len(self.sigmas)


LevelsOf = Callable[[str, int, SigmaTable], Tensor]
"""Function (scheduler, steps, table) → noise levels of the steps."""
Schedule = Callable[[int, SigmaTable], Tensor]
"""Function (steps, table) → noise levels, highest first, without the final 0."""


def _karras(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in sigma^(1/7), between both ends of the table.

    Source: Karras et al. 2022, arXiv 2206.00364, equation 5.
    """
    return karras_between(steps, table.sigma_max, table.sigma_min)


def karras_between(steps: int, highest: float, lowest: float) -> Tensor:
    """Return Karras levels between two levels, both included, float32 (steps,)."""
    high, low = highest ** (1 / KARRAS_RHO), lowest ** (1 / KARRAS_RHO)
    return (high + torch.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO


def _exponential(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in log sigma, between both ends of the table."""
    return torch.linspace(
        float(np.log(table.sigma_max)), float(np.log(table.sigma_min)), steps
    ).exp()


def _polyexponential(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in a power of log sigma. The power is 1.

    Source: k-diffusion, `get_sigmas_polyexponential` with rho 1.
    """
    low, high = math.log(table.sigma_min), math.log(table.sigma_max)
    return torch.exp(torch.linspace(1, 0, steps) * (high - low) + low)


def _kl_optimal(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in arctan sigma, down to the lowest one instead of 0.

    Source: Sabour et al. 2024, "Align Your Steps", arXiv 2404.14507, theorem 3.1.
    """
    low, high = (torch.tensor(sigma).atan() for sigma in (table.sigma_min, table.sigma_max))
    share = torch.arange(steps + 1) / steps
    return (share * low + (1 - share) * high).tan()


def _normal(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in training steps, both ends included."""
    return table.interpolate(torch.linspace(len(table) - 1, 0, steps))


def _sgm_uniform(steps: int, table: SigmaTable) -> Tensor:
    """Space levels evenly in training steps, without the lower end."""
    return table.interpolate(torch.linspace(len(table) - 1, 0, steps + 1)[:-1])


def _ddim(steps: int, table: SigmaTable) -> Tensor:
    """Select levels with a whole stride, from the second lowest one up.

    There are more levels than steps where the stride does not divide the training steps: for 1,000
    of them, 167 for 150 steps.
    """
    return table.sigmas[1 :: max(len(table) // steps, 1)].flip(0)


def _turbo(steps: int, table: SigmaTable) -> Tensor:
    """Select levels evenly from the highest one down, as SDXL Turbo was trained.

    Source: Sauer et al. 2023, "Adversarial Diffusion Distillation", arXiv 2311.17042.
    """
    timesteps = (torch.arange(steps, 0, -1) * (len(table) / steps) - 1).round()
    return table.sigmas[timesteps.long().clamp(0, len(table) - 1)]


def _interpolate_log(published: tuple[float, ...]) -> Schedule:
    """Return a schedule of published levels. Other numbers of levels are interpolated."""
    logs = np.log(published[::-1])
    positions = np.linspace(0, 1, len(published))

    def schedule(steps: int, _table: SigmaTable) -> Tensor:
        """Interpolate the published levels in log sigma."""
        levels = np.exp(np.interp(np.linspace(1, 0, steps), positions, logs))
        return torch.from_numpy(levels).float()

    return schedule


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


_ALIGN_YOUR_STEPS = _interpolate_log(
    (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
)
"""Levels for SDXL. Source: Sabour et al. 2024, "Align Your Steps", arXiv 2404.14507."""

_ALIGN_YOUR_STEPS_32 = _interpolate_log((
    14.615, 11.1491618, 8.50522127, 6.48827151, 5.43707402, 4.60398619, 3.89854704, 3.27407457,
    2.74396527, 2.29968659, 1.95448514, 1.67108715, 1.42878152, 1.23181009, 1.06789649, 0.92579443,
    0.80290886, 0.69660121, 0.60436903, 0.52852552, 0.46773344, 0.41393379, 0.36258186, 0.31008517,
    0.26518925, 0.22326461, 0.17653877, 0.13959192, 0.10587381, 0.05519369, 0.02877334, 0.015,
))  # fmt: skip
"""The levels of 32 steps for SDXL. They end below the lowest level of training."""

_GITS = _interpolate_log(
    (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029)
)
"""Levels for SDXL. Source: Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion
Sampling", arXiv 2405.11326."""

SCHEDULES: dict[str, Schedule] = {
    "Karras": _karras,
    "Exponential": _exponential,
    "Normal": _normal,
    "SGM Uniform": _sgm_uniform,
    "Simple": _simple,
    "Beta": _beta,
    "Uniform": _normal,
    "Polyexponential": _polyexponential,
    "KL Optimal": _kl_optimal,
    "Align Your Steps": _ALIGN_YOUR_STEPS,
    "Align Your Steps GITS": _GITS,
    "Align Your Steps 11": _ALIGN_YOUR_STEPS,
    "Align Your Steps 32": _ALIGN_YOUR_STEPS_32,
    "DDIM": _ddim,
    "Turbo": _turbo,
}
_ENDS_ABOVE_ZERO = {"KL Optimal"}


def sigmas_for(
    scheduler: str, steps: int, table: SigmaTable, *, skip_lowest: bool = False
) -> Tensor:
    """Return the noise levels of a schedule, highest first. The last one is 0.

    "KL Optimal" ends at the lowest level instead. "DDIM" may have more steps.

    Args:
        scheduler: One of `alphalayer.core.samplers.SCHEDULERS`.
        steps: Number of steps.
        table: Noise levels that the model was trained on.
        skip_lowest: Take the schedule of one step more, and leave out the level before the last.
            The last step is then a long one.

    Returns:
        float32, on the CPU: one level more than there are steps.
    """
    levels = SCHEDULES[scheduler](steps + skip_lowest, table)
    if scheduler not in _ENDS_ABOVE_ZERO:
        levels = torch.cat([levels, torch.zeros(1)])
    return torch.cat([levels[:-2], levels[-1:]]) if skip_lowest else levels
