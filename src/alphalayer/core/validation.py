"""What pydantic finds wrong in a value, in the service's words: `got 4096; at most 2048`."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
"""What is accepted, by pydantic's type of error."""
_WHOLE = {
    "missing": "it must be given",
    "missing_argument": "it must be given",
    "extra_forbidden": "there is no such field",
    "unexpected_keyword_argument": "there is no such field",
    "too_long": "got {actual_length} entries; at most {max_length}",
    "string_too_short": "it is empty",
}
"""The whole sentence, where what was sent does not help."""
_FORMS = {COLOUR: 'a colour such as "#ffffff"'}


def describe_validation_error(fault: Mapping[str, Any]) -> str:
    """One of `ValidationError.errors()` as a sentence without its full stop and without the name of the field."""
    kind, value = fault["type"], fault.get("input")
    # a limit of 4.0 is shown as 4
    about = {
        name: f"{each:g}" if isinstance(each, float) else each
        for name, each in fault.get("ctx", {}).items()
    }
    if kind in _WHOLE:
        return _WHOLE[kind].format(**about)
    if kind == "string_too_long":
        return f"got {len(str(value))} characters; at most {about['max_length']}"
    if kind == "string_pattern_mismatch":
        form = _FORMS.get(about["pattern"], f"a text of the form {about['pattern']}")
        return f"got {shown(value)}; {form}"
    if kind in _ACCEPTED:
        return f"got {shown(value)}; {_ACCEPTED[kind].format(**about)}"
    return str(fault["msg"]).removeprefix("Value error, ")


def check_unicode(value: Any) -> None:
    """Raise `ValueError` where a text of a JSON value, however deep, has halves of characters, which no answer can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text in it is not Unicode") from None


def shown(value: Any) -> str:
    """A value as it was sent, as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="replace").decode()
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
