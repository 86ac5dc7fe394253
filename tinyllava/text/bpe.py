"""Byte-level BPE, the tokenizer of GPT-2, LLaMA-3 and Qwen2 (tokenizer.ggml.model = "gpt2").

Text -> words (pretokenize.py) -> UTF-8 bytes, each written as one printable character -> merged by rank
-> ids. Bytes have tokens, so no text is unknown. Source: openai/gpt-2, src/encoder.py.
"""

from __future__ import annotations

from functools import lru_cache

from tinyllava.text.merge import merge
from tinyllava.text.pretokenize import IGNORES_MERGES, splitter
from tinyllava.text.vocabulary import NORMAL, USER_DEFINED, Vocabulary

CACHED_WORDS = 1 << 16
CACHED_LENGTH = 48  # characters; longer words seldom come back


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it: itself if printable and not a space, else one from U+0100 on.

    >>> byte_alphabet()[ord("A")], byte_alphabet()[ord(" ")], byte_alphabet()[ord("\\n")]
    ('A', 'Ġ', 'Ċ')
    """
    stretches = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in stretches for byte in range(ord(first), ord(last) + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


ALPHABET = byte_alphabet()
BYTE_OF = {ord(character): byte for byte, character in ALPHABET.items()}


class ByteLevelBPE:
    """The merging half of the tokenizer: text without special tokens <-> ids."""

    def __init__(self, vocabulary: Vocabulary, where: object = "tokenizer") -> None:
        self._vocabulary = vocabulary
        self._ids = vocabulary.ids_by_text()
        # A token of this alphabet never holds a space, so "left right" as the file has it is a unique key.
        # Counted from the end, so that of two equal merges the first one's rank stays.
        n_merges = len(vocabulary.merges)
        self._ranks = {pair: n_merges - 1 - i for i, pair in enumerate(reversed(vocabulary.merges))}
        self._split = splitter(vocabulary.pre, where)
        self._whole_words = vocabulary.pre in IGNORES_MERGES
        self._remember = lru_cache(CACHED_WORDS)(self._word_ids)

    def encode(self, text: str, _prefix: bool = True) -> list[int]:
        """Ids of a text without special tokens. This kind of tokenizer has no space prefix."""
        ids: list[int] = []
        for word in self._split(text):
            ids += self._remember(word) if len(word) <= CACHED_LENGTH else self._word_ids(word)
        return ids

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for."""
        text, type = self._vocabulary.tokens[id], self._vocabulary.types[id]
        if type == USER_DEFINED:
            return text.encode()
        if type != NORMAL:
            return b""
        try:
            return bytes(BYTE_OF[ord(character)] for character in text)
        except KeyError:
            return text.encode()  # not in the byte alphabet: added by hand, and meant as it is written

    def _word_ids(self, word: str) -> tuple[int, ...]:
        written = word.encode().decode("latin-1").translate(ALPHABET)  # one character a byte
        if self._whole_words and written in self._ids:
            return (self._ids[written],)
        symbols = merge(list(written), lambda left, right: self._ranks.get(f"{left} {right}"))
        return tuple(id for symbol in symbols for id in self._symbol_ids(symbol))

    def _symbol_ids(self, symbol: str) -> list[int]:
        """The token, or those of its bytes where a merge makes no token.

        Some models left bytes out that their texts never had, such as 0x04 in SmolLM: those are dropped, as in
        llama.cpp. (Their <unk> would not do: it is the token that ends a text.)
        """
        if symbol in self._ids:
            return [self._ids[symbol]]
        return [self._ids[character] for character in symbol if character in self._ids]
