"""Tables in Markdown."""

from __future__ import annotations

NONE = "–"  # a cell that nothing was measured for


def table(lines: list[list[str]]) -> str:
    """The first line is the head."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
