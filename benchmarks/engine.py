"""Cost of an image by stage.

    python benchmarks/engine.py [--model NAME | --random-sdxl FOLDER] [--steps …] [--batch 1 2 4 8]

For every batch size, the report has the seconds of each stage, images a second and peak memory.
For the UNet, the VAE and the transparent decoder it has the share of the machine's limit.
The limit is the rate of a large matrix product in the same number format, measured in the same
run. The last line is JSON.

`--random-sdxl FOLDER` uses a full-size checkpoint of random numbers.
If it does not exist, it is written first (7.9 GB).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from alphalayer.core.request import GenerationRequest
from alphalayer.engine.canvas import Canvas
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.text.encoders import Conditioning
from alphalayer.images import codecs

WARM_RUNS = 3


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations a second of a large matrix product, the UNet's limit.

    A multiply-add counts as two operations.
    """
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds: list[float] = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def unet_call(engine: LocalEngine, width: int, height: int, rows: int) -> Callable[[], Any]:
    """Return a UNet call with a number of rows."""
    model, device = engine.model, engine.device
    unet: Any = model.modules["denoiser"].to(device)
    dtype, cell = next(unet.parameters()).dtype, model.latent.cell
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    latent = torch.randn(rows, model.latent.channels, height // cell, width // cell, **like)
    context = torch.randn(rows, 77, unet.config["cross_attention_dim"], **like)
    pooled_width = (
        unet.config["projection_class_embeddings_input_dim"]
        - 6 * unet.config["addition_time_embed_dim"]
    )
    conditioning = Conditioning(context, torch.randn(rows, pooled_width, **like))
    return lambda: model.denoise(latent, 1.0, conditioning, width, height)


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
    """Measure a call: milliseconds, billions of operations, share of the limit."""
    with FlopCounterMode(display=False) as counter:
        call()
    seconds: list[float] = []
    for _ in range(WARM_RUNS + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    operations = counter.get_total_flops()
    return {
        "ms": round(min(seconds) * 1000, 2),
        "gigaoperations": round(operations / 1e9, 2),
        "share_of_limit": round(operations / min(seconds) / limit, 3),
    }


def render(engine: LocalEngine, request: GenerationRequest) -> dict[str, Any]:
    """Measure a request with warm caches.

    Returns:
        Median seconds of each stage and of the PNG encoder, images a second, and peak memory.
    """
    runs: list[dict[str, float]] = []
    wall: list[float] = []
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    for _ in range(WARM_RUNS):
        start = time.perf_counter()
        result = engine.generate(request)
        rendered_at = time.perf_counter()
        for image in result.images:
            codecs.encode(image.rgba, "png", result.infotext(image))
        runs.append({**result.seconds, "png": time.perf_counter() - rendered_at})
        wall.append(time.perf_counter() - start)
    stages = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    return {
        "seconds": stages,
        "total_s": round(statistics.median(wall), 3),
        "images_a_second": round(request.batch_size / statistics.median(wall), 4),
        "peak_gib": round(_peak_bytes(engine.device) / 2**30, 2),
    }


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
        f"{figures['share_of_limit']:.0%} of the limit"
    )


def _models_dir(options: argparse.Namespace) -> Path:
    if options.random_sdxl is None:
        return options.models_dir
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.full_size.full_size_models import write_models

    if not (options.random_sdxl / "layer_model").is_dir():
        write_models(options.random_sdxl)
    return options.random_sdxl


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--random-sdxl", type=Path, metavar="FOLDER")
    parser.add_argument("--prompt", default="an apple, high quality")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--memory", default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet, after the first image"
    )
    options = parser.parse_args()
    engine = LocalEngine(
        _models_dir(options),
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
    if options.compile:
        engine.model.modules["denoiser"].compile()
        engine.generate(request)
    limit = matmul_rate(engine.device, engine.precision.unet)
    canvas = Canvas.of(resolved.width, resolved.height)
    wide, high = canvas.full_width, canvas.full_height
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name()
        if engine.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(engine.precision.unet).removeprefix("torch."),
        "compiled": options.compile,
        "memory_mode": engine.memory.name,
        "model": first.model_name,
        "size": [resolved.width, resolved.height],
        "steps": resolved.steps,
        "load_s": round(first.seconds["load"], 2),
        "first_image_s": round(cold_s, 2),
        "matmul_teraoperations_a_second": round(limit / 1e12, 3),
        "parts": {
            name: cost(call, engine.device, limit)
            for name, call in decode_calls(engine, wide, high).items()
        },
        "batches": {},
    }
    for name, figures in report["parts"].items():
        print(f"{name}: {_format_cost(figures)}")
    for batch in options.batch:
        figures = render(engine, request.model_copy(update={"batch_size": batch}))
        unet = cost(unet_call(engine, wide, high, 2 * batch), engine.device, limit)
        report["batches"][batch] = {**figures, "unet_call": unet}
        stages = "  ".join(f"{name} {seconds:.3f}" for name, seconds in figures["seconds"].items())
        print(
            f"batch {batch}: {figures['total_s']:.2f} s  "
            f"{figures['images_a_second']:.3f} images/s  {figures['peak_gib']} GiB  [{stages}]"
        )
        print(f"    one UNet call of {2 * batch} rows: {_format_cost(unet)}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
