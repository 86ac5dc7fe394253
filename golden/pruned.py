"""Real vocabularies, cut down to the tokens that a fixed list of texts can produce.

Why that keeps every answer: a tokenizer of either kind starts from characters or bytes and joins neighbours,
so whatever it looks up on the way from a text, joined or whole, is a piece of that text (as the vocabulary
writes text: spaces as U+2581, or bytes by GPT-2's alphabet). An entry that is in no text is never found,
whatever its rank, and a merge is never tried unless both its sides stand side by side in a text. So such
entries can be replaced; ids stay, since the list keeps its length. Control and byte tokens are always kept.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from golden.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, byte_alphabet

SPACE = "\u2581"
BETWEEN = "\ue000"  # stands between texts; no vocabulary here has it
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """What one tokenizer answered to one text."""

    text: str
    add_special: bool  # put BOS before (where the vocabulary asks for it)
    parse_special: bool  # the text "<s>" means the token <s>
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PrunedVocabulary:
    """A tokenizer's metadata as in a GGUF file, by key without "tokenizer.ggml.", and its cases."""

    source: str
    model_name: str  # general.name: llama.cpp strips the space after special tokens where it says "phi3"
    scalars: dict[str, Any]  # model, pre, bos_token_id, add_bos_token, ...
    tokens: list[str]  # pruned ones read <prunedN>
    token_type: list[int]
    scores: list[float]  # empty for BPE
    merges: list[str]  # empty for SPM; those left, in their old order
    cases: list[Case]


def forms(texts: list[str], model: str) -> str:
    """All texts as the vocabulary writes them, and as they are, in one string to search in."""
    if model == "llama":
        written = [SPACE + text.replace(" ", SPACE) for text in texts]
    else:
        letters = byte_alphabet()
        written = ["".join(letters[byte] for byte in text.encode()) for text in texts]
    return BETWEEN.join(written + texts)


def can_occur(token: str, searched: str) -> bool:
    """Whether a token can come out of a text; a space may have been put before any part of it."""
    return token in searched or token.removeprefix(SPACE) in searched


def prune(metadata: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The JSON form of a vocabulary without what `texts` cannot produce.

    `metadata`: tokenizer.ggml.* of a GGUF file, by key without that prefix.
    """
    searched = forms(texts, metadata["model"])
    types = metadata["token_type"]
    kept = [
        i
        for i, token in enumerate(metadata["tokens"])
        if types[i] in (UNKNOWN, CONTROL, BYTE) or can_occur(token, searched)
    ]
    merges = [merge for merge in metadata.get("merges", []) if merge.replace(" ", "") in searched]
    lists = ("tokens", "token_type", "scores", "merges")
    return {
        "n_tokens": len(types),
        "ids": kept,
        "tokens": [metadata["tokens"][i] for i in kept],
        "token_type": [types[i] for i in kept],
        "scores": [metadata["scores"][i] for i in kept] if metadata["model"] == "llama" else [],
        "merges": merges,
        "scalars": {key: value for key, value in metadata.items() if key not in lists},
    }


def load_json(name: str) -> Any:
    """The content of golden/<name>, gzipped JSON."""
    return json.loads(gzip.decompress((FOLDER / name).read_bytes()))


def expand(stored: dict[str, Any], cases: list[Case], source: str, model_name: str) -> PrunedVocabulary:
    """Undo prune(): full-length lists again."""
    n = stored["n_tokens"]
    tokens, types = [f"<pruned{i}>" for i in range(n)], [NORMAL] * n
    scores = [-1e9] * n if stored["scores"] else []
    for at, i in enumerate(stored["ids"]):
        tokens[i], types[i] = stored["tokens"][at], stored["token_type"][at]
        if scores:
            scores[i] = stored["scores"][at]
    scalars, merges = stored["scalars"], stored["merges"]
    return PrunedVocabulary(source, model_name, scalars, tokens, types, scores, merges, cases)


def load(name: str) -> PrunedVocabulary:
    """Read golden/vocab-<name>.json.gz."""
    content = load_json(f"vocab-{name}.json.gz")
    cases = [Case(text, add, parse, tuple(ids)) for text, add, parse, ids in content["cases"]]
    return expand(content["vocabulary"], cases, content["source"], content["model_name"])


def write_gguf(path: str | Path, vocabulary: PrunedVocabulary, arch: str = "llama") -> None:
    """A GGUF file that holds a vocabulary and nothing else."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(vocabulary.model_name)
    writer.add_vocab_size(len(vocabulary.tokens))
    for key, value in vocabulary.scalars.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_type)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
