"""Engines with errors, for tests of engine processes.

They are not in a test module, whose imports of the service each engine process would load.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.base import GenerationResult, RenderTask
from alphalayer.engine.fake import FakeEngine

ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


class Breaking(FakeEngine):
    """An engine whose GPU fails from the prompt "boom" until its process ends."""

    is_broken = False

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Raise an error from the first task "boom" on."""
        self.is_broken |= any(task.request.prompt == "boom" for task in tasks)
        if self.is_broken:
            raise RuntimeError(ILLEGAL_ACCESS)
        return super().render(tasks)


def create_breaking(_options: dict[str, Any]) -> FakeEngine:
    """Create an engine that renders up to three images of 64x64 pixels together."""
    return Breaking(batch_pixels=3 * 64 * 64)


class BrokenOnce(FakeEngine):
    """An engine that raises an error at its first image and creates a file, unless it exists."""

    def __init__(self, mark: str):
        super().__init__()
        self._mark = Path(mark)

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Raise an error if the file is missing."""
        if not self._mark.exists():
            self._mark.touch()
            raise RuntimeError(ILLEGAL_ACCESS)
        return super().render(tasks)


def create_broken_once(options: dict[str, Any]) -> FakeEngine:
    """Create an engine; the option `mark` is the path of its file."""
    return BrokenOnce(options["mark"])


class Quoting(FakeEngine):
    """An engine whose errors quote the prompt."""

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Raise an error for clients for "wrong …", and an unexpected one for "boom …"."""
        prompt = tasks[0].request.prompt
        if prompt.startswith("wrong"):
            raise InvalidRequest(f'the attention weight of "{prompt}" is too high.', field="prompt")
        if prompt.startswith("boom"):
            TypeAdapter(int).validate_python(prompt)
        return super().render(tasks)


def create_quoting(_options: dict[str, Any]) -> FakeEngine:
    """Create an engine whose errors quote the prompt."""
    return Quoting()


class Unwarmable(FakeEngine):
    """An engine whose GPU is broken from the start."""

    def warm_up(self) -> None:
        """Raise an error."""
        raise IndexError("list index out of range")


def create_unwarmable(_options: dict[str, Any]) -> FakeEngine:
    """Create an engine that cannot warm up."""
    return Unwarmable()


def create_hanging(_options: dict[str, Any]) -> FakeEngine:
    """Wait instead of creating an engine."""
    time.sleep(3600)
    return FakeEngine()


class SlowToWarm(FakeEngine):
    """An engine that creates a file once it is warm."""

    def __init__(self, mark: str):
        super().__init__()
        self._mark = Path(mark)

    def warm_up(self) -> None:
        """Wait, then create the file."""
        time.sleep(0.5)
        self._mark.touch()


def create_slow_to_warm(options: dict[str, Any]) -> FakeEngine:
    """Create an engine; the option `mark` is the path of its file."""
    return SlowToWarm(options["mark"])


class Logging(FakeEngine):
    """An engine that logs a warning."""

    def warm_up(self) -> None:
        """Log a warning."""
        logging.getLogger("alphalayer.engine").warning("a file is left out (%s).", "broken")


def create_logging(_options: dict[str, Any]) -> FakeEngine:
    """Create an engine that logs a warning."""
    return Logging()
