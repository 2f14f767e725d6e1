"""The denoiser: one UNet evaluation with classifier-free guidance, from a noisy latent to the predicted clean one.

Everything around the UNet is float32: input scaling, prediction to x0, guidance. The UNet runs in its own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphalayer.engine.families.base import DiffusionModel
from alphalayer.engine.memory import MemoryMode
from alphalayer.engine.text.encoders import Conditioning, PromptPlan


@dataclass(frozen=True)
class Guidance:
    """What steers the UNet for a request's images: prompt plans over the steps, and the scale."""

    positive: PromptPlan
    negative: PromptPlan
    scale: float
    images: int = 1

    def conditionings(self, step: int) -> list[Conditioning]:
        """What x0 is predicted under: the negative, if it counts, then each part of the prompt."""
        positives = self.positive.at(step)
        if self.scale == 1.0 and len(positives) == 1 and positives[0][1] == 1.0:
            return [positives[0][0]]
        return [self.negative.at(step)[0][0], *(each for each, _ in positives)]

    def steer(self, step: int, predicted: Sequence[Tensor]) -> Tensor:
        """x0 from what was predicted under each of the conditionings."""
        unconditional, *conditional = predicted
        if not conditional:
            return unconditional
        weights = [weight for _, weight in self.positive.at(step)]
        steered = sum(
            (weight * (c - unconditional) for c, weight in zip(conditional, weights, strict=True))
        )
        return unconditional + self.scale * steered


@dataclass
class Denoiser:
    """`denoiser(x, sigma, step)` → x0, both float32 of shape (B, C, h, w): the images of all guidances, one after the other.

    `width` and `height` are the size that SDXL is told. Guidance is done on x0: `u + scale * sum_i w_i (c_i - u)`, with several
    `c_i` where the prompt has AND. At scale 1 with a single prompt the negative row is skipped. Rows of unlike token counts are
    tiled to a common length if that is at most four times the shorter one (cross-attention does not change when its keys are
    repeated), else evaluated apart.
    """

    model: DiffusionModel
    guidances: Sequence[Guidance]
    width: int
    height: int
    mode: MemoryMode
    check: Callable[[], None] = lambda: None
    """Asked before each call of the UNet; may raise."""

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: float, step: int) -> Tensor:
        """Predict the clean latent from `x` (B, C, h, w) at noise level `sigma` in schedule step `step`."""
        asked = [each.conditionings(step) for each in self.guidances]
        own = x.split([each.images for each in self.guidances])
        rows = [
            _Rows(images, each)
            for images, conditionings in zip(own, asked, strict=True)
            for each in conditionings
        ]
        predicted = iter(self._predict(rows, sigma))
        return torch.cat(
            [
                guidance.steer(step, [next(predicted) for _ in conditionings])
                for guidance, conditionings in zip(self.guidances, asked, strict=True)
            ]
        )

    def _predict(self, rows: Sequence[_Rows], sigma: float) -> list[Tensor]:
        """Predict the clean latents of each entry, in order."""
        predicted: list[Tensor] = []
        for group in _groups(rows):
            noisy = torch.cat([entry.images for entry in group])
            output = self._evaluate(noisy, sigma, group)
            clean = self.model.process.to_denoised(noisy, output, sigma)
            predicted += clean.split([len(entry.images) for entry in group])
        return predicted

    def _evaluate(self, noisy: Tensor, sigma: float, group: Sequence[_Rows]) -> Tensor:
        """Return the raw output of the denoiser, float32 (rows, C, h, w)."""
        dtype = next(self.model.modules["denoiser"].parameters()).dtype
        scaled = self.model.process.scale_input(noisy, sigma).to(dtype)
        context, pooled = (
            torch.cat(
                [
                    getattr(entry.conditioning, name).expand(len(entry.images), *shape)
                    for entry in group
                ]
            ).to(noisy.device, dtype)
            for name, shape in (("context", (-1, -1)), ("pooled", (-1,)))
        )
        at_once = self.mode.rows_at_once(self.width, self.height)
        outputs: list[Tensor] = []
        for x, *text in zip(
            scaled.split(at_once), context.split(at_once), pooled.split(at_once), strict=True
        ):
            self.check()
            conditioning = Conditioning(*text)
            outputs.append(self.model.denoise(x, sigma, conditioning, self.width, self.height))
        return torch.cat(outputs)


@dataclass(frozen=True)
class _Rows:
    """Noisy images (n, C, h, w) and what their x0 is to be predicted under."""

    images: Tensor
    conditioning: Conditioning

    @property
    def tokens(self) -> int:
        return self.conditioning.context.shape[1]


def _groups(asked: Sequence[_Rows]) -> list[list[_Rows]]:
    """Neighbours that may share a UNet call, tiled to the same number of tokens."""
    groups: list[list[_Rows]] = []
    for each in asked:
        if groups and _compatible([*groups[-1], each]):
            groups[-1].append(each)
        else:
            groups.append([each])
    return [_tiled(group) for group in groups]


def _compatible(group: Sequence[_Rows]) -> bool:
    lengths = [each.tokens for each in group]
    return math.lcm(*lengths) <= 4 * min(lengths)


def _tiled(group: Sequence[_Rows]) -> list[_Rows]:
    length = math.lcm(*(each.tokens for each in group))
    return [
        _Rows(
            each.images,
            Conditioning(
                each.conditioning.context.repeat(1, length // each.tokens, 1),
                each.conditioning.pooled,
            ),
        )
        for each in group
    ]
