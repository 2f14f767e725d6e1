"""Chunks of tokens: a text encoder reads 75 tokens at a time, between a start and an end token.

This module is independent of encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.text.grammar import Fragment

CHUNK_LENGTH = 75
COMMA_BACKTRACK = 20


@dataclass
class Chunk:
    """Tokens of one call of a text encoder.

    Attributes:
        tokens: At most 75 token ids. Positions of learned vectors hold 0.
        weights: Attention weight of each token.
        embeddings: Position of the first vector and name of each learned embedding.
    """

    tokens: list[int] = field(default_factory=list[int])
    weights: list[float] = field(default_factory=list[float])
    embeddings: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])


@dataclass(frozen=True)
class LearnedWord:
    """Textual-inversion embedding in a prompt.

    Attributes:
        name: Word that represents the embedding in prompts.
        tokens: Token ids of the name.
        vectors: Number of learned vectors.
    """

    name: str
    tokens: tuple[int, ...]
    vectors: int


def chunk_fragments(
    fragments: Sequence[Fragment],
    tokenize: Callable[[str], list[int]],
    comma: int,
    words: Sequence[LearnedWord] = (),
) -> list[Chunk]:
    """Divide the tokens of a prompt into chunks.

    If a chunk is full and its last comma is at most 20 tokens back, the text after the comma moves
    to the next chunk. A learned word is never split.

    Args:
        fragments: Text of the prompt, with weights.
        tokenize: Returns the token ids of a text.
        comma: Token id of a comma, -1 if there is none.
        words: Learned words that replace their names.

    Returns:
        At least one chunk.

    Raises:
        InvalidRequest: A learned word has more vectors than a chunk holds.

    Source: AUTOMATIC1111, `modules/sd_hijack_clip.py`.
    """
    builder = _ChunkBuilder(comma)
    by_first: dict[int, list[LearnedWord]] = {}
    for word in sorted(words, key=lambda word: -len(word.tokens)):
        by_first.setdefault(word.tokens[0], []).append(word)
    for fragment in fragments:
        if fragment.is_break:
            builder.close()
            continue
        tokens, i = tokenize(fragment.text), 0
        while i < len(tokens):
            following = tuple(tokens[i : i + 100])
            word = next(
                (
                    word
                    for word in by_first.get(tokens[i], ())
                    if following[: len(word.tokens)] == word.tokens
                ),
                None,
            )
            if word:
                builder.add_word(word, fragment.weight)
            else:
                builder.add(tokens[i], fragment.weight)
            i += len(word.tokens) if word else 1
    return builder.finish()


class _ChunkBuilder:
    """Incomplete chunk and the full chunks before it."""

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
                f'the embedding "{word.name}" has {word.vectors} vectors; '
                f"a text encoder reads {CHUNK_LENGTH} at a time.",
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

    def finish(self) -> list[Chunk]:
        if self._chunk.tokens or not self._full:
            self.close()
        return self._full

    def _is_full(self) -> bool:
        return len(self._chunk.tokens) == CHUNK_LENGTH

    def _carry_over(self, start: int) -> None:
        """Close the chunk before position `start` and move the rest to the next chunk."""
        full = self._chunk
        kept = [(i, name) for i, name in full.embeddings if i < start]
        moved = [(i - start, name) for i, name in full.embeddings if i >= start]
        self._chunk = Chunk(full.tokens[:start], full.weights[:start], kept)
        self.close()
        self._chunk = Chunk(full.tokens[start:], full.weights[start:], moved)
