"""The lists of the AUTOMATIC1111 dialect: what there is to choose from. Most are short, some empty; clients ask for all of them."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request

from alphalayer.api.a1111.script import METHODS, SCRIPT
from alphalayer.api.deps import ServiceDep
from alphalayer.catalog.headers import read_header
from alphalayer.core.errors import CorruptFile
from alphalayer.core.request import (
    AUTOMATIC,
    SAMPLERS,
    SCHEDULERS,
    scheduler_name,
    split_sampler_name,
)

router = APIRouter()
ALIASES = {
    "k_dpmpp_2m_sde": "DPM++ 2M SDE",
    "k_dpmpp_2m": "DPM++ 2M",
    "k_dpmpp_sde": "DPM++ SDE",
    "k_dpmpp_3m_sde": "DPM++ 3M SDE",
    "k_euler": "Euler",
    "k_euler_a": "Euler a",
    "k_euler_ancestral": "Euler a",
    "k_heun": "Heun",
    "k_lcm": "LCM",
}
"""Other names of samplers in that ecosystem, beside those that differ in case alone."""

EMBEDDING = {
    "step": None,
    "sd_checkpoint": None,
    "sd_checkpoint_name": None,
    "shape": 0,
    "vectors": 0,
}


@router.get("/samplers", summary="Samplers")
def samplers() -> list[dict[str, Any]]:
    """By the names that txt2img takes; it takes the aliases, too. `scheduler` is what Automatic means for one."""
    aliases = {
        name: [alias for alias, meant in ALIASES.items() if meant == name] for name in SAMPLERS
    }
    own = {name: scheduler_name(split_sampler_name(name, AUTOMATIC)[1] or "") for name in SAMPLERS}
    return [
        {"name": name, "aliases": aliases[name], "options": {"scheduler": own[name]}}
        for name in SAMPLERS
    ]


@router.get("/schedulers", summary="Schedules of noise")
def schedulers() -> list[dict[str, Any]]:
    """By the names that txt2img takes; it takes the labels, too."""
    return [
        {
            "name": scheduler_name(label),
            "label": label,
            "aliases": [],
            "default_rho": 7.0 if label == "Karras" else -1.0,
            "need_inner_model": label in ("Normal", "SGM Uniform", "Simple", "Beta"),
        }
        for label in (AUTOMATIC, *SCHEDULERS)
    ]


@router.get("/loras", summary="LoRA files")
def loras(service: ServiceDep) -> list[dict[str, Any]]:
    """The files of models/Lora."""
    files = sorted((service.models_dir / "Lora").rglob("*.safetensors"))
    return [
        {"name": file.stem, "alias": file.stem, "path": str(file.resolve()), "metadata": {}}
        for file in files
    ]


@router.get("/embeddings", summary="Embeddings")
def embeddings(service: ServiceDep) -> dict[str, dict[str, Any]]:
    """The files of the embeddings folder, by the names that prompts use; skipped are those that are not SDXL's."""
    found: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for path in sorted(service.embeddings_dir.rglob("*.safetensors")):
        with suppress(CorruptFile):
            shapes = read_header(path).shapes
            sides = [shapes[name] for name in ("clip_l", "clip_g") if name in shapes]
            vectors = {side[0] if len(side) > 1 else 1 for side in sides}
            is_sdxl = (
                len(sides) == 2 and len(vectors) == 1 and all(len(side) in (1, 2) for side in sides)
            )
            about = (
                {"shape": sum(side[-1] for side in sides), "vectors": vectors.pop()}
                if is_sdxl
                else {}
            )
            found["loaded" if is_sdxl else "skipped"][path.stem] = {**EMBEDDING, **about}
    return found


@router.get("/upscalers", summary="None yet")
def upscalers() -> list[dict[str, Any]]:
    """The one that does nothing."""
    return [
        {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    ]


@router.get("/sd-vae", summary="None: the model's own is used")
@router.get("/sd-modules", summary="None: the model's own are used")
@router.get("/latent-upscale-modes", summary="None yet")
@router.get("/prompt-styles", summary="None yet")
@router.get("/face-restorers", summary="None yet")
@router.get("/realesrgan-models", summary="None yet")
@router.get("/hypernetworks", summary="None yet")
def nothing() -> list[dict[str, Any]]:
    """An empty list."""
    return []


@router.post("/refresh-checkpoints", summary="Needs not be asked: folders are read each time")
@router.post("/refresh-loras", summary="Needs not be asked: folders are read each time")
@router.post("/refresh-vae", summary="Needs not be asked: folders are read each time")
def refresh() -> None:
    """Nothing to do."""


@router.get("/scripts", summary="Scripts")
def scripts() -> dict[str, list[str]]:
    """LayerDiffuse alone."""
    return {"txt2img": [SCRIPT.lower()], "img2img": []}


@router.get("/script-info", summary="What the scripts take")
def script_info() -> list[dict[str, Any]]:
    """The positional arguments of LayerDiffuse that mean something here."""
    number = {"minimum": 0, "step": 0.001}
    args = [
        {"label": "Enabled", "value": True},
        {"label": "Method", "value": next(iter(METHODS)), "choices": list(METHODS)},
        {"label": "Weight", "value": 1.0, "maximum": 2, **number},
        {"label": "Stop At", "value": 1.0, "maximum": 1, **number},
    ]
    empty = {"minimum": None, "maximum": None, "step": None, "choices": None}
    shown = [{**empty, **each} for each in args]
    return [{"name": SCRIPT.lower(), "is_alwayson": True, "is_img2img": False, "args": shown}]


@router.get("/memory", summary="Memory of this machine, in bytes")
def memory() -> dict[str, Any]:
    """The GPU belongs to other processes; /metrics has what they use."""
    cuda = {"error": "not known to this process; see /metrics"}
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return {"ram": {"error": "not known on this system"}, "cuda": cuda}
    return {"ram": {"free": free, "used": total - free, "total": total}, "cuda": cuda}


@router.get("/cmd-flags", summary="Flags")
def cmd_flags(request: Request) -> dict[str, Any]:
    """Those that clients look at; never a password or a path."""
    return {
        "api": True,
        "nowebui": False,
        "subpath": request.scope.get("root_path", ""),
        "do_not_download_clip": True,
    }
