"""The CPU's speed, out of golden/speed-cpu.json: golden/cpu.md's tables, and README.md's, which has ranges.

Ratios alone; seconds stand in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.markdown import NONE
from tests.markdown import table as markdown

RESULTS = Path(__file__).parents[1] / "golden" / "speed-cpu.json"
PEERS = {
    "llama.cpp": "llama.cpp",
    "ik": "ik_llama.cpp",
    "torch": "torch, bfloat16",
    "llava-cli": "llama-llava-cli",
}
COLUMNS = {"prefill": "prompt of {}", "decode": "answer at {}", "memory": "memory at {}"}


def table(path: Path = RESULTS) -> str:
    """Two tables and where they were measured: language models, and what begins with a picture."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["rows"]
    language = [row for row in rows if row["work"].split()[0] in COLUMNS]
    pictures = [row for row in rows if row not in language]
    return "\n\n".join([_language(language), _pictures(pictures), _source(found)]) + "\n"


def summary(path: Path = RESULTS) -> str:
    """One table: a line for each work, a column for each peer; the least and the largest ratio of all files."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["rows"]
    peers = sorted({row["peer"] for row in rows}, key=list(PEERS).index)
    lines = [["beside", *(PEERS[peer] for peer in peers)]]
    for work in sorted(dict.fromkeys(row["work"] for row in rows), key=_order):
        models = list(dict.fromkeys(row["model"] for row in rows if row["work"] == work))
        title = _title(work) + (f", {models[0]}" if len(models) == 1 else f", {len(models)} files")
        ratios = [[row["ratio"] for row in rows if (row["work"], row["peer"]) == (work, peer)] for peer in peers]
        lines.append([title, *(_range(cell) for cell in ratios)])
    return markdown(lines) + f"\n\n{_source(found)}\n"


def _language(rows: list[dict[str, Any]]) -> str:
    """A line for each model, a column for each work; in a cell the ratio to each peer."""
    works = sorted({row["work"] for row in rows}, key=_order)
    peers = sorted({row["peer"] for row in rows}, key=list(PEERS).index)
    ratios = {(row["model"], row["work"], row["peer"]): row["ratio"] for row in rows}
    lines = [["beside " + " / ".join(PEERS[peer] for peer in peers), *(_title(work) for work in works)]]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [[ratios.get((model, work, peer)) for peer in peers] for work in works]
        lines.append([model, *(" / ".join(map(_ratio, cell)) if any(cell) else NONE for cell in cells)])
    return markdown(lines)


def _pictures(rows: list[dict[str, Any]]) -> str:
    """A line for each work, a column for each peer."""
    peers = sorted({row["peer"] for row in rows}, key=list(PEERS).index)
    ratios = {(row["work"], row["model"], row["peer"]): row["ratio"] for row in rows}
    lines = [["beside", *(PEERS[peer] for peer in peers)]]
    for work, model in dict.fromkeys((row["work"], row["model"]) for row in rows):
        lines.append([f"{work}, {model}", *(_ratio(ratios.get((work, model, peer))) for peer in peers)])
    return markdown(lines)


def _source(found: dict[str, Any]) -> str:
    """Where, when and beside which versions."""
    versions = [about["versions"] for name, about in found["versions"].items() if name != "tinyllava"]
    programs = ", ".join(f"{name} {text}" for program in versions for name, text in program.items())
    turns = sorted({len(row["pairs"]) for row in found["rows"] if "own_s" in row})
    medians = " to ".join(map(str, sorted({turns[0], turns[-1]})))
    return (
        f"{found['cpu']}, {found['threads']} threads, {found['date']}; medians of {medians} turns. {programs}; "
        "all with their defaults."
    )


def _order(work: str) -> tuple[int, int]:
    kind, *_, number = work.split()
    return (list(COLUMNS).index(kind), int(number)) if kind in COLUMNS else (len(COLUMNS), 0)


def _title(work: str) -> str:
    kind, *_, number = work.split()
    return COLUMNS[kind].format(f"{int(number):,}") if kind in COLUMNS else work


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _range(ratios: list[float]) -> str:
    """The least and the largest, as text once if they read alike."""
    ends = dict.fromkeys(map(_ratio, (min(ratios), max(ratios)))) if ratios else [NONE]
    return " to ".join(ends)
