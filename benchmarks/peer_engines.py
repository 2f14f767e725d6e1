"""Engines of `benchmarks/peers.py`, each in a process of its own.

    python -m benchmarks.peer_engines NAME TASK

TASK is JSON. The process generates one image for each line that it reads. It answers each with a
line of JSON: the seconds of decoding, and on a GPU the peak memory in MB.
The engines are imported last, so that importing them is part of the first image.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Answer = dict[str, float]
Render = Callable[[], Answer]


@dataclass(frozen=True)
class Task:
    """Image that all engines generate, the model, and where to run."""

    models: str
    """Models folder, as `make_models` of `benchmarks.peer_models` writes it."""
    width: int
    height: int
    steps: int
    device: str = "cpu"
    dtype: str = "fp32"
    prompt: str = "an apple, high quality"
    negative_prompt: str = "blurry"
    cfg_scale: float = 5.0
    seed: int = 1


def alphalayer(task: Task, mode: str = "attention") -> Render:
    """Load this engine; return its rendering of the task."""
    from alphalayer.core.request import GenerationRequest
    from alphalayer.engine.base import RenderTask
    from alphalayer.worker.render import load_engine

    options = {"models_dir": task.models, "device": task.device, "dtype": task.dtype}
    engine = load_engine("alphalayer.engine.pipeline:create_engine", options)
    fields = ("width", "height", "steps", "prompt", "negative_prompt", "cfg_scale", "seed")
    request = GenerationRequest(mode=mode, **{name: getattr(task, name) for name in fields})

    def render() -> Answer:
        seconds = engine.render([RenderTask(request)])[0].seconds
        return {"decode_s": seconds["vae"] + seconds.get("decode", 0.0), **_gpu_memory(task)}

    return render


def diffusers(task: Task) -> Render:
    """Load the SDXL pipeline of diffusers; return its rendering of the task.

    The sampler is the same, but its noise is not a Brownian tree.
    """
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    models = Path(task.models)
    pipeline: Any = StableDiffusionXLPipeline.from_single_file(
        str(models / "Stable-diffusion" / "random-sdxl.safetensors"),
        config=str(models / "config"),
        local_files_only=True,
        torch_dtype=dtypes[task.dtype],
    ).to(task.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    )
    decoding: list[float] = []
    pipeline.vae.decode = _timed(pipeline.vae.decode, decoding, task)

    def render() -> Answer:
        decoding.clear()
        pipeline(
            prompt=task.prompt,
            negative_prompt=task.negative_prompt,
            num_inference_steps=task.steps,
            guidance_scale=task.cfg_scale,
            width=task.width,
            height=task.height,
            generator=torch.Generator().manual_seed(task.seed),
            output_type="np",
        )
        return {"decode_s": sum(decoding), **_gpu_memory(task)}

    return render


ENGINES: dict[str, Callable[[Task], Render]] = {
    "alphalayer": alphalayer,
    "alphalayer-opaque": lambda task: alphalayer(task, "opaque"),
    "diffusers": diffusers,
}


def _timed(call: Callable[..., Any], seconds: list[float], task: Task) -> Callable[..., Any]:
    """Return a function that also appends the seconds of each call."""
    import torch

    def wait() -> None:
        if torch.device(task.device).type == "cuda":
            torch.cuda.synchronize(task.device)

    def timed(*args: Any, **kwargs: Any) -> Any:
        wait()
        start = time.perf_counter()
        result = call(*args, **kwargs)
        wait()
        seconds.append(time.perf_counter() - start)
        return result

    return timed


def _gpu_memory(task: Task) -> Answer:
    import torch

    if torch.device(task.device).type != "cuda":
        return {}
    return {"gpu_mb": torch.cuda.max_memory_allocated(task.device) / 1e6}


def main() -> None:
    """Answer each line of the standard input."""
    name, task = sys.argv[1:]
    output = sys.stdout
    with redirect_stdout(sys.stderr):
        render: Render | None = None
        for _ in sys.stdin:
            render = render or ENGINES[name](Task(**json.loads(task)))
            print(json.dumps(render()), file=output, flush=True)


if __name__ == "__main__":
    main()
