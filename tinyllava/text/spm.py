"""SentencePiece-BPE, the tokenizer of LLaMA, Vicuna, Mistral and Yi (tokenizer.ggml.model = "llama").

Text -> "▁" for every space, and one in front -> characters -> merged by score -> ids; a character without a
token becomes its UTF-8 bytes, <0x00> to <0xFF>. Source: google/sentencepiece, src/bpe_model.cc.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tinyllava.text.merge import merge
from tinyllava.text.vocabulary import BYTE, NORMAL, SPACE, USER_DEFINED, Vocabulary, byte_value

# A word and the spaces in front of it: "▁▁the", "▁cat", and spaces at the very end.
WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
CACHED_WORDS = 1 << 16
CACHED_LENGTH = 48  # characters; longer words seldom come back


class SentencePieceBPE:
    """The merging half of the tokenizer: text without special tokens <-> ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids = vocabulary.ids_by_text()
        self._cost = {text: -vocabulary.scores[id] for text, id in self._ids.items()}
        self._byte_ids = {
            value: id
            for id, type in enumerate(vocabulary.types)
            if type == BYTE and (value := byte_value(vocabulary.tokens[id])) is not None
        }
        # Where no token has a space after a letter, no merge crosses the start of a word, so words can be
        # merged (and remembered) one by one with the same result.
        self._splits = not any(SPACE in text.lstrip(SPACE) for text in self._ids)
        self._remember = lru_cache(CACHED_WORDS)(self._word_ids)

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """Ids of a text without special tokens; with ``prefix``, a space goes in front if the model wants it."""
        text = (" " + text if prefix and self._vocabulary.add_space_prefix else text).replace(" ", SPACE)
        ids: list[int] = []
        for word in WORD.findall(text) if self._splits else [text]:
            ids += self._remember(word) if len(word) <= CACHED_LENGTH else self._word_ids(word)
        return self._join_unknown(ids)

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of a token that carries text; "▁" is a space again."""
        text, type = self._vocabulary.tokens[id], self._vocabulary.types[id]
        if type == BYTE:
            value = byte_value(text)
            return b"" if value is None else bytes([value])
        if type == USER_DEFINED:
            return text.encode()
        return text.replace(SPACE, " ").encode() if type == NORMAL else b""

    def _word_ids(self, word: str) -> tuple[int, ...]:
        symbols = merge(list(word), lambda left, right: self._cost.get(left + right))
        return tuple(id for symbol in symbols for id in self._symbol_ids(symbol))

    def _symbol_ids(self, symbol: str) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        ids = [self._byte_ids.get(value, -1) for value in symbol.encode()]
        if -1 not in ids:
            return ids
        return [] if self._vocabulary.unk_id is None else [self._vocabulary.unk_id]

    def _join_unknown(self, ids: list[int]) -> list[int]:
        """A run of unknown characters is one <unk>, as in SentencePiece."""
        unknown = self._vocabulary.unk_id
        if unknown is None or len(self._byte_ids) == 256:
            return ids
        return [id for i, id in enumerate(ids) if id != unknown or i == 0 or ids[i - 1] != unknown]
