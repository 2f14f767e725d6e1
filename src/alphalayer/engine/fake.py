"""Engine without torch, for tests of the service and of clients.

It generates a disc with a soft edge, whose colour depends on prompt and seed. Layers that a mode
makes opaque are opaque.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alphalayer.core.errors import Cancelled
from alphalayer.core.modes import MODES
from alphalayer.core.request import ModelDefaults
from alphalayer.engine.base import GeneratedImage, GenerationResult, Progress, RenderTask, RgbaImage


class FakeEngine:
    """Implementation of `alphalayer.engine.base.Engine`. The same request gives the same image.

    Each step takes `step_s` seconds, for any number of images. Each result has the `warnings`.
    """

    def __init__(self, step_s: float = 0.0, batch_pixels: int = 0, warnings: Sequence[str] = ()):
        self._step_s = step_s
        self._warnings = tuple(warnings)
        self.batch_pixels = batch_pixels
        self.description = "discs, no device"
        self.unload_after_s = 0.0

    def warm_up(self) -> None:
        """Return at once."""

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Generate the discs. See the protocol."""
        passes = tasks[0].request.resolve(ModelDefaults()).passes
        steps = sum(one.steps for one in passes)
        start = time.perf_counter()
        for step in range(1, steps + 1):
            if all(task.is_cancelled() for task in tasks):
                raise Cancelled("cancelled.")
            if self._step_s:
                time.sleep(self._step_s)
            for task in tasks:
                preview = (
                    render_disc(
                        task.request.prompt,
                        (task.images or task.request.image_seeds())[0].seed,
                        32,
                        32,
                    )[..., :3]
                    if task.previews
                    else None
                )
                task.on_progress(Progress("sample", step, steps, preview))
        return [self._result(task, time.perf_counter() - start) for task in tasks]

    def unload(self) -> None:
        """Do nothing, as there is no model."""

    def memory_bytes(self) -> int:
        """Return 0, as there is no device."""
        return 0

    def _result(self, task: RenderTask, seconds: float) -> GenerationResult:
        request = task.request.resolve(ModelDefaults(), task.images)
        mode = MODES[request.mode]
        images = [
            GeneratedImage(
                render_disc(request.prompt, seeds.seed, *request.final_size),
                *seeds,
                mode.layers[number % len(mode.layers)],
            )
            for number, seeds in enumerate(request.images)
        ]
        for image in images:
            if image.role != "image" and not mode.is_transparent(image.role):
                image.rgba[..., 3] = 255
        return GenerationResult(
            request, "fake", "0" * 10, images, {"sample": seconds}, self._warnings
        )


def render_disc(prompt: str, seed: int, width: int, height: int) -> RgbaImage:
    """Return a disc with a soft edge on a transparent background, (height, width, 4)."""
    digest = zlib.crc32(f"{prompt}/{seed}".encode())
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    alpha = np.clip((0.9 - np.hypot(x, y)) * 8, 0, 1)
    image = np.empty((height, width, 4), np.uint8)
    image[..., :3] = [digest & 255, digest >> 8 & 255, digest >> 16 & 255]
    image[..., 3] = np.rint(alpha * 255)
    return image


def create_engine(options: dict[str, Any]) -> FakeEngine:
    """Create the engine from the options `step_s`, `batch_pixels` and `warnings`."""
    return FakeEngine(
        float(options.get("step_s", 0.0)),
        int(options.get("batch_pixels") or 0),
        options.get("warnings", ()),
    )
