"""``tinyllava compare``: where two runs, or two model files, part ways first, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllava.commands.parser import Parser, real
from tinyllava.errors import UsageError

if TYPE_CHECKING:
    from tinyllava.study.compare.compare import Comparison, Row

DESCRIPTION = """\
Compare two traces, dumps by transformers or llama.cpp (.npz, .safetensors, or llama.cpp's printed graph),
or two GGUF files tensor by tensor. Prints the first that diverges, then a table of all.

Exit code 0: all within the tolerance; 1: not so; 2: bad input.
"""
DIFFERENT = 1  # exit code
MANY = 6  # names of one side alone that are listed


def make_parser() -> Parser:
    """The parser of ``compare``."""
    parser = Parser("compare", DESCRIPTION)
    group = parser.add_argument_group("options")
    what = "largest |a - b| / |a|, 2-norms of a tensor (default 1e-3; GGUF: 0)"
    parser.option(group, "--tolerance", metavar="X", type=real, help=what)
    parser.option(group, "--json", action="store_true", help="print JSON")
    parser.add_standard_options(group)
    parser.positional("a", metavar="A", type=Path, help="the reference: relative errors are relative to it")
    parser.positional("b", metavar="B", type=Path, help="what is measured")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``. The exit code says whether the two agree."""
    arguments = make_parser().parse(words)
    if arguments.a is None or arguments.b is None:
        raise UsageError("A and B", "not both given", wanted="two files to compare")
    from tinyllava.study.compare.compare import compare

    comparison = compare(arguments.a, arguments.b, arguments.tolerance)
    if arguments.json:
        print(json.dumps(as_json(comparison), ensure_ascii=False))
    else:
        for line in as_text(comparison):
            print(printable(line))
    return 0 if comparison.agrees else DIFFERENT


def printable(line: str) -> str:
    """A line whose control characters are spelled out: names come from files, and must not command a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def as_text(comparison: Comparison) -> Iterator[str]:
    """The verdict, the table, and what explains it."""
    yield from verdict(comparison)
    yield ""
    width = max(len("name"), *(len(row.name) for row in comparison.rows)) + 2
    yield f"{'name':<{width}}{'shape':<22}{'max abs':>11}{'relative':>11}{'cosine':>11}  verdict"
    for row in comparison.rows:
        yield table_line(row, width)
    for side, names in ((comparison.a, comparison.only_a), (comparison.b, comparison.only_b)):
        if names:
            shown = ", ".join(names[:MANY]) + (", ..." if len(names) > MANY else "")
            yield f"only in {Path(side).name} ({len(names)}): {shown}"
    for note in comparison.notes:
        yield f"note: {note}"
    if comparison.choices:
        yield "known differences:"
        for text in comparison.choices.values():
            yield f"  {text}"


def verdict(comparison: Comparison) -> Iterator[str]:
    """One line that says the most important, and one more where it helps."""
    first, unequal = comparison.first, comparison.first_unequal
    n = len(comparison.rows)
    if first is None:
        exact = "equal to the last bit" if unequal is None else f"within {comparison.tolerance:g}"
        yield f"agree: {n} of {n} {exact}"
    else:
        beyond = f"{sum(row.diverges for row in comparison.rows)} of {n} beyond {comparison.tolerance:g}"
        yield f"first diverging: {first.name} ({reason(first)}); {beyond}"
    if unequal is not None and unequal is not first:
        yield f"first not equal: {unequal.name} ({reason(unequal)})"


def reason(row: Row) -> str:
    """Why a row is not equal, in a few words."""
    if row.verdict == "missing":
        return row.note
    if row.verdict == "shape":
        return f"shape {shape(row.shape)} against {shape(row.other_shape)}"
    return f"relative {row.relative:.2g}, max abs {row.max_abs:.2g}"


def table_line(row: Row, width: int) -> str:
    """One line of the table."""
    numbers = f"{'-':>11}{'-':>11}{'-':>11}"
    size = shape(row.shape)
    if row.verdict not in ("shape", "missing"):
        numbers = f"{row.max_abs:11.3g}{row.relative:11.3g}{row.cosine:11.7f}"
    elif row.verdict == "shape":
        size += f" | {shape(row.other_shape)}"
    more = ", ".join(filter(None, (row.note, *row.known)))
    return f"{row.name:<{width}}{size:<22}{numbers}  {row.verdict}{f'  [{more}]' if more else ''}"


def shape(lengths: tuple[int, ...]) -> str:
    """``17 x 96``; a single number has no axes."""
    return " x ".join(map(str, lengths)) or "1"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, for programs. Infinite distances, of shapes that differ, are null."""
    first, unequal = comparison.first, comparison.first_unequal
    rows = [{key: _finite(value) for key, value in asdict(row).items()} for row in comparison.rows]
    return {
        "a": comparison.a,
        "b": comparison.b,
        "tolerance": comparison.tolerance,
        "agree": comparison.agrees,
        "first_diverging": None if first is None else first.name,
        "first_not_equal": None if unequal is None else unequal.name,
        "rows": rows,
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
        "notes": comparison.notes,
        "known_differences": comparison.choices,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
