"""The lists of the AUTOMATIC1111 dialect: what there is to choose from. Most are short, some empty; clients ask for all of them."""

from __future__ import annotations

import os
from typing import Any

from fastapi import APIRouter, Request

from alphalayer.api.deps import ServiceDep
from alphalayer.api.layerdiffuse_script import METHODS, SCRIPT
from alphalayer.request import AUTOMATIC, SAMPLERS, SCHEDULERS, scheduler_name, split_sampler_name

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


@router.get("/samplers", summary="Samplers")
def samplers() -> list[dict[str, Any]]:
    """By the names that txt2img takes; it takes the aliases, too. `scheduler` is what Automatic means for one."""
    aliases = {name: [alias for alias, meant in ALIASES.items() if meant == name] for name in SAMPLERS}
    own = {name: scheduler_name(split_sampler_name(name, AUTOMATIC)[1] or "") for name in SAMPLERS}
    return [{"name": name, "aliases": aliases[name], "options": {"scheduler": own[name]}} for name in SAMPLERS]


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
    return [{"name": file.stem, "alias": file.stem, "path": str(file.resolve()), "metadata": {}} for file in files]


@router.get("/upscalers", summary="None yet")
def upscalers() -> list[dict[str, Any]]:
    """The one that does nothing."""
    return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}]


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
    return {"api": True, "nowebui": False, "subpath": request.scope.get("root_path", ""), "do_not_download_clip": True}
