"""What a sampler calls, and the arithmetic that samplers share.

All samplers are in the variance-exploding frame: x = x0 + sigma * noise. Latents are float32
(B, C, h, w). Noise levels are Python floats. This module is independent of models, prompts and the
source of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""Function (x, sigma) → predicted clean latent, shaped like x."""
Noise = Callable[[float, float], Tensor]
"""Function (sigma, sigma_next) → unit-variance noise of that interval, shaped like x."""
OnStep = Callable[[int, Tensor, Tensor], None]
"""Callback (completed steps, x, predicted clean latent), called after each step."""


@dataclass(frozen=True)
class Run:
    """What a sampler calls."""

    denoise: Denoise
    noise: Noise
    """Samplers without noise do not call it."""
    on_step: OnStep
    unconditional: Callable[[], Tensor]
    """Function () → clean latent of the last call without the prompt, for CFG++."""
    eta: float = 0.0
    """Share of fresh noise in each step. At 0 the samplers are deterministic."""


def split_step(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """Split a step into its deterministic and its random part.

    Returns:
        The level to step down to, and the noise to add. Their squares sum to `following` squared.

    Source: Song et al. 2021, arXiv 2010.02502, equation 16. k-diffusion, `get_ancestral_step`.
    """
    up = min(following, eta * following * math.sqrt(sigma**2 - following**2) / sigma)
    return math.sqrt(following**2 - up**2), up


def geometric_mean(sigma: float, following: float) -> float:
    """Return the level in the middle of a step in log sigma."""
    return math.exp((math.log(sigma) + math.log(following)) / 2)
