"""README.md's table of speed, out of golden/speed-cpu.json: ratios alone; seconds stand in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "golden" / "speed-cpu.json"
PEERS = {
    "llama.cpp": "llama.cpp",
    "ik": "ik_llama.cpp",
    "torch": "torch, bfloat16",
    "llava-cli": "llama-llava-cli",
}
COLUMNS = {"prefill": "prompt of {}", "decode": "answer at {}", "memory": "memory at {}"}
NONE = "–"


def table(path: Path = RESULTS) -> str:
    """Two tables and where they were measured: language models, and what begins with a picture."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["rows"]
    language = [row for row in rows if row["work"].split()[0] in COLUMNS]
    pictures = [row for row in rows if row not in language]
    return "\n\n".join([_language(language), _pictures(pictures), _source(found)]) + "\n"


def _language(rows: list[dict[str, Any]]) -> str:
    """A line for each model, a column for each work; in a cell the ratio to each peer."""
    works = sorted({row["work"] for row in rows}, key=_order)
    peers = sorted({row["peer"] for row in rows}, key=list(PEERS).index)
    ratios = {(row["model"], row["work"], row["peer"]): row["ratio"] for row in rows}
    lines = [["beside " + " / ".join(PEERS[peer] for peer in peers), *(_title(work) for work in works)]]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [[ratios.get((model, work, peer)) for peer in peers] for work in works]
        lines.append([model, *(" / ".join(map(_ratio, cell)) if any(cell) else NONE for cell in cells)])
    return _markdown(lines)


def _pictures(rows: list[dict[str, Any]]) -> str:
    """A line for each work, a column for each peer."""
    peers = sorted({row["peer"] for row in rows}, key=list(PEERS).index)
    ratios = {(row["work"], row["model"], row["peer"]): row["ratio"] for row in rows}
    lines = [["beside", *(PEERS[peer] for peer in peers)]]
    for work, model in dict.fromkeys((row["work"], row["model"]) for row in rows):
        lines.append([f"{work}, {model}", *(_ratio(ratios.get((work, model, peer))) for peer in peers)])
    return _markdown(lines)


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
    return list(COLUMNS).index(kind), int(number)


def _title(work: str) -> str:
    kind, *_, number = work.split()
    return COLUMNS[kind].format(f"{int(number):,}")


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _markdown(lines: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
