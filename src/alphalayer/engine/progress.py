"""What is said of a batch while it is drawn: how far it is, to those who wait for it, and how long its stages took."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from alphalayer.core.errors import Cancelled
from alphalayer.engine.base import Progress, RenderTask


class ProgressReporter:
    """Tells the callers of a batch how far it is, and stops it when none of them wants it any more."""

    def __init__(self, tasks: Sequence[RenderTask]):
        self._orders = tasks

    def check(self) -> None:
        """Raise `Cancelled` if nobody wants the pictures."""
        if all(task.is_cancelled() for task in self._orders):
            raise Cancelled("cancelled.")

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.check()
        for task in self._orders:
            task.on_progress(Progress(name))


class Stopwatch:
    """Seconds of each stage; waits for the device, so that a stage is charged with its own work."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time a block and add it to the stage's account."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
