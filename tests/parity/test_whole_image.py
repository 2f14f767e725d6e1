"""The whole image from prompt to RGBA, against `reference_pipeline` and between model forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.parity.reference_pipeline import render
from tests.support import tiny_models

from alphalayer.core.request import GenerationRequest
from alphalayer.engine.pipeline import LocalEngine

PROMPT = "a red apple, high quality"
REQUEST = GenerationRequest(prompt=PROMPT, seed=7, steps=3, width=64, height=64, noise="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a models folder with the tiny model as a folder and as a single file.

    Both share `layer_model/`.
    """
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "folder")
    tiny_models.make_single_file(folder / "Stable-diffusion" / "single.safetensors")
    tiny_models.make_layer_files(folder / "layer_model")
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> LocalEngine:
    return LocalEngine(models, device="cpu")


def _render(engine: LocalEngine, **changes: object) -> np.ndarray:
    return (
        engine.generate(REQUEST.model_copy(update={"model": "folder", **changes}))
        .images[0]
        .rgba.astype(int)
    )


# Both sides truncate float32 values that agree to about 1e-5. So a value may be on either side of a
# step of 1/255. With "forge2" this also happens to the decoder's input.
@pytest.mark.filterwarnings("ignore:Should have")
@pytest.mark.parametrize(("decode", "negative"), [("official", "bad, ugly"), ("forge2", "")])
def test_engine_equals_the_reference(engine: LocalEngine, models: Path, decode: str, negative: str):
    reference = render(
        models / "Stable-diffusion" / "folder", PROMPT, negative,
        seed=7, steps=5, cfg_scale=5.0, width=64, height=128, decode=decode,
    )  # fmt: skip
    image = _render(engine, decode=decode, negative_prompt=negative, steps=5, height=128)
    assert image.shape == (128, 64, 4)
    assert image.std(axis=(0, 1)).min() > 15, "a flat image would prove nothing"
    assert np.abs(image - reference).max() <= 1


def test_engine_single_file_equals_folder(engine: LocalEngine):
    assert np.abs(_render(engine, model="single") - _render(engine)).max() <= 1


def test_engine_image_is_equal_alone_and_in_a_batch(engine: LocalEngine):
    batch = engine.generate(REQUEST.model_copy(update={"model": "folder", "batch_size": 3})).images
    assert [image.seed for image in batch] == [7, 8, 9]
    for image in batch:
        alone = _render(engine, seed=image.seed)
        assert np.abs(alone - image.rgba).max() <= 1


def test_engine_other_sizes_are_cropped_from_the_middle(engine: LocalEngine):
    whole = _render(engine, width=128, height=128)
    part = _render(engine, width=100, height=70)
    # the UNet gets the size that is rendered, so the images agree
    assert np.array_equal(part, whole[29:99, 14:114])


def test_engine_without_patch_differs_and_patch_is_restored(engine: LocalEngine):
    before = _render(engine)
    unpatched = _render(engine, layerdiffuse_weight=0.0)
    early = _render(engine, layerdiffuse_stop_at=0.1)
    assert np.abs(before - unpatched).max() > 8
    assert not np.array_equal(before, early)
    assert np.array_equal(_render(engine), before)


def test_engine_without_layerdiffuse_is_opaque(engine: LocalEngine):
    assert (_render(engine, mode="opaque")[..., 3] == 255).all()


def test_engine_variation_strength_changes_the_image_gradually(engine: LocalEngine):
    base = _render(engine)
    near, far = (_render(engine, subseed=99, subseed_strength=s) for s in (0.02, 0.9))
    assert 0 < np.abs(near - base).mean() < np.abs(far - base).mean()


def test_engine_noise_sources_differ_and_repeat(engine: LocalEngine):
    images = {noise: _render(engine, noise=noise) for noise in ("nv", "cpu")}
    assert not np.array_equal(images["nv"], images["cpu"])
    for noise, image in images.items():
        assert np.array_equal(_render(engine, noise=noise), image)
