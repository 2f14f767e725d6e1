"""The models in memory: one that draws, and others that were put aside, as many as a budget of host memory holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from alphalayer.catalog import ModelEntry
from alphalayer.engine.families.sdxl import LoadedModel
from alphalayer.engine.memory import free_memory
from alphalayer.engine.text.encoders import TextEncoders


@dataclass(frozen=True)
class LoadedPipeline:
    """A model with its text encoders' cache."""

    model: LoadedModel
    encoders: TextEncoders

    @property
    def modules(self) -> list[nn.Module]:
        """Everything that may be on a device."""
        model = self.model
        decoder = [model.decoder] if "decoder" in vars(model) else []
        return [model.unet, model.vae, model.text_encoder, model.text_encoder_2, *decoder]

    @property
    def size_bytes(self) -> int:
        """Memory of all weights."""
        return sum(each.nbytes for module in self.modules for each in module.parameters())

    def is_of(self, entry: ModelEntry) -> bool:
        """Whether it was read from the files of an entry as they are."""
        return (self.model.entry.path, self.model.entry.stamp) == (entry.path, entry.stamp)

    def leave_device(self) -> None:
        """Move everything to the CPU."""
        for module in self.modules:
            module.to("cpu")

    def offload(self) -> None:
        """Keep the weights alone, as they were read, on the CPU."""
        self.encoders.forget()
        self.model.remove_patches()
        self.leave_device()


class ModelCache:
    """`get` brings a model; the one before goes to the CPU and stays there while all that are put aside fit into `spare_bytes`."""

    def __init__(self, load: Callable[[ModelEntry], LoadedPipeline], spare_bytes: int):
        self._load = load
        self._spare_bytes = spare_bytes
        self._aside: OrderedDict[Path, LoadedPipeline] = OrderedDict()
        self.held: LoadedPipeline | None = None

    def get(self, entry: ModelEntry) -> LoadedPipeline:
        """The model of an entry: the one held, one put aside, or read from disk, as it is if its files changed since. Raises what
        loading raises; then none is held."""
        if self.held and self.held.is_of(entry):
            return self.held
        # taken off first: it is not what has to make room
        aside = self._aside.pop(entry.path, None)
        self._offload()
        self.held = aside if aside and aside.is_of(entry) else self._load(entry)
        return self.held

    def _offload(self) -> None:
        held, self.held = self.held, None
        if held is None:
            return
        device = next(held.model.unet.parameters()).device
        room = self._spare_bytes - held.size_bytes
        while self._aside and sum(each.size_bytes for each in self._aside.values()) > max(room, 0):
            self._aside.popitem(last=False)
        if room >= 0:
            held.offload()
            self._aside[held.model.entry.path] = held
        del held
        free_memory(device)
