"""The whole picture, prompt to uint8 RGBA, against the straight-line reference beside this file, and across forms of one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.parity.reference_pipeline import render
from tests.support import tiny_models

from alphalayer.core.request import GenerationRequest
from alphalayer.engine.pipeline import LocalEngine

PROMPT = "a red apple, high quality"
REQUEST = GenerationRequest(prompt=PROMPT, seed=7, steps=6, width=64, height=128, noise="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the tiny model as a folder and as single files, which share `layer_model/`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "folder")
    tiny_models.make_single_file(folder / "Stable-diffusion" / "single.safetensors")
    tiny_models.make_layer_files(folder / "layer_model")
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> LocalEngine:
    return LocalEngine(models, device="cpu")


def _picture(engine: LocalEngine, **changes: object) -> np.ndarray:
    return (
        engine.generate(REQUEST.model_copy(update={"model": "folder", **changes}))
        .images[0]
        .rgba.astype(int)
    )


# Both sides truncate float32 values that agree to about 1e-5, so a value may fall on either side of a step of 1/255; with "forge2"
# the same happens once more to the decoder's input.
@pytest.mark.filterwarnings("ignore:Should have")
@pytest.mark.parametrize("decode", ["official", "forge2"])
@pytest.mark.parametrize("negative", ["bad, ugly", ""])
def test_engine_equals_the_reference(engine: LocalEngine, models: Path, decode: str, negative: str):
    reference = render(
        models / "Stable-diffusion" / "folder", PROMPT, negative,
        seed=7, steps=6, cfg_scale=5.0, width=64, height=128, decode=decode,
    )  # fmt: skip
    ours = _picture(engine, decode=decode, negative_prompt=negative)
    assert ours.shape == (128, 64, 4)
    assert ours.std(axis=(0, 1)).min() > 15, "a flat picture would prove nothing"
    assert np.abs(ours - reference).max() <= 1


def test_single_file_draws_what_the_folder_draws(engine: LocalEngine):
    assert np.abs(_picture(engine, model="single") - _picture(engine)).max() <= 1


def test_an_image_is_the_same_alone_and_in_a_batch(engine: LocalEngine):
    batch = engine.generate(REQUEST.model_copy(update={"model": "folder", "batch_size": 3})).images
    assert [image.seed for image in batch] == [7, 8, 9]
    for image in batch:
        alone = _picture(engine, seed=image.seed)
        assert np.abs(alone - image.rgba).max() <= 1


def test_sizes_between_multiples_of_64_are_cut_from_the_middle(engine: LocalEngine):
    whole = _picture(engine, width=128, height=128)
    part = _picture(engine, width=100, height=70)
    # the UNet is told the size that is drawn, so the pictures agree
    assert np.array_equal(part, whole[29:99, 14:114])


def test_taking_the_patch_off_changes_the_picture_and_is_undone_exactly(engine: LocalEngine):
    before = _picture(engine)
    unpatched = _picture(engine, layerdiffuse_weight=0.0)
    early = _picture(engine, layerdiffuse_stop_at=0.1)
    assert np.abs(before - unpatched).max() > 8
    assert not np.array_equal(before, early)
    assert np.array_equal(_picture(engine), before)


def test_without_layerdiffuse_the_picture_is_opaque(engine: LocalEngine):
    assert (_picture(engine, mode="opaque")[..., 3] == 255).all()


def test_variation_seeds_move_the_picture_gradually(engine: LocalEngine):
    base = _picture(engine)
    near, far = (_picture(engine, subseed=99, subseed_strength=s) for s in (0.02, 0.9))
    assert 0 < np.abs(near - base).mean() < np.abs(far - base).mean()


@pytest.mark.parametrize("noise", ["nv", "cpu"])
def test_noise_sources_differ_and_repeat(engine: LocalEngine, noise: str):
    assert np.array_equal(_picture(engine, noise=noise), _picture(engine, noise=noise))
    assert not np.array_equal(_picture(engine, noise="nv"), _picture(engine, noise="cpu"))
