"""Readiness of a service: its engines, its model, its database and its storage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphalayer import catalog
from alphalayer.api.shutdown import Shutdown, stopping
from alphalayer.core.errors import AlphalayerError, StorageFailed
from alphalayer.core.job import JobResult
from alphalayer.jobs.base import Outcome
from alphalayer.observability.logging import log
from alphalayer.service.pool import WorkerPool
from alphalayer.storage import Storage

PROBE_EVERY_S = 10.0
"""Seconds between two checks of the storage."""


@dataclass(frozen=True)
class Health:
    """Readiness of one service."""

    pool: WorkerPool
    shutdown: Shutdown
    storage_problem: Callable[[], str | None]
    """Why jobs or images cannot be stored, or None."""
    default_model: Callable[[], tuple[str | None, str | None]]
    """The default model's title, or None and the reason."""
    has_engines: bool
    """Whether this service generates by itself. If not, a reachable queue is enough."""

    def readiness(self) -> dict[str, Any]:
        """Return the body of the readiness probe, with the result as `ready`."""
        model, problem = self.default_model()
        ready = not self.has_engines or (model is not None and self.pool.is_ready)
        if self.shutdown.has_begun:
            ready, problem = False, stopping().message
        elif failure := self.storage_problem():
            ready, problem = False, failure
        report: dict[str, Any] = {"ready": ready, "engines": self.pool.states(), "model": model}
        return {**report, "problem": problem} if problem else report


class StorageProbe:
    """Regular checks of the storage. They write only after a failed write."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._has_failed = False
        """Whether the last write of an image failed."""
        self.problem: str | None = None
        """Why images cannot be stored at the last check, or None."""

    def record_outcome(self, outcome: Outcome) -> None:
        """Remember a failed write until an image is stored."""
        if isinstance(outcome, StorageFailed):
            self._has_failed, self.problem = True, outcome.message
        elif isinstance(outcome, JobResult):
            self._has_failed, self.problem = False, None

    async def run(self) -> None:
        """Check the storage regularly until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(PROBE_EVERY_S)

    async def check(self) -> None:
        """Check the storage once."""
        before, is_writing = self.problem, self._has_failed
        try:
            await asyncio.to_thread(self._storage.check, is_writing=is_writing)
        except StorageFailed as error:
            self.problem = error.message
        else:
            self._has_failed &= not is_writing
            self.problem = self.problem if self._has_failed else None
        if self.problem and not before:
            log.warning("storage.unavailable", error=self.problem)
        elif before and not self.problem:
            log.info("storage.recovered")


@dataclass(frozen=True)
class ModelLookup:
    """Lookup of the models of this service."""

    models_dir: Path
    default_model: str | None
    has_engines: bool

    @property
    def knows_models(self) -> bool:
        """Return whether the models folder here is that of the engines."""
        return self.has_engines or (self.models_dir / catalog.CHECKPOINTS).is_dir()

    def list(self) -> list[catalog.ModelEntry]:
        """Return the models, or none if the folder is not that of the engines."""
        if not self.knows_models:
            return []
        entries = catalog.find_models(self.models_dir)
        for entry in entries:
            if entry.problem:
                catalog.shorten_paths(entry.problem, self.models_dir)
        return entries

    def default(self) -> tuple[str | None, str | None]:
        """Return the title of a plain request's model, or None and the reason."""
        if not self.knows_models:
            return self.default_model, None
        try:
            return (
                catalog.resolve_model(self.default_model, self.list(), self.models_dir).title,
                None,
            )
        except AlphalayerError as error:
            return None, str(catalog.shorten_paths(error, self.models_dir))
