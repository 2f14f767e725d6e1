"""Choices of device, number formats and memory mode."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.memory import PRECISIONS, sd15_networks, sdxl_networks
from tests.support import tiny_models
from torch.profiler import ProfilerActivity, profile

from alphalayer.core.request import GenerationRequest
from alphalayer.engine.memory import (
    GIB,
    MAX_BATCH_MEGAPIXELS,
    MEMORY_MODES,
    SAMPLING_GIB,
    SDXL_GIB,
    MemoryMode,
    choose_batch_pixels,
    choose_memory_mode,
    choose_precision,
    describe,
    is_out_of_memory,
)
from alphalayer.engine.memory_count import Networks, count_memory
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.progress import Stopwatch


def test_describe_gives_the_reason_of_automatic_choices():
    cpu = torch.device("cpu")
    precision = choose_precision(cpu, "auto")
    automatic = describe(cpu, precision, MEMORY_MODES["high"], requested=("auto", "auto"))
    assert automatic == 'cpu (torch sees no GPU), float32, memory mode "high"'
    assert (
        describe(cpu, precision, MEMORY_MODES["high"], requested=("cpu", "high"))
        == 'cpu, float32, memory mode "high"'
    )


def test_fp32_switches_off_tf32_in_convolutions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_precision(torch.device("cpu"), "auto")
    assert torch.backends.cudnn.allow_tf32
    choose_precision(torch.device("cpu"), "fp32")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 99 bytes."
        ),
        RuntimeError(
            "[enforce fail] data. DefaultCPUAllocator: not enough memory: "
            "you tried to allocate 99 bytes."
        ),
        OSError(12, "Cannot allocate memory"),
        OSError("The paging file is too small for this operation to complete. (os error 1455)"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_recognized_in_all_messages(error: Exception):
    assert is_out_of_memory(error)


def test_out_of_memory_is_not_recognized_in_other_errors():
    for error in (
        RuntimeError("a shape is wrong"),
        OSError(2, "No such file"),
        ValueError("out of memory"),
    ):
        assert not is_out_of_memory(error)


def test_rows_at_once_keep_sets_together():
    assert MEMORY_MODES["low"].rows_at_once(512, 512, 3) == 3
    assert MEMORY_MODES["balanced"].rows_at_once(512, 512, 3) == 15


def test_rows_at_once_are_limited_in_every_mode():
    """Allow one call on a large GPU for 8 images of 1024x1024 with guidance.

    Many small images are one call, too.
    """
    bounds = {
        name: [mode.rows_at_once(side, side) for side in (256, 1024, 2048)]
        for name, mode in MEMORY_MODES.items()
    }
    assert bounds == {"high": [256, 16, 4], "balanced": [64, 4, 1], "low": [1, 1, 1]}


@pytest.fixture(scope="module")
def networks() -> Networks:
    return sdxl_networks(PRECISIONS["fp16"])


@pytest.fixture
def sdxl(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> Networks:
    """Return networks that are counted without a copy, because they are on the meta device."""
    monkeypatch.setattr("alphalayer.engine.memory_count._on_meta", lambda network: network)
    return networks


def peak_gib(networks: Networks, mode: MemoryMode, images: int = 1) -> float:
    stages = count_memory(networks, 1024, 1024, images, mode, torch.device("cuda"))
    return max(stage.total for stage in stages.values()) / GIB


@pytest.mark.parametrize("mode", MEMORY_MODES.values(), ids=MEMORY_MODES)
def test_memory_of_a_mode_is_counted(sdxl: Networks, mode: MemoryMode):
    assert peak_gib(sdxl, mode) == pytest.approx(mode.sdxl_gib, abs=0.05)


@pytest.mark.usefixtures("sdxl")
def test_batch_of_sd15_fits_where_one_of_sdxl_fits():
    """Batches are chosen by the memory of SDXL."""
    sd15 = sd15_networks(PRECISIONS["fp16"])
    assert sum(weight.numel() for weight in sd15.denoiser.parameters()) == 859_520_964
    largest = SDXL_GIB + SAMPLING_GIB * MAX_BATCH_MEGAPIXELS
    assert peak_gib(sd15, MEMORY_MODES["high"], MAX_BATCH_MEGAPIXELS) < largest


def test_memory_of_a_batch_is_counted(sdxl: Networks):
    stages = count_memory(
        sdxl, 1024, 1024, MAX_BATCH_MEGAPIXELS, MEMORY_MODES["high"], torch.device("cuda")
    )
    sampling = stages["sample"]
    assert sampling.weights / GIB == pytest.approx(SDXL_GIB, abs=0.05)
    expected = SAMPLING_GIB * MAX_BATCH_MEGAPIXELS
    assert sampling.activations / GIB == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("gib", "mode", "megapixels"),
    [(16, "high", 8), (12, "balanced", 0), (10, "balanced", 0), (8, "low", 0), (6, "low", 0)],
)
def test_gpu_size_decides_memory_mode_and_batch(
    monkeypatch: pytest.MonkeyPatch, gib: int, mode: str, megapixels: int
):
    # GPUs report up to 4 % less than the size that they are sold by
    properties = SimpleNamespace(total_memory=int(0.96 * gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = torch.device("cuda")
    chosen = choose_memory_mode(device, "auto")
    assert chosen.name == mode
    assert choose_batch_pixels(device, chosen) == megapixels * 1024**2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "tiny")
    tiny_models.make_sd15_folder(folder / "Stable-diffusion" / "sd15")
    return folder


@contextmanager
def measured_stage(peaks: dict[str, int], name: str) -> Generator[None]:
    """Record the peak of what torch's allocator holds for a stage, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks[name] = max(accumulate((change for _, change in changes), initial=0))


@pytest.mark.parametrize(
    ("model", "width", "height"),
    [("alphalayer-mini", 128, 128), ("tiny", 64, 192), ("sd15", 192, 128)],
)
def test_counted_activations_equal_those_of_the_allocator(
    models: Path, monkeypatch: pytest.MonkeyPatch, model: str, width: int, height: int
):
    """Compare each stage with torch's own accounting of a real image within 10 %.

    Kernels on the CPU also allocate small buffers, which are not counted.
    """
    engine = LocalEngine(models, device="cpu")
    mode = "opaque" if model == "sd15" else "attention"
    request = GenerationRequest(
        prompt="a cup", model=model, mode=mode, width=width, height=height, steps=1
    )
    engine.generate(request)
    measured: dict[str, int] = {}
    monkeypatch.setattr(Stopwatch, "stage", lambda _, name: measured_stage(measured, name))
    engine.generate(request.model_copy(update={"prompt": "two red cups"}))
    with torch.inference_mode(), measured_stage(measured, "inputs"):
        engine.model.encode_image(torch.zeros(1, 3, height, width))
    networks = Networks.of(engine.model, transparent=mode == "attention")
    counted = count_memory(networks, width, height, 1, engine.memory, engine.device)
    for stage, memory in counted.items():
        # convolutions of the VAE's encoder copy their input into another order
        tolerance = 0.3 if stage == "inputs" else 0.1
        assert memory.activations == pytest.approx(measured[stage], rel=tolerance), stage
        assert memory.weights == engine.model.memory_bytes()
