"""The outside oracles: sentencepiece with models trained here, llama.cpp with real vocabularies."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.pruned import load, write_gguf
from golden.texts import nasty_texts
from tinyllava.text.tokenizer import Tokenizer

pytestmark = pytest.mark.peers

# Unassigned characters are left out, since Unicode versions differ, and the two that engines disagree about:
# the long s (an s when case is ignored) and the ideographic space (a sign to deepseek-llm's own pattern).
letters = st.characters(codec="utf-8", exclude_categories=["Cn", "Cs"], exclude_characters="ſ\u3000")
words = "the| and|  |   x|\n|\n\n|\t|'s|'LL|123|!?|é|你好|🙂|a\u0301|▁".split("|")
special = ["<s>", "<unk>", "<0x0A>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|endoftext|>", "[INST]"]
bits = st.sampled_from([*words, *special])
texts = st.text(letters) | st.lists(bits | st.text(letters, max_size=3)).map("".join)


# --- sentencepiece ---

CORPUS = [text for text in nasty_texts() if text.strip() and "\x00" not in text] * 4
TRAININGS: dict[str, dict[str, Any]] = {
    "as LLaMA": {"byte_fallback": True},
    "unknown characters": {"byte_fallback": False},
    "tokens across words": {"byte_fallback": True, "split_by_whitespace": False},
    "no space prefix": {"byte_fallback": True, "add_dummy_prefix": False},
}


def train(**options: Any) -> Any:
    """A small BPE model with LLaMA's settings: no normalisation, every space kept."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    fixed = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=800, character_coverage=0.98,
        minloglevel=2, hard_vocab_limit=False, **fixed, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(processor: Any) -> dict[str, Any]:
    """The model's pieces as GGUF holds them; sentencepiece numbers their types as GGUF does."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    model.ParseFromString(processor.serialized_model_proto())
    keys = {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize("training", TRAININGS)
def test_sentencepiece_gives_the_same_ids_and_texts(training: str) -> None:
    processor = train(**TRAININGS[training])
    tokenizer = Tokenizer.from_metadata(metadata_of(processor))

    @given(texts)
    def same(text: str) -> None:
        ids = processor.encode(text)
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids
        if 0 not in ids:  # sentencepiece writes ⁇ for an unknown token, and llama.cpp nothing
            assert tokenizer.decode(ids) == processor.decode(ids)

    same()


@settings(max_examples=1000)
@given(ids=st.lists(st.integers(3, 258) | st.integers(0, 799)))
def test_sentencepiece_decodes_the_same_bytes(ids: list[int]) -> None:
    """Bytes that form no character: each becomes one U+FFFD there, each broken run one here."""
    processor, tokenizer = llama_like()
    known = [id for id in ids if id != processor.unk_id() and id < processor.get_piece_size()]
    assert tokenizer.decode(known).replace("\ufffd", "") == processor.decode(known).replace("\ufffd", "")


@cache
def llama_like() -> tuple[Any, Tokenizer]:
    processor = train(**TRAININGS["as LLaMA"])
    return processor, Tokenizer.from_metadata(metadata_of(processor))


# --- llama.cpp ---

NAMES = "llama-spm mistral-spm phi-3 llama-bpe gpt-2 qwen2 smollm gpt-neox deepseek-llm starcoder refact".split()


class LlamaCpp:
    """llama.cpp's tokenizer of one GGUF file."""

    def __init__(self, llama_cpp: Any, path: Path) -> None:
        self.api = llama_cpp
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = self.api.llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, parse_special)
        return list(ids[:n])

    def piece(self, id: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = self.api.llama_token_to_piece(self.vocab, id, buffer, 256, 0, special)
        return buffer.raw[:n]

    def end_ids(self, n_vocab: int) -> set[int]:
        return {id for id in range(n_vocab) if self.api.llama_vocab_is_eog(self.vocab, id)}


@pytest.fixture
def open_llama_cpp(tmp_path: Path) -> Iterator[Callable[[str], tuple[LlamaCpp, Tokenizer]]]:
    llama_cpp = pytest.importorskip("llama_cpp")
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    opened = []

    def open_vocabulary(name: str) -> tuple[LlamaCpp, Tokenizer]:
        path = tmp_path / "vocabulary.gguf"
        write_gguf(path, load(name))
        opened.append(LlamaCpp(llama_cpp, path))
        return opened[-1], Tokenizer.from_gguf(path)

    yield open_vocabulary
    for peer in opened:
        llama_cpp.llama_model_free(peer.model)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_gives_the_same_ids(name: str, open_llama_cpp: Any) -> None:
    peer, tokenizer = open_llama_cpp(name)

    @given(texts, st.booleans(), st.booleans())
    def same(text: str, add_bos: bool, parse_special: bool) -> None:
        assert tokenizer.encode(text, add_bos, parse_special) == peer.encode(text, add_bos, parse_special)

    same()


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_gives_the_same_bytes_and_end_tokens(name: str, open_llama_cpp: Any) -> None:
    peer, tokenizer = open_llama_cpp(name)
    # Qwen2 lists "</s>" as a normal word, which llama.cpp overrules.
    different = {tokenizer.id_of("</s>")} if name == "qwen2" else set()
    for id in set(range(tokenizer.n_vocab)) - different:
        assert tokenizer.token_bytes(id) == peer.piece(id, special=False)
        assert tokenizer.token_bytes(id, special=True) == peer.piece(id, special=True)
    assert tokenizer.end_ids == peer.end_ids(tokenizer.n_vocab) - different
