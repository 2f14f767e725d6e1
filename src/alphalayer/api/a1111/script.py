"""Arguments of the LayerDiffuse script, which AUTOMATIC1111 sends as a positional list."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from alphalayer.core.errors import AlphalayerError, InvalidRequest
from alphalayer.core.modes import DEFAULT_MODE, MODES, OPAQUE, InputRole, LayerRole
from alphalayer.core.request import LayerdiffuseStopAt, LayerdiffuseWeight, ResizeModeName
from alphalayer.core.validation import describe_validation_error
from alphalayer.core.values import Frozen

SCRIPT = "LayerDiffuse"
ARGUMENTS = f"alwayson_scripts.{SCRIPT}.args"
IMAGE_ARGUMENTS: dict[InputRole, str] = {
    "foreground": "fg_image",
    "background": "bg_image",
    "blended": "blend_image",
}
"""Arguments with images, by their roles."""
METHODS = {mode.label: mode.name for mode in MODES.values() if mode.label}
"""Modes by their labels."""
ROWS = tuple(sorted(METHODS, key=lambda label: MODES[METHODS[label]].family))
"""Methods in the order of the original, whose numbers clients send: those of SD 1.5 come first."""
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
    fg_additional_prompt: str = ""
    bg_additional_prompt: str = ""
    blend_additional_prompt: str = ""

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
            "foreground_prompt": self.fg_additional_prompt,
            "background_prompt": self.bg_additional_prompt,
            "blended_prompt": self.blend_additional_prompt,
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return which additional prompts have no effect, one sentence each."""
        if not self.enabled:
            return ()
        layers = MODES[_method(self.method)].layers
        prompts: dict[LayerRole, str] = {
            "foreground": "fg_additional_prompt",
            "background": "bg_additional_prompt",
            "blended": "blend_additional_prompt",
        }
        return tuple(
            f"{name}: ignored by this method."
            for role, name in prompts.items()
            if getattr(self, name).strip() and (len(layers) == 1 or role not in layers)
        )

    @property
    def images(self) -> dict[InputRole, str]:
        """Return the input images by role, as base64."""
        images: dict[InputRole, str | None] = {
            role: getattr(self, name) for role, name in IMAGE_ARGUMENTS.items()
        }
        return {role: image for role, image in images.items() if self.enabled and image}


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
    if arguments.enabled and arguments.output_origin:
        raise _wrong_argument("output_origin", "not implemented")
    return arguments


def _method(method: str | int) -> str:
    """Return a mode by its label or row. Raises `InvalidRequest`.

    The label may lack its family, which then is SDXL where both have it, or "(need batch size 2)".
    """
    label = str(method)
    label = {str(row): label for row, label in enumerate(ROWS)}.get(label, label)
    known: dict[str, str] = {}
    for full in ROWS:
        own, short = full.partition(" (need")[0], full.partition(") ")[2]
        known |= dict.fromkeys((full, own, short, short.partition(" (need")[0]), METHODS[full])
    if label in known:
        return known[label]
    raise _wrong_argument("method", f'there is no "{label}"; use one of: {", ".join(ROWS)}')


def _wrong_argument(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {reason}.", field=ARGUMENTS)


def replace_texts(value: Any, texts: Mapping[str, Any]) -> Any:
    """Return a JSON value with other values in the place of some texts, at any depth."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: replace_texts(part, texts) for name, part in fields.items()}
    if isinstance(value, list):
        return [replace_texts(part, texts) for part in cast("list[Any]", value)]
    return texts.get(value, value) if isinstance(value, str) else value


@contextmanager
def method_labels() -> Generator[None]:
    """Name modes by their labels in errors that are raised inside."""
    try:
        yield
    except AlphalayerError as error:
        for mode in MODES.values():
            if mode.label:
                error.message = error.message.replace(f'"{mode.name}"', f'"{mode.label}"')
                if f'"{mode.name}"' in error.hint:
                    error.hint = error.hint.replace(f'"{mode.name}"', f'"{mode.label}"')
        raise
