"""Engines of `benchmarks/peers.py`, each in a process of its own.

    python -m benchmarks.peer_engines NAME TASK

TASK is JSON. The process generates one image for each line that it reads. It answers each with a
line of JSON: the seconds of decoding, those of the transparent decoder among them, and on a GPU
the peak memory in MB.
The engines are imported last, so that importing them is part of the first image.
"""

from __future__ import annotations

import json
import sys
import time
import typing
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

DECODER = "layer_model/vae_transparent_decoder.safetensors"
LORA = "peers/lora.safetensors"
OFFSETS = "peers/offsets.safetensors"
"""Files of the models folder: the transparent decoder, and the patch in two more forms."""

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
        transparent = {"transparent_s": seconds["decode"]} if "decode" in seconds else {}
        decode_s = seconds["vae"] + transparent.get("transparent_s", 0.0)
        return {"decode_s": decode_s, **transparent, **_gpu_memory(task)}

    return render


def diffusers(task: Task) -> Render:
    """Load the SDXL pipeline of diffusers; return its rendering of the task."""
    pipeline = _sdxl_pipeline(task)
    seconds: Answer = {}
    pipeline.vae.decode = _timed(pipeline.vae.decode, seconds, "decode_s", task)

    def render() -> Answer:
        seconds.clear()
        _run_pipeline(pipeline, task)
        return {**seconds, **_gpu_memory(task)}

    return render


def diffuser_layerdiffuse(task: Task) -> Render:
    """Load rootonchair/diffuser_layerdiffuse like its README; return its rendering.

    The patch is a LoRA that PEFT computes beside the UNet's layers.
    """
    peer = import_module("layer_diffuse.models")
    from safetensors.torch import load_file

    models = Path(task.models)
    pipeline = _sdxl_pipeline(task)
    vae = peer.TransparentVAEDecoder.from_config(pipeline.vae.config)
    vae.load_state_dict(pipeline.vae.state_dict())
    vae.to(task.device, pipeline.dtype)
    vae.set_transparent_decoder(load_file(models / DECODER))
    vae.register_to_config(force_upcast=False)
    pipeline.vae = vae
    pipeline.load_lora_weights(models / LORA)
    seconds: Answer = {}
    vae.estimate_augmented = _timed(vae.estimate_augmented, seconds, "transparent_s", task)
    vae.decode = _timed(vae.decode, seconds, "decode_s", task)

    def render() -> Answer:
        seconds.clear()
        _run_pipeline(pipeline, task)
        return {**seconds, **_gpu_memory(task)}

    return render


def layerdiffuse_cli(task: Task) -> Render:
    """Load lllyasviel/LayerDiffuse_DiffusersCLI like its demo; return its rendering.

    Its sampler is DPM++ 2M Karras, without noise between the steps. It leaves out the projection
    of the second text encoder.
    """
    import torch
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img
    from safetensors.torch import load_file

    # its pipeline takes these names from this module, which no longer has them
    for name in ("List", "Optional", "Union"):
        setattr(pipeline_stable_diffusion_xl_img2img, name, getattr(typing, name))
    peer = import_module("diffusers_kdiffusion_sdxl")
    peer_decoder = import_module("lib_layerdiffuse.vae")
    models = Path(task.models)
    parts = _sdxl_pipeline(task).components
    unet, vae = parts["unet"], parts["vae"]
    offsets = load_file(models / OFFSETS, device=task.device)
    unet.load_state_dict(
        {
            name: weight + offsets[name].to(weight) if name in offsets else weight
            for name, weight in unet.state_dict().items()
        }
    )
    del offsets
    names = ("vae", "text_encoder", "tokenizer", "tokenizer_2", "unet")
    pipeline: Any = peer.KDiffusionStableDiffusionXLPipeline(
        **{name: parts[name] for name in names},
        text_encoder_2=parts["text_encoder_2"].text_model,
        scheduler=None,
    )
    decoder: Any = peer_decoder.TransparentVAEDecoder(models / DECODER, dtype=unet.dtype)
    decoder.to(task.device)
    seconds: Answer = {}
    decoder.estimate_augmented = _timed(decoder.estimate_augmented, seconds, "transparent_s", task)
    decode = _timed(decoder, seconds, "decode_s", task)

    @torch.inference_mode()
    def render() -> Answer:
        seconds.clear()
        context, pooled = pipeline.encode_cropped_prompt_77tokens(task.prompt)
        negative, negative_pooled = pipeline.encode_cropped_prompt_77tokens(task.negative_prompt)
        shape = (1, 4, task.height // 8, task.width // 8)
        latents = pipeline(
            initial_latent=torch.zeros(shape, dtype=unet.dtype, device=unet.device),
            num_inference_steps=task.steps,
            guidance_scale=task.cfg_scale,
            prompt_embeds=context,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled,
            generator=torch.Generator().manual_seed(task.seed),
        ).images
        decode(vae, latents.to(vae.dtype) / vae.config.scaling_factor)
        return {**seconds, **_gpu_memory(task)}

    return render


ENGINES: dict[str, Callable[[Task], Render]] = {
    "alphalayer": alphalayer,
    "alphalayer-opaque": lambda task: alphalayer(task, "opaque"),
    "diffusers": diffusers,
    "diffuser_layerdiffuse": diffuser_layerdiffuse,
    "layerdiffuse_cli": layerdiffuse_cli,
}


def _sdxl_pipeline(task: Task) -> Any:
    """Load the SDXL pipeline of diffusers.

    The sampler is the same as this engine's, but its noise is not a Brownian tree.
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
    return pipeline


def _run_pipeline(pipeline: Any, task: Task) -> Any:
    """Return the images of the task, floats (1, H, W, C) in [0, 1]."""
    import torch

    return pipeline(
        prompt=task.prompt,
        negative_prompt=task.negative_prompt,
        num_inference_steps=task.steps,
        guidance_scale=task.cfg_scale,
        width=task.width,
        height=task.height,
        generator=torch.Generator().manual_seed(task.seed),
        output_type="np",
    ).images


def _timed(call: Callable[..., Any], seconds: Answer, name: str, task: Task) -> Callable[..., Any]:
    """Return a function that also adds the seconds of each call to those of a name."""
    import torch

    def wait() -> None:
        if torch.device(task.device).type == "cuda":
            torch.cuda.synchronize(task.device)

    def timed(*args: Any, **kwargs: Any) -> Any:
        wait()
        start = time.perf_counter()
        result = call(*args, **kwargs)
        wait()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
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
