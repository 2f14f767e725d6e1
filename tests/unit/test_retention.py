"""What is removed, and what never is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alphalayer.retention import DAY_S, Limits, doomed

FILES = [("a", 10, 0.0), ("b", 10, 1 * DAY_S), ("c", 10, 2 * DAY_S), ("d", 10, 3 * DAY_S)]


def test_by_age():
    assert doomed(FILES, Limits(pictures_days=1.5), 3 * DAY_S, lambda _: False) == ["a", "b"]


def test_by_size_the_oldest_first():
    assert doomed(FILES, Limits(pictures_bytes=25), 3 * DAY_S, lambda _: False) == ["a", "b"]


def test_no_limits_no_loss():
    assert doomed(FILES, Limits(), 1e12, lambda _: False) == []


def test_previews_go_soon_after_their_job():
    files = [("preview_a.webp", 10, 0.0), ("preview_b.webp", 10, 0.0), ("preview_c.webp", 10, 50.0), ("a", 10, 0.0)]
    assert doomed(files, Limits(), 90.0, lambda key: key == "preview_b.webp") == ["preview_a.webp"]


def test_what_is_kept_stays_though_it_is_old_and_large():
    assert doomed(FILES, Limits(pictures_days=0.1, pictures_bytes=1), 1e9, lambda key: key in "ab") == ["c", "d"]


sizes = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 1e9)), max_size=30)


@given(sizes, st.integers(1, 5000))
def test_afterwards_the_rest_fits(files, limit):
    named = [(str(i), size, modified) for i, (size, modified) in enumerate(files)]
    gone = set(doomed(named, Limits(pictures_bytes=limit), 1e9, lambda _: False))
    assert sum(size for key, size, _ in named if key not in gone) <= limit
