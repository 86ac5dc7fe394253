"""Byte-pair merging, the step that both tokenizers share.

A text starts as a row of symbols (characters). Again and again the best pair of neighbours becomes one
symbol, until no pair is known (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword
Units"). Looking for the best pair afresh each time would cost O(n^2); a heap of candidates over a linked list
costs O(n log n), the way SentencePiece does it (bpe_model.cc).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

# Rank of the merge of two neighbours, lowest first; None when they do not merge.
Rank = Callable[[str, str], "float | None"]


def merge(symbols: list[str], rank: Rank) -> list[str]:
    """Merge neighbours by rank, the leftmost of equals first. Joining the result gives the same text.

    >>> ranks = {"ab": 0, "bc": 1, "abc": 2}
    >>> merge(list("abcbc"), lambda left, right: ranks.get(left + right))
    ['abc', 'bc']
    """
    n = len(symbols)
    text = list(symbols)  # text[i] is "" once symbol i has been swallowed by its left neighbour
    before = list(range(-1, n - 1))
    after = [*range(1, n), -1] if n else []

    def candidate(left: int, right: int) -> tuple[float, int, int, int] | None:
        """(rank, left index, right index, length of the joined text): what the heap sorts by, and a check."""
        value = rank(text[left], text[right])
        return None if value is None else (value, left, right, len(text[left]) + len(text[right]))

    heap = [found for left in range(n - 1) if (found := candidate(left, left + 1))]
    heapify(heap)
    while heap:
        _, left, right, length = heappop(heap)
        # An entry is out of date when one of its symbols was swallowed or has grown since it was pushed.
        if not text[left] or not text[right] or len(text[left]) + len(text[right]) != length:
            continue
        text[left] += text[right]
        text[right] = ""
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
            if found := candidate(left, after[left]):
                heappush(heap, found)
        if before[left] >= 0 and (found := candidate(before[left], left)):
            heappush(heap, found)
    return [symbol for symbol in text if symbol]
