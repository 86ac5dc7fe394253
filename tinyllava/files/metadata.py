"""The metadata of a GGUF file, value by value: a cursor over bytes that never reads past their end."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from tinyllava.errors import FileError

MAX_HEADER = 1 << 26  # bytes of metadata and tensor names; real files have some 20 MB, for the vocabulary
MAX_NESTING = 4  # arrays in arrays in arrays; nobody writes more than two
MAX_ARRAYS = 1 << 16  # arrays in arrays, in the whole file: each costs 12 bytes there, and 10 times that here
AGAIN = "Download or convert it again"

# Value types of metadata (docs/gguf.md): number in the file -> its NumPy type.
NUMBERS = {
    0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
# NumPy type -> letter of the struct module, which reads a single number faster.
LETTERS = {
    "u1": "B", "i1": "b", "u2": "H", "i2": "h", "u4": "I", "i4": "i", "u8": "Q", "i8": "q",
    "f4": "f", "f8": "d", "?": "B",
}  # fmt: skip


class Cursor:
    """Reads one value after another. A read is checked against ``end`` first, a count before it is used."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, byte_order: str, position: int) -> None:
        self.path = path
        self.data = data
        self.position = position
        self.end = min(len(data), MAX_HEADER)
        self.n_arrays = 0  # inner ones so far
        self.prefix: Literal["<", ">"] = "<" if byte_order == "little" else ">"
        self.readers = {kind: struct.Struct(self.prefix + letter) for kind, letter in LETTERS.items()}

    def take(self, n: int, what: str) -> int:
        """Claim the next ``n`` bytes; their position. FileError if the file ends before."""
        start = self.position
        if n > self.end - start:
            self._too_short(what, n)
        self.position = start + n
        return start

    def number(self, kind: str) -> Any:
        """One number, e.g. ``number("u4")``: a Python int, float or bool."""
        reader = self.readers[kind]
        (value,) = reader.unpack_from(self.data, self.take(reader.size, "a number"))
        return value != 0 if kind == "?" else value

    def count(self, what: str, at_least: int, at_most: int = MAX_HEADER) -> int:
        """A u64 count of things of ``at_least`` bytes each. FileError if so many cannot follow."""
        n = int(self.number("u8"))
        room = len(self.data) - self.position
        if n * at_least > room:
            raise FileError(self.path, f"{n} {what} in the {room} bytes that follow", hint=AGAIN)
        if n > at_most or n * at_least > self.end - self.position:
            raise FileError(self.path, f"{n} {what}", wanted="a number of them that a model has", hint=AGAIN)
        return n

    def string(self, what: str) -> str:
        """A string. Bytes that are not UTF-8 become U+FFFD: better an odd name than an unreadable model."""
        n = int(self.number("u8"))
        start = self.take(n, what)
        return self.data[start : start + n].decode("utf-8", "replace")

    def key_value(self) -> tuple[str, Any]:
        key = self.string("metadata key")
        return key, self.value(int(self.number("u4")), key)

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """A value of type ``kind``. FileError for an unknown type."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            found = f"metadata key {key!r} has value type {kind}"
            raise FileError(self.path, found, wanted="0 to 12", hint=AGAIN)
        if depth == MAX_NESTING:
            found = f"metadata key {key!r}: arrays nested more than {MAX_NESTING} deep"
            raise FileError(self.path, found, hint=AGAIN)
        return self.array(key, depth)

    def array(self, key: str, depth: int) -> Any:
        """An array: of numbers, a NumPy array; of strings or arrays, a list."""
        kind = int(self.number("u4"))
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind]).newbyteorder(self.prefix)
            n = self.count(f"numbers in {key!r}", at_least=dtype.itemsize)
            start = self.take(n * dtype.itemsize, key)
            # Copies, because metadata outlives the mapping; a bool is any byte but 0.
            stored = np.frombuffer(self.data, "u1" if kind == BOOL else dtype, n, start)
            return stored != 0 if kind == BOOL else stored.astype(dtype.newbyteorder("="))
        if kind == STRING:
            return self.strings(self.count(f"strings in {key!r}", at_least=8), key)
        n = self.count(f"arrays in {key!r}", at_least=12, at_most=MAX_ARRAYS - self.n_arrays)
        self.n_arrays += n
        return [self.value(kind, key, depth + 1) for _ in range(n)]

    def strings(self, n: int, key: str) -> list[str]:
        """``n`` strings: :meth:`string` unrolled, because a vocabulary has a hundred thousand."""
        data, end, position = self.data, self.end, self.position
        length = self.readers["u8"].unpack_from
        result = []
        for _ in range(n):
            start = position + 8
            if start > end:
                self._too_short(key, 8)
            position = start + length(data, position)[0]
            if position > end:
                self._too_short(key, position - start)
            result.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return result

    def _too_short(self, what: str, n: int) -> NoReturn:
        if n <= len(self.data) - self.position:  # it is there, but beyond the limit
            found = f"more than {MAX_HEADER >> 20} MiB of metadata"
            raise FileError(self.path, found, wanted="a model", hint=AGAIN)
        found = f"truncated: {what} of {n} bytes does not fit in {self.end} bytes"
        raise FileError(self.path, found, wanted="a whole GGUF file", hint=AGAIN)
