"""What is said of values that are not accepted: what was given and what is, in half a sentence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphalayer.errors import InvalidRequest
from alphalayer.request import parse_request
from alphalayer.wording import in_our_words


class Values(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: Annotated[int, Field(gt=0, le=10)] = 1
    share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    name: Annotated[str, Field(max_length=1000, pattern="^[a-z]*$")] = ""
    names: Annotated[list[str], Field(max_length=2)] = []
    kind: Literal["one", "two"] = "one"
    is_on: bool = False
    inner: dict[str, int] = {}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"count": 0}, "0 is too small; it has to be more than 0"),
        ({"count": 11}, "11 is too large; at most 10"),
        ({"count": "many"}, '"many" is not a whole number'),
        ({"count": 1.5}, "1.5 is not a whole number"),
        ({"count": None}, "null is not a whole number"),
        ({"count": {"a": "b"}}, '{"a": "b"} is not a whole number'),
        ({"share": -1}, "-1 is too small; at least 0"),
        ({"share": 1}, "1 is too large; it has to be less than 1"),
        ({"share": float("nan")}, "NaN is not a finite number"),
        ({"share": "half"}, '"half" is not a number'),
        ({"name": "x" * 1001}, "1,001 characters are too many; at most 1,000"),
        ({"name": 3}, "3 is not text"),
        ({"names": ["a", "b", "c"]}, "3 of them are too many; at most 2"),
        ({"names": "a"}, '"a" is not a list'),
        ({"kind": "three"}, "\"three\" is not one of 'one', 'two'"),
        ({"is_on": "perhaps"}, '"perhaps" is not true or false'),
        ({"inner": 1}, "1 is not an object"),
        ({"other": 1}, "there is no such field"),
        ({"count": "9" * 5000}, '"' + "9" * 58 + "… is not a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_faults_are_told_in_our_words(value: dict[str, Any], said: str):
    with pytest.raises(ValidationError) as raised:
        Values(**value)
    assert in_our_words(raised.value.errors()[0]) == said


def test_what_is_not_known_here_stays_as_it_is():
    with pytest.raises(ValidationError) as raised:
        Values(name="A")
    assert "should match pattern" in in_our_words(raised.value.errors()[0])


def test_a_request_says_its_limits():
    with pytest.raises(InvalidRequest, match=r"steps: 1000 is too large; at most 150\."):
        parse_request({"prompt": "x", "steps": 1000})
    with pytest.raises(InvalidRequest, match=r"prompt: it has to be given\."):
        parse_request({})
