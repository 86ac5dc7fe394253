"""Tokenizer files to tokenizer.ggml.*: checked by hand, by the tokens that texts get, and with any bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from golden.tokenizer_files import (
    LLAMA3_SPLIT,
    llama3_files,
    qwen2_files,
    sentencepiece_model,
    spm_files,
    spm_json_files,
    to_bytes,
)
from golden.vocab import bpe_vocabulary, spm_vocabulary
from tinyllava.convert.sentencepiece import fields, parse, read_sentencepiece
from tinyllava.convert.tokenizer_json import pre_tokenizer, puts_space_first, sentencepiece_scores
from tinyllava.convert.vocabulary import CONTROL, UNUSED, USER_DEFINED, Vocabulary, fit, read_vocabulary
from tinyllava.errors import FileError
from tinyllava.text.tokenizer import Tokenizer

TEXTS = ["the dog", " a  picture of dogs\n", "What is THIS?", "é 你 \U0001f600", "USER: describe ASSISTANT:"]


def folder_with(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def read(tmp_path: Path, files: dict[str, bytes], config: dict[str, Any] | None = None) -> Vocabulary:
    return read_vocabulary(folder_with(tmp_path, files), config or {})


def ids(vocabulary: Vocabulary, text: str) -> list[int]:
    metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vocabulary.metadata().items()}
    return Tokenizer.from_metadata(metadata).encode(text, add_bos=False)


# ---- tokenizer.model


def test_pieces_scores_and_types_are_those_of_the_model(tmp_path: Path) -> None:
    small = spm_vocabulary()
    vocabulary = read(tmp_path, spm_files({"<image>": 512}))
    assert vocabulary.tokens == [*small.tokens, "<image>"]
    assert vocabulary.scores == [*small.scores, -1000.0]
    assert vocabulary.types == [*small.types, USER_DEFINED]
    assert vocabulary.keys == {
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip


@pytest.mark.peers
def test_pieces_are_sentencepieces_own(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "m").write_bytes(sentencepiece_model(spm_vocabulary()))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m"))
    ours = read_sentencepiece(tmp_path / "m").pieces
    assert [p[0] for p in ours] == [theirs.IdToPiece(i) for i in range(theirs.vocab_size())]
    assert [p[1] for p in ours] == [theirs.GetScore(i) for i in range(theirs.vocab_size())]


def test_a_protocol_buffer_by_hand() -> None:
    assert list(fields(b"\x08\x96\x01\x12\x02hi\x1d\x00\x00\x80\x3f")) == [
        (1, 150), (2, b"hi"), (3, b"\x00\x00\x80\x3f"),
    ]  # fmt: skip
    for damaged in (b"\x08", b"\x12\x05hi", b"\x0b", b"\xff" * 12):
        with pytest.raises(ValueError):
            list(fields(damaged))


@example(b"\n\x02\x12\x00")  # a score of no bytes
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=8).map(lambda b: b"\x0a" + bytes([len(b)]) + b))
def test_any_bytes_are_a_model_or_an_error(data: bytes) -> None:
    try:
        parse(data)
    except (ValueError, TypeError):
        pass


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 8000), byte=st.integers(0, 255))
def test_any_byte_flipped_gives_a_vocabulary_or_our_error(
    at: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = spm_files()
    data = bytearray(files["tokenizer.model"])
    data[at % len(data)] = byte
    try:
        read(tmp_path_factory.mktemp("t"), files | {"tokenizer.model": bytes(data)})
    except FileError as error:
        assert "tokenizer.model" in str(error)


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    data = sentencepiece_model(spm_vocabulary()).replace(b"\x18\x02\x20\x80\x04", b"\x18\x01\x20\x80\x04")
    with pytest.raises(FileError, match=r"tokenizer.model: a SentencePiece model of type 1; wanted 2 \(BPE\)"):
        read(tmp_path, spm_files() | {"tokenizer.model": data})


# ---- tokenizer.json


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_as_json_gives_the_same_ids(text: str, tmp_path: Path) -> None:
    """Scores made from merges merge in the order of the original's scores."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    model, as_json = read(tmp_path / "a", spm_files()), read(tmp_path / "b", spm_json_files({}))
    assert ids(model, text) == ids(as_json, text)


def test_special_tokens_of_json_are_control_tokens(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, spm_json_files({"<image>": 512, "<pad>": 513}))
    assert vocabulary.tokens[512:] == ["<image>", "<pad>"]
    assert vocabulary.types[512:] == [CONTROL, CONTROL]
    assert vocabulary.keys["tokenizer.chat_template"].startswith("{% for m in messages %}USER:")


@pytest.mark.parametrize("files, pre, bos", [(llama3_files(), "llama-bpe", 354), (qwen2_files(), "qwen2", None)])
def test_byte_level_vocabularies(files: dict[str, bytes], pre: str, bos: int | None, tmp_path: Path) -> None:
    vocabulary = read(tmp_path, files)
    normal = [text for text in bpe_vocabulary().tokens if not text.startswith("<")] + ["<"]
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre)
    assert sorted(vocabulary.tokens[:354]) == sorted(normal)
    assert vocabulary.types[354:] == [CONTROL] * 3
    assert vocabulary.merges == list(bpe_vocabulary().merges)  # pairs or texts
    assert vocabulary.keys.get("tokenizer.ggml.bos_token_id") == bos
    assert vocabulary.keys["tokenizer.ggml.eos_token_id"] == 356


def test_vocab_json_with_merges_txt(tmp_path: Path) -> None:
    files = qwen2_files()
    del files["tokenizer.json"]
    vocabulary = read(tmp_path, files)
    assert vocabulary.merges == list(bpe_vocabulary().merges) and len(vocabulary.tokens) == 357


@pytest.mark.peers
@pytest.mark.parametrize("files", [llama3_files(), qwen2_files(), spm_json_files({"<image>": 512})])
def test_ids_are_those_of_the_tokenizers_library(files: dict[str, bytes], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    vocabulary = read(tmp_path, files)
    for text in TEXTS:
        assert ids(vocabulary, text) == theirs.encode(text, add_special_tokens=False).ids


def test_how_words_are_cut_is_told_by_the_expression() -> None:
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}}
    byte_level = {"type": "ByteLevel", "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    assert pre_tokenizer({"pre_tokenizer": steps}) == "llama-bpe"
    assert pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}) == "gpt-2"
    split["pattern"] = {"Regex": "x"}
    assert pre_tokenizer({"pre_tokenizer": split}) == "" == pre_tokenizer({})


@pytest.mark.parametrize(
    "content, expected",
    [
        ({}, False),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}}, True),
        ({"normalizer": {"type": "Replace"}}, False),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
        ({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": False}}, False),
    ],
)
def test_whether_a_space_comes_first(content: dict[str, Any], expected: bool) -> None:
    assert puts_space_first(content) is expected


def test_tokens_that_only_tokenizer_config_knows(tmp_path: Path) -> None:
    """Yi's tokenizer.model has <|im_end|> as an ordinary piece; <image> was added without added_tokens.json."""
    files = spm_files()
    said = json.loads(files["tokenizer_config.json"])
    decoder = {"512": {"content": "<image>", "special": True}, "300": {"content": "e", "special": True}}
    wrong = {"301": {"content": "another", "special": True}}
    text = to_bytes(said | {"added_tokens_decoder": decoder | wrong})
    before = read(tmp_path, files)
    vocabulary = read(tmp_path, files | {"tokenizer_config.json": text})
    assert vocabulary.tokens == [*before.tokens, "<image>"] and vocabulary.types[512] == CONTROL
    at = before.tokens.index("e")
    assert vocabulary.types[301] == before.types[301] and (at != 300 or vocabulary.types[300] == CONTROL)


def test_scores_follow_the_merges() -> None:
    assert sentencepiece_scores(["a", "b", "ab", "abb"], ["a b", "ab b", "a bb"]) == [0.0, 0.0, -0.0, -1.0]


# ---- special tokens, templates, as many tokens as rows


def test_ids_come_from_config_where_the_tokenizer_has_no_text(tmp_path: Path) -> None:
    files = {"tokenizer.model": spm_files()["tokenizer.model"]}
    vocabulary = read(tmp_path, files, {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 9999})
    assert vocabulary.keys == {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def test_a_post_processor_that_puts_bos_first(tmp_path: Path) -> None:
    files = llama3_files()
    content = json.loads(files["tokenizer.json"])
    single = [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single}
    content["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    vocabulary = read(tmp_path, files | {"tokenizer.json": to_bytes(content)})
    assert vocabulary.keys["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize(
    "name, content",
    [("chat_template.json", b'{"chat_template": "T"}'), ("chat_template.jinja", b"T"),
     ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": "T"},'
      b' {"name": "tool", "template": "U"}]}')],
)  # fmt: skip
def test_chat_templates_wherever_they_lie(name: str, content: bytes, tmp_path: Path) -> None:
    keys = read(tmp_path, spm_files() | {name: content}).keys
    assert keys["tokenizer.chat_template"] == "T"
    assert keys.get("tokenizer.chat_template.tool") == ("U" if "config" in name else None)


def test_rows_without_a_token_and_tokens_without_a_row(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, spm_files({"<image>": 512}))
    fit(vocabulary, 515)
    assert vocabulary.tokens[512:] == ["<image>", "<dummy00001>", "<dummy00002>"]
    assert vocabulary.types[513:] == [UNUSED] * 2
    fit(vocabulary, 512)
    assert len(vocabulary.tokens) == len(vocabulary.scores) == len(vocabulary.types) == 512
    assert "3 tokens left out" in vocabulary.notes[1]


BAD = [
    ({}, "no tokenizer; wanted tokenizer.model"),
    ({"tokenizer.model": b"\xff"}, "tokenizer.model: damaged"),
    ({"tokenizer.model": b""}, "tokenizer.model: no pieces"),
    ({"tokenizer.json": b"[]"}, "tokenizer.json: JSON, but a list"),
    ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 7}, "merges": []}}'}, "ids other than 0 to 0"),
    ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}}}'}, "no merges"),
    ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}}'}, "a merge that reads 7"),
    (spm_files({"<x>": 600}), "added token '<x>' has id 600, but 512 comes next"),
    (spm_files() | {"added_tokens.json": b'{"<x>": "y"}'}, "added tokens without a number"),
]


@pytest.mark.parametrize("files, message", BAD)
def test_bad_tokenizers(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        read(tmp_path, files)
    assert message in str(caught.value)
