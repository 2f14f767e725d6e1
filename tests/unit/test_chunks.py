"""Tokens into chunks of 75: worked examples of filling, comma back-track, BREAK and learned words, and what holds for any tokens."""

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
    """Chunks of fragments whose text is token ids in decimal; plain lists have weight 1."""
    made = [each if isinstance(each, Fragment) else _fragment(each) for each in fragments]
    return chunk_fragments(made, lambda text: [int(token) for token in text.split()], COMMA, words)


def _fragment(tokens: list[int], weight: float = 1.0) -> Fragment:
    return Fragment(" ".join(map(str, tokens)), weight)


def test_no_tokens_are_one_empty_chunk():
    assert _chunks([]) == [[]]


def test_a_full_chunk_stays_one():
    assert _chunks([1] * 75) == [[1] * 75]


def test_what_does_not_fit_goes_on_in_the_next_chunk():
    assert _chunks([1] * 76) == [[1] * 75, [1]]
    assert [len(each) for each in _chunks([1] * 200)] == [75, 75, 50]


def test_text_after_a_near_comma_moves_on_whole():
    tokens = [1] * 60 + [COMMA] + [2] * 20
    assert _chunks(tokens) == [[1] * 60 + [COMMA], [2] * 20]


def test_a_comma_is_near_up_to_20_tokens_back():
    # position 55 is 20 before the end of the chunk, 54 is 21
    assert [len(each) for each in _chunks([1] * 55 + [COMMA] + [2] * 30)] == [56, 30]
    assert [len(each) for each in _chunks([1] * 54 + [COMMA] + [2] * 30)] == [75, 10]


def test_the_last_comma_counts():
    tokens = [1] * 58 + [COMMA] + [2] * 9 + [COMMA] + [3] * 10
    assert _chunks(tokens) == [[1] * 58 + [COMMA] + [2] * 9 + [COMMA], [3] * 10]


def test_a_comma_that_ends_a_full_chunk_moves_nothing():
    assert _chunks([1] * 74 + [COMMA] + [2]) == [[1] * 74 + [COMMA], [2]]


def test_a_comma_that_begins_a_chunk_is_put_there():
    assert _chunks([1] * 75 + [COMMA, 2]) == [[1] * 75, [COMMA, 2]]


def test_a_comma_of_an_earlier_chunk_does_not_count():
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


def test_weights_go_with_their_tokens_over_a_back_track():
    chunks = _full(_fragment([1] * 60), _fragment([COMMA, *[2] * 20], 1.3))
    assert [chunk.weights for chunk in chunks] == [[1.0] * 60 + [1.3], [1.3] * 20]


WORD = LearnedWord("style", (7, 8), 3)


def test_a_learned_word_is_replaced_by_its_vectors():
    (chunk,) = _full(_fragment([1, 7, 8, 2], 1.2), words=[WORD])
    assert chunk.tokens == [1, 0, 0, 0, 2]
    assert chunk.embeddings == [(1, "style")]
    assert chunk.weights == [1.2] * 5


def test_a_part_of_a_learned_word_is_text():
    (chunk,) = _full([7, 9, 7], words=[WORD])
    assert (chunk.tokens, chunk.embeddings) == ([7, 9, 7], [])


def test_the_longest_learned_word_wins():
    (chunk,) = _full([7, 8], words=[LearnedWord("short", (7,), 1), WORD])
    assert chunk.embeddings == [(0, "style")]


def test_a_learned_word_is_not_cut_in_two():
    first, second = _full([1] * 73 + [7, 8], words=[WORD])
    assert len(first.tokens) == 73
    assert second.embeddings == [(0, "style")]


def test_a_learned_word_moves_with_a_back_track():
    first, second = _full([1] * 60 + [COMMA, 7, 8] + [2] * 15, words=[WORD])
    assert first.embeddings == []
    assert second.embeddings == [(0, "style")]
    assert second.tokens == [0, 0, 0] + [2] * 15


TOKENS = st.lists(st.lists(st.sampled_from([1, 2, 3, 7, 8, COMMA]), max_size=120), max_size=4)


@settings(max_examples=200, deadline=None)
@given(TOKENS)
def test_no_token_is_lost_or_moved_and_no_chunk_is_too_long(fragments: list[list[int]]):
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
def test_learned_words_stand_where_their_vectors_are(fragments: list[list[int]]):
    for chunk in _full(*fragments, words=[WORD]):
        assert len(chunk.tokens) == len(chunk.weights) <= CHUNK_LENGTH
        for at, _ in chunk.embeddings:
            assert chunk.tokens[at : at + 3] == [0, 0, 0]
        assert chunk.tokens.count(0) == 3 * len(chunk.embeddings)


def test_a_learned_word_of_more_vectors_than_a_chunk_holds_is_refused_where_it_is_used():
    long = LearnedWord("long", (7, 8), 76)
    assert _chunks([1, 7, 9], words=[long]) == [[1, 7, 9]]
    with pytest.raises(InvalidRequest, match='"long" has 76 vectors') as error:
        _full([1, 7, 8], words=[long])
    assert error.value.field == "prompt"
    assert len(_full([1, 7, 8], words=[LearnedWord("full", (7, 8), 75)])) == 2
