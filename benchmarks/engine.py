"""Cost of an image by stage.

    python -m benchmarks.engine [--model NAME | --random-sdxl FOLDER] [--steps …] [--batch 1 2 4 8]

For every batch size, the report has the seconds of each stage, images a second and peak memory.
For the UNet, the VAE and the transparent decoder it has the share of the machine's limit, and how
many kernels a call launches. The limit is the rate of a large matrix product in the same number
format, measured in the same run.

- floor: the operations of the image at that limit. The fastest image takes `times_floor` of it.
- host ms a step: the shortest time between two steps, as the host sees it. On a GPU that is the
  time until a step is in the queue; on a CPU a step itself.
- waits, copies: how often an image waits for the GPU, and what is copied to it. Only on a GPU.

The last line is JSON.

`--random-sdxl FOLDER` uses a checkpoint of random numbers in the size of `--random-size`.
If it does not exist, it is written first (full: 7.9 GB).
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from alphalayer.engine.threads import configure_threads

if __name__ == "__main__":
    # before torch is imported, as in the processes of the service
    configure_threads()

import torch
from benchmarks.peer_models import MODELS, make_models
from benchmarks.report import machine
from tests.support.operations import OperationCounter
from tests.support.transfers import Transfers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from alphalayer.core.request import GenerationRequest
from alphalayer.engine.acceleration import Acceleration
from alphalayer.engine.base import Progress
from alphalayer.engine.canvas import Canvas
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.text.encoders import Conditioning
from alphalayer.images import codecs

WARM_RUNS = 3


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations a second of a large matrix product, the UNet's limit.

    A multiply-add counts as two operations.
    """
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds: list[float] = []
    for _ in range(20):
        _wait(device)
        start = time.perf_counter()
        torch.matmul(a, a)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def operations_of(call: Callable[[], Any]) -> int:
    """Count the operations of a call; a multiply-add counts as two."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    # torch's own table lacks the attention of the CPU
    with FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
        call()
    return counter.get_total_flops()


@torch.inference_mode()
def unet_call(engine: LocalEngine, width: int, height: int, rows: int) -> Callable[[], Any]:
    """Return a UNet call with a number of rows."""
    model, device = engine.model, engine.device
    unet: Any = model.modules["denoiser"].to(device)
    dtype, cell = next(unet.parameters()).dtype, model.latent.cell
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    latent = torch.randn(rows, model.latent.channels, height // cell, width // cell, **like)
    context = torch.randn(rows, 77, unet.config.context, **like)
    conditioning = Conditioning(context, torch.randn(rows, unet.config.pooled, **like))
    prepared = model.prepare(conditioning, width, height, (0, 0))
    return lambda: model.denoise(latent, 1.0, prepared)


def decode_calls(engine: LocalEngine, width: int, height: int) -> dict[str, Callable[[], Any]]:
    """Return calls of the VAE and of one pass of the transparent decoder."""
    model, device, cell = engine.model, engine.device, engine.model.latent.cell
    model.modules["vae"].to(device)
    decoder = model.decoder.to(device)
    dtype = next(decoder.parameters()).dtype
    latent = torch.randn(1, model.latent.channels, height // cell, width // cell, device=device)
    pixel = torch.rand(1, 3, height, width, device=device, dtype=dtype)
    return {
        "vae": lambda: model.decode(latent),
        "decoder_pass": lambda: decoder(pixel, latent.to(dtype)),
    }


@torch.inference_mode()
def cost(call: Callable[[], Any], device: torch.device, limit: float) -> dict[str, float]:
    """Measure a call: milliseconds, operations, share of the limit, launches."""
    operations = operations_of(call)
    with OperationCounter() as counter:
        call()
    seconds: list[float] = []
    for _ in range(WARM_RUNS + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return {
        "launches": counter.launches.total(),
        "ms": round(min(seconds) * 1000, 2),
        "gigaoperations": round(operations / 1e9, 2),
        "share_of_limit": round(operations / min(seconds) / limit, 3),
    }


def render(
    engine: LocalEngine, request: GenerationRequest, limit: float, acceleration: Acceleration
) -> dict[str, Any]:
    """Measure a request with warm caches.

    Returns:
        Median seconds of each stage and of the PNG encoder, images a second, the floor, CPU
        seconds of the fastest image, host milliseconds a step, and peak memory.
    """
    # counted without acceleration: a replayed graph hides its operations
    engine.model.accelerate("off")
    floor_s = operations_of(lambda: engine.generate(request)) / limit
    engine.model.accelerate(acceleration)
    engine.generate(request)
    runs: list[dict[str, float]] = []
    wall: list[float] = []
    cpu: list[float] = []
    steps: list[float] = []
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    for _ in range(WARM_RUNS):
        marks: list[float] = []
        start, cpu_start = time.perf_counter(), time.process_time()
        result = engine.generate(request, on_progress=_step_marker(marks))
        rendered_at = time.perf_counter()
        for image in result.images:
            codecs.encode(image.rgba, "png", result.infotext(image))
        runs.append({**result.seconds, "png": time.perf_counter() - rendered_at})
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        steps += [end - begin for begin, end in itertools.pairwise(marks)]
    stages = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    total_s = statistics.median(wall)
    peak_bytes = _peak_bytes(engine.device)
    return {
        "seconds": stages,
        "total_s": round(total_s, 3),
        "images_a_second": round(request.batch_size / total_s, 4),
        "floor_s": round(floor_s, 3),
        "times_floor": round(min(wall) / floor_s, 2),
        "cpu_s": round(min(cpu), 3),
        "host_ms_a_step": round(min(steps) * 1000, 2) if steps else None,
        "peak_gib": round(peak_bytes / 2**30, 2),
    }


def _step_marker(marks: list[float]) -> Callable[[Progress], None]:
    """Return a callback that adds the time of each finished step."""

    def mark(progress: Progress) -> None:
        if progress.step:
            marks.append(time.perf_counter())

    return mark


def count_waits(engine: LocalEngine, request: GenerationRequest) -> dict[str, int] | None:
    """Count the waits for the GPU and the copies to it of one image; None on a CPU."""
    if engine.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits, Transfers() as transfers:
            warnings.simplefilter("always")
            engine.generate(request)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronizing = [wait for wait in waits if "synchroniz" in str(wait.message)]
    return {"waits": len(synchronizing), "copies": len(transfers.operations)}


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _format_cost(figures: dict[str, float]) -> str:
    return (
        f"{figures['ms']} ms, {figures['gigaoperations']} billion operations, "
        f"{figures['share_of_limit']:.0%} of the limit, {figures['launches']} launches"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts and each batch size, and print them."""
    if options.random_sdxl:
        make_models(options.random_sdxl, options.random_size)
    engine = LocalEngine(
        options.random_sdxl or options.models_dir,
        device=options.device,
        dtype=options.dtype,
        memory=options.memory,
    )
    request = GenerationRequest(
        prompt=options.prompt,
        model=options.model,
        width=options.width,
        height=options.height,
        steps=options.steps,
    )
    start = time.perf_counter()
    first = engine.generate(request)
    cold_s, resolved = time.perf_counter() - start, first.request
    limit = matmul_rate(engine.device, engine.precision.unet)
    canvas = Canvas.of(resolved.width, resolved.height)
    size = canvas.full_width, canvas.full_height
    is_gpu = engine.device.type == "cuda"
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if is_gpu else machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(engine.precision.unet).removeprefix("torch."),
        "acceleration": options.acceleration,
        "memory_mode": engine.memory.name,
        "model": first.model_name,
        "size": [resolved.width, resolved.height],
        "steps": resolved.steps,
        "load_s": round(first.seconds["load"], 2),
        "first_image_s": round(cold_s, 2),
        "matmul_teraoperations_a_second": round(limit / 1e12, 3),
        "waits_an_image": count_waits(engine, request),
        "parts": {
            name: cost(call, engine.device, limit)
            for name, call in decode_calls(engine, *size).items()
        },
        "batches": {},
    }
    print(f"waits and copies of an image: {report['waits_an_image'] or 'on a GPU only'}")
    for name, figures in report["parts"].items():
        print(f"{name}: {_format_cost(figures)}")
    for batch in options.batch:
        batched = request.model_copy(update={"batch_size": batch})
        figures = render(engine, batched, limit, options.acceleration)
        unet = cost(unet_call(engine, *size, 2 * batch), engine.device, limit)
        report["batches"][batch] = {**figures, "unet_call": unet}
        _print_batch(batch, figures)
        print(f"    one UNet call of {2 * batch} rows: {_format_cost(unet)}")
    return report


def _print_batch(batch: int, figures: dict[str, Any]) -> None:
    stages = "  ".join(f"{name} {seconds:.3f}" for name, seconds in figures["seconds"].items())
    print(
        f"batch {batch}: {figures['total_s']:.2f} s  {figures['images_a_second']:.3f} images/s  "
        f"fastest {figures['times_floor']} times the floor  {figures['cpu_s']:.2f} CPU s  "
        f"{figures['host_ms_a_step']} host ms a step  {figures['peak_gib']} GiB  [{stages}]"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--random-sdxl", type=Path, metavar="FOLDER")
    parser.add_argument("--random-size", choices=MODELS, default="full")
    parser.add_argument("--prompt", default="an apple, high quality")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--acceleration", choices=get_args(Acceleration), default="off")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
