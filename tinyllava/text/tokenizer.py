"""Text <-> token ids, as the model saw them in training.

    text -> special tokens cut out -> SentencePiece-BPE (spm.py) or byte-level BPE (bpe.py) -> ids
    ids -> bytes of each token -> UTF-8 -> text

A token may end in the middle of a character, so a stream of tokens goes through ``TextStream``, which holds
bytes back until their character is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tinyllava.errors import UsageError
from tinyllava.text.bpe import ByteLevelBPE
from tinyllava.text.spm import SentencePieceBPE
from tinyllava.text.vocabulary import CONTROL, SPACE, UNKNOWN, USER_DEFINED, Kind, Vocabulary

if TYPE_CHECKING:
    from tinyllava.files.gguf import GGUFFile


Prefix = Literal["each_text", "first_text", "no_text"]


class _Model(Protocol):
    """What spm.py and bpe.py have in common."""

    def encode(self, text: str, prefix: bool, /) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...


class Tokenizer:
    """The vocabulary of one model, held open with its caches. ``decode(encode(text)) == text``.

    Two exceptions, both SentencePiece's: "▁" comes back as a space, and half a surrogate pair as U+FFFD.
    """

    def __init__(self, vocabulary: Vocabulary, where: object = "tokenizer") -> None:
        self._vocabulary = vocabulary
        self._model: _Model = (
            SentencePieceBPE(vocabulary) if vocabulary.kind == "spm" else ByteLevelBPE(vocabulary, where)
        )
        self._special = {parse: vocabulary.special_ids(parse) for parse in (False, True)}
        self.n_vocab = len(vocabulary.tokens)
        self.kind: Kind = vocabulary.kind
        self.pre = vocabulary.pre
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.add_bos = vocabulary.add_bos
        self.end_ids = vocabulary.end_ids
        self.notes = vocabulary.notes

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFFile) -> Tokenizer:
        """Read the vocabulary of a GGUF file, given by its path or already open."""
        if isinstance(source, (str, Path)):
            from tinyllava.files.gguf import open_gguf

            with open_gguf(source) as file:
                return cls.from_metadata(file.metadata, where=source)
        return cls.from_metadata(source.metadata, where=source.path)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: object = "tokenizer") -> Tokenizer:
        """Read the ``tokenizer.ggml.*`` keys. ``where`` is the name that errors give the source."""
        return cls(Vocabulary.from_metadata(metadata, where), where)

    def encode(
        self, text: str, add_bos: bool = True, parse_special: bool = True, space_prefix: Prefix = "each_text"
    ) -> list[int]:
        """Ids of a text. BOS goes in front if ``add_bos`` and if the model was trained with one.

        With ``parse_special``, "</s>" in the text is the control token; without, it is four characters.
        Each stretch of text between special tokens gets its own space prefix, as in llama.cpp and in the slow
        LLaMA tokenizer that LLaVA was trained with. ``space_prefix`` "first_text": only one at the very start
        does; "no_text": none.
        """
        # Half a surrogate pair (an undecodable argument of the command line) has no UTF-8 form.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = [self.bos_id] if add_bos and self.add_bos and self.bos_id is not None else []
        for i, part in enumerate(self._cut_special(text, parse_special)):
            prefix = space_prefix == "each_text" or (space_prefix == "first_text" and i == 0)
            ids += [part] if isinstance(part, int) else self._model.encode(part, prefix)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids, without control tokens unless ``special``; bytes that are not UTF-8 give U+FFFD.

        The space prefixes that ``encode`` put in are taken out again.
        """
        ids = list(ids)
        if ids and min(ids) < 0:
            raise UsageError("decode", f"token {min(ids)}", wanted="0 or more")
        stream = TextStream(self, special)
        return "".join(stream.push(id) for id in ids) + stream.finish()

    def token_bytes(self, id: int, special: bool = False) -> bytes:
        """UTF-8 bytes of one token, perhaps a fraction of a character.

        A control token is b"" unless ``special``. So is an id past the end of the vocabulary: models pad
        their embedding to a round number of rows.
        """
        if id >= self.n_vocab:
            return b""
        if self._vocabulary.types[id] in (CONTROL, UNKNOWN):
            return self._vocabulary.tokens[id].encode() if special else b""
        return self._model.token_bytes(id)

    def text_of(self, id: int) -> str:
        """The token as the file writes it: "▁the", "<0x0A>", "Ġcat"."""
        return self._vocabulary.tokens[id] if id < self.n_vocab else f"[{id}]"

    def id_of(self, text: str) -> int | None:
        """The id of the token that the file writes so, or None."""
        try:
            return self._vocabulary.tokens.index(text)
        except ValueError:
            return None

    def starts_new_text(self, id: int) -> bool:
        """Whether a space prefix follows this token: it is a special one that shows in the text."""
        return id < self.n_vocab and self._vocabulary.types[id] in (CONTROL, UNKNOWN, USER_DEFINED)

    @property
    def adds_space_prefix(self) -> bool:
        return self._vocabulary.add_space_prefix

    def _cut_special(self, text: str, parse_special: bool) -> list[str | int]:
        """Split at special tokens: the longest token is looked for first, through the whole text."""
        parts: list[str | int] = [text] if text else []
        for id in self._special[parse_special]:
            token = self._vocabulary.tokens[id]
            if token in text:
                parts = [cut for part in parts for cut in self._cut(part, token, id)]
        return parts

    def _cut(self, part: str | int, token: str, id: int) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        for i, piece in enumerate(part.split(token)):
            if i > 0:
                yield id
                piece = piece.lstrip(" \t\n\v\f\r") if id in self._vocabulary.strips_right else piece
            if piece:
                yield piece


class Utf8Stream:
    """Bytes in, whole characters out.

    Bytes that cannot become a character any more come out as U+FFFD, one for each maximal broken sequence
    (the Unicode standard's recommendation), but never before that is certain.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """The characters that these bytes complete."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD if the stream ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class TextStream:
    """Token ids in, text out: the pieces joined are ``tokenizer.decode(ids)``."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = Utf8Stream()
        self._strip_space = tokenizer.adds_space_prefix

    def push(self, id: int) -> str:
        """The text that this token completes, often ""."""
        data = self._tokenizer.token_bytes(id, self._special)
        if not data:
            return ""
        if self._tokenizer.starts_new_text(id):
            self._strip_space = self._tokenizer.adds_space_prefix
        elif self._strip_space:
            # Not the byte token <0x20>: encoding never makes one of a prefix.
            data = data.removeprefix(b" ") if self._tokenizer.text_of(id).startswith(SPACE) else data
            self._strip_space = False
        return self._utf8.push(data)

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._utf8.finish()
