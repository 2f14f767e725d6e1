"""Tokens into chunks: a text encoder reads 75 at a time, between a start and an end token. Knows no encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.text.grammar import Fragment

CHUNK_LENGTH = 75
COMMA_BACKTRACK = 20


@dataclass
class Chunk:
    """At most 75 token ids, their weights, and where learned vectors (by name) take the place of tokens."""

    tokens: list[int] = field(default_factory=list[int])
    weights: list[float] = field(default_factory=list[float])
    embeddings: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])


@dataclass(frozen=True)
class LearnedWord:
    """A textual-inversion embedding as prompts see it: the token ids of its name, and how many vectors it has."""

    name: str
    tokens: tuple[int, ...]
    vectors: int


def chunk_fragments(
    fragments: Sequence[Fragment],
    tokenize: Callable[[str], list[int]],
    comma: int,
    words: Sequence[LearnedWord] = (),
) -> list[Chunk]:
    """Lay the tokens of a prompt into chunks, at least one.

    When a chunk is full and its last comma stands at most 20 tokens back, what follows the comma moves on with the next chunk. A
    learned word is never cut in two.

    Raises:
        InvalidRequest: a learned word has more vectors than a chunk holds.
    """
    layer = _Layer(comma)
    by_first: dict[int, list[LearnedWord]] = {}
    for word in sorted(words, key=lambda word: -len(word.tokens)):
        by_first.setdefault(word.tokens[0], []).append(word)
    for fragment in fragments:
        if fragment.is_break:
            layer.close()
            continue
        tokens, i = tokenize(fragment.text), 0
        while i < len(tokens):
            here = tuple(tokens[i : i + 100])
            word = next(
                (w for w in by_first.get(tokens[i], ()) if here[: len(w.tokens)] == w.tokens), None
            )
            if word:
                layer.add_word(word, fragment.weight)
            else:
                layer.add(tokens[i], fragment.weight)
            i += len(word.tokens) if word else 1
    return layer.finished()


class _Layer:
    """The chunk being filled and those that are full."""

    def __init__(self, comma: int):
        self._comma = comma
        self._full: list[Chunk] = []
        self._chunk = Chunk()
        self._last_comma = -1

    def add(self, token: int, weight: float) -> None:
        if token == self._comma:
            self._last_comma = len(self._chunk.tokens)
        elif (
            self._is_full()
            and self._last_comma >= 0
            and CHUNK_LENGTH - self._last_comma <= COMMA_BACKTRACK
        ):
            self._carry_over(self._last_comma + 1)
        if self._is_full():
            self.close()
        self._chunk.tokens.append(token)
        self._chunk.weights.append(weight)

    def add_word(self, word: LearnedWord, weight: float) -> None:
        if word.vectors > CHUNK_LENGTH:
            raise InvalidRequest(
                f'the embedding "{word.name}" has {word.vectors} vectors; a text encoder reads {CHUNK_LENGTH} at a time.',
                hint="Leave it out.",
                field="prompt",
            )
        if len(self._chunk.tokens) + word.vectors > CHUNK_LENGTH:
            self.close()
        self._chunk.embeddings.append((len(self._chunk.tokens), word.name))
        self._chunk.tokens += [0] * word.vectors
        self._chunk.weights += [weight] * word.vectors

    def close(self) -> None:
        self._full.append(self._chunk)
        self._chunk = Chunk()
        self._last_comma = -1

    def finished(self) -> list[Chunk]:
        if self._chunk.tokens or not self._full:
            self.close()
        return self._full

    def _is_full(self) -> bool:
        return len(self._chunk.tokens) == CHUNK_LENGTH

    def _carry_over(self, start: int) -> None:
        """Close the chunk at `start` and begin the next one with what stood behind it."""
        old = self._chunk
        self._chunk = Chunk(
            old.tokens[:start],
            old.weights[:start],
            [each for each in old.embeddings if each[0] < start],
        )
        self.close()
        moved = [(at - start, name) for at, name in old.embeddings if at >= start]
        self._chunk = Chunk(old.tokens[start:], old.weights[start:], moved)
