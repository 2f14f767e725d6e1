"""Immutable values, and how they are built from plain data or from each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest

T = TypeVar("T", bound=BaseModel)


class Frozen(BaseModel, frozen=True):
    """Base of immutable values: unknown fields and numbers that are not finite are refused."""

    # errors go into logs, and inputs hold prompts
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


def parse_as(kind: type[T], fields: dict[str, Any]) -> T:
    """Validate plain data. Raises `InvalidRequest` of the first wrong field."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRequest(
            f"{validation.describe_validation_error(first)}.",
            field=".".join(str(part) for part in first["loc"]),
        ) from None


def copy_fields(source: BaseModel, kind: type[T], **values: Any) -> T:
    """Build an object from the fields of a valid one, without a second validation.

    Args:
        source: Object whose fields of the same names have the same types.
        kind: Class to build.
        values: Valid values of other fields, or instead of those of `source`.
    """
    shared = kind.model_fields.keys() & type(source).model_fields
    return kind.model_construct(**{**{name: getattr(source, name) for name in shared}, **values})


def one_of(names: tuple[str, ...], kind: str) -> Callable[[str], str]:
    """Return a check for one of `names` in any case. It returns the name as listed."""
    by_lower = {name.lower(): name for name in names}

    def check(value: str) -> str:
        if value.lower() not in by_lower:
            raise ValueError(f'unknown {kind} "{value}"; use one of: {", ".join(names)}')
        return by_lower[value.lower()]

    return check
