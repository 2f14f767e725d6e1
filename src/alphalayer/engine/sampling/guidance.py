"""Denoiser: one evaluation of the network with classifier-free guidance.

Everything around the network is float32: input scaling, prediction of x0, guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphalayer.engine.families.base import DiffusionModel
from alphalayer.engine.memory import MemoryMode
from alphalayer.engine.text.encoders import Conditioning, PromptPlan


@dataclass(frozen=True)
class Guidance:
    """Conditioning of a request's images over the steps, and the guidance scale."""

    positive: PromptPlan
    negative: PromptPlan
    scale: float
    images: int = 1
    condition: Tensor | None = None
    """Condition of a mode with input images (1, C, h, w), see `DiffusionModel.denoise`."""

    def conditionings(self, step: int) -> list[Conditioning]:
        """Return the conditionings of a step: the negative one first, if it is used."""
        positives = self.positive.at(step)
        if self.scale == 1.0 and len(positives) == 1 and positives[0][1] == 1.0:
            return [positives[0][0]]
        return [self.negative.at(step)[0][0], *(positive for positive, _ in positives)]

    def combine(self, step: int, predicted: Sequence[Tensor]) -> Tensor:
        """Combine the x0 predicted under each conditioning of a step into one."""
        unconditional, *conditional = predicted
        if not conditional:
            return unconditional
        weights = [weight for _, weight in self.positive.at(step)]
        guided = sum(
            (weight * (c - unconditional) for c, weight in zip(conditional, weights, strict=True))
        )
        return unconditional + self.scale * guided


@dataclass
class Denoiser:
    """Predictor of clean latents for the images of all guidances, one after the other.

    Guidance works on x0: `u + scale * sum_i w_i (c_i - u)`, with several `c_i` if the prompt has
    AND. At scale 1 with a single prompt the negative row is skipped.

    Rows with different token counts are repeated to a common length, if that is at most four times
    the shorter one. Cross-attention does not change when its keys are repeated. Other rows are
    evaluated separately.

    Args:
        model: The model.
        guidances: Guidance of each request.
        width: Width in pixels that the model is conditioned on.
        height: Height in pixels that the model is conditioned on.
        memory: Memory mode, which limits the rows of one call.
        check: Called before each call of the network. It may raise.
    """

    model: DiffusionModel
    guidances: Sequence[Guidance]
    width: int
    height: int
    memory: MemoryMode
    check: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: float, step: int, *, conditioned: bool = True) -> Tensor:
        """Predict the clean latents, float32 (B, C, h, w).

        Args:
            x: Noisy latents (B, C, h, w), float32.
            sigma: Noise level.
            step: Step of the schedule, from 0.
            conditioned: Whether the conditions of input images are used.
        """
        conditionings = [guidance.conditionings(step) for guidance in self.guidances]
        latents = x.split([guidance.images for guidance in self.guidances])
        rows = [
            _Rows(images, conditioning, guidance.condition if conditioned else None)
            for guidance, images, texts in zip(self.guidances, latents, conditionings, strict=True)
            for conditioning in texts
        ]
        predicted = iter(self._predict(rows, sigma))
        return torch.cat(
            [
                guidance.combine(step, [next(predicted) for _ in texts])
                for guidance, texts in zip(self.guidances, conditionings, strict=True)
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
        context = _expand(group, lambda entry: entry.conditioning.context).to(noisy.device, dtype)
        pooled = _expand(group, lambda entry: entry.conditioning.pooled).to(noisy.device, dtype)
        condition = (
            _expand(group, lambda entry: entry.condition) if _is_conditioned(group) else None
        )
        at_once = self.memory.rows_at_once(self.width, self.height)
        outputs: list[Tensor] = []
        for first in range(0, len(scaled), at_once):
            rows = slice(first, first + at_once)
            self.check()
            outputs.append(
                self.model.denoise(
                    scaled[rows],
                    sigma,
                    Conditioning(context[rows], pooled[rows]),
                    self.width,
                    self.height,
                    None if condition is None else condition[rows],
                )
            )
        return torch.cat(outputs)


@dataclass(frozen=True)
class _Rows:
    """Noisy images (n, C, h, w) and the conditioning of their prediction."""

    images: Tensor
    conditioning: Conditioning
    condition: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.conditioning.context.shape[1]


def _expand(group: Sequence[_Rows], value: Callable[[_Rows], Tensor | None]) -> Tensor:
    """Repeat a value (1, ...) of each entry for its images and join them."""
    values = [(value(entry), len(entry.images)) for entry in group]
    return torch.cat([one.expand(n, *one.shape[1:]) for one, n in values if one is not None])


def _is_conditioned(group: Sequence[_Rows]) -> bool:
    """Return whether the entries have conditions. A batch has one mode."""
    return group[0].condition is not None


def _groups(rows: Sequence[_Rows]) -> list[list[_Rows]]:
    """Group neighbours that may share a call, repeated to the same number of tokens."""
    groups: list[list[_Rows]] = []
    for entry in rows:
        if groups and _are_compatible([*groups[-1], entry]):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return [_repeated(group) for group in groups]


def _are_compatible(group: Sequence[_Rows]) -> bool:
    lengths = [entry.tokens for entry in group]
    return math.lcm(*lengths) <= 4 * min(lengths)


def _repeated(group: Sequence[_Rows]) -> list[_Rows]:
    length = math.lcm(*(entry.tokens for entry in group))
    repeated: list[_Rows] = []
    for entry in group:
        context = entry.conditioning.context.repeat(1, length // entry.tokens, 1)
        conditioning = Conditioning(context, entry.conditioning.pooled)
        repeated.append(replace(entry, conditioning=conditioning))
    return repeated
