"""Descriptions of pydantic's validation errors, such as `got 4096; at most 2048`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

SHOWN_CHARACTERS = 60
DESCRIBED = "The fields are described at /docs."
COLOUR = r"^#[0-9a-fA-F]{6}$"
_ACCEPTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is finite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "string_unicode": "a text in Unicode",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "enum": "{expected}",
}
"""Description of accepted values, by pydantic's type of error."""
_FULL = {
    "missing": "it must be given",
    "missing_argument": "it must be given",
    "extra_forbidden": "there is no such field",
    "unexpected_keyword_argument": "there is no such field",
    "too_long": "got {actual_length} entries; at most {max_length}",
    "too_short": "got {actual_length} entries; at least {min_length}",
    "string_too_short": "it is empty",
}
"""Full description of errors where the received value does not help."""
_FORMS = {COLOUR: 'a colour such as "#ffffff"'}


def describe_validation_error(error: Mapping[str, Any]) -> str:
    """Describe an entry of `ValidationError.errors()`.

    Returns:
        A sentence without the name of the field and without its full stop.
    """
    kind, value = error["type"], error.get("input")
    # a limit of 4.0 is shown as 4
    context = {
        name: f"{bound:g}" if isinstance(bound, float) else bound
        for name, bound in error.get("ctx", {}).items()
    }
    if kind in _FULL:
        return _FULL[kind].format(**context)
    if kind == "string_too_long":
        return f"got {len(str(value))} characters; at most {context['max_length']}"
    if kind == "string_pattern_mismatch":
        form = _FORMS.get(context["pattern"], f"a text of the form {context['pattern']}")
        return f"got {shown(value)}; {form}"
    if kind in _ACCEPTED:
        return f"got {shown(value)}; {_ACCEPTED[kind].format(**context)}"
    return str(error["msg"]).removeprefix("Value error, ")


def check_unicode(value: Any) -> None:
    """Check that every text of a JSON value is Unicode, at any depth.

    Raises:
        ValueError: a text holds half of a surrogate pair, which no response can hold.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text in it is not Unicode") from None


def check_printable(text: str) -> str:
    """Return a text that every database can hold. Raises `ValueError`."""
    check_unicode(text)
    if any(character < " " or character == "\x7f" for character in text):
        raise ValueError("it has control characters; use printable ones")
    return text


def shown(value: Any) -> str:
    """Return a received value as JSON, cut after `SHOWN_CHARACTERS`."""
    if isinstance(value, str | bytes):
        value = value[: SHOWN_CHARACTERS + 1]
    # encoded part by part, because a list may be much longer than what is shown of it
    parts = json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value)
    text = "".join(islice(parts, SHOWN_CHARACTERS + 1))
    return cut(text.encode(errors="replace").decode())


def cut(text: str) -> str:
    """Return a text, cut after `SHOWN_CHARACTERS`."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
