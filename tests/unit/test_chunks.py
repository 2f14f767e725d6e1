"""Chunks of 75 tokens: examples of commas, BREAK and learned words, and general properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.text.chunks import (
    CHUNK_LENGTH,
    COMMA_BACKTRACK,
    LearnedWord,
    chunk_fragments,
)
from alphalayer.engine.text.grammar import Fragment

COMMA = 267


def _chunks(*fragments: Fragment | list[int], words=()) -> list[list[int]]:
    return [chunk.tokens for chunk in _full(*fragments, words=words)]


def _full(*fragments: Fragment | list[int], words=()):
    """Chunk fragments whose text is token ids in decimal. Lists have weight 1."""
    prepared = [
        fragment if isinstance(fragment, Fragment) else _fragment(fragment)
        for fragment in fragments
    ]
    return chunk_fragments(
        prepared, lambda text: [int(token) for token in text.split()], COMMA, words
    )


def _fragment(tokens: list[int], weight: float = 1.0) -> Fragment:
    return Fragment(" ".join(map(str, tokens)), weight)


def test_chunks_without_tokens_are_one_empty_chunk():
    assert _chunks([]) == [[]]


def test_75_tokens_are_one_chunk():
    assert _chunks([1] * 75) == [[1] * 75]


def test_more_tokens_continue_in_the_next_chunk():
    assert _chunks([1] * 76) == [[1] * 75, [1]]
    assert [len(chunk) for chunk in _chunks([1] * 200)] == [75, 75, 50]


def test_text_after_a_near_comma_moves_to_the_next_chunk():
    tokens = [1] * 60 + [COMMA] + [2] * 20
    assert _chunks(tokens) == [[1] * 60 + [COMMA], [2] * 20]


def test_comma_is_near_up_to_20_tokens_back():
    # position 55 is 20 before the end of the chunk, 54 is 21
    assert [len(chunk) for chunk in _chunks([1] * 55 + [COMMA] + [2] * 30)] == [56, 30]
    assert [len(chunk) for chunk in _chunks([1] * 54 + [COMMA] + [2] * 30)] == [75, 10]


def test_last_of_several_commas_counts():
    tokens = [1] * 58 + [COMMA] + [2] * 9 + [COMMA] + [3] * 10
    assert _chunks(tokens) == [[1] * 58 + [COMMA] + [2] * 9 + [COMMA], [3] * 10]


def test_comma_at_the_end_of_a_full_chunk_moves_nothing():
    assert _chunks([1] * 74 + [COMMA] + [2]) == [[1] * 74 + [COMMA], [2]]


def test_comma_after_a_full_chunk_starts_the_next_chunk():
    assert _chunks([1] * 75 + [COMMA, 2]) == [[1] * 75, [COMMA, 2]]


def test_comma_of_an_earlier_chunk_is_ignored():
    tokens = [1] * 70 + [COMMA] + [2] * 4 + [3] * 80
    first, second, *rest = _chunks(tokens)
    assert first == [1] * 70 + [COMMA]
    assert len(second) == 75
    assert sum(map(len, rest)) == len(tokens) - 71 - 75


def test_break_closes_a_chunk():
    assert _chunks([1, 2], Fragment("", is_break=True), [3]) == [[1, 2], [3]]
    assert _chunks([1], Fragment("", is_break=True), Fragment("", is_break=True), [3]) == [
        [1],
        [],
        [3],
    ]
    assert _chunks([1], Fragment("", is_break=True)) == [[1]]


def test_weights_move_with_their_tokens():
    chunks = _full(_fragment([1] * 60), _fragment([COMMA, *[2] * 20], 1.3))
    assert [chunk.weights for chunk in chunks] == [[1.0] * 60 + [1.3], [1.3] * 20]


WORD = LearnedWord("style", (7, 8), 3)


def test_learned_word_is_replaced_by_its_vectors():
    (chunk,) = _full(_fragment([1, 7, 8, 2], 1.2), words=[WORD])
    assert chunk.tokens == [1, 0, 0, 0, 2]
    assert chunk.embeddings == [(1, "style")]
    assert chunk.weights == [1.2] * 5


def test_part_of_a_learned_word_is_text():
    (chunk,) = _full([7, 9, 7], words=[WORD])
    assert (chunk.tokens, chunk.embeddings) == ([7, 9, 7], [])


def test_longest_learned_word_is_selected():
    (chunk,) = _full([7, 8], words=[LearnedWord("short", (7,), 1), WORD])
    assert chunk.embeddings == [(0, "style")]


def test_learned_word_is_not_split():
    first, second = _full([1] * 73 + [7, 8], words=[WORD])
    assert len(first.tokens) == 73
    assert second.embeddings == [(0, "style")]


def test_learned_word_moves_to_the_next_chunk():
    first, second = _full([1] * 60 + [COMMA, 7, 8] + [2] * 15, words=[WORD])
    assert first.embeddings == []
    assert second.embeddings == [(0, "style")]
    assert second.tokens == [0, 0, 0] + [2] * 15


TOKENS = st.lists(st.lists(st.sampled_from([1, 2, 3, 7, 8, COMMA]), max_size=120), max_size=4)


@settings(max_examples=200, deadline=None)
@given(TOKENS)
def test_chunks_keep_all_tokens_in_order_and_in_size(fragments: list[list[int]]):
    chunks = _full(*(_fragment(tokens, 1.0 + i) for i, tokens in enumerate(fragments)))
    assert [token for chunk in chunks for token in chunk.tokens] == [
        token for tokens in fragments for token in tokens
    ]
    expected = [1.0 + i for i, tokens in enumerate(fragments) for _ in tokens]
    assert [weight for chunk in chunks for weight in chunk.weights] == expected
    assert all(len(chunk.tokens) == len(chunk.weights) <= CHUNK_LENGTH for chunk in chunks)
    # only a back-track leaves a chunk short, by at most its reach
    assert all(len(chunk.tokens) > CHUNK_LENGTH - COMMA_BACKTRACK for chunk in chunks[:-1])


@settings(max_examples=200, deadline=None)
@given(TOKENS)
def test_learned_words_are_at_the_position_of_their_vectors(fragments: list[list[int]]):
    for chunk in _full(*fragments, words=[WORD]):
        assert len(chunk.tokens) == len(chunk.weights) <= CHUNK_LENGTH
        for position, _ in chunk.embeddings:
            assert chunk.tokens[position : position + 3] == [0, 0, 0]
        assert chunk.tokens.count(0) == 3 * len(chunk.embeddings)


def test_learned_word_longer_than_a_chunk_is_refused_if_used():
    long = LearnedWord("long", (7, 8), 76)
    assert _chunks([1, 7, 9], words=[long]) == [[1, 7, 9]]
    with pytest.raises(InvalidRequest, match='"long" has 76 vectors') as error:
        _full([1, 7, 8], words=[long])
    assert error.value.field == "prompt"
    assert len(_full([1, 7, 8], words=[LearnedWord("full", (7, 8), 75)])) == 2
