"""Arguments of the LayerDiffuse script, which AUTOMATIC1111 sends as a positional list."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import DEFAULT_MODE, MODES, OPAQUE, InputRole
from alphalayer.core.request import LayerdiffuseStopAt, LayerdiffuseWeight, ResizeModeName
from alphalayer.core.validation import describe_validation_error
from alphalayer.core.values import Frozen

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
ROWS = (*OTHER_METHODS, *METHODS)
"""Methods in the order of the original, whose numbers clients send."""
LABELS = {
    "enabled": "Enabled",
    "method": "Method",
    "weight": "Weight",
    "ending_step": "Stop At",
    "fg_image": "Foreground",
    "bg_image": "Background",
    "blend_image": "Blending",
    "resize_mode": "Resize Mode",
    "output_origin": "Output original mat for img2img",
    "fg_additional_prompt": "Foreground Additional Prompt",
    "bg_additional_prompt": "Background Additional Prompt",
    "blend_additional_prompt": "Blended Additional Prompt",
}
"""Labels of the arguments in the original's page."""


def _whole(value: Any) -> Any:
    """Return the number of a row as an integer. Some programs send floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Switch = Annotated[bool, Field(strict=False)]


class Arguments(Frozen, frozen=True):
    """Arguments in the order of the list. A missing tail and null mean the defaults."""

    model_config = ConfigDict(strict=True)

    enabled: Switch = True
    method: Annotated[str | int, BeforeValidator(_whole)] = MODES[DEFAULT_MODE].label
    weight: Annotated[LayerdiffuseWeight, Field(strict=False)] = 1.0
    ending_step: Annotated[LayerdiffuseStopAt, Field(strict=False)] = 1.0
    fg_image: str | None = None
    bg_image: str | None = None
    blend_image: str | None = None
    resize_mode: ResizeModeName = "Crop and Resize"
    output_origin: Switch = False
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

    Args:
        args: The values by position. The first may be an object of values by name.

    Raises:
        InvalidRequest: An argument is wrong or not implemented.
    """
    named = dict(zip(Arguments.model_fields, args, strict=False))
    if isinstance(first := named.get("enabled"), dict):
        named |= {"enabled": True, **cast("dict[str, Any]", first)}
    try:
        arguments = Arguments.model_validate(
            {name: value for name, value in named.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _wrong_argument(str(first["loc"][0]), describe_validation_error(first)) from None
    for name in UNSUPPORTED if arguments.enabled else ():
        if str(getattr(arguments, name) or "").strip():
            raise _wrong_argument(name, "not implemented")
    return arguments


def _method(method: str | int) -> str:
    """Return a mode by its label or row. Raises `InvalidRequest`.

    The label may lack "(SDXL)".
    """
    label = str(method)
    label = {str(row): label for row, label in enumerate(ROWS)}.get(label, label)
    bare = label.removeprefix("(SDXL) ")
    known = {label.removeprefix("(SDXL) "): name for label, name in METHODS.items()}
    if bare in known:
        return known[bare]
    # older labels of these methods have no "(need batch size 2)"
    others = {other for label in OTHER_METHODS for other in (label, label.partition(" (need")[0])}
    is_known = {label, f"(SD1.5) {label}"} & others
    reason = f'"{label}" is not implemented' if is_known else f'there is no "{label}"'
    raise _wrong_argument("method", f"{reason}; use one of: {', '.join(METHODS)}")


def _wrong_argument(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {reason}.", field=f"alwayson_scripts.{SCRIPT}.args")
