"""Arguments of the LayerDiffuse script, which AUTOMATIC1111 sends as a positional list."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, ValidationError

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import MODES, OPAQUE
from alphalayer.core.request import (
    Frozen,
    LayerdiffuseStopAt,
    LayerdiffuseWeight,
    ResizeModeName,
)
from alphalayer.core.validation import describe_validation_error

SCRIPT = "LayerDiffuse"
METHODS = {mode.label: mode.name for mode in MODES.values() if mode.label and not mode.needs}
"""Modes without input images by their labels."""
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
"""Methods of the original that are not implemented."""


class Arguments(Frozen, frozen=True):
    """Arguments in the order of the list. A missing tail and null mean the defaults."""

    model_config = ConfigDict(strict=True)

    enabled: bool = True
    method: str = MODES["attention"].label
    weight: LayerdiffuseWeight = 1.0
    ending_step: LayerdiffuseStopAt = 1.0
    fg_image: Any = None
    bg_image: Any = None
    blend_image: Any = None
    resize_mode: ResizeModeName = "Just Resize"
    output_origin: Any = False
    fg_additional_prompt: Any = ""
    bg_additional_prompt: Any = ""
    blend_additional_prompt: Any = ""


UNSUPPORTED = (
    "fg_image",
    "bg_image",
    "blend_image",
    "output_origin",
    "fg_additional_prompt",
    "bg_additional_prompt",
    "blend_additional_prompt",
)


def layerdiffuse_of(args: list[Any]) -> dict[str, Any]:
    """Return the fields of `GenerationRequest` that the script's arguments mean.

    Raises:
        InvalidRequest: An argument is wrong or not implemented.
    """
    named = zip(Arguments.model_fields, args, strict=False)
    try:
        arguments = Arguments.model_validate(
            {name: value for name, value in named if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _wrong_argument(str(first["loc"][0]), describe_validation_error(first)) from None
    if not arguments.enabled:
        return {"mode": OPAQUE}
    for name in UNSUPPORTED:
        if getattr(arguments, name):
            raise _wrong_argument(name, "not implemented")
    return {
        "mode": _method(arguments.method),
        "layerdiffuse_weight": arguments.weight,
        "layerdiffuse_stop_at": arguments.ending_step,
        "resize_mode": arguments.resize_mode,
    }


def _method(label: str) -> str:
    """Return a method by its label, also without "(SDXL)". Raises `InvalidRequest`."""
    bare = label.removeprefix("(SDXL) ")
    known = {label.removeprefix("(SDXL) "): name for label, name in METHODS.items()}
    if bare in known:
        return known[bare]
    others = {other.partition(") ")[2] for other in OTHER_METHODS}
    reason = (
        f'"{label}" is not implemented'
        if bare.removeprefix("(SD1.5) ") in others
        else f'there is no "{label}"'
    )
    raise _wrong_argument("method", f"{reason}; use one of: {', '.join(METHODS)}")


def _wrong_argument(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {reason}.", field=f"alwayson_scripts.{SCRIPT}.args")
