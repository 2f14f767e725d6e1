"""Noise levels: the table a model was trained on, and the schedules that pick a few of them for sampling.

A noise level sigma is sqrt((1 - alpha_bar) / alpha_bar), in units of the latent's spread. Tables and schedules stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

Array = NDArray[np.float64]

KARRAS_RHO = 7.0
ZERO_SNR_ALPHA_BAR = 4.8973451890853435e-08


class SigmaTable:
    """The training noise levels of a model, lowest first; computed in float64, held in float32."""

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
        """The table of a beta schedule, "scaled_linear" (Stable Diffusion's) or "linear".

        `zero_snr` rescales it to end in pure noise (Lin et al. 2024): the square roots of alpha_bar are shifted so that the
        last is 0 and scaled to keep the first; the last alpha_bar becomes 4.9e-8 to stay finite.
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
        """The lowest level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The highest level."""
        return float(self.sigmas[-1])

    def timestep(self, sigma: float) -> float:
        """The training step whose log sigma is nearest, a whole number."""
        log_sigma = torch.tensor(sigma, dtype=torch.float32).log()
        return float((self._log_sigmas - log_sigma).abs().argmin())

    def sigma(self, timestep: float) -> float:
        """The level at a training step, interpolated in log sigma between whole steps."""
        timestep = min(max(timestep, 0.0), len(self.sigmas) - 1)
        low = int(timestep)
        high = min(low + 1, len(self.sigmas) - 1)
        part = timestep - low
        return float(((1 - part) * self._log_sigmas[low] + part * self._log_sigmas[high]).exp())

    def __len__(self) -> int:
        return len(self.sigmas)


def _karras(steps: int, table: SigmaTable) -> Tensor:
    """Karras et al. 2022, equation 5, between the model's own ends."""
    high, low = table.sigma_max ** (1 / KARRAS_RHO), table.sigma_min ** (1 / KARRAS_RHO)
    return (high + torch.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO


def _exponential(steps: int, table: SigmaTable) -> Tensor:
    """Evenly spaced in log sigma."""
    return torch.linspace(
        float(np.log(table.sigma_max)), float(np.log(table.sigma_min)), steps
    ).exp()


def _normal(steps: int, table: SigmaTable) -> Tensor:
    """Evenly spaced in training steps, both ends included."""
    return _at(np.linspace(len(table) - 1, 0, steps), table)


def _sgm_uniform(steps: int, table: SigmaTable) -> Tensor:
    """Evenly spaced in training steps, the lower end left out."""
    return _at(np.linspace(len(table) - 1, 0, steps + 1)[:-1], table)


def _simple(steps: int, table: SigmaTable) -> Tensor:
    """Every n-th level of the table, from the top."""
    stride = len(table) / steps
    return torch.stack([table.sigmas[-(1 + int(i * stride))] for i in range(steps)])


def _beta(steps: int, table: SigmaTable) -> Tensor:
    """Quantiles of Beta(0.6, 0.6), dense at both ends (Lee et al. 2024), spread linearly over sigma as webui does."""
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)
    return torch.from_numpy(
        table.sigma_min + quantiles * (table.sigma_max - table.sigma_min)
    ).float()


def _at(timesteps: Array, table: SigmaTable) -> Tensor:
    return torch.tensor([table.sigma(float(timestep)) for timestep in timesteps])


_SCHEDULES: dict[str, Callable[[int, SigmaTable], Tensor]] = {
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
    """The `steps` noise levels of a schedule, highest first, and a final 0: float32 (steps + 1,), on the CPU.

    `scheduler` is one of `alphalayer.core.request.SCHEDULERS`. With `skip_lowest` they are those of a schedule of one step more without its
    lowest level, so that the last step, which goes to 0, is a long one.
    """
    levels = _SCHEDULES[scheduler](steps + skip_lowest, table)[:steps]
    return torch.cat([levels, torch.zeros(1)])
