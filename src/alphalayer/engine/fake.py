"""An engine without torch, for tests of the service and for trying clients: draws a soft disc whose colour comes from prompt and seed."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alphalayer.core.errors import Cancelled
from alphalayer.core.request import ModelDefaults
from alphalayer.engine.base import GeneratedImage, GenerationResult, Progress, RenderTask, RgbaImage


class FakeEngine:
    """Implements `alphalayer.engine.Engine`; each step takes `step_s` seconds, however many are drawn together. The same request
    gives the same picture."""

    def __init__(self, step_s: float = 0.0, batch_pixels: int = 0):
        self._step_s = step_s
        self.batch_pixels = batch_pixels
        self.description = "discs, no device"

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Draw the discs; see the protocol."""
        steps = tasks[0].request.steps or ModelDefaults().steps
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

    def memory_bytes(self) -> int:
        """None of its own."""
        return 0

    def _result(self, task: RenderTask, seconds: float) -> GenerationResult:
        request = task.request.resolve(ModelDefaults(), task.images)
        images = [
            GeneratedImage(
                render_disc(request.prompt, each.seed, request.width, request.height),
                each.seed,
                each.subseed,
            )
            for each in request.images
        ]
        return GenerationResult(request, "fake", "0" * 10, images, {"sample": seconds})


def render_disc(prompt: str, seed: int, width: int, height: int) -> RgbaImage:
    """A disc with a soft edge over nothing, (height, width, 4)."""
    digest = zlib.crc32(f"{prompt}/{seed}".encode())
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    alpha = np.clip((0.9 - np.hypot(x, y)) * 8, 0, 1)
    picture = np.empty((height, width, 4), np.uint8)
    picture[..., :3] = [digest & 255, digest >> 8 & 255, digest >> 16 & 255]
    picture[..., 3] = np.rint(alpha * 255)
    return picture


def create_engine(options: dict[str, Any]) -> FakeEngine:
    """Build the engine from the options of the engine process; `step_s` and `batch_pixels` mean something here."""
    return FakeEngine(float(options.get("step_s", 0.0)), int(options.get("batch_pixels") or 0))
