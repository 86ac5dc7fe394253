"""What holds for both kinds of tokenizer: nothing is lost, and no character is ever cut in half."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.texts import nasty_texts
from golden.vocab import VOCABULARIES
from tinyllava.errors import ModelError
from tinyllava.text.tokenizer import TextStream, Tokenizer, Utf8Stream

KINDS = sorted(VOCABULARIES)


def metadata(kind: str) -> dict[str, Any]:
    """golden/vocab.py's toy vocabulary, with arrays as the GGUF reader gives them."""
    vocabulary = VOCABULARIES[kind]()
    keys: dict[str, Any] = {
        "model": vocabulary.model,
        "tokens": list(vocabulary.tokens),
        "token_type": np.array(vocabulary.types, np.int32),
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "add_bos_token": vocabulary.add_bos,
        "merges": list(vocabulary.merges) or None,
        "pre": vocabulary.pre,
        "scores": np.array(vocabulary.scores, np.float32) if vocabulary.scores else None,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


TOKENIZERS = {kind: Tokenizer.from_metadata(metadata(kind)) for kind in KINDS}

words = ["the", " the", "picture", "  ", "\n", "é", "你", "🙂", "</s>", "<|im_end|>", "'s"]
wordy = st.lists(st.sampled_from(words))
texts = st.text(st.characters(codec="utf-8", exclude_characters="▁")) | wordy.map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_decoding_undoes_encoding(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False), special=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_hard_texts_come_back(kind: str) -> None:
    for text in nasty_texts():
        ids = TOKENIZERS[kind].encode(text, parse_special=False)
        assert TOKENIZERS[kind].decode(ids) == (text.replace("▁", " ") if kind == "spm" else text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_ids_are_in_the_vocabulary(kind: str, text: str) -> None:
    assert all(0 <= id < TOKENIZERS[kind].n_vocab for id in TOKENIZERS[kind].encode(text))


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(st.integers(0, 600)), special=st.booleans())
def test_a_stream_gives_the_text_of_decode(kind: str, ids: list[int], special: bool) -> None:
    stream = TextStream(TOKENIZERS[kind], special)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZERS[kind].decode(ids, special)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_a_stream_never_yields_half_a_character(kind: str, text: str) -> None:
    stream = TextStream(TOKENIZERS[kind])
    given_out = ""
    for id in TOKENIZERS[kind].encode(text, parse_special=False):
        given_out += stream.push(id)
        assert text.startswith(given_out)  # so no U+FFFD but the text's own


def test_broken_bytes_wait_until_they_cannot_become_a_character() -> None:
    stream = Utf8Stream()
    assert [stream.push(bytes([byte])) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.push(b"\xf0\x9f") == ""
    assert stream.push(b"\x99a") == "\ufffda"  # three bytes of a four-byte character, then a letter
    assert stream.push(b"\xff") == "\ufffd"  # never the start of anything
    assert stream.push(b"\xe4\xbd") == ""
    assert stream.finish() == "\ufffd"


@given(st.binary(), st.lists(st.integers(0, 20)))
def test_broken_bytes_come_out_the_same_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    stream, text, rest = Utf8Stream(), "", data
    for cut in cuts:
        text += stream.push(rest[:cut])
        rest = rest[cut:]
    assert text + stream.push(rest) + stream.finish() == data.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_kilobytes_take_about_a_second_at_most(kind: str) -> None:
    tokenizer = Tokenizer.from_metadata(metadata(kind))  # without a warm cache
    words = np.random.RandomState(0).randint(97, 123, (20_000, 5)).astype(np.uint8)
    text = " ".join(bytes(word).decode() for word in words)[:100_000]  # 17 000 words, most of them new
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 5  # measured: 0.2 s; a slow machine may take its time
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_kilobytes_without_a_space_are_not_quadratic(kind: str) -> None:
    start = time.perf_counter()
    assert len(TOKENIZERS[kind].encode("你" * 33_000)) >= 33_000
    assert time.perf_counter() - start < 5


KEYS = {
    "model": ["llama", "gpt2"],
    "pre": ["gpt-2", "llama-bpe", "no such"],
    "tokens": [["<unk>", "a", "", "a", "▁", "<0x41>", "</s>", "ab", "Ġ", "<0x4>", "<0x 4>"]],
    "token_type": [[2, 1, 5, 1, 4, 6, 3, 1, 99, 6, 6], np.zeros(11, np.int32)],
    "scores": [np.linspace(0, -1, 11)],
    "merges": [["a b", "", "a", "a b c", "Ġ a", "a b"]],
    "bos_token_id": [0, 3, 11, -1],
    "eot_token_id": [0, 7, 1 << 40],
    "unknown_token_id": [0, 5],
    "add_bos_token": [True, False],
}
odd = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers()))


@st.composite
def any_metadata(draw: st.DrawFn) -> dict[str, Any]:
    """A vocabulary some of whose keys are missing or nonsense."""
    keys = {key: draw(st.sampled_from(values)) for key, values in KEYS.items()}
    for key in draw(st.sets(st.sampled_from(sorted(keys)), max_size=2)):
        if draw(st.booleans()):
            del keys[key]
        else:
            keys[key] = draw(odd)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@given(metadata=any_metadata(), text=texts)
def test_any_vocabulary_works_or_is_refused_in_one_line(metadata: dict[str, Any], text: str) -> None:
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
    except ModelError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)
    assert all(isinstance(note, str) for note in tokenizer.notes)


def test_tokens_by_text() -> None:
    tokenizer = TOKENIZERS["spm"]
    assert tokenizer.id_of("</s>") == 2
    assert tokenizer.id_of("no such token") is None
    assert tokenizer.text_of(2) == "</s>"
    assert tokenizer.text_of(99_999) == "[99999]"


def test_chatml_ends_a_turn() -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert {tokenizer.text_of(id) for id in tokenizer.end_ids} == {"<|im_end|>", "<|endoftext|>"}
