"""Progress of a batch, reported to its clients, and the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from alphalayer.core.errors import Cancelled
from alphalayer.engine.base import Progress, RenderTask

REPEAT_S = 1.0
"""Seconds between two reports of a stage without steps."""


class ProgressReporter:
    """Reports of a batch to its tasks. It stops the batch when all of them are cancelled."""

    def __init__(self, tasks: Sequence[RenderTask]):
        self._tasks = tasks
        self._reported_at = 0.0

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
        self._reported_at = time.monotonic()
        for task in self._tasks:
            task.on_progress(Progress(name))

    def repeat(self, name: str) -> None:
        """Report a running stage again, at most once in `REPEAT_S`.

        Raises:
            Cancelled: All tasks are cancelled.
        """
        if time.monotonic() - self._reported_at > REPEAT_S:
            self.stage(name)
        else:
            self.check()

    @contextmanager
    def within(self, name: str, networks: Sequence[nn.Module]) -> Generator[None]:
        """Report a stage, and repeat the report while networks run.

        Each of their layers checks for cancellation, because a CPU takes minutes for a large image.

        Raises:
            Cancelled: All tasks are cancelled.
        """

        def continue_(*_: object) -> None:
            self.repeat(name)

        layers = [layer for network in networks for layer in network.modules()]
        hooks = [layer.register_forward_pre_hook(continue_) for layer in layers]
        try:
            self.stage(name)
            yield
        finally:
            for hook in hooks:
                hook.remove()


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
