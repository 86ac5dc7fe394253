"""A checkpoint's tokenizer as GGUF metadata: tokenizer.model or tokenizer.json, and the files beside them.

    tokenizer.model            SentencePiece: pieces, scores, types
    tokenizer.json             byte-level BPE, or SentencePiece's pieces as merges
    vocab.json, merges.txt     byte-level BPE of older checkpoints
    added_tokens.json          text -> id of tokens that were added later
    tokenizer_config.json      bos_token, add_bos_token, added_tokens_decoder, chat_template, ...
    chat_template.json, chat_template.jinja   where newer checkpoints keep the template

Tokens, scores and types are those of convert_legacy_llama.py, but for types it did not tell apart: user-defined
pieces of SentencePiece, and added tokens that tokenizer_config.json calls special, which it wrote as ordinary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava.convert.sentencepiece import read_sentencepiece
from tinyllava.convert.tokenizer_json import (
    merges_of,
    pre_tokenizer,
    puts_bos_first,
    puts_space_first,
    sentencepiece_scores,
)
from tinyllava.errors import FileError
from tinyllava.files.checkpoint import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
ADDED_SCORE = -1000.0  # of tokens that no merge makes
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}  # sic: GGUF's key
TYPES = ("spm", "bpe", "hfft")  # --vocab-type of convert_legacy_llama.py


@dataclass
class Vocabulary:
    """Tokens by id, and everything else that tokenizer.ggml.* holds."""

    model: str  # "llama" or "gpt2"
    source: Path
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    pre: str = ""
    keys: dict[str, Any] = field(default_factory=dict)  # the rest, by whole name
    notes: list[str] = field(default_factory=list)

    def add(self, text: str, kind: int) -> None:
        """Another token, at the end."""
        self.tokens.append(text)
        self.scores.append(ADDED_SCORE)
        self.types.append(kind)

    def metadata(self) -> dict[str, Any]:
        """Keys and values for the file."""
        import numpy as np

        keys: dict[str, Any] = {"tokenizer.ggml.model": self.model}
        if self.pre:
            keys["tokenizer.ggml.pre"] = self.pre
        keys["tokenizer.ggml.tokens"] = self.tokens
        keys["tokenizer.ggml.scores"] = np.array(self.scores, np.float32)
        keys["tokenizer.ggml.token_type"] = np.array(self.types, np.int32)
        if self.merges:
            keys["tokenizer.ggml.merges"] = self.merges
        return keys | self.keys


def read_vocabulary(folder: Path, config: dict[str, Any], kinds: Iterable[str] = TYPES) -> Vocabulary:
    """The first kind of tokenizer that ``folder`` has. ``config``: the language model's part of config.json.

    FileError if there is none, or if it is damaged or of a kind that GGUF has no name for.
    """
    tokenizer_config = read_json(folder / "tokenizer_config.json", missing={})
    tokenizer = read_json(folder / "tokenizer.json", missing={})
    readers = {"spm": _sentencepiece, "bpe": _byte_level, "hfft": _sentencepiece_json}
    found = (readers[kind](folder, tokenizer) for kind in kinds)
    vocabulary = next((vocabulary for vocabulary in found if vocabulary is not None), None)
    if vocabulary is None:
        wanted = "tokenizer.model, tokenizer.json, or vocab.json with merges.txt"
        raise FileError(folder, "no tokenizer", wanted=wanted, hint="Copy it from the model's own folder")
    items = _special_items(vocabulary, tokenizer, tokenizer_config)
    _append(vocabulary, {item["content"]: item["id"] for item in items}, USER_DEFINED)
    _mark_types(vocabulary, items)
    _add_special_ids(vocabulary, tokenizer, tokenizer_config, config)
    _add_template(vocabulary, folder, tokenizer_config)
    return vocabulary


def fit(vocabulary: Vocabulary, n_rows: int) -> None:
    """As many tokens as the embedding has rows: llama.cpp reads no other files.

    Rows beyond the tokens (transformers rounds their number up) get unused ones, named as --pad-vocab of
    convert_legacy_llama.py names them. Tokens beyond the rows, which the model cannot know, are left out.
    """
    n_tokens = len(vocabulary.tokens)
    for i in range(1, n_rows - n_tokens + 1):
        vocabulary.add(f"<dummy{i:05}>", UNUSED)
    if n_rows > n_tokens:
        vocabulary.notes.append(f"{n_rows - n_tokens} rows without a token: called <dummy00001> and so on")
    if n_rows < n_tokens:
        names = ", ".join(vocabulary.tokens[n_rows:][:3])
        vocabulary.notes.append(f"{n_tokens - n_rows} tokens left out, for which there is no row: {names}")
        del vocabulary.tokens[n_rows:], vocabulary.scores[n_rows:], vocabulary.types[n_rows:]
        ids = [key for key, value in vocabulary.keys.items() if key.endswith("_token_id") and value >= n_rows]
        for key in ids:
            del vocabulary.keys[key]


# ---- the three kinds of tokenizer


def _sentencepiece(folder: Path, _: dict[str, Any]) -> Vocabulary | None:
    path = folder / "tokenizer.model"
    if not path.exists():
        return None
    model = read_sentencepiece(path)
    texts, scores, types = (list(column) for column in zip(*model.pieces, strict=True))
    vocabulary = Vocabulary("llama", path, texts, scores, types)
    if not model.add_dummy_prefix:
        vocabulary.keys["tokenizer.ggml.add_space_prefix"] = False
    _append(vocabulary, read_json(folder / "added_tokens.json", missing={}), USER_DEFINED)
    return vocabulary


def _byte_level(folder: Path, tokenizer: dict[str, Any]) -> Vocabulary | None:
    """tokenizer.json with a ByteLevel decoder, or vocab.json with merges.txt."""
    path = folder / "tokenizer.json"
    model = _part(tokenizer, "model")
    if model:
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            return None
        vocab, merges, pre = model.get("vocab"), merges_of(model, path), pre_tokenizer(tokenizer)
        extra = {item["content"]: item["id"] for item in _added(tokenizer, path)}
    elif (path := folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocab, pre = read_json(path), "gpt-2"
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        extra = read_json(folder / "added_tokens.json", missing={})
    else:
        return None
    vocabulary = Vocabulary("gpt2", path, _by_id(vocab, path), [], [], merges, pre or "default")
    vocabulary.scores, vocabulary.types = [0.0] * len(vocabulary.tokens), [NORMAL] * len(vocabulary.tokens)
    _append(vocabulary, extra, USER_DEFINED)
    if not pre:
        vocabulary.notes.append("tokenizer.json cuts words in a way without a name in GGUF: 'default' is written")
    return vocabulary


def _sentencepiece_json(folder: Path, tokenizer: dict[str, Any]) -> Vocabulary | None:
    """tokenizer.json of a LLaMA: SentencePiece's pieces, and merges in place of scores."""
    path = folder / "tokenizer.json"
    model = _part(tokenizer, "model")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    tokens = _by_id(model.get("vocab"), path)
    types = [BYTE if len(t) == 6 and t.startswith("<0x") and t.endswith(">") else NORMAL for t in tokens]
    if (unknown := model.get("unk_token")) in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    scores = sentencepiece_scores(tokens, merges_of(model, path))
    vocabulary = Vocabulary("llama", path, tokens, scores, types)
    if not puts_space_first(tokenizer):
        vocabulary.keys["tokenizer.ggml.add_space_prefix"] = False
    _append(vocabulary, {item["content"]: item["id"] for item in _added(tokenizer, path)}, USER_DEFINED)
    return vocabulary


def _part(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _added(tokenizer: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """tokenizer.json's added_tokens."""
    items = tokenizer.get("added_tokens") or []
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise FileError(path, "an added token without a text", hint="Download the file again")
    return list(items)


def _by_id(vocab: Any, path: Path) -> list[str]:
    """Texts in the order of their ids, which must be 0, 1, 2, ..."""
    if not isinstance(vocab, dict) or not all(isinstance(id, int) for id in vocab.values()):
        raise FileError(path, "no vocabulary", wanted="text -> id", hint="Download the file again")
    texts = sorted(vocab, key=lambda text: int(vocab[text]))
    if [vocab[text] for text in texts] != list(range(len(texts))):
        raise FileError(path, f"ids other than 0 to {len(texts) - 1} for {len(texts)} tokens")
    return texts


def _append(vocabulary: Vocabulary, extra: dict[str, Any], kind: int) -> None:
    """Added tokens behind the others. FileError if their ids leave a gap."""
    n_tokens = len(vocabulary.tokens)
    if not all(isinstance(id, int) for id in extra.values()):
        raise FileError(vocabulary.source.parent, "added tokens without a number", wanted="text -> id")
    new = {int(id): text for text, id in extra.items() if id >= n_tokens}
    for id in sorted(new):
        if id != len(vocabulary.tokens):
            found = f"added token {new[id]!r} has id {id}, but {len(vocabulary.tokens)} comes next"
            raise FileError(vocabulary.source.parent / "added_tokens.json", found)
        vocabulary.add(new[id], kind)


# ---- what other files say of the tokens


def _special_items(
    vocabulary: Vocabulary, tokenizer: dict[str, Any], config: dict[str, Any]
) -> list[dict[str, Any]]:
    """{"id", "content", "special"} of tokenizer.json's added_tokens and tokenizer_config.json's decoder."""
    items = _added(tokenizer, vocabulary.source)
    decoder = _part(config, "added_tokens_decoder")
    items += [{**item, "id": int(id)} for id, item in decoder.items() if id.isdecimal() and isinstance(item, dict)]
    return [item for item in items if type(item.get("id")) is int and isinstance(item.get("content"), str)]


def _mark_types(vocabulary: Vocabulary, items: list[dict[str, Any]]) -> None:
    """Tokens called special are control tokens: they mean something to the model, and are not text."""
    for item in items:
        id = item["id"]
        known = 0 <= id < len(vocabulary.tokens) and item["content"] == vocabulary.tokens[id]
        if known and vocabulary.types[id] in (NORMAL, USER_DEFINED):
            vocabulary.types[id] = CONTROL if item.get("special") else USER_DEFINED


def _add_special_ids(
    vocabulary: Vocabulary, tokenizer: dict[str, Any], tokenizer_config: dict[str, Any], config: dict[str, Any]
) -> None:
    """bos_token_id and its like: by the text in tokenizer_config.json, or by the number in config.json."""
    ids = {text: id for id, text in reversed(list(enumerate(vocabulary.tokens)))}
    for name, key in SPECIAL.items():
        entry = tokenizer_config.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        id = ids.get(text) if isinstance(text, str) else None
        number: Any = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number  # LLaMA-3 has several ends
        id = number if id is None else id
        if type(id) is int and 0 <= id < len(vocabulary.tokens):
            vocabulary.keys[f"tokenizer.ggml.{key}_token_id"] = id
        add = tokenizer_config.get(f"add_{name}_token")
        if isinstance(add, bool) and name in ("bos", "eos"):
            vocabulary.keys[f"tokenizer.ggml.add_{name}_token"] = add
    if puts_bos_first(tokenizer):
        vocabulary.keys.setdefault("tokenizer.ggml.add_bos_token", True)


def _add_template(vocabulary: Vocabulary, folder: Path, tokenizer_config: dict[str, Any]) -> None:
    """tokenizer.chat_template; of several named ones "default", the others under their names."""
    template = tokenizer_config.get("chat_template")
    if template is None:
        template = read_json(folder / "chat_template.json", missing={}).get("chat_template")
    if template is None and (path := folder / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8", errors="replace")
    if isinstance(template, str):
        vocabulary.keys["tokenizer.chat_template"] = template
    if not isinstance(template, list):
        return
    whole = (entry for entry in template if isinstance(entry, dict) and {"name", "template"} <= set(entry))
    named = {str(entry["name"]): str(entry["template"]) for entry in whole}
    if "default" in named:
        vocabulary.keys["tokenizer.chat_template"] = named.pop("default")
    if named:
        vocabulary.keys["tokenizer.chat_templates"] = list(named)
        vocabulary.keys |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
