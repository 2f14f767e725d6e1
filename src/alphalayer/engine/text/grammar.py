r"""Prompt grammar of AUTOMATIC1111: weights, BREAK, step schedules, alternation and AND.

(word)  (word:1.3)  [word]      attention times 1.1, 1.3, 1/1.1 (nesting multiplies)
\(  \)  \[  \]  \\              literal characters
BREAK                           the rest starts a new chunk of 75 tokens
[a:b:8]  [b:8]  [a::8]          a up to step 8, then b
[a:b:0.5]                       a up to that share of the steps, then b
[a|b|c]                         a, b, c in turn, step by step
a AND b:0.5                     two prompts, combined in one image with these weights

This module handles text only. It is independent of tokens and torch.

Source: AUTOMATIC1111, `modules/prompt_parser.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.prompts import AND
from alphalayer.core.request import Emphasis

ROUND_WEIGHT = 1.1
MAX_WEIGHT = 1e4
MAX_NESTING = 60
"""Brackets around more brackets than this are text, not schedules."""

_TOKEN = re.compile(r"\\[()\[\]\\]|[()\[\]\\]|:\s*([+-]?[.\d]+)\s*\)|:|[^\\()\[\]:]+")
_BREAK = re.compile(r"\bBREAK\b")
_BREAK_WEIGHT = -1.0
"""Weight that marks the word BREAK. Brackets multiply it, and then it is a word as any other."""
# There is only one way to match a run of digits or spaces. So the time is linear in the length of
# the text, not quadratic.
_AND_WEIGHT = re.compile(r":\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")
_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*")
_PIECE = re.compile(r"\\.|[][():|]|[^][():|\\]+|\\")


@dataclass(frozen=True)
class Fragment:
    """Text of one attention weight. With `is_break` it is empty and closes the chunk."""

    text: str
    weight: float = 1.0
    is_break: bool = False


def parse_weights(prompt: str, emphasis: Emphasis = "Original") -> list[Fragment]:
    """Split a prompt into fragments of equal weight.

    Unclosed brackets extend to the end. Closing brackets without an opening bracket are text.
    BREAK inside brackets is the word, with a negative weight.

    Args:
        prompt: Text without schedules and AND.
        emphasis: "None" leaves brackets and BREAK in the text, "Ignore" drops the weights.

    Raises:
        InvalidRequest: A weight is above 10,000 or below -10,000.
    """
    if emphasis == "None":
        return [Fragment(prompt)]
    fragments: list[Fragment] = []
    for text, weight in _merge(*_weigh(prompt)):
        if text == "BREAK" and weight == _BREAK_WEIGHT:
            fragments.append(Fragment("", is_break=True))
        elif text and (not math.isfinite(weight) or abs(weight) > MAX_WEIGHT):
            raise InvalidRequest(
                f'the attention weight of "{text[:40]}" is {weight:.3g}; '
                f"the limit is {MAX_WEIGHT:.0f}.",
                hint="Remove some brackets.",
                field="prompt",
            )
        elif text:
            fragments.append(Fragment(text, 1.0 if emphasis == "Ignore" else weight))
    return fragments or [Fragment("")]


def _weigh(prompt: str) -> tuple[list[str], list[float]]:
    """Return the pieces of a prompt's text and the weight of each.

    A bracket multiplies the weights of the pieces inside it when it closes. So the inner factors
    come first, as in the source: the last bit of a weight decides which pieces are merged.
    """
    texts: list[str] = []
    weights: list[float] = []
    factors: list[tuple[int, int, float]] = []
    open_: dict[str, list[int]] = {"(": [], "[": []}
    for token in _TOKEN.finditer(prompt):
        text, number = token[0], _finite(token[1])
        opening = "[" if text == "]" else "("
        if text in open_:
            open_[text].append(len(texts))
        elif text in (")", "]") and open_[opening]:
            factors.append((open_[opening].pop(), len(texts), _FACTORS[opening]))
        elif number is not None and open_["("]:
            factors.append((open_["("].pop(), len(texts), number))
        elif text.startswith("\\"):
            texts.append(text[1:])
            weights.append(1.0)
        else:
            _append(text, texts, weights)
    for opening, starts in open_.items():
        factors += [(start, len(texts), _FACTORS[opening]) for start in starts]
    product = np.array(weights)
    with np.errstate(over="ignore", invalid="ignore"):
        for start, end, factor in factors:
            product[start:end] *= factor
    return texts, product.tolist()


_FACTORS = {"(": ROUND_WEIGHT, "[": 1 / ROUND_WEIGHT}


def _append(text: str, texts: list[str], weights: list[float]) -> None:
    """Append text, split at BREAK. Spaces around BREAK are removed."""
    parts = _BREAK.split(text)
    for i, part in enumerate(parts):
        if i:
            texts.append("BREAK")
            weights.append(_BREAK_WEIGHT)
            part = part.lstrip()
        texts.append(part.rstrip() if i < len(parts) - 1 else part)
        weights.append(1.0)


def _merge(texts: list[str], weights: list[float]) -> list[tuple[str, float]]:
    """Join neighbours of equal weight."""
    merged: list[tuple[list[str], float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if merged and merged[-1][1] == weight:
            merged[-1][0].append(text)
        else:
            merged.append(([text], weight))
    return [("".join(parts), weight) for parts, weight in merged]


def _finite(number: str | None) -> float | None:
    try:
        value = float(number) if number else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def split_and(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt at AND.

    Returns:
        The text and weight of each part. The weight is the number after the last colon, else 1.
    """
    parts: list[tuple[str, float]] = []
    for part in AND.split(prompt):
        match = _AND_WEIGHT.search(part)
        weight = _finite(match[1]) if match else None
        parts.append(
            (part[: match.start()], weight) if match and weight is not None else (part, 1.0)
        )
    return parts


@dataclass(frozen=True)
class _Switch:
    """Change of text: `before` up to and including step `at`, then `after`."""

    before: list[_Node]
    after: list[_Node]
    at: int


@dataclass(frozen=True)
class _Alternation:
    """Options that take turns, each for one step."""

    options: list[list[_Node]]


_Node = str | _Switch | _Alternation


def schedule_prompt(prompt: str, steps: int, before: int = 0) -> list[tuple[int, str]]:
    """List the texts of a prompt over the steps.

    A prompt with a "|" outside of `[a|b]`, or with a backslash before a line break or the end, is
    one text at all steps. So is one with `[a|b]` around a lone bracket or colon.

    Args:
        prompt: Prompt without AND.
        steps: Steps, or calls of the network for samplers with several calls a step.
        before: Those of the first pass, for a second one. Numbers of steps then count on, and
            shares from 1 to 2 are those of the second pass.

    Returns:
        (last step, text) in order; neighbours may have equal texts. A step, counted from 0, has the
        text of the first entry whose last step is not below it.
    """
    reader = _Reader(steps, before)
    try:
        nodes = reader.read(prompt)
    except _NoSchedules:
        return [(steps, prompt)]
    return [(end, _text_at(nodes, end)) for end in sorted({*reader.boundaries, steps})]


def _text_at(nodes: list[_Node], step: int) -> str:
    parts: list[str] = []
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
        elif isinstance(node, _Switch):
            parts.append(_text_at(node.before if step <= node.at else node.after, step))
        else:
            parts.append(_text_at(node.options[(step - 1) % len(node.options)], step))
    return "".join(parts)


class _NoSchedules(Exception):
    """The prompt is not of the grammar of schedules."""


@dataclass
class _Bracket:
    """An open bracket: what was read inside it, and the colons and bars between its parts."""

    opening: str
    parts: list[list[_Node]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list[str])

    def as_text(self) -> list[_Node]:
        """Return the content as text around the schedules inside it."""
        if "|" in self.separators:
            raise _NoSchedules
        nodes: list[_Node] = [self.opening, *self.parts[0]]
        for separator, part in zip(self.separators, self.parts[1:], strict=True):
            nodes += [separator, *part]
        return nodes


@dataclass
class _Reader:
    """Parser of a prompt. Collects the steps at which its text changes.

    A bracket that is not closed, or has a content that no rule allows, is text. It may not be
    inside another bracket, so all brackets around it are text, too.
    """

    steps: int
    before: int = 0
    boundaries: set[int] = field(default_factory=set[int])
    open: list[_Bracket] = field(default_factory=lambda: [_Bracket("")])

    def read(self, prompt: str) -> list[_Node]:
        """Return the nodes of a prompt. Raises `_NoSchedules`."""
        for piece in _PIECE.findall(prompt):
            if piece == "\\":
                raise _NoSchedules
            if piece in "([":
                if len(self.open) > MAX_NESTING:
                    self._open_as_text()
                self.open.append(_Bracket(piece))
            elif piece in ")]":
                self._close(piece)
            elif piece in ":|":
                self.open[-1].separators.append(piece)
                self.open[-1].parts.append([])
            else:
                self.open[-1].parts[-1].append(piece)
        self._open_as_text()
        return self.open[0].as_text()

    def _close(self, piece: str) -> None:
        """Close the innermost bracket, if the piece fits it and its content is of a rule."""
        bracket = self.open[-1]
        nodes = None
        if bracket.opening + piece in ("()", "[]"):
            nodes = self._round(bracket) if piece == ")" else self._square(bracket)
        if nodes is None:
            self._open_as_text()
            nodes = [piece]
        else:
            self.open.pop()
        self.open[-1].parts[-1] += nodes

    def _open_as_text(self) -> None:
        """Turn all open brackets into text."""
        for bracket in self.open[1:]:
            self.open[0].parts[-1] += bracket.as_text()
        del self.open[1:]

    def _round(self, bracket: _Bracket) -> list[_Node] | None:
        if bracket.separators in ([], [":"]):
            return [*bracket.as_text(), ")"]
        return None

    def _square(self, bracket: _Bracket) -> list[_Node] | None:
        """Return the node of a bracket, or None if no rule allows its content."""
        parts, separators = bracket.parts, bracket.separators
        if not separators:
            return [*bracket.as_text(), "]"]
        if set(separators) == {"|"}:
            self.boundaries.update(range(1, self.steps + 1))
            return [_Alternation(parts)]
        when = parts[-1][0] if len(parts[-1]) == 1 else None
        if separators in ([":"], [":", ":"]) and isinstance(when, str) and _NUMBER.fullmatch(when):
            return [_Switch(parts[0] if len(parts) == 3 else [], parts[-2], self._boundary(when))]
        return None

    def _boundary(self, when: str) -> int:
        number = float(when.strip())
        share = number - 1 if self.before else number
        value = share * self.steps if "." in when else number - self.before
        boundary = int(max(min(value, self.steps), -1))
        if boundary >= 1:
            self.boundaries.add(boundary)
        return boundary
