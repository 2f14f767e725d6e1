"""Part of latents that stays as it is while the rest is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEED_OFFSET, SEEDS = 100_000, 2**16


def mask_generator(seed: int) -> torch.Generator:
    """Return the generator of the noise around the mask of an image.

    It is torch's CPU generator for every source of noise.

    Source: AUTOMATIC1111, whose CPU noise leaves the global generator at this seed.
    """
    return torch.Generator().manual_seed((seed + SEED_OFFSET) % SEEDS)


@dataclass(frozen=True)
class KeptLatents:
    """Latents outside a mask. Around each call of the denoiser they replace the sampled ones."""

    clean: Tensor
    """Clean latents (B, C, h, w)."""
    mask: Tensor
    """1 where a cell is sampled, 0 where it is kept, (B, 1, h, w)."""
    generators: Sequence[torch.Generator]
    """Source of fresh noise for each image."""

    def add_noise(self, x: Tensor, sigma: float) -> Tensor:
        """Return noisy latents whose kept part is the clean one with fresh noise."""
        shape = self.clean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=own) for own in self.generators])
        return x * self.mask + (self.clean + noise.to(x.device) * sigma) * (1 - self.mask)

    def restore(self, x: Tensor) -> Tensor:
        """Return clean latents whose kept part is the original one."""
        return x * self.mask + self.clean * (1 - self.mask)
