"""Compare two dumps of activations, or two model files: where do they part ways first, and by how much?

A tolerance is on |a - b| / |a| in the 2-norm, for each tap. Sums in float32 in another order are about 1e-6 apart,
programs that round to F16 on their way 5e-4, and two programs that disagree on a step 0.1 to 1: hence 1e-3.
Model files are compared exactly unless a tolerance is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tinyllava.errors import UsageError
from tinyllava.files.gguf import GGUFFile, Tensor, open_gguf
from tinyllava.study import tap_names
from tinyllava.study.compare import differences
from tinyllava.study.compare.align import align
from tinyllava.study.compare.dumps import Dump, open_dump
from tinyllava.study.compare.lengths import explain_lengths
from tinyllava.study.compare.measure import Distance, Verdict, pieces

TOLERANCE = 1e-3
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One activation, or one tensor, of both sides."""

    name: str
    shape: Shape
    other_shape: Shape
    max_abs: float
    relative: float
    cosine: float
    verdict: Verdict
    known: tuple[str, ...] = ()  # the choices that explain a difference which begins here
    note: str = ""

    @property
    def diverges(self) -> bool:
        return self.verdict not in ("equal", "close")


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared, in the order of the walk or of the first file."""

    a: str
    b: str
    tolerance: float
    rows: tuple[Row, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    choices: dict[str, str] = field(default_factory=dict)  # each choice in Row.known, in words

    @property
    def first(self) -> Row | None:
        """The first that diverges."""
        return next((row for row in self.rows if row.diverges), None)

    @property
    def first_unequal(self) -> Row | None:
        """The first that is not the same to the last bit."""
        return next((row for row in self.rows if row.verdict != "equal"), None)

    @property
    def agrees(self) -> bool:
        """Whether everything is within the tolerance."""
        return self.first is None


def compare(a: str | Path, b: str | Path, tolerance: float | None = None) -> Comparison:
    """Compare two files: dumps of activations of any kind (dumps.py), or two GGUF files.

    Raises FileError for a file that is neither, and UsageError for two that have nothing in common.
    """
    if tolerance is not None and not tolerance >= 0.0:
        raise UsageError("tolerance", str(tolerance), wanted="0 or more")
    models = [_is_gguf(path) for path in (a, b)]
    if all(models):
        with open_gguf(a) as one, open_gguf(b) as other:
            return compare_models(one, other, 0.0 if tolerance is None else tolerance)
    if any(models):
        model = a if models[0] else b
        raise UsageError(model, "a model file against a dump of activations", wanted="two files of one kind")
    return compare_dumps(open_dump(a), open_dump(b), TOLERANCE if tolerance is None else tolerance)


def _is_gguf(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # whoever opens it next says why


# ---- activations


def compare_dumps(a: Dump, b: Dump, tolerance: float = TOLERANCE) -> Comparison:
    """Every activation that both dumps have, in the order of the walk."""
    common = sorted((name for name in a.values if name in b.values), key=tap_names.walk)
    if not common:
        names = [next(iter(dump.values.values())).theirs if dump.values else "nothing" for dump in (a, b)]
        hint = "`tinyllava trace --list` shows the names that are understood"
        raise UsageError(f"{a.path} and {b.path}", f"no name in common ({names[0]}, {names[1]})", hint=hint)
    fields = differences.differing(a, b)
    rows: list[Row] = []
    place = (-1, 0, 0)  # on the walk; differences up to here are explained, or had no effect
    for name in common:
        row = _compare_values(name, a, b, tolerance)
        known = differences.explaining(name, place, fields) if row.diverges else []
        rows.append(replace(row, known=tuple(known)))
        place = tap_names.walk(name)
    return Comparison(
        str(a.path),
        str(b.path),
        tolerance,
        tuple(rows),
        tuple(name for name in a.values if name not in b.values),
        tuple(name for name in b.values if name not in a.values),
        tuple(explain_lengths(a, b)),
        {name: differences.describe(name, fields[name]) for row in rows for name in row.known},
    )


def _compare_values(name: str, a: Dump, b: Dump, tolerance: float) -> Row:
    x, y = align(name, a, b)
    if x.shape != y.shape or x.values.shape != y.values.shape:
        return Row(name, x.shape, y.shape, math.inf, math.inf, 0.0, "shape")
    distance = Distance()
    distance.add(x.values, y.values)
    rounding = max(a.values[name].rounding, b.values[name].rounding)
    verdict = distance.verdict(tolerance, rounding)
    note = "" if x.where is None and y.where is None else "corners"
    if note and verdict in ("equal", "close") and not _sums_agree(name, a, b, tolerance):
        verdict, note = "differs", "the sums differ: what is not printed does"
    return Row(name, x.shape, y.shape, distance.max_abs, distance.relative, distance.cosine, verdict, note=note)


def _sums_agree(name: str, a: Dump, b: Dump, tolerance: float) -> bool:
    """Whether the sum of a whole tensor is the printed one, within the tolerance of its 1-norm.

    Told only where one side has all of the other's rows: a cut array has another sum.
    """
    printed, full = (a, b) if a.values[name].seen is not None else (b, a)
    value, other = printed.values[name], full.values[name]
    if value.total is None or other.seen is not None:
        return True
    array = other.load().astype(np.float64)
    if array.size != np.prod(value.shape, dtype=np.int64):
        return True
    magnitude = float(np.abs(array).sum())
    return abs(float(array.sum()) - value.total) <= max(tolerance, 1e-4) * magnitude


# ---- model files


def compare_models(a: GGUFFile, b: GGUFFile, tolerance: float = 0.0) -> Comparison:
    """Every tensor of two model files by what its blocks mean; a tensor in one file alone diverges.

    Memory does not depend on the files' size: a tensor is read in pieces.
    """
    rows = []
    for name in [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]:
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is not None and other is not None:
            rows.append(_compare_tensors(one, other, tolerance))
        else:
            shapes = [() if tensor is None else tensor.shape for tensor in (one, other)]
            note = f"only in {(b if one is None else a).path.name}"
            rows.append(Row(name, shapes[0], shapes[1], math.inf, math.inf, 0.0, "missing", note=note))
    return Comparison(str(a.path), str(b.path), tolerance, tuple(rows), notes=tuple(_metadata_notes(a, b)))


def _compare_tensors(a: Tensor, b: Tensor, tolerance: float) -> Row:
    if a.shape != b.shape:
        return Row(a.name, a.shape, b.shape, math.inf, math.inf, 0.0, "shape")
    types = a.type if a.type == b.type else f"{a.type} against {b.type}"
    if _same_bytes(a, b):
        return Row(a.name, a.shape, b.shape, 0.0, 0.0, 1.0, "equal", note=types)
    distance = Distance()
    for part in pieces(a.n_rows, a.shape[-1] if a.shape else 1):
        rows = np.arange(part.start, part.stop)
        distance.add(a.rows(rows), b.rows(rows))
    verdict = distance.verdict(tolerance)
    return Row(a.name, a.shape, b.shape, distance.max_abs, distance.relative, distance.cosine, verdict, note=types)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether the files hold the same blocks: no need to ask what they mean."""
    if a.type != b.type or a.file.byte_order != b.file.byte_order:
        return False
    one, other = a.stored, b.stored  # (n_rows, row_bytes)
    return all(np.array_equal(one[part], other[part]) for part in pieces(*one.shape))


def _metadata_notes(a: GGUFFile, b: GGUFFile) -> list[str]:
    """The metadata keys in which the files differ. Not part of the verdict: a name or a date may differ."""
    one, other = a.metadata, b.metadata
    keys = [key for key in {**one, **other} if not _same_value(one.get(key), other.get(key))]
    if not keys:
        return []
    shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
    return [f"{len(keys)} metadata keys differ: {shown}"]


def _same_value(x: object, y: object) -> bool:
    if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
        return isinstance(x, np.ndarray) and isinstance(y, np.ndarray) and np.array_equal(x, y)
    return type(x) is type(y) and x == y
