"""What llama.cpp's tokenizers answer, with the vocabularies that its own tests use."""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

from golden.manifest import record, save_json, sha256, versions
from golden.pruned import expand, prune, write_gguf
from golden.texts import nasty_texts

# gpt-neox names no pre-tokenizer: the one that is used then is called "default"
NAMES = "llama-spm phi-3 llama-bpe gpt-2 qwen2 starcoder refact deepseek-llm gpt-neox".split()
SEPARATOR = "\n__ggml_vocab_test__\n"
FLAGS = [(False, False), (False, True), (True, True)]  # (add_special, parse_special)
IGNORED = {"chat_template"}

Answer = tuple[str, bool, bool, list[int]]  # text, add_special, parse_special, ids


class Tokenizer:
    """llama.cpp's tokenizer of one GGUF file."""

    def __init__(self, path: str | Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, parse_special)
        return list(ids[:n])

    def answers(self, texts: list[str]) -> list[Answer]:
        """Every text with every setting; the settings that change nothing are stored too."""
        return [(text, *flags, self.encode(text, *flags)) for text in texts for flags in FLAGS]

    def close(self) -> None:
        """Free the C side."""
        llama_cpp.llama_model_free(self.model)


def read_metadata(path: Path) -> dict[str, Any]:
    """tokenizer.ggml.* of a GGUF file, by key without that prefix."""
    prefix = "tokenizer.ggml."
    fields = gguf.GGUFReader(path).fields
    found = {k.removeprefix(prefix): v.contents() for k, v in fields.items() if k.startswith(prefix)}
    return {key: value for key, value in found.items() if key not in IGNORED}


def make(name: str, path: Path, texts: list[str], expected: dict[str, list[int]], command: str) -> None:
    """Write vocab-<name>.json.gz, after checking that the pruned vocabulary answers as the whole one does."""
    tokenizer = Tokenizer(path)
    cases = tokenizer.answers(texts)
    for text, ids in expected.items():
        if tokenizer.encode(text, False, False) != ids:
            raise SystemExit(f"{name}: llama.cpp's own file says that {text!r} gives {ids}")
    tokenizer.close()
    stored = prune(read_metadata(path), texts)
    model_name = gguf.GGUFReader(path).fields["general.name"].contents()
    check_pruned(model_name, stored, cases)
    content = {"source": path.name, "model_name": model_name, "vocabulary": stored, "cases": cases}
    out = save_json(f"vocab-{name}.json.gz", content)
    packages = versions("llama-cpp-python", "gguf")
    record(out, command, packages, "exact: integers", source={"file": path.name, "sha256": sha256(path)})


def check_pruned(model_name: str, stored: dict[str, Any], cases: list[Answer]) -> None:
    """Tokenize every case with the pruned vocabulary as well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.gguf"
        write_gguf(path, expand(stored, [], "", model_name))
        tokenizer = Tokenizer(path)
        wrong = [case[:3] for case in cases if tokenizer.encode(*case[:3]) != case[3]]
        tokenizer.close()
    if wrong:
        raise SystemExit(f"{model_name}: pruning changed {len(wrong)} of {len(cases)}, such as {wrong[:3]}")
    print(f"{model_name}: {len(stored['ids'])} of {stored['n_tokens']} tokens, {len(cases)} cases")


def make_llama_vocabularies(folder: str) -> None:
    """vocab-<name>.json.gz from a folder with llama.cpp's ggml-vocab-*.gguf, .inp and .out"""
    for name in NAMES:
        path = Path(folder) / f"ggml-vocab-{name}.gguf"
        questions, answers = path.with_name(path.name + ".inp"), path.with_name(path.name + ".out")
        expected = {}
        if questions.exists():
            texts, lines = questions.read_bytes().decode().split(SEPARATOR), answers.read_text().split("\n")
            for text, line in zip(texts, lines, strict=True):  # both end with an empty one
                expected[text] = [int(word) for word in line.split()]
        make(name, path, list(dict.fromkeys([*expected, *nasty_texts()])), expected, "llama-vocabs FOLDER")


def make_smollm(path: str) -> None:
    """vocab-smollm.json.gz from SmolLM2's GGUF"""
    make("smollm", Path(path), nasty_texts(), {}, "smollm-vocab SMOLLM2_GGUF")
