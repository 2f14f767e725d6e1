"""The prompt language: worked examples of the published grammar, and what must hold for any text."""

from __future__ import annotations

import math
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.text.grammar import (
    MAX_WEIGHT,
    Fragment,
    parse_weights,
    schedule_prompt,
    split_and,
)


def _pairs(prompt: str) -> list[tuple[str, float]]:
    return [
        ("BREAK" if each.is_break else each.text, each.weight) for each in parse_weights(prompt)
    ]


# from the documentation of the grammar's own parser, and the rules written there
WEIGHTS = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    "(x:1.2)": [("x", 1.2)],
    "((x:1.2):1.5)": [("x", 1.8)],
    "[x]": [("x", 1 / 1.1)],
    "[[x]]": [("x", 1 / 1.21)],
    "[x:1.2]": [("x:1.2", 1 / 1.1)],
    "(x: 1.2 )": [("x", 1.2)],
    "(x:-0.5)": [("x", -0.5)],
    "(x:+.5)": [("x", 0.5)],
    "(x:0)": [("x", 0.0)],
    "(x:1.2.3)": [("x:1.2.3)", 1.1)],
    "a:b": [("a:b", 1.0)],
    "a) b]": [("a) b]", 1.0)],
    "x:1.2)": [("x:1.2)", 1.0)],
    "": [("", 1.0)],
    "()": [("", 1.0)],
    r"a \\ b": [("a \\ b", 1.0)],
    r"\:(": [("\\:", 1.0)],
    "a BREAK b": [("a", 1.0), ("BREAK", 1.0), ("b", 1.0)],
    "(a BREAK b:1.3)": [("a", 1.3), ("BREAK", 1.0), ("b", 1.3)],
    "BREAKFAST": [("BREAKFAST", 1.0)],
}


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights(prompt: str):
    found, expected = _pairs(prompt), WEIGHTS[prompt]
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("prompt", ["(x:99999)", "(" * 200 + "x", "((x:9999):9999)", "(x:-99999)"])
def test_absurd_weights_are_refused_and_name_the_prompt(prompt: str):
    with pytest.raises(InvalidRequest) as error:
        parse_weights(prompt)
    assert error.value.field == "prompt"


def test_fragments_are_merged_only_at_equal_weight():
    assert parse_weights("a(b:1.0)c") == [Fragment("abc")]


AND = {
    "a cat": [("a cat", 1.0)],
    "a cat AND a dog": [("a cat ", 1.0), (" a dog", 1.0)],
    "a cat :1.2 AND a dog AND a pig :-2.2": [("a cat ", 1.2), (" a dog ", 1.0), (" a pig ", -2.2)],
    "a cat:.5": [("a cat", 0.5)],
    "SAND AND x": [("SAND ", 1.0), (" x", 1.0)],
    "(a:1.2)": [("(a:1.2)", 1.0)],
}


@pytest.mark.parametrize("prompt", AND)
def test_and(prompt: str):
    assert split_and(prompt) == AND[prompt]


# the examples that the grammar's own parser documents, for 10 steps, and more
SCHEDULES = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [b|c:.5] d": [(10, "a [b|c:.5] d")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a::4]": [(4, "a"), (10, "")],
    "[a:b:0.5] [c:d:5]": [(5, "a c"), (10, "b d")],
    "[a|(b:1.1)]": [(i, "a" if i % 2 else "(b:1.1)") for i in range(1, 11)],
    "[a|b|c]": [(i, "abc"[(i - 1) % 3]) for i in range(1, 11)],
    "[a|]": [(i, "a" if i % 2 else "") for i in range(1, 11)],
    "[fe|]male": [(i, "female" if i % 2 else "male") for i in range(1, 11)],
    "[a:b:0]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[a:b:0.0]": [(10, "b")],
    "[a:b:1.0]": [(10, "a")],
    r"\[a:b:5\]": [(10, r"\[a:b:5\]")],
    "[a:b]": [(10, "[a:b]")],
    "[a]": [(10, "[a]")],
}


@pytest.mark.parametrize("prompt", SCHEDULES)
def test_schedules(prompt: str):
    found = schedule_prompt(prompt, 10)

    # neighbours of equal text may be one entry or several: what counts is what is said at each step
    def said(schedule):
        return [next(text for last, text in schedule if step <= last) for step in range(11)]

    assert said(found) == said(SCHEDULES[prompt])
    assert found[-1][0] == 10


# any text, with many of the characters that mean something
_MARKS = [*r"()[]:|\,. 0123456789-+ab", "BREAK", "AND", "é", "\n", ":1.2)", ":0.5]"]
MARKED = st.lists(st.sampled_from(_MARKS), max_size=60).map("".join)
ANY = st.one_of(st.text(max_size=60), MARKED)


def _parsed(prompt: str) -> list[Fragment]:
    try:
        return parse_weights(prompt)
    except InvalidRequest:
        return [Fragment("")]


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_any_text_is_read_or_refused(prompt: str):
    fragments = _parsed(prompt)
    assert fragments
    for each in fragments:
        assert math.isfinite(each.weight)
        assert abs(each.weight) <= MAX_WEIGHT
        assert each.text == "" or not each.is_break


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab ()[],"), max_size=40))
def test_brackets_without_numbers_give_positive_weights_and_keep_every_letter(prompt: str):
    fragments = parse_weights(prompt)
    assert all(each.weight > 0 for each in fragments)

    def letters(text):
        return [each for each in text if each in "ab ,"]

    assert letters("".join(each.text for each in fragments)) == letters(prompt)


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        st.characters(blacklist_characters="()[]\\:|", blacklist_categories=["Cs"]), max_size=40
    )
)
def test_text_without_marks_is_itself(prompt: str):
    if "BREAK" not in prompt:
        assert parse_weights(prompt) == [Fragment(prompt)]
    assert schedule_prompt(prompt, 7) == [(7, prompt)]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_escaped_text_is_itself(text: str):
    escaped = "".join(f"\\{each}" if each in "()[]\\" else each for each in text)
    if "BREAK" not in text:
        assert "".join(each.text for each in parse_weights(escaped)) == text


@settings(max_examples=300, deadline=None)
@given(ANY, st.integers(1, 30))
def test_any_text_has_a_schedule_that_covers_every_step(prompt: str, steps: int):
    schedule = schedule_prompt(prompt, steps)
    ends = [end for end, _ in schedule]
    assert ends == sorted(set(ends))
    assert ends[-1] == steps
    assert ends[0] >= 1


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_and_keeps_all_text_and_gives_finite_weights(prompt: str):
    parts = split_and(prompt)
    assert len(parts) >= 1
    assert all(math.isfinite(weight) and text in prompt for text, weight in parts)


# the same grammar with patterns that take the square of a text's length
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_AND_WEIGHT = re.compile(r":\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$")
_NUMBER = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*")
_SPACED = st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "\u3000",
            "\x1c",
            "BREAK",
            "BREAKS",
            "a",
            ",",
            ":",
            "-",
            "1",
            "12",
            ".",
            "AND",
        ]
    )
).map("".join)


@settings(max_examples=500, deadline=None)
@given(_SPACED)
@example("BREAK")
@example(" BREAK  BREAK ")
@example("a\u2003BREAK\u2003b")
def test_breaks_are_where_a_plain_pattern_finds_them(text: str):
    parts = [Fragment(part) for part in _BREAK.split(text)]
    expected = [each for part in parts for each in (Fragment("", is_break=True), part)][1:]
    assert parse_weights(text.replace(":", ";")) == (
        [
            Fragment(each.text.replace(":", ";"), 1.0, each.is_break)
            for each in expected
            if each.is_break or each.text
        ]
        or [Fragment("")]
    )


@settings(max_examples=500, deadline=None)
@given(_SPACED.filter(lambda text: "AND" not in text))
def test_weights_of_and_and_numbers_are_those_that_plain_patterns_find(text: str):
    found = _AND_WEIGHT.search(text)
    assert split_and(text) == [(text[: found.start()], float(found[1])) if found else (text, 1.0)]
    plain = text.replace(":", "")
    switches = schedule_prompt(f"[a:b:{plain}]", 4) != [(4, f"[a:b:{plain}]")]
    assert switches == bool(_NUMBER.fullmatch(plain))


LONG = 100_000


@pytest.mark.parametrize(
    "prompt",
    [" " * LONG + "x", "a:" + "1" * LONG + "x", "[a:b:" + "1" * LONG + "x]", "[a:b:1." + "1" * LONG + "x]", ": " * LONG,
     "a:" + " " * LONG + "x", "a:1" + " " * LONG + "x", "BREAK " * LONG, "(a:" + "1" * LONG, "(a:1" + " " * LONG],
    ids=lambda prompt: prompt[:8],
)  # fmt: skip
def test_the_time_to_read_a_prompt_grows_with_its_length(prompt: str):
    """At a hundred thousand characters what takes the square of them takes minutes, the rest a fraction of a second."""
    start = time.process_time()
    parse_weights(prompt)
    split_and(prompt)
    schedule_prompt(prompt, 1)
    assert time.process_time() - start < 5


def test_very_deep_nesting_is_read():
    prompt = "[" * 5000 + "a:b:3" + "]" * 5000
    assert schedule_prompt(prompt, 10)[-1][0] == 10
    assert parse_weights("[" * 400 + "a")[0].weight == pytest.approx(1.1**-400)
