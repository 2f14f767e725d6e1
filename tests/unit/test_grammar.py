"""Prompt grammar: examples of the published grammar, and properties of any text."""

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
        ("BREAK" if fragment.is_break else fragment.text, fragment.weight)
        for fragment in parse_weights(prompt)
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
    r"\:(": [(":", 1.0)],
    r"\a": [("a", 1.0)],
    r"a\\": [("a\\", 1.0)],
    "\\\n": [("\n", 1.0)],
    "a BREAK b": [("a", 1.0), ("BREAK", 1.0), ("b", 1.0)],
    "(a BREAK b:1.3)": [("a", 1.3), ("BREAK", -1.3), ("b", 1.3)],
    "[a BREAK b]": [("a", 1 / 1.1), ("BREAK", -1 / 1.1), ("b", 1 / 1.1)],
    "(a BREAK b:1.0)": [("a", 1.0), ("BREAK", 1.0), ("b", 1.0)],
    "(BREAK:-1)": [("BREAK", 1.0)],
    "(a BREAK b:0)": [("aBREAKb", 0.0)],
    "(a BREAK b": [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)],
    "BREAKFAST": [("BREAKFAST", 1.0)],
}


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights_of_documented_examples(prompt: str):
    fragments, expected = _pairs(prompt), WEIGHTS[prompt]
    assert [text for text, _ in fragments] == [text for text, _ in expected]
    assert [weight for _, weight in fragments] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("prompt", ["(x:99999)", "(" * 200 + "x", "((x:9999):9999)", "(x:-99999)"])
def test_extreme_weights_are_refused_and_name_the_prompt(prompt: str):
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
def test_and_of_documented_examples(prompt: str):
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
    "[a:b:1e0]": [(1, "a"), (10, "b")],
    "[a:b:5e-1]": [(10, "b")],
    "[a:b:2.0E-1]": [(2, "a"), (10, "b")],
    "[a:b:1e999]": [(10, "a")],
    "[a:b:\u0663]": [(10, "[a:b:\u0663]")],
    # outside of the grammar: no schedule in the whole prompt
    "a | b [c:d:5]": [(10, "a | b [c:d:5]")],
    "[a red hat|16:9] [c:d:5]": [(10, "[a red hat|16:9] [c:d:5]")],
    "([a:b:5]|c)": [(10, "([a:b:5]|c)")],
    "[(a|b)] [c:d:5]": [(10, "[(a|b)] [c:d:5]")],
    "[a|(b:c:1.1)]": [(10, "[a|(b:c:1.1)]")],
    "[a|b [c|d]": [(10, "[a|b [c|d]")],
    "[a:b:5] \\": [(10, "[a:b:5] \\")],
    "[a:b:5] \\\n": [(10, "[a:b:5] \\\n")],
    r"a \| b [c:d:5]": [(5, r"a \| b c"), (10, r"a \| b d")],
    # a bracket that is text makes those around it text, but not the others
    "[x [a:b] y:z:5] [c:d:5]": [(5, "[x [a:b] y:z:5] c"), (10, "[x [a:b] y:z:5] d")],
    "[x (a] y):z:5]": [(10, "[x (a] y):z:5]")],
    "[(a:b:c):d:5]": [(10, "[(a:b:c):d:5]")],
    "[(a:1.2):d:5]": [(5, "(a:1.2)"), (10, "d")],
    "[x (a [c:d:5]": [(5, "[x (a c"), (10, "[x (a d")],
    "[a|[b|c]]": [(i, "a" if i % 2 else "c") for i in range(1, 11)],
    "[a]": [(10, "[a]")],
}


@pytest.mark.parametrize("prompt", SCHEDULES)
def test_schedules_of_documented_examples(prompt: str):
    schedule = schedule_prompt(prompt, 10)

    # neighbors of equal text may be one entry or several: only the text of each step counts
    def texts(schedule):
        return [next(text for last, text in schedule if step <= last) for step in range(11)]

    assert texts(schedule) == texts(SCHEDULES[prompt])
    assert schedule[-1][0] == 10


# any text, with many characters of the grammar
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
def test_weights_of_any_text_are_valid_or_refused(prompt: str):
    fragments = _parsed(prompt)
    assert fragments
    for fragment in fragments:
        assert math.isfinite(fragment.weight)
        assert abs(fragment.weight) <= MAX_WEIGHT
        assert fragment.text == "" or not fragment.is_break


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab ()[],"), max_size=40))
def test_brackets_without_numbers_give_positive_weights(prompt: str):
    fragments = parse_weights(prompt)
    assert all(fragment.weight > 0 for fragment in fragments)

    def letters(text):
        return [letter for letter in text if letter in "ab ,"]

    assert letters("".join(fragment.text for fragment in fragments)) == letters(prompt)


@settings(max_examples=200, deadline=None)
@given(
    st.text(
        st.characters(blacklist_characters="()[]\\:|", blacklist_categories=["Cs"]), max_size=40
    )
)
def test_text_without_syntax_is_unchanged(prompt: str):
    if "BREAK" not in prompt:
        assert parse_weights(prompt) == [Fragment(prompt)]
    assert schedule_prompt(prompt, 7) == [(7, prompt)]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_escaped_text_is_unescaped(text: str):
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    if "BREAK" not in text:
        assert "".join(fragment.text for fragment in parse_weights(escaped)) == text


@settings(max_examples=300, deadline=None)
@given(ANY, st.integers(1, 30))
def test_schedule_of_any_text_covers_every_step(prompt: str, steps: int):
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


# the same grammar with simple patterns of quadratic time
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
def test_breaks_equal_those_of_a_simple_pattern(text: str):
    parts = [Fragment(part) for part in _BREAK.split(text)]
    expected = [fragment for part in parts for fragment in (Fragment("", is_break=True), part)][1:]
    assert parse_weights(text.replace(":", ";")) == (
        [
            Fragment(fragment.text.replace(":", ";"), 1.0, fragment.is_break)
            for fragment in expected
            if fragment.is_break or fragment.text
        ]
        or [Fragment("")]
    )


@settings(max_examples=500, deadline=None)
@given(_SPACED.filter(lambda text: "AND" not in text))
def test_and_weights_and_numbers_equal_those_of_simple_patterns(text: str):
    match = _AND_WEIGHT.search(text)
    assert split_and(text) == [(text[: match.start()], float(match[1])) if match else (text, 1.0)]
    plain = text.replace(":", "")
    switches = schedule_prompt(f"[a:b:{plain}]", 4) != [(4, f"[a:b:{plain}]")]
    assert switches == bool(_NUMBER.fullmatch(plain))


LONG = 100_000


@pytest.mark.parametrize(
    "prompt",
    [
        " " * LONG + "x",
        "a:" + "1" * LONG + "x",
        "[a:b:" + "1" * LONG + "x]",
        "[a:b:1." + "1" * LONG + "x]",
        ": " * LONG,
        "a:" + " " * LONG + "x",
        "a:1" + " " * LONG + "x",
        "BREAK " * LONG,
        "(a:" + "1" * LONG,
        "(a:1" + " " * LONG,
    ],
    ids=lambda prompt: prompt[:8],
)
def test_parsing_time_is_linear_in_the_length(prompt: str):
    """Parse 100,000 characters.

    Quadratic time would be minutes, linear time is a fraction of a second.
    """
    start = time.process_time()
    parse_weights(prompt)
    split_and(prompt)
    schedule_prompt(prompt, 1)
    assert time.process_time() - start < 5


def test_very_deep_nesting_is_parsed():
    prompt = "[" * 5000 + "a:b:3" + "]" * 5000
    assert schedule_prompt(prompt, 10)[-1][0] == 10
    assert parse_weights("[" * 400 + "a")[0].weight == pytest.approx(1.1**-400)
