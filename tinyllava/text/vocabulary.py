"""What a GGUF file says about its tokens: the ``tokenizer.ggml.*`` keys, checked and with defaults filled in.

Sources: llama.cpp's ``llama_vocab`` for the keys, their defaults and the list of tokens that end an answer;
SentencePiece's ``sentencepiece_model.proto`` for the token types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np

from tinyllava.errors import ModelError

KEY = "tokenizer.ggml."
SPACE = "▁"  # U+2581: how SentencePiece writes a space inside a token

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

Kind = Literal["spm", "bpe"]
KINDS: dict[str, Kind] = {"llama": "spm", "gpt2": "bpe"}  # by tokenizer.ggml.model

BYTE_TEXT = re.compile("<0x([0-9A-Fa-f]{2})>")

# Pre-tokenizers whose models want a BOS although the file may not say so.
BOS_BY_PRE = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"})

# Tokens that end an answer, whatever id the file gives to EOS. Many files mark only one of theirs.
END_TEXTS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|return|>",
    "<|call|>",
    # Paddings and file separators of code models: nothing that follows them belongs to the answer.
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model, by id. ``notes`` are sentences for the user about what the file left open."""

    kind: Kind
    tokens: list[str]  # by id, as the file writes them
    scores: list[float]  # by id; SentencePiece merges the pair with the highest score first
    types: list[int]  # by id: NORMAL ... BYTE
    merges: list[str]  # "left right", best first; only for "bpe"
    pre: str  # name of the pre-tokenizer; only for "bpe"
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool
    add_space_prefix: bool
    end_ids: frozenset[int]
    strips_right: frozenset[int]  # special tokens that swallow the white space after them (Phi-3)
    notes: tuple[str, ...]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: object = "tokenizer") -> Vocabulary:
        """Read the keys; a key that is missing gets llama.cpp's default, one that is damaged a ModelError."""
        kind = _kind(metadata, where)
        tokens = _strings(metadata, "tokens", where)
        notes: list[str] = []
        special = _special_ids(metadata, kind, len(tokens), where, notes)
        types = _types(metadata, kind, tokens, special, where)
        end_ids = _end_ids(tokens, types, special)
        for id in end_ids:
            types[id] = CONTROL  # files converted before 2024 often call <|im_end|> a normal word
        pre = str(metadata.get(KEY + "pre") or "")
        if kind == "bpe" and not pre:
            notes.append("the file names no pre-tokenizer, so 'default' is used: words may be split wrongly")
            pre = "default"
        if _flag(metadata, "add_eos_token", False, where):
            notes.append("add_eos_token is set, but a prompt must stay open: no EOS is added")
        add_bos = _flag(metadata, "add_bos_token", kind == "spm" or pre in BOS_BY_PRE, where)
        return cls(
            kind=kind,
            tokens=tokens,
            scores=_scores(metadata, kind, tokens, where, notes),
            types=types,
            merges=_strings(metadata, "merges", where) if kind == "bpe" else [],
            pre=pre if kind == "bpe" else "",
            bos_id=special["bos"],
            eos_id=special["eos"],
            unk_id=special["unknown"],
            add_bos=add_bos and special["bos"] is not None,
            add_space_prefix=kind == "spm" and _flag(metadata, "add_space_prefix", True, where),
            end_ids=frozenset(end_ids),
            strips_right=_strips_right(metadata, tokens, types),
            notes=tuple(notes),
        )

    def special_ids(self, parse_control: bool) -> list[int]:
        """Tokens that are cut out of a text before it is merged, longest (in bytes) first.

        User-defined tokens always are; control and unknown tokens only when the caller trusts the text.
        """
        wanted = {USER_DEFINED, CONTROL, UNKNOWN} if parse_control else {USER_DEFINED}
        ids = [id for id, type in enumerate(self.types) if type in wanted and self.tokens[id]]
        return sorted(ids, key=lambda id: (-len(self.tokens[id].encode()), id))

    def ids_by_text(self) -> dict[str, int]:
        """Text -> id of every token that merging may produce.

        Control, unknown, unused and byte tokens are left out, as in SentencePiece: typing "</s>" letter by
        letter never makes an EOS. (llama.cpp would merge into them.) Of two equal texts the first id wins.
        """
        ids: dict[str, int] = {}
        for id, (text, type) in enumerate(zip(self.tokens, self.types, strict=True)):
            if type not in (CONTROL, UNKNOWN, UNUSED, BYTE) and text:
                ids.setdefault(text, id)
        return ids


def byte_value(text: str) -> int | None:
    """255 for "<0xFF>", None for anything else."""
    match = BYTE_TEXT.fullmatch(text)
    return int(match[1], 16) if match else None


def _kind(metadata: Mapping[str, Any], where: object) -> Kind:
    if KEY + "model" not in metadata:
        raise ModelError(where, f"no vocabulary: {KEY}model is missing")
    model = str(metadata[KEY + "model"])
    if model not in KINDS:
        raise ModelError(where, f"tokenizer '{model}'", wanted=" or ".join(f"'{name}'" for name in KINDS))
    return KINDS[model]


def _list(metadata: Mapping[str, Any], name: str, where: object) -> list[Any]:
    """An array of the file as a Python list (NumPy scalars are slow to compare)."""
    value = metadata.get(KEY + name)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise ModelError(where, f"{KEY}{name} is {'missing' if value is None else 'not an array'}")
    return value


def _strings(metadata: Mapping[str, Any], name: str, where: object) -> list[str]:
    texts = _list(metadata, name, where)
    if not texts and name == "tokens":
        raise ModelError(where, f"{KEY}tokens is empty")
    if not all(isinstance(text, str) for text in texts):
        raise ModelError(where, f"{KEY}{name} holds something other than strings")
    return list(texts)


def _numbers(metadata: Mapping[str, Any], name: str, n_tokens: int, where: object) -> list[Any]:
    """One finite number a token; numbers past the last token are left out."""
    numbers = _list(metadata, name, where)
    if len(numbers) < n_tokens:
        raise ModelError(where, f"{KEY}{name} has {len(numbers)} numbers for {n_tokens} tokens")
    if not all(isinstance(number, (int, float)) and isfinite(number) for number in numbers):
        raise ModelError(where, f"{KEY}{name} holds something other than finite numbers")
    return numbers[:n_tokens]


def _flag(metadata: Mapping[str, Any], name: str, default: bool, where: object) -> bool:
    value = metadata.get(KEY + name, default)
    if not isinstance(value, (bool, int)):
        raise ModelError(where, f"{KEY}{name} is {value!r}", wanted="true or false")
    return bool(value)


def _scores(
    metadata: Mapping[str, Any], kind: Kind, tokens: list[str], where: object, notes: list[str]
) -> list[float]:
    if KEY + "scores" in metadata:
        return [float(score) for score in _numbers(metadata, "scores", len(tokens), where)]
    if kind == "spm":
        # A SentencePiece trainer numbers tokens in the order of its merges, so ids can stand in for scores.
        notes.append("the file has no token scores: earlier tokens are merged first")
    return [-float(id) for id in range(len(tokens))]


def _types(
    metadata: Mapping[str, Any], kind: Kind, tokens: list[str], special: dict[str, int | None], where: object
) -> list[int]:
    if KEY + "token_type" in metadata:
        return [int(type) for type in _numbers(metadata, "token_type", len(tokens), where)]
    types = [NORMAL] * len(tokens)
    if kind == "spm":
        types = [NORMAL if byte_value(text) is None else BYTE for text in tokens]
    for name in ("bos", "eos", "unknown"):
        id = special[name]
        if id is not None and (kind == "spm" or tokens[id].startswith("<")):
            types[id] = UNKNOWN if name == "unknown" else CONTROL
    return types


def _special_ids(
    metadata: Mapping[str, Any], kind: Kind, n_tokens: int, where: object, notes: list[str]
) -> dict[str, int | None]:
    default = {"bos": 1, "eos": 2, "unknown": 0} if kind == "spm" else {"bos": 11, "eos": 11}
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        id = metadata.get(f"{KEY}{name}_token_id")
        if not isinstance(id, (int, type(None))):
            raise ModelError(where, f"{KEY}{name}_token_id is {id!r}", wanted="a number")
        if id is not None and not 0 <= id < n_tokens:
            notes.append(f"{name}_token_id {id} is outside the vocabulary of {n_tokens}: ignored")
            id = None
        id = default.get(name) if id is None else int(id)  # a bool is an int, too
        ids[name] = id if id is not None and id < n_tokens else None
    return ids


def _end_ids(tokens: list[str], types: list[int], special: dict[str, int | None]) -> set[int]:
    """EOS, EOT, EOM, and every token whose text says that the turn is over."""
    by_key = {id for id in (special["eos"], special["eot"], special["eom"]) if id is not None}
    by_text = {id for id, text in enumerate(tokens) if text in END_TEXTS}
    # In Qwen2 "</s>" is a word of HTML like others: it counts only where the file sets it apart.
    by_text |= {id for id, text in enumerate(tokens) if text == "</s>" and types[id] != NORMAL}
    if {"<|return|>", "<|call|>"} <= {tokens[id] for id in by_text}:
        by_text = {id for id in by_text if tokens[id] != "<|end|>"}  # there it only ends a thought
    return by_key | by_text


def _strips_right(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> frozenset[int]:
    """Phi-3's special tokens but three. No key says so: llama.cpp, too, goes by the model's name."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = {id for id, type in enumerate(types) if type in (CONTROL, UNKNOWN, USER_DEFINED)}
    return frozenset(id for id in special if tokens[id] not in ("<unk>", "<s>", "<|endoftext|>"))
