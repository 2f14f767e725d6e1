"""Models in memory: the cache in host memory, and moves and retries when memory is scarce."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import tiny_models
from torch import nn

from alphalayer.catalog import ModelEntry
from alphalayer.catalog.kinds import SUPPORTED
from alphalayer.core.errors import OutOfMemory
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.model_cache import ModelCache
from alphalayer.engine.pipeline import FAMILIES, LocalEngine

REQUEST = GenerationRequest(
    prompt="a red [apple:cup:1]", seed=3, steps=2, width=64, height=64, batch_size=2
)
OPAQUE = REQUEST.model_copy(update={"batch_size": 1, "mode": "opaque"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "folder")
    return folder


def test_every_supported_family_can_be_read():
    assert set(SUPPORTED) == set(FAMILIES)


@pytest.mark.parametrize(
    ("budget", "reads"), [(0, "ABABA"), (1, "AB"), (1.5, "AB"), (0.9, "ABABA")]
)
def test_model_cache_keeps_models_within_its_budget(budget: float, reads: str):
    read: list[str] = []

    def load(entry: ModelEntry) -> Any:
        read.append(entry.name)
        return SimpleNamespace(
            entry=entry,
            modules={"denoiser": nn.Linear(9, 9)},
            text=SimpleNamespace(forget=lambda: None),
            memory_bytes=lambda: 360,
            remove_patches=lambda: None,
            move=lambda _device: None,
        )

    entries = {name: ModelEntry(name, Path(name), "single_file", "sdxl") for name in "AB"}
    cache = ModelCache(load, int(360 * budget))
    for name in "ABABA":
        assert cache.get(entries[name]).entry.name == name
    assert "".join(read) == reads
    cache.clear()
    assert cache.active is None
    cache.get(entries["B"])
    assert "".join(read) == reads + "B"


def test_unloaded_model_is_freed_and_read_again(models: Path):
    engine = LocalEngine(models, device="cpu")
    before = engine.generate(OPAQUE).images[0].rgba
    weight = weakref.ref(engine.model.modules["vae"])
    engine.unload()
    assert weight() is None
    assert np.array_equal(engine.generate(OPAQUE).images[0].rgba, before)


def test_text_encoders_are_moved_only_for_new_texts(models: Path, monkeypatch: pytest.MonkeyPatch):
    engine = LocalEngine(models, device="cpu", memory="balanced")
    engine.generate(OPAQUE)
    encoder, moves = engine.model.modules["text"], []
    monkeypatch.setattr(
        "alphalayer.engine.memory.move",
        lambda module, _device: moves.append(module) if module is encoder else None,
    )
    for changes, expected in (
        ({"seed": 4}, 0),
        ({"negative_prompt": "bad"}, 1),
        ({"negative_prompt": "bad", "seed": 5}, 0),
        ({"clip_skip": 3}, 1),
        ({"prompt": "a red [apple:plate:1]"}, 1),
    ):
        moves.clear()
        engine.generate(OPAQUE.model_copy(update=changes))
        assert len(moves) == expected, changes


@pytest.mark.parametrize("failing_calls", [[2], [2, 3], [1, 2, 3]])
def test_out_of_memory_in_decoding_keeps_sampled_latents(models: Path, failing_calls: list[int]):
    """Keep decoded images, too, and fail after the smallest mode."""
    engine = LocalEngine(models, device="cpu", memory="high")
    first = engine.generate(REQUEST).images
    model, sampled, decoded = engine.model, [], []
    model.unet.register_forward_pre_hook(
        lambda _, inputs: None if inputs[0].is_meta else sampled.append(1)
    )

    def fail(module: torch.nn.Module, _: object) -> None:
        if next(module.parameters()).is_meta:
            return  # the count of the memory that was needed
        decoded.append(1)
        if len(decoded) in failing_calls:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.vae.decoder.register_forward_pre_hook(fail)
    if len(failing_calls) == 3:
        with pytest.raises(OutOfMemory, match='"low"'):
            engine.generate(REQUEST)
        assert len(decoded) == 3
    else:
        repeated = engine.generate(REQUEST).images
        assert len(decoded) == 2 + len(failing_calls)
        assert len(repeated) == len(first)
        # smaller batches of passes round differently, and truncation makes 1/255 of it
        assert all(
            abs(a.rgba.astype(int) - b.rgba.astype(int)).max() <= 1
            for a, b in zip(repeated, first, strict=True)
        )
    assert len(sampled) == REQUEST.steps
