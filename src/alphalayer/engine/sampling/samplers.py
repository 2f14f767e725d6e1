"""The samplers by name: how each is called, and with which levels and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from alphalayer.core.samplers import ADAPTIVE
from alphalayer.engine.sampling import levels, multistep, partial, single_step
from alphalayer.engine.sampling.partial import Levels
from alphalayer.engine.sampling.run import Run
from alphalayer.engine.sampling.schedules import LevelsOf, SigmaTable, sigmas_for

LastLevels = Callable[[LevelsOf, str, int, int, SigmaTable], Levels]
"""Function (levels, scheduler, total, steps, table) → levels of the last steps of a schedule."""


@dataclass(frozen=True)
class Sampler:
    """Sampling function and how to call it."""

    function: Callable[[Run, Tensor, Sequence[float]], Tensor]
    noise: Literal["none", "fresh", "brownian"] = "none"
    """Source of its noise: none, independent samples or a Brownian path."""
    eta: float = 0.0
    """Default of the share of fresh noise."""
    levels: LevelsOf = sigmas_for
    last_levels: LastLevels = partial.last_levels
    preserves_variance: bool = False
    """Whether its first and last latents are in the variance-preserving frame."""
    is_cfgpp: bool = False
    """Whether it uses the prediction without the prompt (CFG++)."""

    @property
    def guidance_share(self) -> float:
        """Return the factor of the guidance scale."""
        return _CFGPP_SHARE if self.is_cfgpp else 1.0

    def choose_eta(self, requested: float | None) -> float:
        """Return the share of fresh noise of a request."""
        if self.noise == "none":
            return 0.0
        return self.eta if requested is None else requested

    def noise_scale(self, sigma: float) -> float:
        """Return the factor from unit noise to the first latent, of level `sigma`."""
        return math.sqrt(sigma**2 + 1) if self.preserves_variance else sigma

    def choose_levels(
        self, scheduler: str, steps: int, table: SigmaTable, total: int | None = None
    ) -> Levels:
        """Return the noise levels of a run.

        Args:
            scheduler: Name of the schedule.
            steps: Number of steps.
            table: Noise levels that the model was trained on.
            total: Steps of a schedule whose last `steps` are used. None: the whole of `steps`.
        """
        if total is None:
            return Levels.whole(self.levels(scheduler, steps, table))
        return self.last_levels(self.levels, scheduler, total, steps, table)

    def add_noise(self, latent: Tensor | None, noise: Tensor, levels: Levels) -> Tensor:
        """Return the first latent of a run, float32 (B, C, h, w).

        Args:
            latent: Clean latents. None: the run starts from pure noise.
            noise: Unit noise (B, C, h, w).
            levels: Levels of the run.
        """
        first = float(levels.sigmas[0])
        if latent is None:
            return noise * self.noise_scale(first)
        noisy = latent + noise * levels.start
        return noisy * (self.noise_scale(first) / self.noise_scale(levels.start))


_CFGPP_SHARE = 1 / 12.5
"""CFG++ takes scales from 0 to 1. AUTOMATIC1111 maps its own scales to them."""
SAMPLERS = {
    "DPM++ 2M SDE": Sampler(multistep.dpmpp_2m_sde, "brownian", eta=1.0),
    "DPM++ 2M": Sampler(multistep.dpmpp_2m),
    "DPM++ SDE": Sampler(single_step.dpmpp_sde, "brownian", eta=1.0),
    "DPM++ 2M SDE Heun": Sampler(multistep.dpmpp_2m_sde_heun, "brownian", eta=1.0),
    "DPM++ 2S a": Sampler(single_step.dpmpp_2s, "fresh", eta=1.0),
    "DPM++ 3M SDE": Sampler(
        multistep.dpmpp_3m_sde, "brownian", eta=1.0, levels=levels.sigmas_without_lowest
    ),
    "Euler a": Sampler(single_step.euler, "fresh", eta=1.0),
    "Euler": Sampler(single_step.euler),
    "LMS": Sampler(multistep.lms),
    "Heun": Sampler(single_step.heun),
    "DPM2": Sampler(single_step.dpm2, levels=levels.sigmas_without_lowest),
    "DPM2 a": Sampler(single_step.dpm2, "fresh", eta=1.0, levels=levels.sigmas_without_lowest),
    "DPM fast": Sampler(
        single_step.dpm_fast,
        "fresh",
        eta=1.0,
        levels=levels.dpm_fast_sigmas,
        last_levels=partial.last_dpm_fast_levels,
    ),
    ADAPTIVE: Sampler(
        single_step.dpm_adaptive,
        "fresh",
        eta=1.0,
        levels=levels.dpm_adaptive_sigmas,
        last_levels=partial.last_dpm_adaptive_levels,
    ),
    "Restart": Sampler(
        single_step.heun,
        "fresh",
        levels=levels.restart_sigmas,
        last_levels=partial.last_restart_levels,
    ),
    "HeunPP2": Sampler(single_step.heun_plus),
    "IPNDM": Sampler(multistep.ipndm),
    "IPNDM_V": Sampler(multistep.ipndm_v),
    "DEIS": Sampler(multistep.deis),
    # these choose training steps themselves, and so ignore the schedule
    "DDIM": Sampler(
        single_step.euler,
        "fresh",
        levels=levels.ddim_sigmas,
        last_levels=partial.last_ddim_levels,
        preserves_variance=True,
    ),
    "DDIM CFG++": Sampler(
        single_step.ddim_cfgpp,
        "fresh",
        levels=levels.ddim_sigmas,
        last_levels=partial.last_ddim_levels,
        preserves_variance=True,
        is_cfgpp=True,
    ),
    "PLMS": Sampler(
        multistep.plms,
        levels=levels.ddim_sigmas,
        last_levels=partial.last_ddim_levels,
        preserves_variance=True,
    ),
    "UniPC": Sampler(
        multistep.unipc,
        levels=levels.unipc_sigmas,
        last_levels=partial.last_unipc_levels,
        preserves_variance=True,
    ),
    "LCM": Sampler(single_step.lcm, "fresh", levels=levels.lcm_sigmas),
    "DDPM": Sampler(single_step.ddpm, "fresh"),
}


def sample(name: str, run: Run, x: Tensor, sigmas: Tensor) -> Tensor:
    """Sample a clean latent.

    Args:
        name: A key of `SAMPLERS`.
        run: What the sampler calls.
        x: Latent with noise of level `sigmas[0]`, float32 (B, C, h, w).
        sigmas: Noise levels of the sampler's `levels`, float32, on the CPU.

    Returns:
        The clean latent, float32 (B, C, h, w).
    """
    sampler = SAMPLERS[name]
    x = sampler.function(run, x, sigmas.tolist())
    return x / math.sqrt(float(sigmas[-1]) ** 2 + 1) if sampler.preserves_variance else x


def count_steps(sigmas: Tensor) -> int:
    """Return the number of steps along noise levels.

    A repeated level is a step, and a rise is none.
    """
    return int((sigmas[1:] <= sigmas[:-1]).sum())


def brownian_intervals(name: str, sigmas: Tensor, eta: float = 1.0) -> list[tuple[float, float]]:
    """List the intervals of Brownian noise that a sampler requests.

    Args:
        name: A key of `SAMPLERS`.
        sigmas: Noise levels as for `sample`.
        eta: Share of fresh noise.

    Returns:
        Pairs (sigma, sigma_next) in the order of the requests. Empty without Brownian noise.
    """
    if SAMPLERS[name].noise != "brownian" or not eta:
        return []
    steps = [step for step in pairwise(sigmas.tolist()) if step[1] > 0]
    if name != "DPM++ SDE":
        return steps
    halves = [single_step.sde_levels(*step) for step in steps]
    return [pair for start, middle, end in halves for pair in ((start, middle), (start, end))]
