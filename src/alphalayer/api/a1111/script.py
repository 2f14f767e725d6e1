"""The arguments of the LayerDiffuse script as that ecosystem sends them: a positional list whose missing tail keeps the defaults."""

from __future__ import annotations

from typing import Any

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import MODES, OPAQUE
from alphalayer.core.request import RESIZE_MODES

SCRIPT = "LayerDiffuse"
METHODS = {mode.label: mode.name for mode in MODES.values() if mode.label}
OTHER_METHODS = (
    "(SDXL) From Foreground to Blending",
    "(SDXL) From Foreground and Blending to Background",
    "(SDXL) From Background to Blending",
    "(SDXL) From Background and Blending to Foreground",
    "(SD1.5) Only Generate Transparent Image (Attention Injection)",
    "(SD1.5) From Foreground to Background (need batch size 2)",
    "(SD1.5) From Background to Foreground (need batch size 2)",
    "(SD1.5) Generate Everything Together (need batch size 3)",
)
"""What the original can do and this version cannot."""


def layerdiffuse_of(args: list[Any]) -> dict[str, Any]:
    """The positional arguments of the script; a missing tail keeps the defaults. Raises `InvalidRequest`."""
    names = (
        "enabled",
        "method",
        "weight",
        "ending_step",
        "fg_image",
        "bg_image",
        "blend_image",
        "resize_mode",
    )
    names = (*names, "output_origin")
    given = {name: value for name, value in zip(names, args, strict=False) if value is not None}
    enabled = given.get("enabled", True)
    if not isinstance(enabled, bool):
        raise _wrong_arg("enabled", "it is true or false")
    if not enabled:
        return {"mode": OPAQUE}
    for name in ("fg_image", "bg_image", "blend_image"):
        if given.get(name):
            raise _wrong_arg(name, "pictures are not taken here yet")
    if given.get("resize_mode", RESIZE_MODES[0]) not in RESIZE_MODES:
        raise _wrong_arg("resize_mode", f"use one of: {', '.join(RESIZE_MODES)}")
    if given.get("output_origin"):
        raise _wrong_arg("output_origin", "the picture before decoding is not there yet")
    if any(args[9:12]):
        raise _wrong_arg("additional prompts", "they are not there yet")
    return {
        "mode": _method(given.get("method", MODES["attention"].label)),
        "layerdiffuse_weight": _number(given, "weight", 1.0, 2),
        "layerdiffuse_stop_at": _number(given, "ending_step", 1.0, 1),
    }


def _method(label: Any) -> str:
    """The name of a method by its label, also by that of older versions, which had no "(SDXL)". Raises `InvalidRequest`."""
    bare = str(label).removeprefix("(SDXL) ")
    known = {each.removeprefix("(SDXL) "): name for each, name in METHODS.items()}
    if bare in known:
        return known[bare]
    others = {each.partition(") ")[2] for each in OTHER_METHODS}
    what = (
        f'"{label}" is not there yet'
        if bare.removeprefix("(SD1.5) ") in others
        else f'there is no "{label}"'
    )
    raise _wrong_arg("method", f"{what}; use one of: {', '.join(METHODS)}")


def _number(given: dict[str, Any], name: str, default: float, most: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise _wrong_arg(name, f"it is a number from 0 to {most:g}")
    return float(value)


def _wrong_arg(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {why}.", field=f"alwayson_scripts.{SCRIPT}.args")
