"""Models in memory: those that are put aside in a budget of host memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from alphalayer.catalog import ModelEntry
from alphalayer.engine.shelf import ModelShelf, Ready


@pytest.mark.parametrize(("room", "reads"), [(0, "ABABA"), (1, "AB"), (1.5, "AB"), (0.9, "ABABA")])
def test_room_for_one_model_lets_two_take_turns(room: float, reads: str):
    read: list[str] = []

    def load(entry: ModelEntry) -> Ready:
        read.append(entry.name)
        parts = {name: nn.Linear(9, 9) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
        model: Any = SimpleNamespace(entry=entry, take_off_patches=lambda: None, **parts)
        encoders: Any = SimpleNamespace(forget=lambda: None)
        return Ready(model, encoders)

    entries = {name: ModelEntry(name, Path(name), "single_file", "sdxl") for name in "AB"}
    one = load(entries["A"]).size_bytes
    read.clear()
    shelf = ModelShelf(load, int(one * room))
    for name in "ABABA":
        assert shelf.get(entries[name]).model.entry.name == name
    assert "".join(read) == reads
