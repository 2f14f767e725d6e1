"""Passes of a batch: their sizes, noise levels and patches, and the prompts that guide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from alphalayer.core.cost import last_steps
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import ResolvedRequest
from alphalayer.engine.base import RenderTask
from alphalayer.engine.canvas import SIZE_MULTIPLE, Canvas
from alphalayer.engine.families.base import DiffusionModel, LatentSpec
from alphalayer.engine.memory import Residency
from alphalayer.engine.networks.unet import UNet
from alphalayer.engine.progress import ProgressReporter, Stopwatch
from alphalayer.engine.sampling.guidance import Guidance
from alphalayer.engine.sampling.noise import Shape
from alphalayer.engine.sampling.partial import Levels
from alphalayer.engine.sampling.samplers import SAMPLERS, count_steps
from alphalayer.engine.text.encoders import (
    Reading,
    TextEncoders,
    combine_plans,
    is_cached,
    plan_negative,
    plan_prompt,
)
from alphalayer.engine.transparency.attention_sharing import Sharing, share_attention
from alphalayer.engine.transparency.modes import Mode
from alphalayer.engine.transparency.patch import PatchSpec


@dataclass(frozen=True)
class Pass:
    """One run of the denoiser over all images of a batch."""

    number: int
    requests: Sequence[ResolvedRequest]
    canvas: Canvas
    levels: Levels

    @property
    def shared(self) -> ResolvedRequest:
        """Return the first request; what all share is read from it."""
        return self.requests[0]

    @property
    def steps(self) -> int:
        """Return the number of its steps."""
        return count_steps(self.levels.sigmas)

    def latent_shape(self, spec: LatentSpec) -> Shape:
        """Return the shape of a latent, (C, h, w)."""
        canvas, cell = self.canvas, spec.cell
        return spec.channels, canvas.full_height // cell, canvas.full_width // cell


@dataclass(frozen=True)
class Batch:
    """Requests that are generated together, and what their stages share."""

    tasks: Sequence[RenderTask]
    passes: Sequence[Pass]
    model: DiffusionModel
    mode: Mode
    residency: Residency
    reporter: ProgressReporter
    stopwatch: Stopwatch


def plan_passes(requests: Sequence[ResolvedRequest], model: DiffusionModel) -> list[Pass]:
    """Return the passes of requests of one batch.

    Raises:
        InvalidRequest: The second pass is too large, or a strength too low for its steps.
    """
    requests[0].check_hires()
    multiple = SIZE_MULTIPLE if requests[0].uses_layerdiffuse else model.latent.cell
    table = model.process.table
    passes: list[Pass] = []
    for group in zip(*(request.passes for request in requests), strict=True):
        shared = group[0]
        steps, total = last_steps(shared) or (shared.steps, None)
        if total and total > len(table):
            raise InvalidRequest(
                f"{shared.steps} steps at this strength are the end of a schedule of {total}; "
                f"at most {len(table)}.",
                hint="Use fewer steps or a higher strength.",
                field="hires_strength" if passes else "strength",
            )
        canvas = Canvas.of(shared.width, shared.height, multiple)
        levels = SAMPLERS[shared.sampler].choose_levels(shared.scheduler, steps, table, total)
        passes.append(Pass(len(passes), group, canvas, levels))
    return passes


@dataclass(frozen=True)
class PatchSchedule:
    """Weight patches of the denoiser over the noise levels of a run."""

    model: DiffusionModel
    patches: tuple[PatchSpec, ...]
    """Merged from the start: LoRAs and the LayerDiffuse patch."""
    loras: tuple[PatchSpec, ...]
    """Merged below `end_sigma`."""
    end_sigma: float
    sharing: Sharing | None = None
    """What replaces the attentions of the denoiser until `end_sigma`."""

    def apply(self, sigma: float) -> bool:
        """Merge the patches of a noise level. Return whether LayerDiffuse is on."""
        is_on = sigma >= self.end_sigma
        self.model.patchers["denoiser"].ensure(self.patches if is_on else self.loras)
        # after the LoRAs: it copies the weights that it changes
        unet = cast(UNet, self.model.modules["denoiser"])
        share_attention(unet, self.sharing, is_on=is_on)
        return is_on


def is_encoded(
    requests: Sequence[ResolvedRequest], loras: tuple[PatchSpec, ...], model: DiffusionModel
) -> bool:
    """Return whether all prompts were encoded before, with the same LoRAs."""
    return loras == model.patchers["text"].applied and all(
        is_cached(model.text, prompt, request.negative_prompt, _reading(request))
        for request in requests
        for prompt in _texts_of(request)
    )


def patch_text(loras: tuple[PatchSpec, ...], model: DiffusionModel) -> None:
    """Merge LoRAs into the text encoders. Other LoRAs clear the cached encodings."""
    patcher = model.patchers["text"]
    if loras != patcher.applied:
        model.text.forget()
        patcher.ensure(loras)


def read_prompts(
    request: ResolvedRequest, encoders: TextEncoders, check: Callable[[], None]
) -> Guidance:
    """Encode the prompts of a request."""
    reading, sampler = _reading(request), SAMPLERS[request.sampler]
    prompts = request.layer_prompts
    plans = {prompt: plan_prompt(encoders, prompt, reading, check) for prompt in prompts}
    positive = plans[prompts[0]]
    if len(plans) > 1:
        empty = encoders.encode("", reading.clip_skip, reading.emphasis)
        positive = combine_plans([plans[prompt] for prompt in prompts], empty)
    return Guidance(
        positive,
        plan_negative(encoders, request.negative_prompt, reading, check),
        request.cfg_scale * sampler.guidance_share,
        len(request.images),
        min_uncond=request.options.min_uncond,
        keep_negative=sampler.is_cfgpp,
    )


def _texts_of(request: ResolvedRequest) -> set[str]:
    """Return the prompts of all layers. An empty one fills the shorter ones of a set."""
    texts = set(request.layer_prompts)
    return {*texts, ""} if len(texts) > 1 else texts


def _reading(request: ResolvedRequest) -> Reading:
    return Reading(request.calls, request.clip_skip, request.options.emphasis, request.calls_before)
