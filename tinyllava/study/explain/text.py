"""The explanation for the terminal: the walk as a table, then the answer token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyllava.study.explain.walk import STAGES
from tinyllava.study.explain.walk_page import by_stage

if TYPE_CHECKING:
    from tinyllava.study.explain.explain import Explanation

COLUMNS = ("step", "shape", "runs", "parameters", "ms", "ms/token", "code")
LEFT = {"step", "shape", "code"}


def as_text(e: Explanation) -> str:
    """The whole text, without a newline at its end."""
    return "\n".join([*walk_lines(e), "", *token_lines(e)])


def walk_lines(e: Explanation) -> list[str]:
    """A line for each step, aligned; "ms" is for picture and prompt, "ms/token" for each further token."""
    rows: list[tuple[str, ...] | str] = [COLUMNS]
    for stage, steps in by_stage(e.walk).items():
        rows.append(STAGES[stage][0])
        for row in steps:
            shape = "x".join(map(str, row.shape))
            n = f"{row.parameters:,}" if row.parameters else "-"
            each = "-" if row.seconds_each is None else f"{1e3 * row.seconds_each:.3f}"
            times = str(row.times)
            rows.append((f"  {row.title}", shape, times, n, f"{1e3 * row.seconds:.2f}", each, row.place))
    before, each_s = sum(r.seconds for r in e.walk), sum(r.seconds_each or 0.0 for r in e.walk)
    total = f"{sum(row.parameters for row in e.walk):,}"
    rows.append(("All", "", "", total, f"{1e3 * before:.2f}", f"{1e3 * each_s:.3f}", ""))
    return _aligned(rows)


def token_lines(e: Explanation) -> list[str]:
    """A line for each token: its probability, and the next best."""
    lines = ["The answer, token by token, with the five next best:"]
    width = max(len(repr(step.chosen.text)) for step in e.tokens)
    for step in e.tokens:
        others = "  ".join(f"{guess.text!r} {100 * guess.probability:.1f}%" for guess in step.best)
        lines.append(f"  {step.chosen.text!r:{width}} {100 * step.chosen.probability:5.1f}%   {others}")
    return lines


def _aligned(rows: list[tuple[str, ...] | str]) -> list[str]:
    tables = [row for row in rows if not isinstance(row, str)]
    widths = [max(len(row[i]) for row in tables) for i in range(len(COLUMNS))]
    lines = []
    for row in rows:
        if isinstance(row, str):
            lines.append(row)
            continue
        cells = (
            text.ljust(width) if name in LEFT else text.rjust(width)
            for text, width, name in zip(row, widths, COLUMNS, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return lines
