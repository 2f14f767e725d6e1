"""Hashes of the images that the engine renders, to prove that a refactoring changes no bit.

    python -m tests.parity.image_hashes record tests/parity/data/image_hashes.json
    python -m tests.parity.image_hashes compare tests/parity/data/image_hashes.json

The images come from the small random SDXL of the tests, in float32, on one CPU thread.
Hashes hold for one version of torch and one kind of CPU. `compare` reports both.
"""

from __future__ import annotations

import os

# Set before torch is imported. One instruction set on every x86 CPU: fewer machines differ.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
}

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.support import tiny_models

Fields = dict[str, Any]
Rendered = tuple[bytes, str]
"""The RGBA bytes of an image, height and width first, and its infotext."""


# The only code that knows the engine: adapt these two functions when its modules move.
def create_renderer(
    models_dir: Path, embeddings_dir: Path, memory: str, latents: list[torch.Tensor]
) -> Callable[[list[Fields]], list[list[Rendered]]]:
    """Create an engine.

    Args:
        models_dir: Folder of models, as `make_models` writes it.
        embeddings_dir: Folder of textual inversions.
        memory: Name of the memory mode.
        latents: Receives the sampled latents (B, C, h, w) of each call.

    Returns:
        A function from the fields of requests, rendered as one batch, to the images of each.
    """
    from alphalayer.core.request import parse_request
    from alphalayer.engine import pipeline
    from alphalayer.engine.base import RenderTask
    from alphalayer.images.infotext import write_parameters

    original = pipeline.sample

    def sample(*arguments: Any) -> torch.Tensor:
        latents.append(original(*arguments))
        return latents[-1]

    options = {"device": "cpu", "dtype": "fp32", "memory": memory}
    folders = {"models_dir": str(models_dir), "embeddings_dir": str(embeddings_dir)}
    engine = pipeline.create_engine({**folders, **options})

    def render(requests: list[Fields]) -> list[list[Rendered]]:
        pipeline.sample = sample
        try:
            results = engine.render([RenderTask(parse_request(fields)) for fields in requests])
        finally:
            pipeline.sample = original
        return [
            [
                (
                    _raw(image.rgba),
                    write_parameters(
                        result.request,
                        result.model_name,
                        result.model_hash,
                        image.seed,
                        image.subseed,
                    ),
                )
                for image in result.images
            ]
            for result in results
        ]

    return render


def transparency(method: str | None = "attention", **options: float) -> Fields:
    """Return the request fields of a LayerDiffuse method, None for off."""
    settings = {f"layerdiffuse_{name}": value for name, value in options.items()}
    return {"mode": method or "opaque", **settings}


# Models and cases. Fields are those of the native API; `single` has a conv patch, `folder` not.
SAMPLERS = {
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM++ 3M SDE": "Exponential",
    "Euler": "Normal",
    "Euler a": "Normal",
    "Heun": "Normal",
    "DDIM": "Normal",
    "UniPC": "Normal",
    "LCM": "Normal",
    "DPM++ 2M SDE Heun": "Exponential",
    "DPM++ 2S a": "Karras",
    "LMS": "Normal",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "DPM fast": "Normal",
    "Restart": "Karras",
    "HeunPP2": "Normal",
    "IPNDM": "Normal",
    "IPNDM_V": "Normal",
    "DEIS": "Normal",
    "DDIM CFG++": "Normal",
    "PLMS": "Normal",
    "DDPM": "Normal",
}
SCHEDULERS = ("Karras", "Exponential", "Normal", "SGM Uniform", "Simple", "Beta", "Turbo")
MEMORY_MODES = ("high", "balanced", "low")
BASE: Fields = {
    "prompt": "a red apple, high quality",
    "negative_prompt": "bad, ugly",
    "model": "folder",
    "seed": 3,
    "subseed": 5,
    "steps": 4,
    "width": 64,
    "height": 64,
    "sampler": "DPM++ 2M SDE",
    "scheduler": "Karras",
    "cfg_scale": 5.0,
}
SINGLE = {"model": "single"}
DIFFERENT_JOBS: list[Fields] = [
    {},
    {
        "prompt": "a (blue:1.3) ghost AND smoke",
        "seed": 9,
        "cfg_scale": 2.5,
        "batch_size": 2,
        "clip_skip": 2,
    },
    {"prompt": "word " * 90, "negative_prompt": "", "cfg_scale": 1.0},
    {"prompt": "[a:b:0.5] cat", "seed": 4, "subseed": 8, "subseed_strength": 0.4},
]
PROMPTS = {
    "editing": "a [red:blue:0.5] apple, [shiny|matte] skin, [leaf::2]",
    "and": "a red apple AND a green leaf :0.6 AND smoke",
    "break": "a red apple BREAK on nothing, isolated",
    "emphasis": "a (red:1.4) ((apple)), [dull], \\(plain\\)",
    "embedding": "a photo of apple-style, round",
    "long": "a red apple, " + "sharp, detailed, clean, " * 20,
}


def build_cases() -> dict[str, tuple[str, list[Fields]]]:
    """Return the memory mode and the jobs of each case, by a name that is unique."""
    jobs: dict[str, Fields] = {}
    for sampler, scheduler in SAMPLERS.items():
        fields = {"sampler": sampler, "scheduler": scheduler}
        jobs[f"sampler/{sampler}"] = fields
        jobs[f"sampler/{sampler}/batch of 3"] = {**fields, "batch_size": 3, "steps": 3}
    for scheduler in SCHEDULERS:
        for sampler in ("Euler", "DPM++ SDE"):
            fields = {"sampler": sampler, "scheduler": scheduler, "steps": 5}
            jobs[f"schedule/{scheduler}/{sampler}"] = fields
    for name, method in {"attention": "attention", "conv": "conv", "off": None}.items():
        jobs[f"transparency/{name}"] = {**SINGLE, **transparency(method)}
    for name in ("attention", "conv"):
        for option in ("weight", "stop_at"):
            changes = transparency(name, **{option: 0.5})
            jobs[f"transparency/{name}/{option} 0.5"] = {**SINGLE, **changes}
    for noise in ("nv", "cpu"):
        for sampler in ("Euler a", "DPM++ 2M SDE"):
            jobs[f"noise/{noise}/{sampler}"] = {"noise": noise, "sampler": sampler}
    for decode in ("official", "forge2"):
        jobs[f"decode/{decode}"] = {"decode": decode}
        jobs[f"decode/{decode}/single file"] = {"decode": decode, **SINGLE}
    for name, prompt in PROMPTS.items():
        jobs[f"prompt/{name}"] = {"prompt": prompt}
    loras = [{"name": "unet", "weight": 0.5}, {"name": "text", "weight": 1.0}]
    jobs |= {
        "subseed": {"subseed_strength": 0.3, "batch_size": 2},
        "subseed/cpu noise": {"subseed_strength": 0.3, "batch_size": 2, "noise": "cpu"},
        "clip skip/2": {"clip_skip": 2},  # the same as 1: SDXL always skips one layer
        "clip skip/3": {"clip_skip": 3},
        "negative prompt/empty": {"negative_prompt": ""},
        "guidance 1": {"cfg_scale": 1.0},
        "lora/unet": {"loras": loras[:1]},
        "lora/text": {"loras": loras[1:]},
        "lora/both, in the prompt": {"prompt": "a mug <lora:unet:0.5> <lora:text:0.7>"},
        "lora/transparency off": {"loras": loras, **transparency(None)},
        "size/odd, cropped": {"width": 100, "height": 70},
        "size/128x64": {"width": 128},
        "model/single file": {**SINGLE, "sampler": "Euler"},
        "model/folder": {"sampler": "Euler"},
        "model/folder, its defaults": {
            "seed": 11,
            **dict.fromkeys(("width", "height", "steps", "sampler", "scheduler", "cfg_scale")),
        },
        "model/v-prediction": {"model": "vpred", "sampler": "Euler"},
        "model/built in": {"model": "alphalayer-mini", "steps": 2, "width": None, "height": None},
    }
    cases = {name: ("high", [fields]) for name, fields in jobs.items()}
    for memory in MEMORY_MODES:
        cases |= {
            f"memory/{memory}": (memory, [{}]),
            f"memory/{memory}/128x128": (memory, [{"width": 128, "height": 128, "steps": 3}]),
            f"memory/{memory}/batch of 3": (memory, [{"batch_size": 3}]),
            f"memory/{memory}/conv": (memory, [{**SINGLE, **transparency("conv")}]),
            f"memory/{memory}/off": (memory, [transparency(None)]),
            f"memory/{memory}/forge2": (memory, [{"decode": "forge2"}]),
            f"memory/{memory}/different jobs": (memory, DIFFERENT_JOBS),
        }
        for sampler in ("Euler a", "UniPC"):
            together = [{**fields, "sampler": sampler} for fields in DIFFERENT_JOBS]
            cases[f"memory/{memory}/different jobs/{sampler}"] = (memory, together)
    return cases


def make_models(folder: Path) -> tuple[Path, Path]:
    """Write the models, patches, LoRAs and textual inversions of the cases.

    Returns:
        The folder of models and the folder of embeddings.
    """
    models, embeddings = folder / "models", folder / "embeddings"
    checkpoints = models / "Stable-diffusion"
    tiny_models.make_diffusers_folder(checkpoints / "folder")
    vpred = tiny_models.make_diffusers_folder(checkpoints / "vpred")
    scheduler = vpred / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(config))
    tiny_models.make_single_file(checkpoints / "single.safetensors")
    layer_model = tiny_models.make_layer_files(models / "layer_model")
    save_file(_conv_patch(), layer_model / "layer_xl_transparent_conv.safetensors")
    loras = models / "Lora"
    loras.mkdir()
    save_file(_unet_lora(), loras / "unet.safetensors")
    save_file(_text_lora(), loras / "text.safetensors")
    embeddings.mkdir()
    generator = torch.Generator().manual_seed(60)
    vectors = {
        name: torch.randn(2, width, generator=generator)
        for name, width in (("clip_l", tiny_models.WIDTH_L), ("clip_g", tiny_models.WIDTH_G))
    }
    save_file(vectors, embeddings / "apple-style.safetensors")
    return models, embeddings


def _conv_patch() -> dict[str, torch.Tensor]:
    """Return a low-rank patch of the convolutions of all residual blocks."""
    generator = torch.Generator().manual_seed(61)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in tiny_models.unet().named_parameters():
        if name.endswith(("conv1.weight", "conv2.weight")):
            key = "diffusion_model." + tiny_models.unet_name_in_ldm(name)
            up = torch.randn(weight.shape[0], 4, 1, 1, generator=generator) * 0.1
            down = torch.randn(4, *weight.shape[1:], generator=generator) * 0.1
            tensors |= {f"{key}::lora::0": up.half(), f"{key}::lora::1": down.half()}
    return tensors


def _unet_lora() -> dict[str, torch.Tensor]:
    """Return a LoRA of the UNet's attention in kohya's names."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (up, down) in tiny_models.lora_pairs(seed=50).items():
        module = tiny_models.unet_name_in_ldm(name).removesuffix(".weight").replace(".", "_")
        stem = f"lora_unet_{module}"
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    return tensors


def _text_lora() -> dict[str, torch.Tensor]:
    """Return a LoRA of the MLPs of both text encoders in kohya's names."""
    generator = torch.Generator().manual_seed(51)
    tensors: dict[str, torch.Tensor] = {}
    for part, encoder in zip(("te1", "te2"), tiny_models.text_encoders(), strict=True):
        for name, weight in encoder.named_parameters():
            if ".mlp." in name and name.endswith("weight"):
                module = name.removesuffix(".weight").removeprefix("text_model.")
                stem = f"lora_{part}_text_model_{module.replace('.', '_')}"
                up = torch.randn(weight.shape[0], 4, generator=generator)
                down = torch.randn(4, weight.shape[1], generator=generator)
                tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    return tensors


def _raw(rgba: Any) -> bytes:
    """Return height, width and the bytes of an RGBA image."""
    height, width, _ = rgba.shape
    return f"{height}x{width}:".encode() + rgba.tobytes()


def _sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def render_cases() -> Fields:
    """Render every case.

    Returns:
        By case: the SHA-256 of each image, of the batch's latents, and each infotext.
    """
    torch.set_num_threads(1)
    hashes: Fields = {}
    cases = build_cases()
    with tempfile.TemporaryDirectory() as name:
        folders = make_models(Path(name))
        for memory in MEMORY_MODES:
            latents: list[torch.Tensor] = []
            render = create_renderer(*folders, memory, latents)
            for case, jobs in (
                (case, jobs) for case, (mode, jobs) in cases.items() if mode == memory
            ):
                latents.clear()
                results = render([BASE | changes for changes in jobs])
                images = [image for images_of_request in results for image in images_of_request]
                hashes[case] = {
                    "images": [_sha256([raw]) for raw, _ in images],
                    "latents": _sha256(latent.contiguous().numpy().tobytes() for latent in latents),
                    "infotexts": [infotext for _, infotext in images],
                }
    return hashes


def describe_environment() -> Fields:
    """Return what the hashes depend on: CPU, threads and versions of the libraries."""
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            cpu = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return {
        "cpu": cpu,
        "cpu_flags": sorted(flag for flag in flags if flag.startswith(("avx", "amx"))),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "transformers", "numpy")},
    }


def record(file: Path) -> int:
    """Write the hashes of this checkout to a file."""
    recorded = {"commit": _commit(), "cases": render_cases(), "environment": describe_environment()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(recorded['cases'])} cases recorded in {file}.")
    return 0


def compare(file: Path) -> int:
    """Render every case and report those that differ from a recorded file.

    Returns:
        1 if any case differs, else 0.
    """
    recorded = json.loads(file.read_text(encoding="utf-8"))
    cases, before = render_cases(), recorded["cases"]
    here = describe_environment()
    environment = {
        name: (value, here.get(name))
        for name, value in recorded["environment"].items()
        if value != here.get(name)
    }
    differing = 0
    for case in sorted(before.keys() | cases.keys()):
        if case not in cases or case not in before:
            differing += 1
            print(f"{case}: {'not rendered' if case in before else 'not recorded'}")
            continue
        parts = [part for part, value in before[case].items() if value != cases[case][part]]
        differing += bool(parts)
        if parts:
            print(f"{case}: {', '.join(parts)} differ")
        if "infotexts" in parts:
            print(
                f"  recorded: {before[case]['infotexts']}\n  now:      {cases[case]['infotexts']}"
            )
    print(f"{differing} of {len(before)} cases differ from commit {recorded['commit']}.")
    for name, (old, new) in environment.items():
        print(f"WARNING: {name} was {old}, is {new}: hashes may differ for this reason alone.")
    return int(differing > 0)


def _commit() -> str:
    """Return the commit of this checkout, or "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    sys.exit((record if arguments.command == "record" else compare)(arguments.file))
