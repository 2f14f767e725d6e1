"""Img2img and inpainting on small random models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tests.support import tiny_models

from alphalayer.core.errors import Cancelled, InvalidRequest, LayerDiffuseMissing, ModelUnusable
from alphalayer.core.modes import MODES, InputRole
from alphalayer.core.request import GenerationRequest, ImageInput
from alphalayer.engine.base import Progress, RenderTask
from alphalayer.engine.canvas import Canvas
from alphalayer.engine.edits import encode_edit, inpaint_condition
from alphalayer.engine.families import stable_diffusion
from alphalayer.engine.families.base import LayerDiffuseFiles
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.text.encoders import Conditioning
from alphalayer.engine.transparency.encode import load_encoder

Inputs = dict[InputRole, np.ndarray]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    layers = tiny_models.make_shared_models(models)
    tiny_models.make_encoder(layers)
    tiny_models.make_condition_patch(layers, "bgble2fg")
    return models


@pytest.fixture(scope="module")
def engine(models: Path) -> LocalEngine:
    return LocalEngine(models, device="cpu")


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory, models: Path) -> LocalEngine:
    """Return an engine with an inpainting checkpoint."""
    folder = tmp_path_factory.mktemp("inpainting")
    path = tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "inpaint")
    shutil.rmtree(tiny_models.widen_for_inpainting(path) / "layerdiffuse")
    older = tiny_models.make_sd15_folder(folder / "Stable-diffusion" / "sd15")
    tiny_models.widen_for_inpainting(older)
    (folder / "layer_model").symlink_to(models / "layer_model")
    return LocalEngine(folder, device="cpu")


def image(width: int = 64, height: int = 64, seed: int = 0) -> np.ndarray:
    rgba = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    rgba[: height // 4, :, 3] = 0
    return rgba


def mask(width: int = 64, height: int = 64, value: int = 255) -> np.ndarray:
    rgba = np.zeros((height, width, 4), np.uint8)
    rgba[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = value
    return rgba


def task_of(inputs: Inputs, **fields) -> RenderTask:
    stored = tuple(ImageInput(role=role, file_name=f"input_{'0' * 64}.png") for role in inputs)
    values = {"prompt": "a cup", "steps": 2, "width": 64, "height": 64, "seed": 5} | fields
    return RenderTask(GenerationRequest(inputs=stored, **values), inputs=inputs)


def render(engine: LocalEngine, inputs: Inputs, **fields) -> list[np.ndarray]:
    (result,) = engine.render([task_of(inputs, **fields)])
    return [image.rgba for image in result.images]


@pytest.mark.parametrize("mode", ["attention", "opaque"])
def test_result_has_the_size_and_depends_on_the_image(engine: LocalEngine, mode: str):
    results = [
        render(engine, {"init": image(80, 48, seed)}, width=72, mode=mode, strength=0.3)[0]
        for seed in (0, 0, 1)
    ]
    assert results[0].shape == (64, 72, 4)
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert bool(results[0][..., 3].min() < 255) is MODES[mode].has_alpha


@pytest.mark.parametrize("mode", ["Just Resize", "Resize and Fill", "Latent"])
def test_every_resize_mode_renders(engine: LocalEngine, mode: str):
    inputs: Inputs = {"init": image(90, 50), "mask": mask(90, 50)}
    fields = {"init_resize_mode": mode, "mask_fill": "fill", "mode": "opaque"}
    (result,) = render(engine, inputs, height=72, **fields)
    assert result.shape == (72, 64, 4)


def test_alpha_of_the_image_changes_the_latent(engine: LocalEngine):
    """Compare an image with one whose visible colours on grey are the same."""
    init = image()
    opaque = init.copy()
    share = init[..., 3:] / 255
    opaque[..., :3] = np.rint(init[..., :3] * share + 127 * (1 - share))
    opaque[..., 3] = 255
    results = [render(engine, {"init": one}, steps=1)[0] for one in (init, opaque)]
    assert not np.array_equal(*results)


def test_kept_alpha_is_that_of_the_image(engine: LocalEngine):
    init = image()
    (kept,) = render(engine, {"init": init}, alpha="keep")
    (new,) = render(engine, {"init": init})
    assert np.array_equal(kept[..., 3], init[..., 3])
    assert np.array_equal(kept[..., :3], new[..., :3])


@pytest.mark.parametrize(("masked_only", "width"), [(False, 64), (True, 128)])
@pytest.mark.parametrize("fill", ["original", "latent noise", "latent nothing"])
def test_bytes_outside_the_mask_stay(engine: LocalEngine, masked_only: bool, width: int, fill: str):
    """The region of a mask is generated at a size of its own."""
    init = image(width, 64)
    inputs: Inputs = {"init": init, "mask": mask(width, 64)}
    (result,) = render(engine, inputs, mask_fill=fill, mask_blur=2, masked_only=masked_only)
    assert result.shape == init.shape
    changed = (result != init).any(-1)
    left, right = width // 4, 3 * width // 4
    assert changed[24:40, left + 8 : right - 8].mean() > 0.9
    changed[16 - 5 : 48 + 5, left - 5 : right + 5] = False
    assert not changed.any()


@pytest.mark.parametrize("masked_only", [False, True])
def test_black_mask_returns_the_image(engine: LocalEngine, masked_only: bool):
    inputs: Inputs = {"init": image(), "mask": mask(value=0)}
    (result,) = render(engine, inputs, masked_only=masked_only)
    assert np.array_equal(result, inputs["init"])


def test_noise_around_the_mask_comes_from_the_seed(engine: LocalEngine):
    inputs: Inputs = {"init": image(), "mask": mask()}
    results = [render(engine, inputs, seed=seed, mode="opaque")[0] for seed in (5, 5, 6)]
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_batch_equals_single_images(engine: LocalEngine):
    inputs: Inputs = {"init": image(), "mask": mask()}
    batch = render(engine, inputs, batch_size=2, mask_fill="latent noise")
    (alone,) = render(engine, inputs, seed=6, mask_fill="latent noise")
    assert np.abs(batch[1].astype(int) - alone).max() <= 1


def test_requests_with_own_images_share_a_batch(engine: LocalEngine):
    all_inputs: list[Inputs] = [
        {"init": image(100, 80, seed), "mask": mask(100, 80)} for seed in (1, 2)
    ]
    fields = {"masked_only": True, "mask_padding": 8}
    tasks = [task_of(one, seed=seed, **fields) for seed, one in enumerate(all_inputs)]
    together = [result.images[0].rgba for result in engine.render(tasks)]
    for seed, one in enumerate(all_inputs):
        (alone,) = render(engine, one, seed=seed, **fields)
        assert together[seed].shape == (80, 100, 4)
        # colours of nearly invisible pixels are divided by their alpha
        shares = [one[..., :3] * (one[..., 3:] / 255) for one in (together[seed], alone)]
        assert np.abs(shares[0] - shares[1]).max() <= 2


@pytest.mark.parametrize(("strength", "calls"), [(0.0, 1), (0.5, 3)])
def test_progress_counts_the_steps_of_the_strength(
    engine: LocalEngine, strength: float, calls: int
):
    reports: list[Progress] = []
    task = task_of({"init": image()}, steps=4, strength=strength, mode="opaque")
    task = RenderTask(task.request, (), reports.append, inputs=task.inputs)
    engine.render([task])
    steps = [(report.step, report.steps) for report in reports if report.step]
    assert steps == [(step, calls) for step in range(1, calls + 1)]
    stages = list(dict.fromkeys(report.stage for report in reports))
    assert stages == ["load", "text", "inputs", "sample", "decode"]


def test_schedule_that_is_too_long_names_the_strength(engine: LocalEngine):
    # the engine alone knows open steps
    with pytest.raises(InvalidRequest, match="schedule of 20000") as caught:
        render(engine, {"init": image()}, strength=0.001, exact_steps=True, steps=None)
    assert caught.value.field == "strength"


def test_cancelled_edit_stops_before_it_is_encoded(engine: LocalEngine):
    stages: list[str] = []
    task = task_of({"init": image()})
    task = RenderTask(
        task.request,
        on_progress=lambda progress: stages.append(progress.stage),
        is_cancelled=lambda: "text" in stages,
        inputs=task.inputs,
    )
    with pytest.raises(Cancelled):
        engine.render([task])
    assert stages == ["load", "text"]


def test_smallest_memory_mode_gives_the_same_image(engine: LocalEngine, models: Path):
    inputs: Inputs = {"init": image(), "mask": mask()}
    (expected,) = render(engine, inputs)
    (result,) = render(LocalEngine(models, device="cpu", memory="low"), inputs)
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_mode_with_input_images_starts_from_an_image(engine: LocalEngine):
    inputs: Inputs = {"background": image(seed=1), "blended": image(seed=2)}
    (plain,) = render(engine, inputs, mode="bgble2fg")
    (edited,) = render(engine, {**inputs, "init": image()}, mode="bgble2fg", strength=0.3)
    assert not np.array_equal(plain, edited)


def test_missing_encoder_names_the_file_and_command(engine: LocalEngine, models: Path):
    path = models / "layer_model" / "vae_transparent_encoder.safetensors"
    path.rename(path.with_suffix(".away"))
    try:
        with pytest.raises(LayerDiffuseMissing, match="vae_transparent_encoder") as caught:
            render(engine, {"init": image()})
        assert "models pull layerdiffuse-encoder" in str(caught.value.hint)
        assert render(engine, {"init": image()}, mode="opaque", steps=1)
    finally:
        path.with_suffix(".away").rename(path)


def test_encoder_is_read_once(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch):
    render(engine, {"init": image()}, steps=1)
    monkeypatch.setattr(stable_diffusion, "load_encoder", None)
    assert render(engine, {"init": image()}, steps=1)


def test_encoder_of_other_widths_is_read_by_its_shapes(tmp_path: Path):
    encoder = load_encoder(tiny_models.make_encoder(tmp_path, (4, 6, 8, 8, 10, 12, 14, 16, 4)))
    assert encoder(torch.zeros(1, 4, 16, 24)).shape == (1, 4, 2, 3)


def test_encoder_of_another_latent_is_refused(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    render(engine, {}, steps=1, mode="opaque")
    path = tiny_models.make_encoder(tmp_path, (*tiny_models.ENCODER[:-1], 8))
    monkeypatch.setattr(LayerDiffuseFiles, "required_encoder", lambda _: path)
    with pytest.raises(ModelUnusable, match="does not fit the latent of tiny"):
        render(engine, {"init": image()})


# --- inpainting checkpoints


@torch.inference_mode()
def test_inpainting_checkpoint_reads_mask_and_image(inpainting: LocalEngine, models: Path):
    """Compare the UNet with that of diffusers, whose input has nine channels."""
    render(inpainting, {}, steps=1, mode="opaque")
    model, canvas = inpainting.model, Canvas.of(64, 64)
    request = task_of({"init": image(), "mask": mask()}, mask_blur=0, mode="opaque").request
    edit = encode_edit(
        model,
        None,
        request.resolve(model.defaults),
        {"init": image(), "mask": mask()},
        canvas,
    )
    assert edit.mask is not None
    folder = inpainting._models_dir / "Stable-diffusion" / "inpaint" / "unet"
    reference = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    reference.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    x, context, pooled = (
        torch.randn(*shape, generator=generator)
        for shape in ((1, 4, 8, 8), (1, 77, 96), (1, tiny_models.WIDTH_G))
    )
    whole = image()[..., :3] * (image()[..., 3:] / 255) + 255 - image()[..., 3:]
    rgb = torch.from_numpy(np.rint(whole)).permute(2, 0, 1)[None].float() / 127.5 - 1
    hole = torch.from_numpy(mask()[..., 0] / 255)[None, None].float()
    masked = model.encode_image(rgb * (1 - hole))
    joined = torch.cat([x, hole[..., ::8, ::8], masked], dim=1)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = reference(joined, 500, context, added_cond_kwargs=added).sample
    prepared = model.prepare(Conditioning(context, pooled), 64, 64, (0, 0))
    sigma = model.process.table.sigma(500)
    actual = model.denoise(x, sigma, prepared, edit.condition)
    assert float((actual - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    blank = inpaint_condition(model, canvas)
    assert blank is not None
    assert not torch.equal(model.denoise(x, sigma, prepared, blank), actual)


@pytest.mark.parametrize(
    "fields",
    [{}, {"layerdiffuse_stop_at": 0.5}, {"mode": "opaque", "model": "sd15"}],
    ids=str,
)
def test_inpainting_checkpoint_renders_every_route(inpainting: LocalEngine, fields: dict):
    init = image()
    (edited,) = render(inpainting, {"init": init, "mask": mask()}, **fields)
    (whole,) = render(inpainting, {"init": init}, **fields)
    (plain,) = render(inpainting, {}, **fields)
    assert not np.array_equal(edited, whole)
    assert plain.shape == (64, 64, 4)


def test_inpainting_checkpoint_makes_a_second_pass(inpainting: LocalEngine):
    (result,) = render(inpainting, {}, hires_scale=2, mode="opaque")
    assert result.shape == (128, 128, 4)


def test_inpainting_checkpoint_refuses_modes_with_images(inpainting: LocalEngine):
    inputs: Inputs = {"background": image(), "blended": image()}
    with pytest.raises(InvalidRequest, match="inpaint is an inpainting checkpoint"):
        render(inpainting, inputs, mode="bgble2fg")
