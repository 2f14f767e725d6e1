"""What pydantic found wrong with a value, in this program's words: what was given, and what is accepted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
}
_LIMITS = {
    "greater_than": ("gt", "is too small; it has to be more than {}"),
    "greater_than_equal": ("ge", "is too small; at least {}"),
    "less_than": ("lt", "is too large; it has to be less than {}"),
    "less_than_equal": ("le", "is too large; at most {}"),
}
LONGEST_SHOWN = 60


def in_our_words(fault: Mapping[str, Any]) -> str:
    """One of pydantic's `errors()` as half a sentence, without a full stop; what is not known here stays as pydantic says it."""
    kind, context = str(fault["type"]), fault.get("ctx", {})
    given = _shown(fault.get("input"))
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"{given} {words.format(_shown(context[name]))}"
    if kind == "string_too_long":
        return f"{len(fault['input']):,} characters are too many; at most {context['max_length']:,}"
    if kind == "too_long":
        return f"{context['actual_length']} of them are too many; at most {context['max_length']}"
    if kind in ("literal_error", "enum"):
        return f"{given} is not one of {context['expected'].replace(' or ', ', ')}"
    if kind == "finite_number":
        return f"{given} is not a finite number"
    base = kind.removesuffix("_size").removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if base in _KINDS and base != kind:
        return f"{given} is not {_KINDS[base]}"
    known = {"missing": "it has to be given", "extra_forbidden": "there is no such field"}
    return known.get(kind, str(fault["msg"]).removeprefix("Value error, "))


def _shown(value: Any) -> str:
    """A value as it may stand in a message."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 1] + "…"
