"""Merging: a case by hand, and the heap against the obvious quadratic loop."""

from __future__ import annotations

import time
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tinyllava.text.merge import Rank, merge


def slow_merge(symbols: list[str], rank: Rank) -> list[str]:
    """The definition: find the best pair in the whole row, join it, start again."""
    symbols = list(symbols)
    while True:
        ranked = [(rank(left, right), i) for i, (left, right) in enumerate(pairwise(symbols))]
        known = [(value, i) for value, i in ranked if value is not None]
        if not known:
            return symbols
        _, i = min(known)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_by_hand() -> None:
    ranks = {"ab": 0, "bc": 1, "abc": 2}
    # ab has the best rank wherever it stands; the second b, without an a, joins its c
    assert merge(list("abcbc"), lambda left, right: ranks.get(left + right)) == ["abc", "bc"]


def test_the_leftmost_of_equal_pairs_merges_first() -> None:
    assert merge(list("aaa"), lambda left, right: {"aa": 0}.get(left + right)) == ["aa", "a"]


def test_nothing_to_merge() -> None:
    assert merge([], lambda _left, _right: 0) == []
    assert merge(["x"], lambda _left, _right: 0) == ["x"]


pieces = st.text("abc", min_size=2, max_size=5)


@given(st.text("abcd", max_size=40), st.dictionaries(pieces, st.integers(0, 6)))
def test_heap_agrees_with_the_definition_by_joined_text(text: str, ranks: dict[str, int]) -> None:
    def rank(left: str, right: str) -> int | None:
        return ranks.get(left + right)

    assert merge(list(text), rank) == slow_merge(list(text), rank)


pairs = st.tuples(st.text("ab", min_size=1, max_size=3), st.text("ab", min_size=1, max_size=3))


@given(st.text("ab", max_size=40), st.dictionaries(pairs, st.integers(0, 9)))
def test_heap_agrees_with_the_definition_by_pair(text: str, ranks: dict[tuple[str, str], int]) -> None:
    def rank(left: str, right: str) -> int | None:
        return ranks.get((left, right))

    assert merge(list(text), rank) == slow_merge(list(text), rank)


def test_a_long_word_is_not_quadratic() -> None:
    ranks = {"a" * (1 << n): n for n in range(1, 20)}
    start = time.perf_counter()
    assert merge(["a"] * (1 << 16), lambda left, right: ranks.get(left + right)) == ["a" * (1 << 16)]
    assert time.perf_counter() - start < 10  # half a second; the quadratic loop takes minutes
