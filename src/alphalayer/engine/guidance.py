"""The denoiser: one UNet evaluation with classifier-free guidance, from a noisy latent to the predicted clean one.

Everything around the UNet is float32: input scaling, prediction to x0, guidance. The UNet runs in its own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphalayer.engine.devices import MemoryMode
from alphalayer.engine.loading import LoadedModel
from alphalayer.engine.text import Conditioning, PromptPlan


@dataclass(frozen=True)
class Guidance:
    """What steers the UNet: prompt plans over the steps, the scale, and the size that SDXL is told."""

    positive: PromptPlan
    negative: PromptPlan
    scale: float
    width: int
    height: int


@dataclass
class Denoiser:
    """`denoiser(x, sigma, step)` → x0, both float32 of shape (B, C, h, w).

    Guidance is done on x0: `u + scale * sum_i w_i (c_i - u)`, with several `c_i` where the prompt has AND. At scale 1 with a
    single prompt the negative row is skipped. Rows of unlike token counts are tiled to a common length if that is at most
    four times the shorter one (cross-attention does not change when its keys are repeated), else evaluated apart.
    """

    model: LoadedModel
    guidance: Guidance
    mode: MemoryMode

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: float, step: int) -> Tensor:
        """Predict the clean latent from `x` (B, C, h, w) at noise level `sigma` in schedule step `step`."""
        positives = self.guidance.positive.at(step)
        if self.guidance.scale == 1.0 and len(positives) == 1 and positives[0][1] == 1.0:
            return self._predict(x, sigma, [positives[0][0]])[0]
        negative = self.guidance.negative.at(step)[0][0]
        unconditional, *conditional = self._predict(x, sigma, [negative, *(each for each, _ in positives)])
        steered = sum((weight * (c - unconditional) for c, (_, weight) in zip(conditional, positives, strict=True)))
        return unconditional + self.guidance.scale * steered

    def _predict(self, x: Tensor, sigma: float, conditionings: Sequence[Conditioning]) -> list[Tensor]:
        """x0 under each conditioning, in order."""
        predicted: list[Tensor] = []
        for group in _groups(conditionings):
            output = self._evaluate(x, sigma, group)
            noisy = x.repeat(len(group), 1, 1, 1)
            predicted += _clean(noisy, output, sigma, self.model.prediction_type).chunk(len(group))
        return predicted

    def _evaluate(self, x: Tensor, sigma: float, group: Sequence[Conditioning]) -> Tensor:
        """The UNet's raw output, float32 (rows, C, h, w); rows ordered conditioning by conditioning, then by image."""
        images = x.shape[0]
        dtype, device = next(self.model.unet.parameters()).dtype, x.device
        scaled = (x / math.sqrt(sigma**2 + 1)).to(dtype).repeat(len(group), 1, 1, 1)
        context = torch.cat([each.context.expand(images, -1, -1) for each in group]).to(device, dtype)
        pooled = torch.cat([each.pooled.expand(images, -1) for each in group]).to(device, dtype)
        at_once = self.mode.rows_at_once or len(scaled)
        outputs = [
            self._unet(*rows, sigma)
            for rows in zip(scaled.split(at_once), context.split(at_once), pooled.split(at_once), strict=True)
        ]
        return torch.cat(outputs)

    def _unet(self, scaled: Tensor, context: Tensor, pooled: Tensor, sigma: float) -> Tensor:
        """One call of the UNet on a few rows, float32 (rows, C, h, w)."""
        size = [self.guidance.height, self.guidance.width, 0, 0, self.guidance.height, self.guidance.width]
        return self.model.unet(
            scaled,
            torch.full((len(scaled),), self.model.sigma_table.timestep(sigma), device=scaled.device),
            encoder_hidden_states=context,
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": torch.tensor([size] * len(scaled), dtype=torch.float32, device=scaled.device),
            },
            return_dict=False,
        )[0].float()


def _clean(x: Tensor, output: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """x0 from the UNet's output, float32 (epsilon: x - s*out; v: x/(s²+1) - out*s/sqrt(s²+1))."""
    if prediction_type == "v":
        return x / (sigma**2 + 1) - output * (sigma / math.sqrt(sigma**2 + 1))
    return x - output * sigma


def _groups(conditionings: Sequence[Conditioning]) -> list[list[Conditioning]]:
    """Neighbours that may share a UNet call, tiled to the same number of tokens."""
    groups: list[list[Conditioning]] = []
    for each in conditionings:
        if groups and _compatible([*groups[-1], each]):
            groups[-1].append(each)
        else:
            groups.append([each])
    return [_tiled(group) for group in groups]


def _lengths(group: Sequence[Conditioning]) -> list[int]:
    return [each.context.shape[1] for each in group]


def _compatible(group: Sequence[Conditioning]) -> bool:
    lengths = _lengths(group)
    return math.lcm(*lengths) <= 4 * min(lengths)


def _tiled(group: Sequence[Conditioning]) -> list[Conditioning]:
    length = math.lcm(*_lengths(group))
    return [Conditioning(each.context.repeat(1, length // each.context.shape[1], 1), each.pooled) for each in group]
