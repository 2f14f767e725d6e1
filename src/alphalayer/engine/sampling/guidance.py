"""Denoiser: one evaluation of the network with classifier-free guidance.

Everything around the network is float32: input scaling, prediction of x0, guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from alphalayer.engine.families.base import DiffusionModel
from alphalayer.engine.memory import MemoryMode
from alphalayer.engine.networks.unet import Prepared
from alphalayer.engine.sampling.masking import KeptLatents
from alphalayer.engine.text.encoders import Conditioning, PromptPlan


@dataclass(frozen=True)
class Guidance:
    """Conditioning of a request's images over the steps, and the guidance scale.

    A conditioning has one row for all images, or one for each image of a set.
    """

    positive: PromptPlan
    negative: PromptPlan
    scale: float
    images: int = 1
    condition: Tensor | None = None
    """Condition of a mode with input images (1, C, h, w), see `DiffusionModel.denoise`."""
    model_condition: Tensor | None = None
    """Condition of the model itself, also while the patch of the mode is off."""
    min_uncond: float = 0.0
    """Noise level below which the negative prompt is left out of odd steps."""
    keep_negative: bool = False
    """Whether each step has the negative prompt, because the sampler uses its prediction."""

    def conditionings(self, step: int, sigma: float) -> list[Conditioning]:
        """Return the conditionings of a step: the negative one first, if it is used."""
        positives = self.positive.at(step)
        is_plain = self.scale == 1.0 and positives[0][1] == 1.0
        is_skipped = is_plain or (step % 2 and sigma < self.min_uncond)
        if len(positives) == 1 and is_skipped and not self.keep_negative:
            return [positives[0][0]]
        return [self.negative.at(step)[0][0], *(positive for positive, _ in positives)]

    def condition_of(self, patched: bool) -> Tensor | None:
        """Return the condition while the patch of the mode is on or off."""
        return self.condition if patched and self.condition is not None else self.model_condition

    def combine(self, step: int, predicted: Sequence[Tensor]) -> Tensor:
        """Combine the x0 predicted under each conditioning of a step into one."""
        unconditional, *conditional = predicted
        if not conditional:
            return unconditional
        weights = [weight for _, weight in self.positive.at(step)]
        guided = [
            c - unconditional if weight == 1.0 else weight * (c - unconditional)
            for c, weight in zip(conditional, weights, strict=True)
        ]
        return unconditional + self.scale * reduce(torch.add, guided)


@dataclass
class Denoiser:
    """Predictor of clean latents for the images of all guidances, one after the other.

    Guidance works on x0: `u + scale * sum_i w_i (c_i - u)`, with several `c_i` if the prompt has
    AND. At scale 1 with a single prompt the negative row is skipped. So it is at odd steps below
    `Guidance.min_uncond`. `Guidance.keep_negative` keeps it.

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
        crop: Top and left of the crop that the model is conditioned on.
        together: Images that attend to each other. No call separates them.
        kept: Part of the latents that stays as it is.
    """

    model: DiffusionModel
    guidances: Sequence[Guidance]
    width: int
    height: int
    memory: MemoryMode
    check: Callable[[], None] = lambda: None
    crop: tuple[int, int] = (0, 0)
    together: int = 1
    kept: KeptLatents | None = None
    _unconditional: list[Tensor] = field(default_factory=list[Tensor], init=False)
    _prepared: dict[tuple[_Key, ...], _Prepared] = field(
        default_factory=dict[tuple["_Key", ...], "_Prepared"], init=False
    )

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: float, step: int, *, patched: bool = True) -> Tensor:
        """Predict the clean latents, float32 (B, C, h, w).

        Args:
            x: Noisy latents (B, C, h, w), float32.
            sigma: Noise level.
            step: Step of the schedule, from 0.
            patched: Whether the patch of the mode is merged. Else its conditions are left out.
        """
        clean = self._denoise(
            self.kept.add_noise(x, sigma) if self.kept else x, sigma, step, patched
        )
        return self.kept.restore(clean) if self.kept else clean

    def _denoise(self, x: Tensor, sigma: float, step: int, patched: bool) -> Tensor:
        conditionings = [guidance.conditionings(step, sigma) for guidance in self.guidances]
        latents = x.split([guidance.images for guidance in self.guidances])
        rows = [
            _Rows(images, conditioning, guidance.condition_of(patched), patched)
            for guidance, images, texts in zip(self.guidances, latents, conditionings, strict=True)
            for conditioning in texts
        ]
        predicted = iter(self._predict(rows, sigma))
        outputs = [[next(predicted) for _ in texts] for texts in conditionings]
        self._unconditional = [output[0] for output in outputs]
        return torch.cat(
            [
                guidance.combine(step, output)
                for guidance, output in zip(self.guidances, outputs, strict=True)
            ]
        )

    def unconditional(self) -> Tensor:
        """Return the clean latents of the last call under the negative prompt.

        Where guidance does not use it, they are those of the prompt.
        """
        return torch.cat(self._unconditional)

    def _predict(self, rows: Sequence[_Rows], sigma: float) -> list[Tensor]:
        """Predict the clean latents of each entry, in order."""
        predicted: list[Tensor] = []
        for group in _groups(rows):
            noisy = torch.cat([entry.images for entry in group])
            output = self._evaluate(noisy, sigma, self._prepare(group))
            clean = self.model.process.to_denoised(noisy, output, sigma)
            predicted += clean.split([len(entry.images) for entry in group])
        return predicted

    def _prepare(self, group: Sequence[_Rows]) -> _Prepared:
        """Prepare the text of a group, or return it from an earlier step."""
        key = tuple(entry.key for entry in group)
        prepared = self._prepared.pop(key, None)
        if prepared is None:
            self._make_room(_common_length(group) * sum(len(entry.images) for entry in group))
            prepared = self._prepare_text(group)
        self._prepared[key] = prepared
        return prepared

    def _make_room(self, tokens: int) -> None:
        """Drop the oldest prepared texts, so that one of this many tokens may be added."""
        while self._prepared and (
            len(self._prepared) >= PREPARED_GROUPS
            or tokens + sum(prepared.tokens for prepared in self._prepared.values())
            > PREPARED_TOKENS
        ):
            del self._prepared[next(iter(self._prepared))]

    def _prepare_text(self, group: Sequence[_Rows]) -> _Prepared:
        length = _common_length(group)
        text = Conditioning(
            _expand(group, lambda entry: _repeat(entry.conditioning.padded_context(), length)),
            _expand(group, lambda entry: entry.conditioning.pooled),
        )
        weight = next(self.model.modules["denoiser"].parameters())
        # a batch has one mode, so all entries have a condition, or none
        condition = _expand(group, lambda entry: entry.condition)
        return _Prepared(
            self.model.prepare(text, self.width, self.height, self.crop),
            None if condition is None else condition.to(weight.device, weight.dtype),
            length * len(text.pooled),
        )

    def _evaluate(self, noisy: Tensor, sigma: float, prepared: _Prepared) -> Tensor:
        """Return the raw output of the denoiser, float32 (rows, C, h, w)."""
        scaled = self.model.process.scale_input(noisy, sigma)
        at_once = self.memory.rows_at_once(self.width, self.height, self.together)
        outputs: list[Tensor] = []
        for first in range(0, len(scaled), at_once):
            rows = slice(first, first + at_once)
            part = prepared if len(scaled) <= at_once else prepared.rows(rows)
            self.check()
            outputs.append(self.model.denoise(scaled[rows], sigma, part.text, part.condition))
        return torch.cat(outputs)


PREPARED_GROUPS = 4
"""Prepared texts that are kept. A prompt whose text changes at each step has more."""
PREPARED_TOKENS = 8192
"""Tokens of the prepared texts that are kept: 2.7 GB for SDXL in float16."""


_Key = tuple[int, int, int, bool]


@dataclass(frozen=True)
class _Prepared:
    """Text and condition of the rows of one call, on the device and in the denoiser's dtype."""

    text: Prepared
    condition: Tensor | None
    tokens: int
    """Tokens of all rows."""

    def rows(self, rows: slice) -> _Prepared:
        """Return some of the rows."""
        condition = None if self.condition is None else self.condition[rows]
        return replace(self, text=self.text.rows(rows), condition=condition)


@dataclass(frozen=True)
class _Rows:
    """Noisy images (n, C, h, w) and the conditioning of their prediction."""

    images: Tensor
    conditioning: Conditioning
    condition: Tensor | None
    patched: bool

    @property
    def tokens(self) -> int:
        return self.conditioning.tokens

    @property
    def key(self) -> _Key:
        """Return the key of the prepared text and condition.

        The guidances keep their conditionings and conditions alive, so the ids stay unique.
        """
        return id(self.conditioning), id(self.condition), len(self.images), self.patched


def _expand(group: Sequence[_Rows], value: Callable[[_Rows], Tensor | None]) -> Any:
    """Repeat a value (rows, ...) of each entry for its images and join them.

    Returns None if no entry has the value.
    """
    values = [(value(entry), len(entry.images)) for entry in group]
    rows = [
        one.expand(n // len(one), *one.shape).flatten(0, 1) for one, n in values if one is not None
    ]
    return torch.cat(rows) if rows else None


def _common_length(group: Sequence[_Rows]) -> int:
    """Return the length in tokens to which all texts of a group can be repeated."""
    return math.lcm(*(entry.tokens for entry in group))


def _repeat(context: Tensor, length: int) -> Tensor:
    """Repeat the tokens of texts (rows, tokens, width) to a length."""
    return context.repeat(1, length // context.shape[1], 1)


def _groups(rows: Sequence[_Rows]) -> list[list[_Rows]]:
    """Group neighbours that may share a call."""
    groups: list[list[_Rows]] = []
    for entry in rows:
        if groups and _are_compatible([*groups[-1], entry]):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _are_compatible(group: Sequence[_Rows]) -> bool:
    return _common_length(group) <= 4 * min(entry.tokens for entry in group)
