"""Options of commands, derived from the fields of models, and errors that name flags."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from alphalayer.config import flag_of
from alphalayer.core.errors import AlphalayerError

Command = Callable[..., None]
FLAG_NAMES = {"iterations": "n_iter"}
"""Names of flags that differ from the field's: those of AUTOMATIC1111."""
LARGEST_SHOWN = 10**9
"""Larger bounds are limits of a number format, and not shown."""
_TYPES = {"string": str, "number": float, "integer": int, "boolean": bool}
"""Types of options by type in JSON Schema; of several, the first."""
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}


def add_options(
    model: type[BaseModel],
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    as_text: bool = False,
) -> Callable[[Command], Command]:
    """Add an option for each field of a model to a command with `**options`.

    An option that is not given is None, so that the model's default holds. Help and flag come from
    the field. Its bounds are checked by the model. Fields with structure are JSON on the command
    line. Parameters of the command itself replace fields of the same name.

    Args:
        model: Model with a description for each field.
        only: Names of the fields to add; None for all.
        skip: Names of fields to leave out.
        as_text: Leave numbers to the model, which also reads them from text elsewhere.
    """

    def add(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = {
            parameter.name: parameter
            for parameter in own
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        for name, schema in model.model_json_schema()["properties"].items():
            if (only is None or name in only) and name not in {*skip, *parameters}:
                parameters[name] = _option(name, schema, as_text=as_text)
        signature = inspect.Signature(list(parameters.values()))
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {
            parameter.name: parameter.annotation for parameter in parameters.values()
        }
        return command

    return add


def select_fields(model: type[BaseModel], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that belong to a model, without those that are None."""
    return {name: options[name] for name in model.model_fields if options.get(name) is not None}


def name_flags(command: Command) -> Command:
    """Make errors of a command name flags: a field `batch_size` is `--batch-size`."""
    options = {
        name
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }

    @functools.wraps(command)
    def run(*arguments: Any, **values: Any) -> None:
        try:
            command(*arguments, **values)
        except AlphalayerError as error:
            error.field = _flag(error.field) if error.field in options else error.field
            raise

    return run


def _flag(field: str) -> str:
    return flag_of(FLAG_NAMES.get(field, field))


def _option(name: str, schema: dict[str, Any], *, as_text: bool) -> inspect.Parameter:
    types = {part["type"] for part in _parts(schema) if "type" in part}
    kind = next((kind for name, kind in _TYPES.items() if name in types), None)
    flag, help_text = _flag(name), _help(schema)
    if kind is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text)
    elif kind is None:
        option = typer.Option(flag, help=f"{help_text} As JSON.", parser=json.loads, metavar="JSON")
    else:
        option = typer.Option(flag, help=help_text)
        kind = str if as_text else kind
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(kind or str) | None, option],
    )


def _help(schema: dict[str, Any]) -> str:
    """Return the description of a field, its choices, its bounds and its default."""
    merged = {key: value for part in reversed(_parts(schema)) for key, value in part.items()}
    sentences: list[str] = [merged.get("description", "").rstrip(".")]
    if "enum" in merged:
        sentences.append(f"One of: {', '.join(merged['enum'])}")
    bounds = [
        f"{words} {merged[key]}"
        for key, words in _BOUNDS.items()
        if key in merged and merged[key] <= LARGEST_SHOWN
    ]
    sentences.append(", ".join(bounds).capitalize())
    default = merged.get("default")
    if default is not False and default not in (None, "", []):
        sentences.append(f"Default: {default}")
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _parts(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [schema, *schema.get("anyOf", [])]
