"""Modes with input images, on the small random model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import tiny_models

from alphalayer.api.native.fields import SpecContext
from alphalayer.api.native.layers import LayersRequest
from alphalayer.core.errors import InvalidRequest, LayerDiffuseMissing, ModelUnusable
from alphalayer.core.job import Job
from alphalayer.core.modes import MODES
from alphalayer.core.request import GenerationRequest, ImageInput, parse_request
from alphalayer.engine.base import GeneratedImage, RenderTask
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.transparency.modes import MODES as MATHEMATICS
from alphalayer.images import codecs
from alphalayer.storage.objects import open_storage
from alphalayer.worker.render import Renderer

CONDITIONAL = [mode.name for mode in MODES.values() if mode.needs and mode.family == "sdxl"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    models = tmp_path_factory.mktemp("models")
    folder = tiny_models.make_shared_models(models)
    for mode in CONDITIONAL:
        tiny_models.make_condition_patch(folder, mode)
    return LocalEngine(models, device="cpu")


def request_of(mode: str, **fields) -> GenerationRequest:
    inputs = tuple(
        ImageInput(role=role, file_name=f"input_{i:064x}.png")
        for i, role in enumerate(MODES[mode].needs)
    )
    defaults = {"prompt": "a table", "steps": 3, "width": 64, "height": 64, "seed": 5}
    return GenerationRequest(mode=mode, inputs=inputs, **(defaults | fields))


def inputs_of(mode: str, seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    return {
        role: generator.integers(0, 256, (40, 56, 4), dtype=np.uint8) for role in MODES[mode].needs
    }


def render(engine: LocalEngine, mode: str, seed: int = 0, **fields) -> list[GeneratedImage]:
    task = RenderTask(request_of(mode, **fields), inputs=inputs_of(mode, seed))
    return engine.render([task])[0].images


def test_every_mode_has_data_and_mathematics():
    assert list(MODES) == list(MATHEMATICS)


@pytest.mark.parametrize("mode", CONDITIONAL)
def test_conditional_mode_renders_its_layer(engine: LocalEngine, mode: str):
    (image,) = render(engine, mode)
    assert image.role == MODES[mode].layers[0]
    assert image.rgba.shape == (64, 64, 4)
    assert bool(image.rgba[..., 3].min() < 255) is MODES[mode].has_alpha


@pytest.mark.parametrize("mode", CONDITIONAL)
def test_result_depends_on_the_input_images(engine: LocalEngine, mode: str):
    first, repeated, other = (render(engine, mode, seed)[0].rgba for seed in (0, 0, 1))
    assert np.array_equal(first, repeated)
    assert not np.array_equal(first, other)


def test_stop_at_zero_equals_the_model_alone(engine: LocalEngine):
    (stopped,) = render(engine, "fg2ble", layerdiffuse_stop_at=0)
    (plain,) = render(engine, "opaque")
    assert np.array_equal(stopped.rgba, plain.rgba)


def test_weight_zero_equals_the_model_alone(engine: LocalEngine):
    (weightless,) = render(engine, "fg2ble", layerdiffuse_weight=0)
    (plain,) = render(engine, "opaque")
    assert np.array_equal(weightless.rgba, plain.rgba)


def test_batch_equals_single_images(engine: LocalEngine):
    batch = render(engine, "fgble2bg", batch_size=2)
    (alone,) = render(engine, "fgble2bg")
    # one call with two rows sums in another order than two calls
    assert np.abs(batch[0].rgba.astype(int) - alone.rgba).max() <= 1


def test_tasks_with_own_inputs_share_a_batch(engine: LocalEngine):
    modes = ("Crop and Resize", "Resize and Fill")
    tasks = [
        RenderTask(request_of("bg2ble", resize_mode=mode), inputs=inputs_of("bg2ble", i))
        for i, mode in enumerate(modes)
    ]
    together = [result.images[0].rgba for result in engine.render(tasks)]
    for i, image in enumerate(together):
        (alone,) = render(engine, "bg2ble", i, resize_mode=modes[i])
        assert np.abs(image.astype(int) - alone.rgba).max() <= 1


def test_size_beside_the_multiple_of_64_is_cropped(engine: LocalEngine):
    (image,) = render(engine, "fg2ble", width=72, height=96)
    assert image.rgba.shape == (96, 72, 4)


@pytest.mark.parametrize(
    ("mode", "roles", "accepted"),
    [
        ("fg2ble", (), "one image each of: foreground"),
        ("fgble2bg", ("foreground", "background"), "one image each of: foreground, blended"),
        ("attention", ("foreground",), "no input images"),
    ],
)
def test_request_with_other_inputs_is_refused(mode, roles, accepted):
    inputs = [{"role": role, "file_name": f"input_{'0' * 64}.png"} for role in roles]
    with pytest.raises(InvalidRequest, match=f'mode "{mode}" takes {accepted}'):
        parse_request({"prompt": "x", "mode": mode, "inputs": inputs})


def test_missing_patch_names_the_file_and_command(engine: LocalEngine, tmp_path: Path):
    tiny_models.make_shared_models(tmp_path)
    without = LocalEngine(tmp_path, device="cpu")
    with pytest.raises(LayerDiffuseMissing) as caught:
        render(without, "fg2ble")
    assert "layer_xl_fg2ble.safetensors" in caught.value.message
    assert caught.value.hint.endswith("models pull layerdiffuse-fg2ble")


def test_patch_of_another_mode_is_refused(tmp_path: Path):
    folder = tiny_models.make_shared_models(tmp_path)
    (folder / "layer_xl_transparent_attn.safetensors").rename(folder / MODES["fg2ble"].files[0])
    with pytest.raises(ModelUnusable, match="is not a patch for input images"):
        render(LocalEngine(tmp_path, device="cpu"), "fg2ble")


def test_chain_equals_its_stages_alone(engine: LocalEngine, tmp_path: Path):
    body = LayersRequest(prompt="a table", steps=3, width=64, height=64, seed=5)
    job = Job.new(body.to_spec(SpecContext("nv", "official")))
    stored = Renderer(engine, open_storage(str(tmp_path))).run(job).images
    layers = {image.role: codecs.decode((tmp_path / image.key).read_bytes())[0] for image in stored}
    assert list(layers) == ["background", "foreground", "blended", "composite"]
    assert [image.is_opaque for image in stored] == [True, False, True, True]
    task = RenderTask(
        request_of(
            "fgble2bg", sampler="Euler a", scheduler="Normal", layerdiffuse_stop_at=0.5, subseed=1
        ),
        job.spec.seeds,
        inputs={"foreground": layers["foreground"], "blended": layers["blended"]},
    )
    (alone,) = engine.render([task])[0].images
    assert np.array_equal(alone.rgba, layers["background"])
