"""Names of samplers and noise schedules, and what depends on the name alone.

Free of torch. `alphalayer.engine.sampling` has the functions.
"""

from __future__ import annotations

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.values import one_of

SAMPLERS = (
    "DPM++ 2M SDE",
    "DPM++ 2M",
    "DPM++ SDE",
    "DPM++ 2M SDE Heun",
    "DPM++ 2S a",
    "DPM++ 3M SDE",
    "Euler a",
    "Euler",
    "LMS",
    "Heun",
    "DPM2",
    "DPM2 a",
    "DPM fast",
    "DPM adaptive",
    "Restart",
    "HeunPP2",
    "IPNDM",
    "IPNDM_V",
    "DEIS",
    "DDIM",
    "DDIM CFG++",
    "PLMS",
    "UniPC",
    "LCM",
    "DDPM",
)
SCHEDULERS = (
    "Karras",
    "Exponential",
    "Normal",
    "SGM Uniform",
    "Simple",
    "Beta",
    "Uniform",
    "Polyexponential",
    "KL Optimal",
    "Align Your Steps",
    "Align Your Steps GITS",
    "Align Your Steps 11",
    "Align Your Steps 32",
    "DDIM",
    "Turbo",
)
AUTOMATIC = "Automatic"
_AUTOMATIC = {
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM++ 2S a": "Karras",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "Restart": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 2M SDE Heun": "Exponential",
    "DPM++ 3M SDE": "Exponential",
}
"""The schedule that "Automatic" means for a sampler; "Normal" for the others."""
CALLS_PER_STEP = {
    "DPM++ SDE": 2,
    "DPM++ 2S a": 2,
    "Heun": 2,
    "DPM2": 2,
    "DPM2 a": 2,
    "Restart": 2,
}
"""Calls of the UNet a step, as the schedules of prompts count them; 1 for the others."""
ADAPTIVE = "DPM adaptive"
"""Sampler that chooses its levels by the image. Each image runs alone."""
MAX_ADAPTIVE_CALLS = 450
"""Most calls of the UNet for an image with it: those of 150 steps of order 3."""
TRAINING_STEPS = 1000
"""Levels that SDXL and SD 1.5 were trained on."""
MAX_STRENGTH = 0.999
WITHOUT_ETA = (
    "Euler",
    "Heun",
    "LMS",
    "DPM2",
    "DPM++ 2M",
    "Restart",
    "HeunPP2",
    "IPNDM",
    "IPNDM_V",
    "DEIS",
    "DDPM",
    "PLMS",
    "UniPC",
    "LCM",
)
"""Samplers for which the share of fresh noise has no meaning, as in Forge."""

sampler_named = one_of(SAMPLERS, "sampler")
scheduler_named = one_of(SCHEDULERS, "scheduler")


def total_steps(steps: int, strength: float) -> int:
    """Return the steps of a schedule whose last `steps` begin at a strength.

    Source: AUTOMATIC1111, the second pass of hires fix.
    """
    return int(steps / min(strength, MAX_STRENGTH))


def split_sampler_name(
    name: str | None, scheduler: str | None = None, default: str | None = None
) -> tuple[str | None, str | None]:
    """Split a sampler name that carries its schedule, such as "DPM++ 2M SDE Karras".

    AUTOMATIC1111 writes the two as one name. `scheduler` wins over the schedule in the name,
    which wins over `default`.
    Schedules go by label or by name ("SGM Uniform", "sgm_uniform"). "Automatic" means the
    sampler's own schedule.
    Unknown names are returned unchanged.
    """
    # "Euler SGM Uniform" ends in "Uniform", too
    for label in sorted((*SCHEDULERS, AUTOMATIC), key=len, reverse=True):
        suffixes = (f" {label.lower()}", f" {scheduler_name(label).lower()}")
        if name and name.lower().endswith(suffixes):
            name, scheduler = name[: -len(label) - 1], scheduler or label
            break
    scheduler = scheduler or default
    if scheduler and scheduler.lower() == AUTOMATIC.lower():
        own = {sampler.lower(): schedule for sampler, schedule in _AUTOMATIC.items()}
        return name, own.get(name.lower(), "Normal") if name else None
    return name, next(
        (
            label
            for label in SCHEDULERS
            if scheduler_name(label).lower() == (scheduler or "").lower()
        ),
        scheduler,
    )


def choose_sampler(
    name: str | None, scheduler: str | None = None, default: str | None = None
) -> tuple[str | None, str | None]:
    """Split a sampler name as `split_sampler_name` does, and check both parts.

    Raises:
        InvalidRequest: One of them is unknown; `field` is "sampler" or "scheduler".
    """
    sampler, schedule = split_sampler_name(name, scheduler, default)
    checks = {"sampler": (sampler_named, sampler), "scheduler": (scheduler_named, schedule)}
    chosen: dict[str, str | None] = {}
    for field, (check, value) in checks.items():
        try:
            chosen[field] = None if value is None else check(value)
        except ValueError as error:
            raise InvalidRequest(f"{error}.", field=field) from None
    return chosen["sampler"], chosen["scheduler"]


def scheduler_name(label: str) -> str:
    """Return the name of a schedule by its label: "sgm_uniform" for "SGM Uniform"."""
    return label.lower().replace(" ", "_").replace("_gits", "_GITS")
