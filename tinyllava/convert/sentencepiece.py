"""Reading tokenizer.model: the few fields of SentencePiece's protocol buffer that a tokenizer needs.

A protocol buffer is a list of fields: a number (field << 3 | kind), then the value: a varint (7 bits a byte, the
lowest first), 4 or 8 bytes, or a length and that many bytes, which may be fields again. Unknown ones are skipped.
Source: sentencepiece_model.proto in google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllava.errors import FileError

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
NORMAL = 1  # ModelProto.SentencePiece.Type; its numbers are those of tokenizer.ggml.token_type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
MAX_BYTES = 64 << 20

Value = int | bytes


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces by id, and whether a space is put before a text."""

    pieces: list[tuple[str, float, int]]  # text, score, type
    model_type: int
    add_dummy_prefix: bool


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(field number, value) of a message: an int, or the bytes of everything else. ValueError if it is none.

    >>> list(fields(bytes([0x08, 0x96, 0x01])))
    [(1, 150)]
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if kind == LENGTH:
            n, at = _varint(data, at)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            n = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + n > len(data):
            raise ValueError("a field that goes on beyond the end")
        yield key >> 3, data[at : at + n]
        at += n


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where the next thing begins."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a number that is cut off")
        number |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return number, at
    raise ValueError("a number of more than 64 bits")


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read tokenizer.model. FileError if it is damaged, or of a kind that GGUF's "llama" tokenizer is not."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileError(path, f"{path.stat().st_size} bytes", wanted="a tokenizer.model")
        model = parse(path.read_bytes())
    except (ValueError, TypeError) as error:
        hint = "Download the file again"
        raise FileError(path, f"damaged: {error}", wanted="a SentencePiece model", hint=hint) from None
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read") from None
    if not model.pieces:
        raise FileError(path, "no pieces", wanted="a SentencePiece model", hint="Download the file again")
    if model.model_type != BPE:
        raise FileError(path, f"a SentencePiece model of type {model.model_type}", wanted=f"{BPE} (BPE)")
    return model


def parse(data: bytes) -> SentencePieceModel:
    """A ModelProto. ValueError or TypeError if it is none."""
    pieces: list[tuple[str, float, int]] = []
    model_type, add_dummy_prefix = UNIGRAM, True
    for number, value in fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            model_type = int(dict(fields(_message(value))).get(3, UNIGRAM))
        elif number == 3:
            add_dummy_prefix = bool(dict(fields(_message(value))).get(3, True))
    return SentencePieceModel(pieces, model_type, add_dummy_prefix)


def _message(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _float(data: bytes) -> float:
    if len(data) != 4:
        raise ValueError("no number of 4 bytes where a score should be")
    return float(struct.unpack("<f", data)[0])


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in fields(data):
        if number == 1:
            text = _message(value).decode("utf-8")
        elif number == 2:
            score = _float(_message(value))
        elif number == 3:
            kind = int(value)
    return text, score, kind
