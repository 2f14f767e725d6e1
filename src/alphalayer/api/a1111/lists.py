"""Lists of the AUTOMATIC1111 dialect. Clients request all of them, also those that are empty."""

from __future__ import annotations

import json
import os
from typing import Any, cast

from fastapi import APIRouter, Depends, Request

from alphalayer import __version__
from alphalayer.api.a1111.script import LABELS, ROWS, SCRIPT, Arguments
from alphalayer.api.deps import ServiceDep
from alphalayer.api.guard import Admitted, Generator, GuardedRoute
from alphalayer.catalog import (
    lora_alias,
    lora_metadata,
    public_path,
    shorten_paths,
    summarize,
    upscaler_files,
    usable_files,
)
from alphalayer.core.errors import CorruptFile
from alphalayer.core.request import IMAGE_UPSCALERS, LATENT_UPSCALERS, RESIZE_MODES
from alphalayer.core.samplers import (
    AUTOMATIC,
    SAMPLERS,
    SCHEDULERS,
    scheduler_name,
    split_sampler_name,
)

router = APIRouter(dependencies=[Depends(Admitted("read"))], route_class=GuardedRoute)
REFRESH = [Depends(Admitted("admin"))]
SAMPLER_ROWS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "DPM++ 2M": (("k_dpmpp_2m",), ()),
    "DPM++ SDE": (("k_dpmpp_sde",), ("second_order", "brownian_noise")),
    "DPM++ 2M SDE": (("k_dpmpp_2m_sde",), ("brownian_noise",)),
    "DPM++ 2M SDE Heun": (("k_dpmpp_2m_sde_heun",), ("brownian_noise",)),
    "DPM++ 2S a": (("k_dpmpp_2s_a",), ("uses_ensd", "second_order")),
    "DPM++ 3M SDE": (("k_dpmpp_3m_sde",), ("discard_next_to_last_sigma", "brownian_noise")),
    "Euler a": (("k_euler_a", "k_euler_ancestral"), ("uses_ensd",)),
    "Euler": (("k_euler",), ()),
    "LMS": (("k_lms",), ()),
    "Heun": (("k_heun",), ("second_order",)),
    "DPM2": (("k_dpm_2",), ("discard_next_to_last_sigma", "second_order")),
    "DPM2 a": (("k_dpm_2_a",), ("discard_next_to_last_sigma", "uses_ensd", "second_order")),
    "DPM fast": (("k_dpm_fast",), ("uses_ensd",)),
    "DPM adaptive": (("k_dpm_ad",), ("uses_ensd",)),
    "Restart": (("restart",), ("second_order",)),
    "DDIM": (("ddim",), ()),
    "DDIM CFG++": (("ddim_cfgpp",), ()),
    "PLMS": (("plms",), ()),
    "UniPC": (("unipc",), ()),
    "LCM": (("k_lcm",), ()),
}
"""Other names and traits of samplers in AUTOMATIC1111. Others have none."""
ALIASES = {alias: name for name, (aliases, _) in SAMPLER_ROWS.items() for alias in aliases}
"""Samplers by their other names, in lower case."""
SCHEDULE_ALIASES = {"SGM Uniform": ["SGMUniform"]}
SCHEDULES = {
    alias.lower(): label for label, aliases in SCHEDULE_ALIASES.items() for alias in aliases
}
"""Schedules by their other names, in lower case."""
RHO = {"Karras": 7.0, "Polyexponential": 1.0}
NEEDS_MODEL = ("Uniform", "Normal", "SGM Uniform", "Simple", "Beta", "DDIM", "Turbo")
"""Schedules whose levels are those of training steps."""

MAX_NESTING = 10
"""Depth of objects in a LoRA's metadata that are parsed. Those of trainers have 3."""
EMBEDDING = {
    "step": None,
    "sd_checkpoint": None,
    "sd_checkpoint_name": None,
    "shape": 0,
    "vectors": 0,
}


def expand_aliases(name: str) -> str:
    """Return a sampler name, with or without a schedule, with aliases replaced."""
    words = name.split(" ")
    words[0] = ALIASES.get(words[0].lower(), words[0])
    words[-1] = SCHEDULES.get(words[-1].lower(), words[-1])
    return " ".join(words)


@router.get("/samplers", summary="List samplers")
def samplers() -> list[dict[str, Any]]:
    """Return the samplers by name. `txt2img` also accepts the aliases.

    `scheduler` is what Automatic means for the sampler, unless it is the model's own schedule.
    """
    return [_sampler(name) for name in SAMPLERS]


def _sampler(name: str) -> dict[str, Any]:
    aliases, traits = SAMPLER_ROWS.get(name, ((), ()))
    own = split_sampler_name(name, AUTOMATIC)[1] or ""
    schedule = {"scheduler": scheduler_name(own)} if own != "Normal" else {}
    # AUTOMATIC1111 sends the traits as text
    options = {**schedule, **dict.fromkeys(traits, "True")}
    return {"name": name, "aliases": list(aliases), "options": options}


@router.get("/schedulers", summary="List noise schedules")
def schedulers() -> list[dict[str, Any]]:
    """Return the schedules by name. `txt2img` also accepts the labels."""
    return [
        {
            "name": scheduler_name(label),
            "label": label,
            "aliases": SCHEDULE_ALIASES.get(label),
            "default_rho": RHO.get(label, -1.0),
            "need_inner_model": label in NEEDS_MODEL,
        }
        for label in (AUTOMATIC, *SCHEDULERS)
    ]


@router.get("/loras", summary="List LoRA files")
def loras(service: ServiceDep) -> list[dict[str, Any]]:
    """Return the files of models/Lora, with their paths from the models folder on.

    `alias` is the name that a file was trained under. Prompts may use it, too.
    """
    return [
        {
            "name": file.stem,
            "alias": next(iter(lora_alias(file)), file.stem),
            "path": public_path(file, service.models_dir),
            "metadata": {key: _parse(text) for key, text in lora_metadata(file).items()},
        }
        for file in usable_files(service.models_dir / "Lora")
    ]


def _parse(text: str) -> Any:
    """Return a value of a LoRA's metadata, whose objects are JSON in a text."""
    if not text.startswith("{"):
        return text
    try:
        value = json.loads(text)
        # no response can hold numbers that are not finite, or half of a surrogate pair
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    return value if _is_flat(value, MAX_NESTING) else text


def _is_flat(value: Any, limit: int) -> bool:
    """Return whether a JSON value is nested at most `limit` levels deep."""
    if not isinstance(value, dict | list):
        return True
    parts = cast("list[Any]", [*value.values()] if isinstance(value, dict) else value)
    return limit > 0 and all(_is_flat(part, limit - 1) for part in parts)


@router.get("/embeddings", summary="List embeddings")
def embeddings(service: ServiceDep) -> dict[str, dict[str, Any]]:
    """Return the files of the embeddings folder by their names in prompts.

    `skipped` has those that are for neither SDXL nor SD 1.5, and damaged ones with the reason as
    `problem`.
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
        is_known = len(vectors) == 1 and all(len(side) in (1, 2) for side in sides)
        measures = (
            {"shape": sum(side[-1] for side in sides), "vectors": vectors.pop()} if is_known else {}
        )
        embeddings["loaded" if is_known else "skipped"][path.stem] = {**EMBEDDING, **measures}
    return embeddings


@router.get("/upscalers", summary="List upscalers")
def upscalers(service: ServiceDep) -> list[dict[str, Any]]:
    """Return the upscalers of images: resampling, and the files of models/ESRGAN."""
    unknown = {"model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    files = upscaler_files(service.models_dir)
    return [
        *({"name": name, **unknown} for name in IMAGE_UPSCALERS),
        *(
            {"name": name, **unknown, "model_path": public_path(path, service.models_dir)}
            for name, path in files.items()
        ),
    ]


@router.get("/latent-upscale-modes", summary="List latent upscale modes")
def latent_upscale_modes() -> list[dict[str, Any]]:
    """Return the upscalers of latents."""
    return [{"name": name} for name in LATENT_UPSCALERS]


@router.get("/sd-vae", summary="List VAEs")
@router.get("/sd-modules", summary="List modules")
@router.get("/prompt-styles", summary="List prompt styles")
@router.get("/face-restorers", summary="List face restorers")
@router.get("/realesrgan-models", summary="List RealESRGAN models")
@router.get("/hypernetworks", summary="List hypernetworks")
def nothing() -> list[dict[str, Any]]:
    """Return an empty list."""
    return []


@router.post("/refresh-checkpoints", summary="Refresh models", dependencies=REFRESH)
@router.post("/refresh-embeddings", summary="Refresh embeddings", dependencies=REFRESH)
@router.post("/refresh-loras", summary="Refresh LoRA files", dependencies=REFRESH)
@router.post("/refresh-vae", summary="Refresh VAEs", dependencies=REFRESH)
def refresh() -> None:
    """Do nothing: folders are read at every request."""


@router.post("/unload-checkpoint", summary="Accept a request to unload the model")
@router.post("/reload-checkpoint", summary="Accept a request to load the model")
def reload_checkpoint(_user: Generator) -> dict[str, Any]:
    """Do nothing: requests load their models, and no memory is released.

    The setting `unload_model_after_s` of the service releases it after a time without jobs.
    """
    return {}


@router.get("/extensions", summary="List extensions")
def extensions() -> list[dict[str, Any]]:
    """Return LayerDiffuse. It is a part of this service, with its own code."""
    unknown = dict.fromkeys(("remote", "branch", "commit_hash", "commit_date"), "")
    return [{"name": SCRIPT, **unknown, "version": f"alphalayer-{__version__}", "enabled": True}]


@router.get("/scripts", summary="List scripts")
def scripts() -> dict[str, list[str]]:
    """Return the one script, LayerDiffuse."""
    return {"txt2img": [SCRIPT.lower()], "img2img": [SCRIPT.lower()]}


@router.get("/script-info", summary="List the arguments of scripts")
def script_info() -> list[dict[str, Any]]:
    """Return the positional arguments of LayerDiffuse, for txt2img and for img2img.

    The numbers of rows are those of Forge. "Output original mat" has no effect, and only its
    default is accepted.
    """
    bounds = {"weight": _number("weight", 0.001), "ending_step": _number("ending_step", 0.01)}
    choices = {"method": list(ROWS), "resize_mode": list(RESIZE_MODES)}
    args = [
        {
            "label": label,
            "value": Arguments.model_fields[name].default,
            "minimum": None,
            "maximum": None,
            "step": None,
            "choices": choices.get(name),
            **bounds.get(name, {}),
        }
        for name, label in LABELS.items()
    ]
    return [
        {"name": SCRIPT.lower(), "is_alwayson": True, "is_img2img": is_img2img, "args": args}
        for is_img2img in (False, True)
    ]


def _number(name: str, step: float) -> dict[str, Any]:
    """Return the bounds of a script's argument."""
    schema = Arguments.model_json_schema()["properties"][name]
    return {**{bound: schema[bound] for bound in ("minimum", "maximum")}, "step": step}


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
