"""Lists of the AUTOMATIC1111 dialect. Clients request all of them, also those that are empty."""

from __future__ import annotations

import os
from typing import Any

from fastapi import APIRouter, Depends, Request

from alphalayer.api.a1111.script import METHODS, SCRIPT, Arguments
from alphalayer.api.deps import ServiceDep
from alphalayer.api.guard import Admitted, GuardedRoute
from alphalayer.catalog import public_path, shorten_paths, summarize, usable_files
from alphalayer.core.errors import CorruptFile
from alphalayer.core.request import (
    AUTOMATIC,
    SAMPLERS,
    SCHEDULERS,
    scheduler_name,
    split_sampler_name,
)

router = APIRouter(dependencies=[Depends(Admitted("read"))], route_class=GuardedRoute)
REFRESH = [Depends(Admitted("admin"))]
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
"""Names of samplers in other versions of AUTOMATIC1111, in lower case."""

EMBEDDING = {
    "step": None,
    "sd_checkpoint": None,
    "sd_checkpoint_name": None,
    "shape": 0,
    "vectors": 0,
}


@router.get("/samplers", summary="List samplers")
def samplers() -> list[dict[str, Any]]:
    """Return the samplers by name. `txt2img` also accepts the aliases.

    `scheduler` is what Automatic means for the sampler.
    """
    aliases = {
        name: [alias for alias, meant in ALIASES.items() if meant == name] for name in SAMPLERS
    }
    own = {name: scheduler_name(split_sampler_name(name, AUTOMATIC)[1] or "") for name in SAMPLERS}
    return [
        {"name": name, "aliases": aliases[name], "options": {"scheduler": own[name]}}
        for name in SAMPLERS
    ]


@router.get("/schedulers", summary="List noise schedules")
def schedulers() -> list[dict[str, Any]]:
    """Return the schedules by name. `txt2img` also accepts the labels."""
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


@router.get("/loras", summary="List LoRA files")
def loras(service: ServiceDep) -> list[dict[str, Any]]:
    """Return the files of models/Lora, with their paths from the models folder on."""
    files = usable_files(service.models_dir / "Lora")
    return [
        {
            "name": file.stem,
            "alias": file.stem,
            "path": public_path(file, service.models_dir),
            "metadata": {},
        }
        for file in files
    ]


@router.get("/embeddings", summary="List embeddings")
def embeddings(service: ServiceDep) -> dict[str, dict[str, Any]]:
    """Return the files of the embeddings folder by their names in prompts.

    `skipped` has those that are not for SDXL, and damaged ones with the reason as `problem`.
    """
    embeddings: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for path in usable_files(service.embeddings_dir):
        try:
            sides = [*summarize(path).embedding.values()]
        except CorruptFile as error:
            problem = shorten_paths(error, service.embeddings_dir).message
            embeddings["skipped"][path.stem] = {**EMBEDDING, "problem": problem}
            continue
        vectors = {side[0] if len(side) > 1 else 1 for side in sides}
        is_sdxl = (
            len(sides) == 2 and len(vectors) == 1 and all(len(side) in (1, 2) for side in sides)
        )
        measures = (
            {"shape": sum(side[-1] for side in sides), "vectors": vectors.pop()} if is_sdxl else {}
        )
        embeddings["loaded" if is_sdxl else "skipped"][path.stem] = {**EMBEDDING, **measures}
    return embeddings


@router.get("/upscalers", summary="List upscalers")
def upscalers() -> list[dict[str, Any]]:
    """Return the upscaler that does nothing."""
    return [
        {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    ]


@router.get("/sd-vae", summary="List VAEs")
@router.get("/sd-modules", summary="List modules")
@router.get("/latent-upscale-modes", summary="List latent upscale modes")
@router.get("/prompt-styles", summary="List prompt styles")
@router.get("/face-restorers", summary="List face restorers")
@router.get("/realesrgan-models", summary="List RealESRGAN models")
@router.get("/hypernetworks", summary="List hypernetworks")
def nothing() -> list[dict[str, Any]]:
    """Return an empty list."""
    return []


@router.post("/refresh-checkpoints", summary="Refresh models", dependencies=REFRESH)
@router.post("/refresh-loras", summary="Refresh LoRA files", dependencies=REFRESH)
@router.post("/refresh-vae", summary="Refresh VAEs", dependencies=REFRESH)
def refresh() -> None:
    """Do nothing: folders are read at every request."""


@router.get("/scripts", summary="List scripts")
def scripts() -> dict[str, list[str]]:
    """Return the one script, LayerDiffuse."""
    return {"txt2img": [SCRIPT.lower()], "img2img": []}


@router.get("/script-info", summary="List the arguments of scripts")
def script_info() -> list[dict[str, Any]]:
    """Return the positional arguments of LayerDiffuse that have an effect."""
    empty = {"minimum": None, "maximum": None, "step": None, "choices": None}
    args = [
        {**empty, "label": "Enabled", "value": True},
        {
            **empty,
            "label": "Method",
            "value": next(iter(METHODS)),
            "choices": list(METHODS),
        },
        {**empty, "label": "Weight", **_number("weight")},
        {**empty, "label": "Stop At", **_number("ending_step")},
    ]
    return [{"name": SCRIPT.lower(), "is_alwayson": True, "is_img2img": False, "args": args}]


def _number(name: str) -> dict[str, Any]:
    """Return default and bounds of a script's argument."""
    schema = Arguments.model_json_schema()["properties"][name]
    bounds = {bound: schema[bound] for bound in ("minimum", "maximum")}
    return {"value": schema["default"], "step": 0.001, **bounds}


@router.get("/memory", summary="Get memory use")
def memory() -> dict[str, Any]:
    """Return the memory of this machine in bytes. /metrics has that of the GPUs."""
    cuda = {"error": "not known to this process; see /metrics"}
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return {"ram": {"error": "not known on this system"}, "cuda": cuda}
    return {"ram": {"free": free, "used": total - free, "total": total}, "cuda": cuda}


@router.get("/cmd-flags", summary="Get command-line flags")
def cmd_flags(request: Request) -> dict[str, Any]:
    """Return the flags that clients read, without passwords and paths."""
    return {
        "api": True,
        "nowebui": False,
        "subpath": request.scope.get("root_path", ""),
        "do_not_download_clip": True,
    }
