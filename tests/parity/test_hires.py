"""The second pass at a larger size, against independent calculations and published vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.support import tiny_models
from torch.nn import functional
from torchsde import BrownianTree

from alphalayer.core import cost
from alphalayer.core.errors import Cancelled, InvalidRequest
from alphalayer.core.request import LATENT_UPSCALERS, GenerationRequest, ModelDefaults
from alphalayer.core.samplers import total_steps
from alphalayer.engine import hires, pipeline, progress
from alphalayer.engine.base import GenerationResult, Progress, RenderTask
from alphalayer.engine.canvas import Canvas
from alphalayer.engine.hires import Enlarger, Resizing, enlarge_latents
from alphalayer.engine.networks.transparent import TransparentEncoder
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.sampling.run import Run
from alphalayer.engine.sampling.samplers import SAMPLERS, count_steps
from alphalayer.engine.sampling.schedules import SCHEDULES, SigmaTable
from alphalayer.engine.transparency.encode import _average, encode_offset, pad_colours
from alphalayer.engine.transparency.modes import MODES
from alphalayer.engine.upscalers import Upscale
from alphalayer.images.resampling import resize

ENCODER = "vae_transparent_encoder.safetensors"
REQUEST = GenerationRequest(
    prompt="a red apple",
    seed=3,
    steps=2,
    width=64,
    height=64,
    model="folder",
    noise="cpu",
    hires_scale=2,
)
TABLE = SigmaTable.from_betas()


def published_encoder() -> TransparentEncoder:
    """Return an encoder with weights of a documented recipe."""
    encoder, random = TransparentEncoder(), np.random.RandomState(1234)
    state = encoder.state_dict()
    for name, tensor in state.items():
        values = random.standard_normal(tensor.numel()).reshape(tensor.shape)
        scale = 0.1 if tensor.ndim == 1 else 1 / math.sqrt(math.prod(tensor.shape[1:]))
        state[name] = torch.from_numpy(values * scale).float()
    encoder.load_state_dict(state)
    return encoder.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "folder")
    tiny_models.make_layer_files(folder / "layer_model")
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> LocalEngine:
    return LocalEngine(models, device="cpu")


def generate(engine: LocalEngine, **changes: Any) -> GenerationResult:
    return engine.generate(REQUEST.model_copy(update=changes))


def image_of(engine: LocalEngine, **changes: Any) -> np.ndarray:
    return generate(engine, **changes).images[0].rgba.astype(int)


class Recorder:
    """Calls of `sample`: name, first latents, levels, noise of each step, and clean latents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[str, torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []
        self.latents: list[torch.Tensor] = []
        original = pipeline.sample

        def sample(name: str, run: Run, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
            pairs = [*zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False)]
            noise = [run.noise(a, b) for a, b in pairs if b > 0] if "SDE" in name else []
            self.calls.append((name, x.clone(), sigmas, noise))
            self.latents.append(original(name, run, x, sigmas))
            return self.latents[-1]

        monkeypatch.setattr(pipeline, "sample", sample)


def karras(steps: int) -> list[float]:
    low, high = (float(TABLE.sigmas[i]) ** (1 / 7) for i in (0, -1))
    return [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]


# --- latents


def test_second_pass_starts_from_noise_on_the_enlarged_latent(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    recorder = Recorder(monkeypatch)
    generate(engine, mode="opaque", hires_steps=3, hires_strength=0.7)
    _, (_, x, sigmas, noise) = recorder.calls
    # 3 of int(3 / 0.7) levels
    levels = karras(4)
    assert sigmas.tolist() == pytest.approx(levels[1:], rel=1e-6)
    enlarged = functional.interpolate(recorder.latents[0], size=(16, 16), mode="bilinear")
    unit = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(x, enlarged + unit * levels[1], atol=1e-5)
    # the path spans the whole schedule, not its last part
    tree = BrownianTree(levels[3], torch.zeros(4, 16, 16), levels[0], entropy=3)
    for step, values in enumerate(noise):
        high, low = sigmas[step], sigmas[step + 1]
        expected = -tree(float(low), float(high)) / float((high - low).sqrt())
        assert torch.allclose(values[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", LATENT_UPSCALERS)
def test_latents_are_interpolated_as_named(name: str):
    latents = torch.randn(2, 4, 8, 12)
    words = name.removeprefix("Latent").strip(" ()").split()
    kind = next((word for word in words if word != "antialiased"), "bilinear")
    expected = functional.interpolate(
        latents, size=(12, 18), mode=kind, antialias="antialiased" in words
    )
    canvas = Canvas.of(140, 90)
    enlarged = enlarge_latents(latents, name, Resizing(150, 99, canvas), 8)
    # the second canvas has multiples of 64 pixels: 24 columns for 18, and 16 rows for 12
    assert enlarged.shape == (2, 4, 16, 24)
    assert torch.equal(enlarged[..., 2:14, 3:21], expected)
    assert torch.equal(enlarged[..., 0, 3:21], expected[..., 0, :])
    assert torch.equal(enlarged[..., 2:14, 23], expected[..., -1])


@pytest.mark.parametrize(
    ("steps", "strength", "total", "first"),
    [(20, 0.75, 26, 5.03310), (20, 0.5, 40, 1.18174), (20, 0.3, 66, 0.33648), (20, 1, 20, None)],
)
def test_start_level_equals_the_published_one(
    steps: int, strength: float, total: int, first: float | None
):
    assert total_steps(steps, strength) == total
    levels = SAMPLERS["Euler"].choose_levels("Karras", steps, TABLE, total)
    assert len(levels.sigmas) == steps + 1
    assert levels.start == pytest.approx(first or TABLE.sigma_max, rel=2e-5)


@pytest.mark.parametrize(
    ("name", "calls", "highest"), [("DDIM", 14, 701), ("PLMS", 14, 701), ("UniPC", 15, 701)]
)
def test_timestep_samplers_run_below_the_level_of_the_noise(name: str, calls: int, highest: int):
    # 15 of 20 steps: the noise is that of training step 751
    levels = SAMPLERS[name].choose_levels("Karras", 16, TABLE, 20)
    assert levels.start == pytest.approx(float(TABLE.sigmas[751]))
    assert len(levels.sigmas) == calls + 1
    assert float(levels.sigmas[0]) == pytest.approx(float(TABLE.sigmas[highest]), rel=1e-5)
    latent, noise = torch.randn(2, 1, 4, 2, 2)
    first = SAMPLERS[name].add_noise(latent, noise, levels)
    alpha_bar = 1 / (levels.start**2 + 1)
    in_vp = latent * math.sqrt(alpha_bar) + noise * math.sqrt(1 - alpha_bar)
    scale = math.sqrt(float(levels.sigmas[0]) ** 2 + 1)
    assert torch.allclose(first / scale, in_vp, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 20, 36])
def test_last_levels_fall_from_the_start_of_each_sampler(name: str, steps: int):
    levels = SAMPLERS[name].choose_levels("Karras", steps, TABLE, total_steps(steps, 0.6))
    assert torch.isfinite(levels.sigmas).all()
    assert len(levels.sigmas) >= 2
    assert float(levels.sigmas[0]) == pytest.approx(levels.start, rel=0.5) or steps < 3
    assert float(levels.sigmas.max()) <= levels.start * (1 + 1e-6)


@pytest.mark.parametrize("scheduler", SCHEDULES)
@pytest.mark.parametrize("strength", [0.05, 0.5, 1.0])
def test_dpm_fast_falls_in_a_single_step(scheduler: str, strength: float):
    total = total_steps(1, strength)
    levels = SAMPLERS["DPM fast"].choose_levels(scheduler, 1, TABLE, total)
    assert len(levels.sigmas) == 2
    assert 0 < float(levels.sigmas[1]) < float(levels.sigmas[0])
    assert float(levels.sigmas[0]) == pytest.approx(levels.start)


@pytest.mark.parametrize(("steps", "strength"), [(20, 0.1), (36, 0.1), (25, 0.2)])
def test_restart_of_a_weak_second_pass_has_no_restart(steps: int, strength: float):
    total = total_steps(steps, strength)
    sigmas = SAMPLERS["Restart"].choose_levels("Exponential", steps, TABLE, total).sigmas
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert count_steps(sigmas) <= cost.count_steps("Restart", "Exponential", steps, total)


# --- images


@pytest.mark.parametrize("name", ["Latent", "Lanczos"])
def test_second_pass_returns_rgba_of_the_enlarged_size(engine: LocalEngine, name: str):
    first = image_of(engine, hires_scale=1)
    result = generate(engine, hires_upscaler=name, hires_strength=0.3)
    image = result.images[0].rgba.astype(int)
    assert image.shape == (128, 128, 4)
    assert image[..., 3].std() > 5, "an opaque image would prove nothing"
    blocks = image.reshape(64, 2, 64, 2, 4).mean((1, 3))
    # it is the image of the first pass, enlarged and changed
    assert np.corrcoef(blocks.ravel(), first.ravel())[0, 1] > 0.5
    assert bool(result.warnings) == (name != "Latent")


def test_encoder_file_adds_the_alpha_of_the_enlarged_image(models: Path, engine: LocalEngine):
    fields = {"hires_upscaler": "Lanczos", "hires_width": 64, "hires_height": 64}
    plain = image_of(engine, **fields)
    try:
        save_file(published_encoder().state_dict(), models / "layer_model" / ENCODER)
        result = generate(engine, **fields)
    finally:
        (models / "layer_model" / ENCODER).unlink()
    assert result.warnings == ()
    assert np.abs(result.images[0].rgba.astype(int) - plain).max() > 8


def test_without_the_encoder_the_latent_keeps_its_transparency(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    # at the same size nothing changes: the colours are encoded, and the rest is added
    recorder = Recorder(monkeypatch)
    generate(engine, hires_width=64, hires_height=64, hires_upscaler="None")
    unit = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(3))
    start = recorder.calls[1][1] - unit * recorder.calls[1][2][0]
    assert torch.allclose(start, recorder.latents[0], atol=1e-4)


def test_second_pass_of_an_opaque_image_is_opaque(engine: LocalEngine):
    result = generate(engine, mode="opaque", hires_upscaler="Lanczos", width=72, hires_scale=1.5)
    assert result.images[0].rgba.shape == (96, 108, 4)
    assert (result.images[0].rgba[..., 3] == 255).all()
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"width": 100, "height": 70, "hires_scale": 1.3}, (130, 91)),
        ({"width": 128, "height": 64, "hires_width": 128, "hires_height": 128}, (128, 128)),
    ],
)
def test_result_has_the_requested_size(engine: LocalEngine, fields: dict[str, Any], size: Any):
    image = image_of(engine, **fields)
    assert (image.shape[1], image.shape[0]) == size


def test_covered_size_is_the_middle_of_the_enlarged_latent(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    recorder = Recorder(monkeypatch)
    sizes = {"width": 128, "hires_width": 128, "hires_height": 128}
    generate(engine, mode="opaque", hires_upscaler="Latent", **sizes)
    enlarged = functional.interpolate(recorder.latents[0], size=(16, 32), mode="bilinear")
    unit = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(3))
    start = recorder.calls[1][1] - unit * recorder.calls[1][2][0]
    assert torch.allclose(start, enlarged[..., 8:24], atol=1e-4)


# the blocking of matrix products depends on the batch, see test_batching
def test_images_are_equal_alone_and_together(engine: LocalEngine):
    fields = {"hires_upscaler": "Lanczos", "hires_width": 64, "hires_height": 64}
    requests = [
        REQUEST.model_copy(update={**fields, "batch_size": 2}),
        REQUEST.model_copy(update={**fields, "seed": 9, "hires_prompt": "a ghost"}),
    ]
    assert len({request.batch_key for request in requests}) == 1
    together = engine.render([RenderTask(request) for request in requests])
    images = [image.rgba for result in together for image in result.images]
    alone = [
        image_of(engine, **fields),
        image_of(engine, **fields, seed=4),
        image_of(engine, **fields, seed=9, hires_prompt="a ghost"),
    ]
    for image, expected in zip(images, alone, strict=True):
        assert np.abs(image - expected).max() <= 1


def test_own_settings_change_the_second_pass(engine: LocalEngine):
    same = {"mode": "opaque", "hires_width": 64, "hires_height": 64}
    images = [
        image_of(engine, **same),
        image_of(engine, **same, hires_prompt="a blue ghost"),
        image_of(engine, **same, hires_negative_prompt="red"),
        image_of(engine, **same, hires_cfg_scale=1.0),
        image_of(engine, **same, hires_sampler="Euler"),
    ]
    for i, image in enumerate(images):
        assert all(not np.array_equal(image, other) for other in images[:i])


def test_patch_is_merged_in_the_second_pass(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch):
    merged: list[tuple[float, bool]] = []
    original = pipeline.PatchSchedule.apply

    def apply(self: pipeline.PatchSchedule, sigma: float) -> bool:
        merged.append((sigma, original(self, sigma)))
        return merged[-1][1]

    monkeypatch.setattr(pipeline.PatchSchedule, "apply", apply)
    generate(engine, steps=4, layerdiffuse_stop_at=0.5, hires_width=64, hires_height=64)
    second = merged[4:]
    end = TABLE.sigma(0.5 * 999)
    assert [is_on for _, is_on in second] == [sigma >= end for sigma, _ in second]
    assert {is_on for _, is_on in second} == {True, False}


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"width": 65, "height": 65, "hires_width": 4000, "hires_height": 4000}, (4032, 4032)),
        ({"width": 1024, "height": 1024, "hires_width": 4000, "hires_height": 64}, (4000, 64)),
        ({"width": 512, "height": 512, "hires_scale": 2}, (1024, 1024)),
    ],
)
def test_window_is_no_larger_than_the_target(fields: dict[str, Any], window: tuple[int, int]):
    request = GenerationRequest(prompt="an apple", **fields)
    first, target = Canvas.of(*request.size), Canvas.of(*request.final_size)
    resizing = Resizing.of(request.resolve(ModelDefaults()), first, target)
    left, top, right, bottom = resizing.window
    assert (right - left, bottom - top) == window
    assert abs(left + right - resizing.width) <= 1
    assert abs(top + bottom - resizing.height) <= 1


@pytest.fixture
def on_upscale(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., None]]:
    """Return functions to call with the check and result of each enlargement."""
    functions: list[Callable[..., None]] = []
    original = hires.load_upscaler

    def load(models_dir: Path, name: str, device: torch.device, check: Any) -> Upscale:
        def upscale(*arguments: Any) -> np.ndarray:
            image = original(models_dir, name, device, check)(*arguments)
            for function in functions:
                function(check, image)
            return image

        return upscale

    monkeypatch.setattr(hires, "load_upscaler", load)
    return functions


def test_only_what_the_second_canvas_shows_is_enlarged(
    engine: LocalEngine, on_upscale: list[Callable[..., None]]
):
    shapes: list[tuple[int, ...]] = []
    on_upscale.append(lambda _, image: shapes.append(image.shape))
    generate(engine, width=128, hires_width=128, hires_height=128, hires_upscaler="Lanczos")
    assert shapes == [(128, 128, 3)]


def test_upscaler_repeats_the_report_of_its_stage(
    engine: LocalEngine, on_upscale: list[Callable[..., None]], monkeypatch: pytest.MonkeyPatch
):
    reports: list[Progress] = []
    repeated: list[str] = []

    def report_tile(check: Callable[[], None], _: np.ndarray) -> None:
        monkeypatch.setattr(progress, "REPEAT_S", -1.0)
        before = len(reports)
        check()
        repeated.extend(report.stage for report in reports[before:])

    on_upscale.append(report_tile)
    request = REQUEST.model_copy(update={"hires_upscaler": "Lanczos", "hires_width": 64})
    engine.render([RenderTask(request, on_progress=reports.append)])
    assert repeated == ["upscale"]


def test_each_image_is_checked_before_it_is_enlarged():
    def check() -> None:
        raise Cancelled("cancelled.")

    enlarger = Enlarger("Lanczos", MODES["opaque"], lambda image, *_: image, None, check)
    with pytest.raises(Cancelled):
        enlarger.enlarge(None, torch.zeros(1, 4, 8, 8), None)  # type: ignore[arg-type]


# --- progress


def test_progress_counts_the_steps_of_both_passes(engine: LocalEngine):
    reports: list[Progress] = []
    request = REQUEST.model_copy(update={"hires_steps": 3, "hires_width": 64, "hires_height": 64})
    task = RenderTask(request, on_progress=reports.append, previews=True)
    engine.render([task])
    steps = [(one.step, one.steps) for one in reports if one.stage == "sample" and one.steps]
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert all(one.preview is not None for one in reports if one.step)
    assert "upscale" in [one.stage for one in reports]


@pytest.mark.parametrize("name", ["Latent", "Lanczos"])
def test_cancelled_second_pass_stops(engine: LocalEngine, name: str):
    reports: list[Progress] = []
    request = REQUEST.model_copy(update={"hires_upscaler": name})
    with pytest.raises(Cancelled):
        engine.render(
            [
                RenderTask(
                    request,
                    on_progress=reports.append,
                    is_cancelled=lambda: any(one.stage == "upscale" for one in reports),
                )
            ]
        )
    assert max(one.step for one in reports) == 2


def test_engine_names_the_wrong_field(engine: LocalEngine):
    with pytest.raises(InvalidRequest) as caught:
        generate(engine, hires_upscaler="4x-Magic")
    assert caught.value.field == "hires_upscaler"


# --- transparent encode: vectors computed with the published code


def _test_image(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    square = (2 * x - width + 1) ** 2 + (2 * y - height + 1) ** 2
    alpha = np.clip((3136 - square) // 8, 0, 255)
    return np.stack([4 * x % 256, 4 * y % 256, 2 * (x + y) % 256, alpha], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "pixel", "colour"),
    [
        ((64, 64), (0, 0), (0.399300, 0.399300, 0.399301)),
        ((64, 64), (0, 63), (0.588935, 0.399300, 0.494118)),
        ((64, 64), (10, 50), (0.676313, 0.281915, 0.479114)),
        ((96, 64), (0, 0), (0.618150, 0.479737, 0.585155)),
        ((96, 64), (63, 95), (0.623468, 0.508498, 0.654060)),
    ],
)
def test_padded_colours_equal_the_published_ones(size: Any, pixel: Any, colour: Any):
    image = _test_image(*size)
    padded = pad_colours(image)
    assert padded[pixel] == pytest.approx(colour, abs=1e-5)
    solid = image[..., 3] == 255
    assert np.allclose(padded[solid] * 255, image[solid][:, :3], atol=1e-3)


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (7, 5), (64, 61), (300, 100)])
def test_averages_equal_those_of_dense_matrices(size: tuple[int, int]):
    image = np.random.default_rng(1).random((*size, 4), np.float32)
    height, width = (int(side / 1.2) for side in size)
    shrunk = _average(_average(image, height, axis=0), width, axis=1)
    assert np.allclose(shrunk, resize(image, (width, height)), atol=1e-6)


def test_padded_colours_of_an_empty_image_are_black():
    assert (pad_colours(np.zeros((3, 5, 4), np.uint8)) == 0).all()


def test_offset_equals_the_published_one():
    image = _test_image(64, 64)
    rgba = np.concatenate([pad_colours(image), image[..., 3:] / np.float32(255)], axis=-1)
    tensor = torch.from_numpy(rgba.astype(np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        offset = encode_offset(published_encoder(), tensor)
    expected = {
        (0, 0): (-0.020503, -0.199060, -0.046485, 0.004707),
        (4, 4): (0.015969, -0.107658, -0.101376, 0.080967),
        (7, 2): (-0.040212, -0.138714, -0.126050, 0.027474),
    }
    for (y, x), values in expected.items():
        assert offset[0, :, y, x].tolist() == pytest.approx(values, abs=1e-5)
    assert float(offset.abs().sum()) == pytest.approx(19.555880, abs=1e-4)


def test_encoded_offset_counts_in_standard_deviations(engine: LocalEngine):
    generate(engine, hires_scale=1)
    model = engine.model
    reference = tiny_models.vae()
    rgb = torch.rand(1, 3, 64, 64) * 2 - 1
    offset = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        encoded = model.encode_image(rgb, offset)
        distribution = reference.encode(rgb).latent_dist
    expected = (distribution.mean + distribution.std * offset) * 0.13025
    assert torch.allclose(encoded, expected, atol=1e-5)
