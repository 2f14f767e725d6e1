"""Modes that share attention, on a small random model of SD 1.5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tests.support import tiny_models

from alphalayer.core.errors import LayerDiffuseMissing, ModelUnusable, OutOfMemory
from alphalayer.core.modes import DECODER_FILES, MODES
from alphalayer.core.prompts import Lora
from alphalayer.core.request import GenerationRequest, ImageInput
from alphalayer.engine.acceleration import GraphRunner
from alphalayer.engine.base import GeneratedImage, RenderTask
from alphalayer.engine.memory import Residency
from alphalayer.engine.networks.unet import UNet
from alphalayer.engine.passes import read_prompts
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.transparency import attention_sharing
from alphalayer.engine.transparency.attention_sharing import (
    SharedAttention,
    Sharing,
    SharingFile,
    read_sharing,
    share_attention,
)
from alphalayer.engine.transparency.modes import NO_WEIGHT
from alphalayer.engine.transparency.patch import PatchFile

SHARING = [mode.name for mode in MODES.values() if mode.shares_attention]


def make_models(models: Path, *, is_zero: bool = False) -> Path:
    tiny_models.make_sd15_folder(models / "Stable-diffusion" / "tiny")
    folder = models / "layer_model"
    folder.mkdir()
    for mode in SHARING:
        tiny_models.make_sharing_file(folder, mode, is_zero=is_zero)
    (name,) = DECODER_FILES["sd15"]
    save_file(tiny_models.decoder().half().state_dict(), folder / name)
    return models


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return LocalEngine(make_models(tmp_path_factory.mktemp("models")), device="cpu")


@pytest.fixture(scope="module")
def zero_engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    """Return an engine whose files change nothing."""
    return LocalEngine(make_models(tmp_path_factory.mktemp("models"), is_zero=True), device="cpu")


def task_of(mode: str, image: int = 0, sets: int = 1, **fields: Any) -> RenderTask:
    info = MODES[mode]
    generator = np.random.default_rng(image)
    inputs = tuple(
        ImageInput(role=role, file_name=f"input_{image:064x}.png") for role in info.needs
    )
    defaults = {
        **{"prompt": "a cup", "steps": 2, "width": 64, "height": 64, "seed": 5},
        "sampler": "Euler",
        "batch_size": sets * len(info.layers),
    }
    request = GenerationRequest(mode=mode, inputs=inputs, **(defaults | fields))
    pixels: Any = {
        role: generator.integers(0, 256, (40, 56, 4), dtype=np.uint8) for role in info.needs
    }
    return RenderTask(request, inputs=pixels)


def render(engine: LocalEngine, mode: str, **fields: Any) -> list[GeneratedImage]:
    return engine.render([task_of(mode, **fields)])[0].images


def pixels(images: list[GeneratedImage]) -> NDArray[np.uint8]:
    return np.stack([image.rgba for image in images])


def assert_equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
    """Check that images are equal. Sums of another order may differ by rounding."""
    assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("mode", SHARING)
def test_mode_generates_its_layers(engine: LocalEngine, mode: str):
    info, images = MODES[mode], render(engine, mode)
    assert [image.role for image in images] == list(info.layers)
    assert [image.seed for image in images] == [5 + i for i in range(len(images))]
    for image in images:
        assert bool(image.rgba[..., 3].min() < 255) is info.is_transparent(image.role)


def test_set_of_a_batch_equals_the_set_alone(engine: LocalEngine):
    both = pixels(render(engine, "sd15_fg2bg", sets=2))
    assert_equal(both[2:], pixels(render(engine, "sd15_fg2bg", seed=7)))


def test_images_of_a_set_depend_on_each_other(engine: LocalEngine):
    plain = pixels(render(engine, "sd15_fg2bg"))
    other = pixels(render(engine, "sd15_fg2bg", blended_prompt="glass"))
    assert not any(np.array_equal(one, changed) for one, changed in zip(plain, other, strict=True))


def test_low_memory_mode_keeps_sets_together(engine: LocalEngine):
    low = LocalEngine(engine._models_dir, device="cpu", memory="low")
    one, other = (pixels(render(used, "sd15_fg2bg", steps=1)) for used in (low, engine))
    assert_equal(one, other)


def test_other_modes_have_the_attentions_of_the_model(engine: LocalEngine):
    before = pixels(render(engine, "opaque", batch_size=2))
    shared = pixels(render(engine, "sd15_fg2bg"))
    assert np.array_equal(pixels(render(engine, "opaque", batch_size=2)), before)
    assert not np.array_equal(shared, before)
    stopped = pixels(render(engine, "sd15_fg2bg", layerdiffuse_stop_at=0))
    assert np.array_equal(stopped, before)

    halfway = pixels(render(engine, "sd15_fg2bg", layerdiffuse_stop_at=0.5))
    assert not np.array_equal(halfway, before)
    assert not np.array_equal(halfway, shared)


def test_units_take_the_weights_of_loras(engine: LocalEngine):
    folder = engine._models_dir / "Lora"
    folder.mkdir()
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    pair = {"lora_A": torch.ones(1, 32), "lora_B": torch.ones(32, 1)}
    save_file(
        {f"{stem}.{part}.weight": one for part, one in pair.items()}, folder / "x.safetensors"
    )
    plain, changed, restored = (
        pixels(render(engine, "sd15_fg2bg", steps=1, loras=loras))
        for loras in ((), (Lora(name="x"),), ())
    )
    assert not np.array_equal(plain, changed)
    assert np.array_equal(plain, restored)


def test_control_depends_on_the_input_image(engine: LocalEngine):
    one, other, repeated = (
        pixels(render(engine, "sd15_fg2bg", image=i, steps=1)) for i in (0, 1, 0)
    )
    assert np.array_equal(one, repeated)
    assert not np.array_equal(one, other)


def test_zero_changes_equal_the_model_alone(zero_engine: LocalEngine):
    images = pixels(render(zero_engine, "sd15_fg2bg"))
    assert_equal(images, pixels(render(zero_engine, "opaque", batch_size=2)))


def test_layer_has_its_own_prompt(zero_engine: LocalEngine):
    images = render(zero_engine, "sd15_fg2bg", background_prompt="sea")
    (background,) = render(zero_engine, "opaque", prompt="sea, a cup")
    (blended,) = render(zero_engine, "opaque", seed=6)
    assert_equal(images[0].rgba, background.rgba)
    assert_equal(images[1].rgba, blended.rgba)


def test_shorter_prompt_of_a_set_is_filled_with_empty_chunks(zero_engine: LocalEngine):
    task = task_of("sd15_fg2bg", background_prompt="sea and sand, " * 20)
    request = task.request.resolve(zero_engine.model.defaults)
    text = zero_engine.model.text
    guidance = read_prompts(request, text, lambda: None)
    ((conditioning, _),) = guidance.positive.at(0)
    assert conditioning.context.shape[:2] == (2, 2 * 77)
    short = torch.cat([text.encode(prompt).context for prompt in ("a cup", "")], dim=1)
    assert torch.equal(conditioning.context[1:], short)


def test_weight_is_ignored_with_a_warning(engine: LocalEngine):
    (whole,), (half,) = (
        engine.render([task_of("sd15_attention", layerdiffuse_weight=weight, steps=1)])
        for weight in (1.0, 0.5)
    )
    assert (whole.warnings, half.warnings) == ((), (NO_WEIGHT,))
    assert np.array_equal(pixels(whole.images), pixels(half.images))


def test_second_pass_shares_attention_at_its_size(engine: LocalEngine):
    fields = {"steps": 1, "hires_scale": 2.0, "hires_upscaler": "Lanczos"}
    images = render(engine, "sd15_bg2fg", **fields)
    assert [image.rgba.shape for image in images] == [(128, 128, 4)] * 2


def test_file_of_another_mode_is_refused(engine: LocalEngine, tmp_path: Path):
    unet: Any = engine.model.modules["denoiser"]
    image = torch.zeros(1, 3, 64, 64)
    for mode, images, control, reason in (
        ("sd15_joint", 1, None, "it is for 3 images together, expected 1"),
        ("sd15_fg2bg", 2, None, "it is for an input image"),
        ("sd15_joint", 3, image, "it is for no input image"),
    ):
        path = tiny_models.make_sharing_file(tmp_path, mode)
        with pytest.raises(ModelUnusable, match=f"{path.name} does not fit .*: {reason}"):
            share_attention(unet, Sharing(PatchFile.at(path), images, control=control))


def test_missing_file_is_named_with_its_download(zero_engine: LocalEngine):
    path = zero_engine.model.layerdiffuse.patch("sd15_joint")
    path.unlink()
    with pytest.raises(LayerDiffuseMissing, match=path.name) as error:
        render(zero_engine, "sd15_joint")
    assert "models pull layerdiffuse-sd15-joint" in str(error.value.hint)


def test_file_for_another_unet_is_refused(engine: LocalEngine, tmp_path: Path):
    path = tiny_models.make_sharing_file(tmp_path, "sd15_joint")
    tensors = load_file(path)
    unet: Any = engine.model.modules["denoiser"]
    for name, reason in (
        ("to_q_lora.0.up.weight", "has the shape"),
        ("temporal_o.bias", "missing"),
    ):
        wrong = {**tensors, f"hookers.layers.31.{name}": torch.zeros(3, 3)}
        if reason == "missing":
            del wrong[f"hookers.layers.31.{name}"]
        save_file(wrong, path)
        with pytest.raises(ModelUnusable, match=reason):
            share_attention(unet, Sharing(PatchFile.at(path), 3))
    save_file(
        {f"hookers.layers.0.to_q_lora.{i}.down.weight": torch.ones(()) for i in range(3)}, path
    )
    with pytest.raises(ModelUnusable):
        share_attention(unet, Sharing(PatchFile.at(path), 3))
    save_file({**tensors, "other": torch.zeros(1)}, path)
    with pytest.raises(ModelUnusable, match="it has 1153 tensors, expected 1152"):
        share_attention(unet, Sharing(PatchFile.at(path), 3))
    assert unet.sharing is None


def test_failed_installation_restores_the_attentions(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tiny_models.make_sharing_file(tmp_path, "sd15_joint")
    unet: Any = engine.model.modules["denoiser"]
    share_attention(unet, None)
    merge, calls = SharedAttention.merge, iter(range(8))

    def fail_later(unit: SharedAttention, attention: Any) -> None:
        if next(calls) == 5:
            raise MemoryError
        merge(unit, attention)

    monkeypatch.setattr(SharedAttention, "merge", fail_later)
    with pytest.raises(MemoryError):
        share_attention(unet, Sharing(PatchFile.at(path), 3))
    assert not any(isinstance(module, SharedAttention) for module in unet.modules())


def test_units_are_read_once_and_recordings_stay(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    render(engine, "opaque", steps=1)
    reads: list[Sharing] = []
    recordings: list[torch.Tensor] = []

    def read(spec: Sharing, unet: UNet) -> SharingFile:
        reads.append(spec)
        return read_sharing(spec, unet)

    def record(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        recordings.append(output := call())
        return lambda: (output.copy_(call()), None)[1], output

    monkeypatch.setattr(attention_sharing, "read_sharing", read)
    model: Any = engine.model
    fields = {"steps": 2, "layerdiffuse_stop_at": 0.5}
    plain = [pixels(render(engine, "sd15_fg2bg", image=image, **fields)) for image in (1, 2)]
    assert len(reads) == 1
    monkeypatch.setattr(model, "_run", GraphRunner(model.unet, model.unet, record))
    for image, expected in zip((1, 2), plain, strict=True):
        assert_equal(pixels(render(engine, "sd15_fg2bg", image=image, **fields)), expected)
    assert (len(reads), len(recordings)) == (1, 2)
    # the input image of another size has other memory
    render(engine, "sd15_fg2bg", width=128, steps=1)
    assert (len(reads), len(recordings)) == (1, 3)


def test_repeated_set_moves_no_unused_network(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch):
    moved: list[Any] = []
    of = Residency.of

    def spy(residency: Residency, *networks: Any, keep: bool) -> Any:
        moved.extend(networks)
        return of(residency, *networks, keep=keep)

    render(engine, "sd15_fg2bg", steps=1)
    monkeypatch.setattr(Residency, "of", spy)
    render(engine, "sd15_fg2bg", steps=1)
    modules = engine.model.modules
    assert moved == [modules["denoiser"], modules["vae"]]


def test_out_of_memory_after_shared_attention_is_reported(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    render(engine, "sd15_fg2bg", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "_encode_prompts", fail)
        with pytest.raises(OutOfMemory, match="needs about"):
            render(engine, "sd15_joint")
    assert len(render(engine, "sd15_fg2bg", steps=1)) == 2


def test_infotext_has_the_prompts_of_layers(engine: LocalEngine):
    result = engine.render([task_of("sd15_fg2bg", background_prompt="sea, sand", steps=1)])[0]
    text = result.infotext(result.images[0])
    assert 'layerdiffusion_bg_additional_prompt: "sea, sand"' in text
    assert "layerdiffusion_method: (SD1.5) From Foreground to Background" in text


def test_unused_model_has_its_own_attentions(engine: LocalEngine):
    render(engine, "sd15_attention")
    unet: Any = engine.model.modules["denoiser"]
    assert unet.sharing
    engine.model.remove_patches()
    assert unet.sharing is None
    assert not any(isinstance(module, SharedAttention) for module in unet.modules())
