"""Progress of a batch, reported to its clients, and the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from alphalayer.core.errors import Cancelled
from alphalayer.engine.base import Progress, RenderTask


class ProgressReporter:
    """Reports of a batch to its tasks. It stops the batch when all of them are cancelled."""

    def __init__(self, tasks: Sequence[RenderTask]):
        self._tasks = tasks

    def check(self) -> None:
        """Check for cancellation.

        Raises:
            Cancelled: All tasks are cancelled.
        """
        if all(task.is_cancelled() for task in self._tasks):
            raise Cancelled("cancelled.")

    def stage(self, name: str) -> None:
        """Report the start of a stage.

        Raises:
            Cancelled: All tasks are cancelled.
        """
        self.check()
        for task in self._tasks:
            task.on_progress(Progress(name))


class Stopwatch:
    """Wall-clock seconds of each stage.

    A stage ends when the device has finished its work.

    Attributes:
        seconds: Sum of all blocks, by name of the stage.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Measure a block and add its time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
