"""The GPU's speed, out of golden/speed-gpu.json, which `python -m tests.gpu` writes: golden/gpu.md's tables, and
README.md's sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.markdown import NONE
from tests.markdown import table as markdown

RESULTS = Path(__file__).parents[1] / "golden" / "speed-gpu.json"
SHOWN = {  # steps that README.md's sentence names, and what it says of each
    "picture of 336 pixels to 576 embeddings, F16": "encodes a picture {:.2f} times as fast",
    "prompt of 2,928 tokens, 7B F16": "reads 2,928 tokens with a 7B model in F16 {:.2f} times as fast",
    "one token, 7B F16": "and writes one {:.2f} times as fast",
}
Row = dict[str, Any]


def table(path: Path = RESULTS) -> str:
    """Times and errors beside transformers', memory beside the file's, and where it was measured."""
    if not path.exists():
        return "Not measured yet.\n"
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    parts = [_times(found["steps"]), _errors(found["errors"]), _memory(found["memory"]), _source(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def sentence(path: Path = RESULTS) -> str:
    """The result for README.md: some steps, and the range of all errors and of all weights' memory."""
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    times = {row["what"]: row["peer_s"] / row["ours_s"] for row in found["steps"] if row.get("peer_s")}
    shown = ", ".join(text.format(times[what]) for what, text in SHOWN.items())
    errors = [row["ours"] / row["peer"] for row in found["errors"] if row.get("peer")]
    card, memory = found["about"]["card"], max(row["device_bytes"] / row["file_bytes"] for row in found["memory"])
    return (
        f"Beside transformers in float16 on an {card}, tinyllava {shown}, with {min(errors):.2f} "
        f"to {max(errors):.2f} times its error; weights take at most {memory:.2f} times their file's size: "
        "[every step](golden/gpu.md)."
    )


def _times(rows: list[Row]) -> str:
    """Without ``peer_s``, transformers was not measured. The share is the least time there could be over ours."""
    lines = [["step", "tinyllava, ms", "transformers in float16, ms", "times as fast", "reached", "of the card's"]]
    for row in rows:
        own, peer = row["ours_s"], row.get("peer_s")
        times = [_number(value and 1e3 * value, 2) for value in (own, peer)]
        share = _number(100 * row["limit_s"] / own, 0, " %")
        lines.append([row["what"], *times, _number(peer and peer / own, 2), _speed(row), share])
    return markdown(lines)


def _speed(row: Row) -> str:
    if row.get("bytes_per_s"):
        return f"{row['bytes_per_s'] / 1e12:.2f} TB/s"
    return f"{row['flop_per_s'] / 1e12:.0f} TFLOP/s" if row.get("flop_per_s") else NONE


def _errors(rows: list[Row]) -> str:
    lines = [["error against float64, relative 2-norm", "tinyllava", "transformers, float16"]]
    for row in rows:
        both = (NONE if row.get(key) is None else f"{row[key]:.1e}" for key in ("ours", "peer"))
        lines.append([row["what"], *both])
    return markdown(lines) if rows else ""


def _memory(rows: list[Row]) -> str:
    lines = [["memory of the weights", "file, GB", "GPU, GB", "ratio"]]
    for row in rows:
        file, held = row["file_bytes"], row["device_bytes"]
        lines.append([row["what"], _number(file / 1e9, 2), _number(held / 1e9, 2), _number(held / file, 2)])
    return markdown(lines) if rows else ""


def _source(found: Row) -> str:
    """Which card, what it can do at most, and beside which versions."""
    about = found["about"]
    copies, products = (found["ceilings"][key] / 1e12 for key in ("bytes_per_s", "flop_per_s"))
    programs = ", ".join(f"{name} {about[name]}" for name in ("cupy", "torch", "transformers"))
    return (
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}, {about['date']}; its own copies reach "
        f"{copies:.2f} TB/s, its float16 products {products:.0f} TFLOP/s. {programs} ({about['attention']})."
    )


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return NONE if value is None else f"{value:,.{digits}f}{unit}"
