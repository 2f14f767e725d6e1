"""The flags of `serve`: an option of the command line for each setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Literal, get_args, get_origin

import typer

from alphalayer.config import Settings


def option_each_setting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**flags` an option for each setting, described as the setting is. Settings check the values."""
    options: list[inspect.Parameter] = []
    for name, field in Settings.model_fields.items():
        kind = bool if field.annotation is bool else str
        names = [] if kind is str else [f"--{name}/--no-{name}".replace("_", "-")]
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        default = "" if field.default is None else str(field.default)
        option = typer.Option(
            *names,
            help=field.description,
            metavar="|".join(choices) or (None if names else "TEXT"),
            show_default=default if default and kind is str else False,
        )
        annotation = Annotated[kind | None, option]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command
