"""Readiness of a service: its engines, its model, its database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphalayer import catalog
from alphalayer.api.shutdown import Shutdown, stopping
from alphalayer.core.errors import AlphalayerError
from alphalayer.service.pool import WorkerPool


@dataclass(frozen=True)
class Health:
    """Readiness of one service."""

    pool: WorkerPool
    shutdown: Shutdown
    is_reachable: Callable[[], bool]
    """Whether the database can be reached."""
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
        elif not self.is_reachable():
            ready, problem = False, "the database cannot be reached."
        report: dict[str, Any] = {"ready": ready, "engines": self.pool.states(), "model": model}
        return {**report, "problem": problem} if problem else report


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
