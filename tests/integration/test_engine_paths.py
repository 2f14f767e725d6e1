"""The engine on the CPU with the tiny model.

- memory modes and out of memory
- progress, previews and cancellation
- LoRAs, the weight of the patch and stop-at
- prediction types, and every sampler and schedule
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import tiny_models
from tests.support.tiny_models import unet_name_in_ldm

from alphalayer import catalog
from alphalayer.catalog.kinds import FIRST_CONV
from alphalayer.config import Settings
from alphalayer.core.errors import (
    Cancelled,
    CorruptFile,
    EngineFailed,
    InvalidRequest,
    LayerDiffuseMissing,
    ModelNotFound,
    ModelUnusable,
    OutOfMemory,
)
from alphalayer.core.prompts import Lora
from alphalayer.core.request import GenerationRequest, parse_request
from alphalayer.core.samplers import SAMPLERS, SCHEDULERS
from alphalayer.engine.base import GenerationResult, Progress
from alphalayer.engine.families.base import NoiseProcess
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.pipeline import LocalEngine, create_engine
from alphalayer.engine.sampling.schedules import SigmaTable
from alphalayer.images.infotext import read_parameters, write_parameters

REQUEST = GenerationRequest(
    prompt="a red apple", seed=3, steps=2, width=64, height=64, model="folder"
)

OPAQUE = {"mode": "opaque"}
"""Changes for tests that need no transparency, because it takes half the time."""


def infotext_of(result: GenerationResult, index: int = 0) -> str:
    image = result.images[index]
    return write_parameters(
        result.request, result.model_name, result.model_hash, image.seed, image.subseed
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the tiny model as a folder and as a file, layer files and LoRAs."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "folder")
    tiny_models.make_single_file(folder / "Stable-diffusion" / "single.safetensors")
    tiny_models.make_layer_files(folder / "layer_model")
    _make_loras(folder / "Lora")
    return folder


def _make_loras(folder: Path) -> None:
    """Write a LoRA with names of kohya and of PEFT, and one of the text encoders."""
    folder.mkdir()
    kohya, peft = {}, {}
    for name, (up, down) in tiny_models.lora_pairs(seed=50).items():
        stem = "lora_unet_" + unet_name_in_ldm(name).removesuffix(".weight").replace(".", "_")
        kohya |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        stem = "unet." + name.removesuffix(".weight")
        peft |= {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}
    save_file(kohya, folder / "kohya.safetensors")
    bundle = kohya | {"bundle_emb.my_word.clip_l": torch.zeros(1, 4)}
    save_file(bundle, folder / "bundle.safetensors", {"ss_output_name": "trained"})
    save_file(peft, folder / "peft.safetensors")
    generator = torch.Generator().manual_seed(51)
    text_lora = {}
    for part, encoder in zip(("te1", "te2"), tiny_models.text_encoders(), strict=True):
        for name, weight in encoder.named_parameters():
            if ".mlp." in name and name.endswith("weight"):
                stem = f"lora_{part}_text_model_" + name.removesuffix(".weight").replace(
                    ".", "_"
                ).removeprefix("text_model_")
                text_lora[f"{stem}.lora_up.weight"] = torch.randn(
                    weight.shape[0], 4, generator=generator
                )
                text_lora[f"{stem}.lora_down.weight"] = torch.randn(
                    4, weight.shape[1], generator=generator
                )
    save_file(text_lora, folder / "words.safetensors")


@pytest.fixture(scope="module")
def engine(models: Path) -> LocalEngine:
    return LocalEngine(models, device="cpu")


@pytest.fixture(scope="module")
def base(engine: LocalEngine) -> np.ndarray:
    """Return the image of `REQUEST`."""
    return _render(engine)


@pytest.fixture(scope="module")
def opaque(engine: LocalEngine) -> np.ndarray:
    """Return the image of `OPAQUE`."""
    return _render(engine, **OPAQUE)


def _render(engine: LocalEngine, **changes: object) -> np.ndarray:
    return engine.generate(REQUEST.model_copy(update=changes)).images[0].rgba.astype(int)


def _difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


# --- memory


def test_memory_modes_differ_only_by_rounding(engine: LocalEngine, models: Path):
    high = _render(engine, batch_size=2)
    for memory in ("balanced", "low"):
        other = _render(LocalEngine(models, device="cpu", memory=memory), batch_size=2)
        # other batch sizes round differently, and truncation makes 1/255 of it
        assert _difference(high, other) <= 1


class _FailingHook:
    """A hook on a real module that runs out of memory on its first `times` calls."""

    def __init__(self, times: int, error: Exception):
        self.failures_left, self.error, self.calls = times, error, 0

    def __call__(self, module: torch.nn.Module, _: object) -> None:
        if next(module.parameters()).is_meta:
            return  # the count of the memory that was needed
        self.calls += 1
        if self.failures_left:
            self.failures_left -= 1
            raise self.error


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 99 bytes."
    ),
]


@pytest.mark.parametrize(
    ("stage", "error"),
    [(stage, OUT_OF_MEMORY[0]) for stage in ("unet", "vae", "decoder", "text_encoder")]
    + [("unet", OUT_OF_MEMORY[1])],
)
def test_out_of_memory_is_retried_in_the_next_smaller_mode(
    engine: LocalEngine,
    base: np.ndarray,
    stage: str,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
):
    _render(engine, steps=1)
    engine.model.text.forget()
    targets = {
        "unet": engine.model.unet,
        "vae": engine.model.vae.decoder,
        "decoder": engine.model.decoder,
        "text_encoder": engine.model.text_encoders[0],
    }
    target = targets[stage]
    hook = _FailingHook(1, error)
    handle = target.register_forward_pre_hook(hook)
    progress: list[Progress] = []
    try:
        result = engine.generate(REQUEST, on_progress=progress.append)
    finally:
        handle.remove()
    assert hook.failures_left == 0
    assert hook.calls > 1
    # decoding is retried without sampling again
    assert [event.stage for event in progress].count("load") == (
        1 if stage in ("vae", "decoder") else 2
    )
    assert [record.message for record in caplog.records if "memory" in record.message] == [
        'Out of memory in memory mode "high"; trying "balanced".'
    ]
    # smaller batches round differently, and truncation makes 1/255 of it
    assert _difference(result.images[0].rgba.astype(int), base) <= 1
    # the next request is tried in the usual mode again
    assert engine.memory.name == "high"
    assert np.array_equal(_render(engine), base)


def test_out_of_memory_retry_starts_with_an_empty_device(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    """Move the UNet of the larger mode off the device before the text encoders."""
    _render(engine, steps=1)
    engine.model.text.forget()
    unet, moves = engine.model.unet, []
    names = {engine.model.modules[name]: name for name in ("denoiser", "text")}

    def record(module: torch.nn.Module, device: torch.device) -> None:
        if module in names:
            moves.append((names[module], str(device)))

    monkeypatch.setattr("alphalayer.engine.memory.move", record)
    monkeypatch.setattr("alphalayer.engine.families.stable_diffusion.move", record)
    handle = unet.register_forward_pre_hook(_FailingHook(1, OUT_OF_MEMORY[0]))
    try:
        _render(engine)
    finally:
        handle.remove()
    one_try = [("text", "cpu"), ("denoiser", "cpu")]
    # texts are not encoded again
    assert moves == [*one_try, *one_try[::-1], one_try[1]], (
        "to the device, off it, and onto it again"
    )


def test_out_of_memory_in_every_mode_reports_needed_memory(engine: LocalEngine, base: np.ndarray):
    _render(engine, steps=1)
    smaller = {"hires_width": 64, "hires_height": 64}
    handle = engine.model.unet.register_forward_pre_hook(_FailingHook(99, OUT_OF_MEMORY[0]))
    try:
        with pytest.raises(OutOfMemory) as error:
            engine.generate(REQUEST.model_copy(update={"batch_size": 2, "width": 128, **smaller}))
    finally:
        handle.remove()
    assert "128x64, batch of 2, needs about" in error.value.message
    assert '"low"' in error.value.message
    assert "larger modes were tried, too" in error.value.message
    assert (
        error.value.hint == "Request a smaller image or batch, or close other programs on the GPU."
    )
    # the engine still renders
    assert np.array_equal(_render(engine), base)


def test_out_of_memory_in_the_smallest_mode_is_tried_once(models: Path):
    engine = LocalEngine(models, device="cpu", memory="low")
    _render(engine, steps=1, **OPAQUE)
    hook = _FailingHook(99, OUT_OF_MEMORY[0])
    engine.model.unet.register_forward_pre_hook(hook)
    with pytest.raises(OutOfMemory) as error:
        _render(engine, **OPAQUE)
    assert hook.calls == 1
    assert '"low".' in error.value.message
    assert "--memory" not in error.value.hint


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError()])
def test_out_of_memory_while_reading_a_model_is_reported(
    models: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("alphalayer.engine.tensors.load_file", fail)
    with pytest.raises(OutOfMemory, match="to read the model") as caught:
        _render(LocalEngine(models, device="cpu"))
    assert "0x0" not in str(caught.value)


def test_other_runtime_error_is_not_retried(engine: LocalEngine):
    _render(engine, steps=1, **OPAQUE)
    hook = _FailingHook(1, RuntimeError("a shape is wrong"))
    handle = engine.model.unet.register_forward_pre_hook(hook)
    try:
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            _render(engine, **OPAQUE)
    finally:
        handle.remove()
    assert hook.calls == 1


# --- progress, previews, cancelling


def test_progress_reports_every_stage_and_step(engine: LocalEngine):
    progress: list[Progress] = []
    result = engine.generate(REQUEST, on_progress=progress.append)
    assert [(event.stage, event.step, event.steps) for event in progress] == [
        ("load", 0, 0), ("text", 0, 0), ("sample", 0, 0),
        ("sample", 1, 2), ("sample", 2, 2), ("decode", 0, 0),
    ]  # fmt: skip
    assert all(event.preview is None for event in progress)
    assert set(result.seconds) == {"load", "text", "sample", "vae", "decode"}


def test_previews_are_small_and_keep_the_result(engine: LocalEngine):
    progress: list[Progress] = []
    request = REQUEST.model_copy(update={"width": 512, "height": 64})
    result = engine.generate(request, on_progress=progress.append, previews=True)
    previews = [event.preview for event in progress if event.step]
    assert len(previews) == 2
    for preview in previews:
        assert preview is not None
        assert preview.dtype == np.uint8
        # 32 cells of 8 pixels along the longer side
        assert preview.shape == (32, 256, 3)
    assert not np.array_equal(previews[0], previews[1])
    assert np.array_equal(result.images[0].rgba, engine.generate(request).images[0].rgba)


@pytest.mark.parametrize("at", [0, 1])
def test_cancel_stops_before_the_next_step(engine: LocalEngine, opaque: np.ndarray, at: int):
    progress: list[Progress] = []
    with pytest.raises(Cancelled):
        engine.generate(
            REQUEST.model_copy(update=OPAQUE),
            on_progress=progress.append,
            is_cancelled=lambda: any(
                event.stage == "sample" and event.step == at for event in progress
            ),
        )
    assert progress[-1].stage == "sample"
    assert progress[-1].step == at
    assert np.array_equal(_render(engine, **OPAQUE), opaque)


def test_cancel_stops_between_two_unet_calls_of_a_step(models: Path):
    """Cancel within a step, which is several calls in the smallest memory mode."""
    engine = LocalEngine(models, device="cpu", memory="low")
    _render(engine, steps=1, **OPAQUE)
    calls: list[int] = []
    engine.model.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(Cancelled):
        engine.generate(REQUEST, is_cancelled=lambda: bool(calls))
    assert len(calls) == 1


def test_cancel_before_the_start_loads_no_model(models: Path):
    engine = LocalEngine(models, device="cpu")
    with pytest.raises(Cancelled):
        engine.generate(REQUEST, is_cancelled=lambda: True)
    with pytest.raises(ModelNotFound):
        _ = engine.model


# --- LoRAs and the patch


def test_lora_changes_the_image_by_weight_and_is_removed(engine: LocalEngine, opaque: np.ndarray):
    def render(weight: float) -> np.ndarray:
        return _render(engine, loras=(Lora(name="kohya", weight=weight),), **OPAQUE)

    full, half = render(1.0), render(0.1)
    assert _difference(opaque, full) > 3
    assert 0 < np.abs(opaque - half).mean() < np.abs(opaque - full).mean()
    assert np.array_equal(_render(engine, **OPAQUE), opaque)
    assert np.array_equal(render(0.0), opaque)


def test_lora_of_text_encoders_changes_image_and_is_removed(
    engine: LocalEngine, opaque: np.ndarray
):
    def render(weight: float) -> np.ndarray:
        return _render(engine, loras=(Lora(name="words", weight=weight),), **OPAQUE)

    with_words = render(1.0)
    assert _difference(opaque, with_words) > 3
    # the conditioning is cached without and with the LoRA
    assert np.array_equal(_render(engine, **OPAQUE), opaque)
    assert np.array_equal(render(1.0), with_words)
    assert not np.array_equal(render(0.5), with_words)
    assert np.array_equal(_render(engine, **OPAQUE), opaque)


def test_lora_in_kohya_and_peft_names_gives_one_image(engine: LocalEngine):
    kohya, peft = (
        _render(engine, loras=(Lora(name=name),), **OPAQUE) for name in ("kohya", "peft")
    )
    assert np.array_equal(kohya, peft)


def test_lora_in_the_prompt_equals_the_lora_field(engine: LocalEngine):
    request = parse_request(
        {**REQUEST.model_dump(), **OPAQUE, "prompt": f"{REQUEST.prompt} <lora:kohya:0.5>"}
    )
    result = engine.generate(request)
    assert np.array_equal(
        result.images[0].rgba, _render(engine, loras=(Lora(name="kohya", weight=0.5),), **OPAQUE)
    )
    assert infotext_of(result).startswith(f"{REQUEST.prompt} <lora:kohya:0.5>\n")


def test_lora_weight_of_the_text_encoders_is_their_own(engine: LocalEngine, opaque: np.ndarray):
    def render(name: str, **weights: float) -> np.ndarray:
        return _render(engine, loras=(Lora(name=name, **weights),), **OPAQUE)

    assert np.array_equal(render("words", weight=0, text_weight=1), render("words"))
    assert np.array_equal(render("words", weight=1, text_weight=0), opaque)
    assert np.array_equal(render("kohya", weight=0, text_weight=1), opaque)


def test_lora_that_is_merged_in_part_is_named_in_the_result(engine: LocalEngine):
    request = REQUEST.model_copy(update={"steps": 1, "loras": (Lora(name="trained"),), **OPAQUE})
    result = engine.generate(request)
    assert result.warnings == ("bundle is merged without bundled embeddings: 1 (my_word).",)
    assert engine.generate(request.model_copy(update={"loras": ()})).warnings == ()


def test_unknown_lora_lists_the_available_ones(engine: LocalEngine):
    with pytest.raises(InvalidRequest, match=r'"absent".*kohya, peft'):
        _render(engine, loras=(Lora(name="absent"),))


def test_layerdiffuse_weight_0_uses_the_base_model(engine: LocalEngine):
    """Compare with a stop before the first step. Transparent decoding stays on."""
    without = _render(engine, layerdiffuse_weight=0.0)
    never = _render(engine, layerdiffuse_stop_at=0.0)
    assert np.array_equal(without, never)
    assert _difference(without, _render(engine)) > 3
    assert without[..., 3].min() < 255


def test_stop_at_increase_approaches_the_patched_model(engine: LocalEngine):
    patched = _render(engine, steps=5)
    distances = [
        np.abs(_render(engine, steps=5, layerdiffuse_stop_at=stop_at) - patched).mean()
        for stop_at in (0, 0.4, 0.8, 1)
    ]
    assert distances[0] > distances[1] > distances[2] >= distances[3] == 0


def test_stop_at_patches_the_steps_of_the_published_levels(engine: LocalEngine):
    """Check the weights during each UNet call: six of twenty Karras steps at 0.25."""
    _render(engine)
    unet, weights = engine.model.unet, NamedWeights(engine.model.unet)
    name = next(iter(tiny_models.lora_pairs()))
    original = tiny_models.unet().get_parameter(name)
    patched: list[bool] = []
    handle = unet.register_forward_pre_hook(
        lambda *_: patched.append(not torch.equal(weights[name], original))
    )
    _render(engine, steps=20, layerdiffuse_stop_at=0.25)
    handle.remove()
    assert patched == [True] * 6 + [False] * 14


def test_missing_layer_files_refuse_only_transparency(models: Path, tmp_path: Path):
    (tmp_path / "Stable-diffusion").mkdir()
    (tmp_path / "Stable-diffusion" / "single.safetensors").symlink_to(
        models / "Stable-diffusion" / "single.safetensors"
    )
    engine = LocalEngine(tmp_path, device="cpu")
    with pytest.raises(LayerDiffuseMissing, match="layer_xl_transparent_attn"):
        _render(engine, model="single")
    assert (_render(engine, model="single", mode="opaque")[..., 3] == 255).all()


@pytest.mark.parametrize("missing", ["decoder", "patch"])
def test_missing_layer_file_is_reported_before_sampling(tmp_path: Path, missing: str):
    layer_files = (
        tiny_models.make_diffusers_folder(tmp_path / "Stable-diffusion" / "folder") / "layerdiffuse"
    )
    (layer_files / f"{missing}.safetensors").unlink()
    progress: list[Progress] = []
    with pytest.raises(LayerDiffuseMissing, match=missing):
        LocalEngine(tmp_path, device="cpu").generate(REQUEST, on_progress=progress.append)
    assert [event.stage for event in progress] == ["load"]


# --- files that change


def _rewrite_checkpoint(folder: Path) -> None:
    tiny_models.unet(seed=1).save_pretrained(folder / "Stable-diffusion" / "folder" / "unet")


def _rewrite_patch(folder: Path) -> None:
    path = folder / "Stable-diffusion" / "folder" / "layerdiffuse" / "patch.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)


def _rewrite_lora(folder: Path) -> None:
    path = folder / "Lora" / "kohya.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)


def _add_embedding(folder: Path) -> None:
    vectors = {
        "clip_l": torch.ones(2, tiny_models.WIDTH_L),
        "clip_g": torch.ones(2, tiny_models.WIDTH_G),
    }
    save_file(vectors, folder / "embeddings" / "apple.safetensors")


@pytest.mark.parametrize(
    "change", [_rewrite_checkpoint, _rewrite_patch, _rewrite_lora, _add_embedding]
)
def test_rewritten_file_is_read_again(models: Path, tmp_path: Path, change: Callable[[Path], None]):
    tiny_models.make_diffusers_folder(tmp_path / "Stable-diffusion" / "folder")
    shutil.copytree(models / "Lora", tmp_path / "Lora")
    (tmp_path / "embeddings").mkdir()
    engine = LocalEngine(tmp_path, device="cpu", embeddings_dir=tmp_path / "embeddings")

    def render() -> np.ndarray:
        own = {} if change is _rewrite_patch else OPAQUE
        return _render(engine, loras=(Lora(name="kohya", weight=0.5),), **own)

    before = render()
    model = engine.model
    assert np.array_equal(before, render())
    change(tmp_path)
    assert not np.array_equal(before, render())
    assert (engine.model is model) is (change in (_rewrite_lora, _add_embedding)), (
        "the model is read again only for its own files"
    )


def test_lora_is_looked_up_once_for_each_image(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    lookups: list[str] = []
    find_lora = catalog.find_lora
    monkeypatch.setattr(
        catalog, "find_lora", lambda folder, name: lookups.append(name) or find_lora(folder, name)
    )
    _render(engine, loras=(Lora(name="kohya"),), steps=4, **OPAQUE)
    assert lookups == ["kohya"]


def test_cached_model_keeps_only_its_own_weights(models: Path, base: np.ndarray):
    """Remove merged LoRAs before caching: `spare_model_gb` counts only the weights."""
    engine = LocalEngine(models, device="cpu", spare_model_bytes=2**30)
    with_words = _render(engine, loras=(Lora(name="words"),))
    cached = engine.model
    _render(engine, model="single")
    assert cached.patchers["denoiser"].applied == cached.patchers["text"].applied == ()
    weights = NamedWeights(cached.unet)
    for name, weight in tiny_models.unet().named_parameters():
        assert torch.equal(weights[name], weight), name
    assert np.array_equal(_render(engine), base)
    assert engine.model is cached
    assert np.array_equal(_render(engine, loras=(Lora(name="words"),)), with_words)


# --- overflow and hashes


@pytest.mark.parametrize(
    ("part", "part_name"),
    [("unet", "the denoiser"), ("vae.decoder", "the VAE"), ("decoder", "the transparent decoder")],
)
def test_overflow_in_a_module_raises_an_error(
    engine: LocalEngine, base: np.ndarray, part: str, part_name: str
):
    _render(engine, steps=1, **OPAQUE)
    module = getattr(engine.model, part.partition(".")[0])
    module = module.decoder if part == "vae.decoder" else module
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: (
            (output[0] * math.nan,) if isinstance(output, tuple) else output * math.nan
        )
    )
    try:
        with pytest.raises(EngineFailed, match=f"^{part_name} gave") as error:
            _render(engine)
    finally:
        handle.remove()
    assert "--dtype" in error.value.hint
    assert np.array_equal(_render(engine), base)


def test_failed_model_hash_keeps_the_image(
    engine: LocalEngine,
    base: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    _render(engine, steps=1, **OPAQUE)
    failed: Future[str] = Future()
    failed.set_exception(CorruptFile("folder cannot be read: Input/output error."))
    monkeypatch.setattr(engine.model, "hashing", failed)
    result = engine.generate(REQUEST)
    assert np.array_equal(result.images[0].rgba, base)
    assert result.model_hash == ""
    assert "Model hash" not in infotext_of(result)
    assert "Input/output error" in caplog.text


# --- guidance


def test_cfg_scale_1_skips_the_negative_row(engine: LocalEngine):
    _render(engine, **OPAQUE)
    rows: list[int] = []
    handle = engine.model.unet.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    one = {"cfg_scale": 1.0, **OPAQUE}
    without_negative = _render(engine, negative_prompt="something else entirely", **one)
    one_row = rows[:]
    rows.clear()
    _render(engine, **OPAQUE)
    handle.remove()
    assert (one_row, rows) == ([1] * 2, [2] * 2)
    assert np.array_equal(without_negative, _render(engine, **one))


def test_and_in_the_prompt_mixes_two_prompts(engine: LocalEngine):
    one, without, mixed = (
        _render(engine, prompt=f"a red apple{end}", **OPAQUE)
        for end in ("", " AND a blue cup:0", " AND a blue cup:1")
    )
    # a weight of 0 gives the same image, up to the rounding of a larger batch
    assert _difference(one, without) <= 1
    assert _difference(one, mixed) > 3


def test_prompts_of_unequal_length_are_tiled_or_split(engine: LocalEngine):
    """Tile a negative prompt of 1 chunk to 2 chunks, but split the calls for 5 chunks."""
    for chunks in (2, 5):
        prompt = " BREAK ".join(["a red apple"] * chunks)
        _render(engine, **OPAQUE)
        rows: list[int] = []
        handle = engine.model.unet.register_forward_pre_hook(
            lambda _, inputs, rows=rows: rows.append(len(inputs[0]))
        )
        image = _render(engine, prompt=prompt, negative_prompt="bad", **OPAQUE)
        handle.remove()
        assert set(rows) == ({2} if chunks == 2 else {1})
        assert image.std() > 1


def test_prompt_schedule_switches_at_its_step(engine: LocalEngine):
    def render(word: str) -> np.ndarray:
        return _render(engine, steps=4, prompt=f"a {word} apple", **OPAQUE)

    red, blue = render("red"), render("blue")
    assert np.array_equal(render("[red:blue:4]"), red)
    assert np.array_equal(render("[red:blue:0]"), blue)
    mixed = render("[red:blue:1]")
    assert not np.array_equal(mixed, red)
    assert not np.array_equal(mixed, blue)


# --- prediction types


def test_epsilon_and_v_predictions_give_one_clean_latent():
    """Compute eps and v of a noisy latent from their variance-preserving definitions."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=generator)
    table = SigmaTable.from_betas()
    for sigma in (0.03, 1.0, 14.6):
        alpha, spread = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
        noisy = clean + sigma * noise
        velocity = alpha * noise - spread * clean
        for prediction, output in (("epsilon", noise), ("v", velocity)):
            denoised = NoiseProcess(table, prediction).to_denoised(noisy, output, sigma)
            # terms of the size of sigma cancel out
            torch.testing.assert_close(denoised, clean, rtol=0, atol=1e-5)


def _marked(
    models: Path, tmp_path: Path, markers: dict[str, torch.Tensor], yaml: str = ""
) -> LocalEngine:
    """Return an engine for a copy of the single file with other prediction markers."""
    checkpoints = tmp_path / "Stable-diffusion"
    checkpoints.mkdir()
    (tmp_path / "layer_model").symlink_to(models / "layer_model")
    tensors = load_file(models / "Stable-diffusion" / "single.safetensors")
    save_file({**tensors, **markers}, checkpoints / "single.safetensors")
    if yaml:
        (checkpoints / "single.yaml").write_text(yaml)
    return LocalEngine(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("markers", "yaml", "prediction", "highest"),
    [
        ((), "", "epsilon", 14.6146),
        (("v_pred",), "", "v", 14.6146),
        (("v_pred", "ztsnr"), "", "v", 4518.76),
        ((), 'model:\n  params:\n    parameterization: "v"\n', "v", 14.6146),
        (
            (),
            "      target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n",
            "v",
            14.6146,
        ),
    ],
)
def test_prediction_type_of_single_file_is_detected(
    models: Path,
    tmp_path: Path,
    markers: tuple[str, ...],
    yaml: str,
    prediction: str,
    highest: float,
):
    engine = _marked(models, tmp_path, {name: torch.zeros(1) for name in markers}, yaml)
    image = _render(engine, model="single", sampler="Euler", scheduler="Normal", **OPAQUE)
    assert engine.model.process.prediction == prediction
    assert engine.model.process.table.sigma_max == pytest.approx(highest, rel=1e-5)
    assert image.std() > 1


def test_prediction_type_of_folder_comes_from_its_scheduler(models: Path, tmp_path: Path):
    folder = tmp_path / "Stable-diffusion" / "folder"
    shutil.copytree(models / "Stable-diffusion" / "folder", folder)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    engine = LocalEngine(tmp_path, device="cpu")
    _render(engine, **OPAQUE)
    assert engine.model.process.prediction == "v"
    assert engine.model.process.table.sigma_max > 4000


def test_unloadable_model_is_reported_and_engine_starts(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    checkpoints = tmp_path / "Stable-diffusion"
    checkpoints.mkdir()
    (tmp_path / "layer_model").symlink_to(models / "layer_model")
    tensors = load_file(models / "Stable-diffusion" / "single.safetensors")
    save_file(tensors, checkpoints / "b.safetensors")
    incomplete = {name: tensor for name, tensor in tensors.items() if ".encoder.down." not in name}
    save_file(incomplete, checkpoints / "a.safetensors")
    engine = LocalEngine(tmp_path, device="cpu")
    engine.warm_up()
    assert "a.safetensors cannot be loaded" in caplog.text
    with pytest.raises(ModelUnusable, match=r"a\.safetensors cannot be loaded"):
        _render(engine, model=None)
    assert _render(engine, model="b").shape == (64, 64, 4)


def test_broken_gpu_fails_the_warm_up(models: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    engine = LocalEngine(models, device="cpu")
    monkeypatch.setattr(engine, "render", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        engine.warm_up()


def test_default_model_skips_unsupported_models(models: Path, tmp_path: Path):
    """Select the first supported model for a request without a model name."""
    checkpoints = tmp_path / "Stable-diffusion"
    checkpoints.mkdir()
    (tmp_path / "layer_model").symlink_to(models / "layer_model")
    tensors = load_file(models / "Stable-diffusion" / "single.safetensors")
    save_file(tensors, checkpoints / "z.safetensors")
    save_file({**tensors, "edm_mean": torch.zeros(4)}, checkpoints / "a.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "first_stage" not in name},
        checkpoints / "b.safetensors",
    )
    wide = torch.cat([tensors[FIRST_CONV], torch.zeros_like(tensors[FIRST_CONV])], dim=1)
    save_file({**tensors, FIRST_CONV: wide}, checkpoints / "c.safetensors")
    engine = LocalEngine(tmp_path, device="cpu")
    result = engine.generate(REQUEST.model_copy(update={"model": None, **OPAQUE}))
    assert result.model_name == "z"


def test_embeddings_beside_the_models_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Find the embeddings of another models folder with default settings."""
    monkeypatch.chdir(tmp_path)
    tiny_models.make_diffusers_folder(tmp_path / "there" / "models" / "Stable-diffusion" / "folder")
    (tmp_path / "there" / "embeddings").mkdir()
    vectors = {
        "clip_l": torch.ones(2, tiny_models.WIDTH_L),
        "clip_g": torch.ones(2, tiny_models.WIDTH_G),
    }
    options = Settings(models_dir=tmp_path / "there" / "models", device="cpu").engine_options()
    plain = _render(create_engine(options), **OPAQUE)
    save_file(vectors, tmp_path / "there" / "embeddings" / "apple.safetensors")
    assert not np.array_equal(_render(create_engine(options), **OPAQUE), plain)


# --- samplers, schedules and number formats


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_batch_equals_single_images(engine: LocalEngine, sampler: str):
    changes = {"sampler": sampler, **OPAQUE}
    batch = engine.generate(REQUEST.model_copy(update={**changes, "batch_size": 2})).images
    alone = _render(engine, **changes, seed=4)
    assert _difference(batch[1].rgba.astype(int), alone) <= 1
    assert not np.array_equal(batch[0].rgba, batch[1].rgba)


def test_3m_sampler_skips_the_lowest_level(engine: LocalEngine):
    """Skip the level for this sampler only, as AUTOMATIC1111 does."""
    _render(engine, **OPAQUE)
    timesteps: list[int] = []
    handle = engine.model.unet.register_forward_pre_hook(
        lambda _, inputs: timesteps.append(int(inputs[1][0]))
    )
    _render(engine, steps=4, sampler="DPM++ 3M SDE", scheduler="Karras", mode="opaque")
    _render(engine, steps=5, sampler="DPM++ 2M SDE", scheduler="Karras", mode="opaque")
    handle.remove()
    assert timesteps[:4] == timesteps[4:8]
    assert timesteps[8:] == [0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_schedule_with_few_steps_renders(engine: LocalEngine, scheduler: str, steps: int):
    image = _render(engine, scheduler=scheduler, steps=steps, sampler="DPM++ SDE", mode="opaque")
    assert image.shape == (64, 64, 4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_image_is_near_the_32_bit_image(engine: LocalEngine, models: Path, dtype: str):
    other = _render(LocalEngine(models, device="cpu", dtype=dtype))
    # rounding of 8 or 11 bits through three steps of guidance, which is not visible
    assert np.abs(other - _render(engine)).mean() < 6


def test_result_records_request_and_seeds(engine: LocalEngine):
    result = engine.generate(
        REQUEST.model_copy(update={"seed": -1, "subseed_strength": 0.1, "batch_size": 2})
    )
    assert result.model_name == "folder"
    assert result.request.seed != -1
    assert [image.seed for image in result.images] == [result.request.seed] * 2
    assert [image.subseed for image in result.images] == [
        result.request.subseed,
        result.request.subseed + 1,
    ]
    parameters = read_parameters(infotext_of(result, 1))
    assert parameters["Seed"] == str(result.request.seed)
    assert parameters["Variation seed"] == str(result.request.subseed + 1)
    assert parameters["Sampler"] == "DPM++ 2M SDE"
    repeated = engine.generate(result.request)
    assert np.array_equal(repeated.images[1].rgba, result.images[1].rgba)


def test_model_defaults_fill_missing_fields(engine: LocalEngine):
    result = engine.generate(GenerationRequest(prompt="a cup", model="folder"))
    assert (result.request.width, result.request.height, result.request.steps) == (64, 64, 4)
    assert result.images[0].rgba.shape == (64, 64, 4)


def test_switching_models_and_back_gives_the_same_image(engine: LocalEngine, base: np.ndarray):
    _render(engine, model="single", steps=1, **OPAQUE)
    assert np.array_equal(_render(engine), base)


def test_create_engine_accepts_plain_options(models: Path):
    options = json.loads(
        json.dumps(
            {
                "models_dir": str(models),
                "embeddings_dir": None,
                "device": "cpu",
                "default_model": "single",
            }
        )
    )
    result = create_engine(options).generate(REQUEST.model_copy(update={"model": None, "steps": 1}))
    assert result.model_name == "single"


def test_model_hash_is_in_the_infotext_and_stored(tmp_path):
    path = tiny_models.make_single_file(tmp_path / "Stable-diffusion" / "tiny.safetensors")
    tiny_models.make_layer_files(tmp_path / "layer_model")
    engine = LocalEngine(tmp_path, device="cpu", dtype="fp32")
    result = engine.generate(GenerationRequest(prompt="an apple", width=64, height=64, steps=1))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert result.model_hash == sha256[:10]
    assert f"Model hash: {sha256[:10]}" in infotext_of(result)
    assert catalog.find_models(tmp_path)[0].sha256 == sha256


def test_folder_with_only_fp16_files_loads(tmp_path):
    folder = tiny_models.make_diffusers_folder(tmp_path / "Stable-diffusion" / "tiny")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    engine = LocalEngine(tmp_path, device="cpu", dtype="fp32")
    result = engine.generate(GenerationRequest(prompt="an apple", width=64, height=64, steps=1))
    assert result.images[0].rgba.shape == (64, 64, 4)
