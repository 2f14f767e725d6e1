"""Arguments of the LayerDiffuse script, which AUTOMATIC1111 sends as a positional list."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, ValidationError

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import DEFAULT_MODE, MODES, OPAQUE, InputRole
from alphalayer.core.request import (
    Frozen,
    LayerdiffuseStopAt,
    LayerdiffuseWeight,
    ResizeModeName,
)
from alphalayer.core.validation import describe_validation_error

SCRIPT = "LayerDiffuse"
METHODS = {mode.label: mode.name for mode in MODES.values() if mode.label}
"""Modes by their labels."""
OTHER_METHODS = (
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
    method: str = MODES[DEFAULT_MODE].label
    weight: LayerdiffuseWeight = 1.0
    ending_step: LayerdiffuseStopAt = 1.0
    fg_image: str | None = None
    bg_image: str | None = None
    blend_image: str | None = None
    resize_mode: ResizeModeName = "Just Resize"
    output_origin: Any = False
    fg_additional_prompt: Any = ""
    bg_additional_prompt: Any = ""
    blend_additional_prompt: Any = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of `GenerationRequest`. Raises `InvalidRequest`."""
        if not self.enabled:
            return {"mode": OPAQUE}
        return {
            "mode": _method(self.method),
            "layerdiffuse_weight": self.weight,
            "layerdiffuse_stop_at": self.ending_step,
            "resize_mode": self.resize_mode,
        }

    @property
    def images(self) -> dict[InputRole, str]:
        """Return the input images by role, as base64."""
        images: dict[InputRole, str | None] = {
            "foreground": self.fg_image,
            "background": self.bg_image,
            "blended": self.blend_image,
        }
        return {role: image for role, image in images.items() if self.enabled and image}


UNSUPPORTED = (
    "output_origin",
    "fg_additional_prompt",
    "bg_additional_prompt",
    "blend_additional_prompt",
)


def read_arguments(args: list[Any]) -> Arguments:
    """Return the named arguments of the script.

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
    for name in UNSUPPORTED if arguments.enabled else ():
        if getattr(arguments, name):
            raise _wrong_argument(name, "not implemented")
    return arguments


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
