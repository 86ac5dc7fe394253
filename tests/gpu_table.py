"""README.md's tables of the GPU, out of golden/speed-gpu.json, which `python -m tests.gpu` writes on a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "golden" / "speed-gpu.json"
NONE = "–"
Row = dict[str, Any]


def table(path: Path = RESULTS) -> str:
    """Times and errors beside transformers', memory beside the file's, and where it was measured."""
    if not path.exists():
        return "Not measured yet.\n"
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    parts = [_times(found["rows"]), _errors(found["accuracy"]), _memory(found["memory"]), _source(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _times(rows: list[Row]) -> str:
    """Without ``peer_s``, transformers was not measured: it does not run the step, or there was no room."""
    lines = [["step", "tinyllava, ms", "transformers, ms", "times as fast", "reached", "of the card's"]]
    for row in rows:
        own, peer = row["ours_s"], row.get("peer_s")
        times = [_number(value and 1e3 * value, 2) for value in (own, peer)]
        ratio, share = peer and peer / own, row.get("share_of_ceiling")
        share = _number(share and 100 * share, 0, " %")
        lines.append([row["step"], *times, _number(ratio, 2), _speed(row), share])
    return _markdown(lines)


def _speed(row: Row) -> str:
    if row.get("bytes_per_s"):
        return f"{row['bytes_per_s'] / 1e12:.2f} TB/s"
    return f"{row['flop_per_s'] / 1e12:.0f} TFLOP/s" if row.get("flop_per_s") else NONE


def _errors(found: Row) -> str:
    lines = [["error against float64, relative 2-norm", "tinyllava", "transformers, float16"]]
    for what, row in found.items():
        lines.append([what, *(NONE if row.get(key) is None else f"{row[key]:.1e}" for key in ("ours", "peer"))])
    return _markdown(lines) if found else ""


def _memory(found: Row) -> str:
    lines = [["memory of the weights", "file, GB", "GPU, GB", "ratio"]]
    for what, row in found.items():
        file, held = row["file_bytes"], row["device_bytes"]
        lines.append([what, _number(file / 1e9, 2), _number(held / 1e9, 2), _number(held / file, 2)])
    return _markdown(lines) if found else ""


def _source(found: Row) -> str:
    """Which card, what it can do at most, and beside which versions."""
    copies, products = (found["ceilings"][key] / 1e12 for key in ("copy_bytes_per_s", "gemm_flop_per_s"))
    programs = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    where = [found["card"], f"driver {found['driver']}", *([found["date"]] if "date" in found else [])]
    return (
        f"{', '.join(where)}; its own copies reach {copies:.2f} TB/s, its float16 products {products:.0f} "
        f"TFLOP/s. {programs}."
    )


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return NONE if value is None else f"{value:,.{digits}f}{unit}"


def _markdown(lines: list[list[str]]) -> str:
    """The first line is the head."""
    rule = "|" + "---|" * len(lines[0])
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([rows[0], rule, *rows[1:]])
