"""Real vocabularies: what llama.cpp answers with them, pruned in golden/ and whole where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.pruned import Case, PrunedVocabulary, load, load_json
from tinyllava.text.tokenizer import Tokenizer

NAMES = "llama-spm mistral-spm phi-3 llama-bpe gpt-2 qwen2 smollm gpt-neox deepseek-llm starcoder refact".split()
LEAST_CASES = 250  # .inp/.out lines and hard texts, each with BOS or without, with special tokens or without


def metadata(vocabulary: PrunedVocabulary) -> dict[str, Any]:
    """The keys as a GGUF file has them."""
    keys: dict[str, Any] = {
        "general.name": vocabulary.model_name,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_type,
    }
    if vocabulary.scores:
        keys["tokenizer.ggml.scores"] = vocabulary.scores
    if vocabulary.merges:
        keys["tokenizer.ggml.merges"] = vocabulary.merges
    return keys | {f"tokenizer.ggml.{key}": value for key, value in vocabulary.scalars.items()}


def is_known_difference(name: str, case: Case) -> bool:
    """Qwen2 lists "</s>" as a normal word. llama.cpp makes every "</s>" a control token; Qwen's own does not."""
    return name == "qwen2" and "</s>" in case.text and case.parse_special


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_of_llama_cpp(name: str) -> None:
    vocabulary = load(name)
    tokenizer = Tokenizer.from_metadata(metadata(vocabulary))
    assert len(vocabulary.cases) >= LEAST_CASES
    for case in vocabulary.cases:
        ids = tuple(tokenizer.encode(case.text, case.add_special, case.parse_special))
        assert (ids == case.ids) != is_known_difference(name, case), case


@pytest.mark.parametrize("name", NAMES)
def test_every_text_of_llama_cpp_comes_back(name: str) -> None:
    vocabulary = load(name)
    tokenizer = Tokenizer.from_metadata(metadata(vocabulary))
    for case in vocabulary.cases:
        if name == "phi-3" and "</s>" in case.text:
            continue  # it swallows the white space after special tokens
        written = case.text.replace("▁", " ") if tokenizer.kind == "spm" else case.text
        ids = tokenizer.encode(case.text, add_bos=False, parse_special=False)
        assert tokenizer.decode(ids, special=True) == written


def test_every_answer_of_sentencepiece() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(load("mistral-spm")))
    answers = load_json("vocab-mistral-spm.json.gz")["sentencepiece"]
    assert len(answers) > 250
    for text, ids, decoded in answers:
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids
        assert tokenizer.decode(ids) == decoded


def whole_vocabularies() -> list[Path]:
    """llama.cpp's own test files (models/ggml-vocab-*.gguf with .inp and .out), where a folder holds them."""
    folder = os.environ.get("TINYLLAVA_MODELS")
    return sorted(Path(folder).glob("**/ggml-vocab-*.gguf")) if folder else []


WHOLE = "llama-spm phi-3 llama-bpe gpt-2 qwen2 deepseek-llm deepseek-coder starcoder refact falcon mpt command-r"


@pytest.mark.models
@pytest.mark.parametrize("name", WHOLE.split())
def test_every_line_of_the_whole_vocabulary(name: str) -> None:
    paths = [path for path in whole_vocabularies() if path.name == f"ggml-vocab-{name}.gguf"]
    if not paths:
        pytest.skip(f"TINYLLAVA_MODELS has no ggml-vocab-{name}.gguf")
    tokenizer = Tokenizer.from_gguf(paths[0])
    inputs = paths[0].with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = paths[0].with_suffix(".gguf.out").read_text().split("\n")
    for text, line in zip(inputs, outputs, strict=True):
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids
        assert tokenizer.decode(ids) == text

    # Falcon and StarCoder have no token for some bytes of control characters and of planes 4 and above.
    letters = st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x3FFFF, exclude_characters="▁")

    @given(st.text(letters))
    def comes_back(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text

    comes_back()
