"""Flags: an option of `serve` for each setting, and errors that name the flag instead of the field behind it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from alphalayer.config import Settings, flag_of
from alphalayer.core.errors import AlphalayerError


def option_each_setting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**flags` an option for each setting, described as the setting is. Settings check the values."""
    options: list[inspect.Parameter] = []
    for name, field in Settings.model_fields.items():
        kind = bool if field.annotation is bool else str
        names = [] if kind is str else [f"{flag_of(name)}/{flag_of(f'no_{name}')}"]
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        default = "" if field.default is None else str(field.default)
        option = typer.Option(
            *names,
            help=field.description,
            metavar="|".join(choices) or (None if names else "TEXT"),
            show_default=default if default and kind is str else False,
        )
        annotation = Annotated[kind | None, option]
        options.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    old = Annotated[
        bool, typer.Option("--listen", help="As --host 0.0.0.0, if no --host is given.")
    ]
    options.append(
        inspect.Parameter("listen", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=old)
    )
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def naming_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Make the errors of a command name its flags: a field `batch_size` is `--batch-size`."""
    flags = {
        name
        for name, each in inspect.signature(command).parameters.items()
        if each.default is not inspect.Parameter.empty
    }

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except AlphalayerError as error:
            error.field = flag_of(error.field) if error.field in flags else error.field
            raise

    return run
