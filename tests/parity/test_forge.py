"""Requests as Forge reads them: final latents against those that Forge generated."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.parity.forge_model import make_models
from torch import Tensor

from alphalayer.api.a1111.schemas import Txt2ImgRequest
from alphalayer.api.a1111.settings import OverrideSettings
from alphalayer.core.modes import InputRole
from alphalayer.core.request import GenerationRequest, ImageInput
from alphalayer.engine.base import RenderTask
from alphalayer.engine.pipeline import LocalEngine

DATA = Path(__file__).parent / "data" / "forge"
CASES: dict[str, dict[str, Any]] = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
TOLERANCE = 5e-3
"""See `data/forge/README.md`."""


class LatentEngine(LocalEngine):
    """Engine that keeps the latents and decodes none."""

    latents: Tensor

    def _compose(self, _requests, _mode, _decoding, latents, _reporter):
        self.latents = latents
        return [[] for _ in latents]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LatentEngine:
    return LatentEngine(make_models(tmp_path_factory.mktemp("models")), device="cpu")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(DATA / "latents.npz") as latents:
        return dict(latents)


@pytest.mark.parametrize("name", CASES)
def test_request_gives_the_latents_of_forge(
    engine: LatentEngine, expected: dict[str, np.ndarray], name: str
):
    body = Txt2ImgRequest.model_validate(
        {**CASES[name], "layerdiffuse_enabled": "alwayson_scripts" in CASES[name]}
    )
    service: Any = SimpleNamespace(noise="nv", decode="forge2", prompt_comments=True)
    engine.generate(body.to_spec(service, OverrideSettings()).generation)
    difference = np.abs(engine.latents.numpy() - expected[name]).max()
    assert difference <= TOLERANCE


# --- img2img and inpainting

KARRAS = {"sampler": "DPM++ 2M SDE", "scheduler": "Karras"}
EULER = {"sampler": "Euler a", "scheduler": "Normal"}
STRETCH = {"init_resize_mode": "Just Resize"}
REGION = {"masked_only": True, "mask_padding": 32, "width": 192}
EDITS: dict[str, dict[str, Any]] = {
    "i2i_d075_stretch": {**KARRAS, **STRETCH},
    "i2i_d030_fit": {**KARRAS, "init_resize_mode": "Resize and Fill", "strength": 0.3},
    "i2i_batch2": {**KARRAS, "width": 192, "batch_size": 2, "noise": "nv"},
    "i2i_latent_resize": {**KARRAS, "init_resize_mode": "Latent"},
    "i2i_ddim": {"sampler": "DDIM", "scheduler": "Normal"},
    "inpaint_fill": {**KARRAS, **STRETCH, "mask_fill": "fill"},
    "inpaint_original": {**EULER, "noise": "nv"},
    "inpaint_nothing": {**EULER, **STRETCH, "mask_fill": "latent nothing"},
    "inpaint_region_fill_wide": {**EULER, **REGION, "mask_fill": "fill", "noise": "nv"},
    "plain_cover": {**KARRAS, "mode": "opaque"},
}
"""Requests by their names in `edits.npz`."""


def image_to_change(width: int = 192, height: int = 256) -> np.ndarray:
    """Return an ellipse with a soft edge, with half-transparent stripes in it."""
    y, x = np.mgrid[:height, :width]
    distance = (3 * (2 * x - width + 1)) ** 2 + (2 * (2 * y - height + 1)) ** 2
    alpha = np.clip((202500 - distance) // 240, 0, 255)
    alpha = np.where(x // 20 % 3 == 2, alpha // 2, alpha)
    channels = [(3 * x + y) % 256, (255 - 5 * y) % 256, 128 + 100 * (x // 10 % 2), alpha]
    return np.stack(channels, -1).astype(np.uint8)


def mask_to_change(width: int = 192, height: int = 256) -> np.ndarray:
    """Return a white box and a soft disc, as RGBA."""
    y, x = np.mgrid[:height, :width]
    box = np.where((x >= 48) & (x < 116) & (y >= 70) & (y < 170), 255, 0)
    disc = np.clip((1296 - (x - 134) ** 2 - (y - 80) ** 2) // 3, 0, 255)
    grey = np.maximum(box, disc)
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], -1).astype(np.uint8)


def edit_task(name: str) -> RenderTask:
    inputs: dict[InputRole, np.ndarray] = {"init": image_to_change()}
    if name.startswith("inpaint"):
        inputs["mask"] = mask_to_change()
    stored = tuple(ImageInput(role=role, file_name=f"input_{'0' * 64}.png") for role in inputs)
    values = {
        "prompt": "an apple, high quality", "steps": 8, "width": 128, "height": 128,
        "noise": "cpu", "decode": "forge2", "inputs": stored,
    }  # fmt: skip
    return RenderTask(GenerationRequest(**{**values, **EDITS[name]}), inputs=inputs)


class StartEngine(LatentEngine):
    """Engine that keeps the latents where sampling starts, and samples none."""

    start: Tensor
    mask: Tensor | None

    def _run_pass(self, _batch, _run, _guidances, _schedule, latents=None, kept=None):
        assert latents is not None
        self.start, self.mask = latents, kept and kept.mask
        return latents


@pytest.fixture(scope="module")
def edits() -> dict[str, np.ndarray]:
    with np.load(DATA / "edits.npz") as latents:
        return dict(latents)


@pytest.fixture(scope="module")
def edited(engine: LatentEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the models folder as of a single file, whose text encoders have heads of 64."""
    models = tmp_path_factory.mktemp("edited") / "models"
    shutil.copytree(engine._models_dir, models, copy_function=os.link)
    for part, heads in (("text_encoder", 1), ("text_encoder_2", 2)):
        file = models / "Stable-diffusion" / "tiny" / part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        file.write_text(json.dumps({**config, "num_attention_heads": heads}))
    return models


@pytest.fixture(scope="module")
def start_engine(edited: Path) -> StartEngine:
    return StartEngine(edited, device="cpu")


@pytest.fixture(scope="module")
def edit_engine(edited: Path) -> LatentEngine:
    return LatentEngine(edited, device="cpu")


@pytest.mark.parametrize("name", [name for name in EDITS if name != "i2i_ddim"])
def test_sampling_starts_where_forge_does(
    start_engine: StartEngine, edits: dict[str, np.ndarray], name: str
):
    start_engine.render([edit_task(name)])
    assert np.abs(start_engine.start.numpy() - edits[f"{name}.init"]).max() <= 5e-5
    if f"{name}.mask" in edits:
        assert start_engine.mask is not None
        assert np.array_equal(start_engine.mask[0, 0].numpy(), edits[f"{name}.mask"])


@pytest.mark.parametrize("name", ["i2i_ddim", "inpaint_fill", "inpaint_region_fill_wide"])
def test_edit_gives_the_latents_of_forge(
    edit_engine: LatentEngine, edits: dict[str, np.ndarray], name: str
):
    edit_engine.render([edit_task(name)])
    assert np.abs(edit_engine.latents.numpy() - edits[f"{name}.final"]).max() <= TOLERANCE
