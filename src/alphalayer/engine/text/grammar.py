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

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import AND

ROUND_WEIGHT = 1.1
MAX_WEIGHT = 1e4
MAX_NESTING = 60
"""Brackets nested deeper than this are text, not schedules."""

_TOKEN = re.compile(r"\\[()\[\]\\]|[()\[\]\\]|:\s*([+-]?[.\d]+)\s*\)|:|[^\\()\[\]:]+")
_BREAK = re.compile(r"\bBREAK\b")
# There is only one way to match a run of digits or spaces. So the time is linear in the length of
# the text, not quadratic.
_AND_WEIGHT = re.compile(r":\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")
_NUMBER = re.compile(r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)\s*")
_PIECE = re.compile(r"\\.|[][():|]|[^][():|\\]+|\\", re.DOTALL)


@dataclass(frozen=True)
class Fragment:
    """Text of one attention weight. With `is_break` it is empty and closes the chunk."""

    text: str
    weight: float = 1.0
    is_break: bool = False


def parse_weights(prompt: str) -> list[Fragment]:
    """Split a prompt into fragments of equal weight.

    Unclosed brackets extend to the end. Closing brackets without an opening bracket are text.

    Raises:
        InvalidRequest: A weight is above 10,000 or below -10,000.
    """
    tokens = list(_TOKEN.finditer(prompt))
    factors, text_of = _match_brackets(tokens)
    weights = {"(": [1.0], "[": [1.0]}
    fragments: list[Fragment] = []
    for i, token in enumerate(tokens):
        if i in text_of:
            weight = weights["("][-1] * weights["["][-1]
            if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
                raise InvalidRequest(
                    f'the attention weight of "{text_of[i][:40]}" is {weight:.3g}; '
                    f"the limit is {MAX_WEIGHT:.0f}.",
                    hint="Remove some brackets.",
                    field="prompt",
                )
            _append(fragments, text_of[i], weight)
        elif i in factors:
            weights[token[0]].append(weights[token[0]][-1] * factors[i])
        else:
            weights["[" if token[0] == "]" else "("].pop()
    return fragments or [Fragment("")]


def _match_brackets(tokens: list[re.Match[str]]) -> tuple[dict[int, float], dict[int, str]]:
    """Classify tokens as opening brackets, text or closing brackets.

    Returns:
        By token number: the factor of each opening bracket, and the text of each text token. All
        other tokens close a bracket.
    """
    factors: dict[int, float] = {}
    text_of: dict[int, str] = {}
    open_: dict[str, list[int]] = {"(": [], "[": []}
    for i, token in enumerate(tokens):
        text, number = token[0], _finite(token[1])
        if text in open_:
            open_[text].append(i)
            factors[i] = ROUND_WEIGHT if text == "(" else 1 / ROUND_WEIGHT
        elif number is not None and open_["("]:
            factors[open_["("].pop()] = number
        elif text in (")", "]") and open_["(" if text == ")" else "["]:
            open_["(" if text == ")" else "["].pop()
        else:
            text_of[i] = text[1:] if text.startswith("\\") and len(text) == 2 else text
    return factors, text_of


def _finite(number: str | None) -> float | None:
    try:
        value = float(number) if number else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _append(fragments: list[Fragment], text: str, weight: float) -> None:
    """Append text to the fragments, split at BREAK.

    Text joins a last fragment of equal weight. Spaces around BREAK are removed.
    """
    parts = _BREAK.split(text)
    for i, part in enumerate(parts):
        if i:
            fragments.append(Fragment("", is_break=True))
            part = part.lstrip()
        if i < len(parts) - 1:
            part = part.rstrip()
        last = fragments[-1] if fragments else None
        if part and last and not last.is_break and last.weight == weight:
            fragments[-1] = Fragment(last.text + part, weight)
        elif part:
            fragments.append(Fragment(part, weight))


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


def schedule_prompt(prompt: str, steps: int) -> list[tuple[int, str]]:
    """List the texts of a prompt over the steps.

    Returns:
        (last step, text) in order. A step, counted from 0, has the text of the first entry whose
        last step is not below it.
    """
    reader = _Reader(_PIECE.findall(prompt), steps)
    nodes = reader.nodes("")
    ends = sorted({*reader.boundaries, steps})
    schedule: list[tuple[int, str]] = []
    for end in ends:
        text = _text_at(nodes, end)
        if schedule and schedule[-1][1] == text:
            schedule.pop()
        schedule.append((end, text))
    return schedule


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


@dataclass
class _Reader:
    """Parser of the pieces of a prompt. Collects the steps at which its text changes."""

    pieces: list[str]
    steps: int
    boundaries: set[int] = field(default_factory=set[int])
    at: int = 0
    depth: int = 0

    def nodes(self, stops: str) -> list[_Node]:
        """Read nodes up to one of the characters of `stops`, which is not consumed."""
        nodes: list[_Node] = []
        while self.at < len(self.pieces) and self.pieces[self.at] not in tuple(stops):
            piece = self.pieces[self.at]
            self.at += 1
            if piece in "([" and self.depth < MAX_NESTING:
                self.depth += 1
                nodes += self._round() if piece == "(" else self._square()
                self.depth -= 1
            else:
                nodes.append(piece)
        return nodes

    def _round(self) -> list[_Node]:
        inside = self.nodes(")")
        return ["(", *inside, *self._close()]

    def _square(self) -> list[_Node]:
        parts, separators = [self.nodes("]:|")], list[str]()
        while self.at < len(self.pieces) and self.pieces[self.at] in ":|":
            separators.append(self.pieces[self.at])
            self.at += 1
            parts.append(self.nodes("]:|"))
        closing = self._close()
        if closing and separators and set(separators) == {"|"}:
            self.boundaries.update(range(1, self.steps + 1))
            return [_Alternation(parts)]
        when = parts[-1][0] if len(parts[-1]) == 1 else None
        if (
            closing
            and separators in ([":"], [":", ":"])
            and isinstance(when, str)
            and _NUMBER.fullmatch(when)
        ):
            return [_Switch(parts[0] if len(parts) == 3 else [], parts[-2], self._boundary(when))]
        literal: list[_Node] = ["[", *parts[0]]
        for separator, part in zip(separators, parts[1:], strict=True):
            literal += [separator, *part]
        return [*literal, *closing]

    def _close(self) -> list[_Node]:
        """Return and consume the closing bracket, if there is one."""
        closing: list[_Node] = [*self.pieces[self.at : self.at + 1]]
        self.at += 1
        return closing

    def _boundary(self, when: str) -> int:
        number = float(when.strip())
        value = number * self.steps if "." in when else number
        boundary = int(max(min(value, self.steps), -1))
        if boundary >= 1:
            self.boundaries.add(boundary)
        return boundary
