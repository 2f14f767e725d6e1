"""Cache of loaded models: the active one, and offloaded ones within a budget of host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from alphalayer.catalog import ModelEntry
from alphalayer.engine.families.base import DiffusionModel
from alphalayer.engine.memory import free_memory


class ModelCache:
    """Cache of loaded models.

    One model is active. The one before it moves to the CPU and stays there while all offloaded
    models fit into `spare_bytes`.
    """

    def __init__(self, load: Callable[[ModelEntry], DiffusionModel], spare_bytes: int):
        self._load = load
        self._spare_bytes = spare_bytes
        self._offloaded: OrderedDict[Path, DiffusionModel] = OrderedDict()
        self.active: DiffusionModel | None = None

    def get(self, entry: ModelEntry) -> DiffusionModel:
        """Return the model of an entry: active, offloaded, or read from disk.

        A model whose files changed is read again. Raises what loading raises, and then no model is
        active.
        """
        if self.active and _is_current(self.active, entry):
            return self.active
        # removed first, so that it is not evicted to make space for itself
        offloaded = self._offloaded.pop(entry.path, None)
        self._offload_active()
        if offloaded is None or not _is_current(offloaded, entry):
            offloaded = self._load(entry)
        self.active = offloaded
        return offloaded

    def clear(self) -> None:
        """Remove all models."""
        self.active = None
        self._offloaded.clear()

    def _offload_active(self) -> None:
        model, self.active = self.active, None
        if model is None:
            return
        device = next(model.modules["denoiser"].parameters()).device
        budget = self._spare_bytes - model.memory_bytes()
        while self._offloaded and self._offloaded_bytes() > max(budget, 0):
            self._offloaded.popitem(last=False)
        if budget >= 0:
            # the weights alone, as they were read
            model.text.forget()
            model.remove_patches()
            model.move("cpu")
            self._offloaded[model.entry.path] = model
        del model
        free_memory(device)

    def _offloaded_bytes(self) -> int:
        return sum(model.memory_bytes() for model in self._offloaded.values())


def _is_current(model: DiffusionModel, entry: ModelEntry) -> bool:
    """Return whether a model was read from the files of an entry as they are now."""
    return (model.entry.path, model.entry.stamp) == (entry.path, entry.stamp)
