"""Byte-level BPE with a vocabulary small enough to follow with a pencil."""

from __future__ import annotations

from typing import Any

import pytest

from tinyllava.errors import ModelError
from tinyllava.text.bpe import ALPHABET
from tinyllava.text.tokenizer import Tokenizer
from tinyllava.text.vocabulary import CONTROL, NORMAL

KEY = "tokenizer.ggml."
LETTERS = [ALPHABET[byte] for byte in range(256)]  # id = byte
WORDS = ["Ġt", "he", "Ġthe", "in", "ing", "cat"]  # ids from 256 on
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "in g", "c at"]  # "at" is never made, so "c at" never happens
END = 256 + len(WORDS)


def tokenizer(pre: str | None = "gpt-2", **changes: Any) -> Tokenizer:
    metadata = {
        KEY + "model": "gpt2",
        KEY + "tokens": [*LETTERS, *WORDS, "<|endoftext|>"],
        KEY + "token_type": [NORMAL] * END + [CONTROL],
        KEY + "merges": MERGES,
        KEY + "eos_token_id": END,
        **({} if pre is None else {KEY + "pre": pre}),
        **{KEY + name: value for name, value in changes.items()},
    }
    return Tokenizer.from_metadata(metadata)


def test_the_byte_alphabet() -> None:
    assert "".join(ALPHABET[byte] for byte in b"A z!~") == "AĠz!~"
    assert (ALPHABET[0], ALPHABET[ord("\n")], ALPHABET[0x7F], ALPHABET[0xAD]) == ("Ā", "Ċ", "ġ", "Ń")
    assert len(set(ALPHABET.values())) == 256


def test_merges_by_rank() -> None:
    assert tokenizer().encode("the the") == [ord("t"), 257, 258]
    assert tokenizer().encode(" thing") == [256, ord("h"), 260]


def test_a_merge_that_is_listed_twice_keeps_its_first_rank() -> None:
    tokens = ["a", "b", "c", "ab", "bc", "<|endoftext|>"]
    t = tokenizer(tokens=tokens, token_type=[NORMAL] * 6, merges=["a b", "b c", "a b"], eos_token_id=5)
    assert t.encode("abc") == [3, 2]


def test_a_word_without_merges_is_its_bytes() -> None:
    assert tokenizer().encode("é") == [0xC3, 0xA9]
    assert tokenizer().decode([0xC3, 0xA9]) == "é"


def test_llama3_takes_a_whole_word_that_is_a_token() -> None:
    assert tokenizer("gpt-2").encode("cat") == list(b"cat")
    assert tokenizer("llama-bpe", bos_token_id=0).encode("cat") == [0, 261]  # and wants a BOS


def test_no_merge_crosses_a_word() -> None:
    assert tokenizer().encode("in'ging") == [259, ord("'"), ord("g"), 259 + 1]
    assert tokenizer().encode("in g") == [259, ord(" "), ord("g")]


def test_special_tokens() -> None:
    assert tokenizer().encode("<|endoftext|> the") == [END, 258]
    assert tokenizer().encode("<|endoftext|>", parse_special=False) == list(b"<|endoftext|>")
    assert tokenizer().decode([END, 258]) == " the"
    assert tokenizer().decode([END, 258], special=True) == "<|endoftext|> the"
    assert tokenizer().end_ids == {END}


def test_bos_only_where_the_file_or_the_pre_tokenizer_asks() -> None:
    assert tokenizer("qwen2").encode("a") == [ord("a")]
    assert tokenizer("qwen2", add_bos_token=True, bos_token_id=END).encode("a") == [END, ord("a")]
    assert tokenizer("llama3", add_bos_token=False).encode("a") == [ord("a")]
    assert tokenizer("llama3", bos_token_id=END).encode("a", add_bos=False) == [ord("a")]


def test_a_file_without_a_pre_tokenizer_gets_the_default_one_and_a_note() -> None:
    t = tokenizer(None)
    assert t.pre == "default"
    assert "names no pre-tokenizer" in t.notes[0]
    assert t.encode("1234") == list(b"1234")


def test_an_unknown_pre_tokenizer_is_refused_with_the_names_that_work() -> None:
    with pytest.raises(ModelError, match=r"pre-tokenizer 'tekken'; wanted one of .*llama-bpe.*qwen2"):
        tokenizer("tekken")


def test_merges_are_required() -> None:
    with pytest.raises(ModelError, match="merges is not an array"):
        tokenizer(merges=7)


def test_a_token_outside_the_byte_alphabet_is_meant_as_written() -> None:
    assert tokenizer(tokens=["日本", *LETTERS[1:], *WORDS, "<|endoftext|>"]).decode([0]) == "日本"


def test_a_byte_without_a_token_is_dropped_as_in_llama_cpp() -> None:
    letters = ["<unk>" if byte == 4 else letter for byte, letter in enumerate(LETTERS)]
    t = tokenizer(tokens=[*letters, *WORDS, "<|endoftext|>"], unknown_token_id=END)
    assert t.encode("a\x04b") == list(b"ab")


def test_half_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert tokenizer().encode("\ud800") == list("\ufffd".encode())
    assert tokenizer().decode(tokenizer().encode("\ud83d\ude42")) == "🙂"
