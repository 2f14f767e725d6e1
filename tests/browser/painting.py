"""A fake engine whose disc covers the image to change, inside the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alphalayer.core.modes import InputRole
from alphalayer.engine.base import GenerationResult, RenderTask, RgbaImage
from alphalayer.engine.fake import FakeEngine
from alphalayer.images.resampling import fit_layer


class PaintingEngine(FakeEngine):
    """The fake engine, which keeps the image to change around its disc and outside the mask."""

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Generate the discs over the images to change. See the protocol."""
        results = super().render(tasks)
        for task, result in zip(tasks, results, strict=True):
            for image in result.images:
                if "init" in task.inputs:
                    _keep_outside(image.rgba, task.inputs)
        return results


def _keep_outside(rgba: RgbaImage, inputs: Mapping[InputRole, RgbaImage]) -> None:
    height, width = rgba.shape[:2]
    fitted = {role: fit_layer(own, (width, height), "Just Resize") for role, own in inputs.items()}
    is_kept = rgba[..., 3] == 0
    if "mask" in fitted:
        is_kept |= fitted["mask"][..., 0] == 0
    rgba[is_kept] = fitted["init"][is_kept]


def create_engine(options: dict[str, Any]) -> PaintingEngine:
    """Create the engine from the option `step_s`."""
    return PaintingEngine(options["step_s"])
