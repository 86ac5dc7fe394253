"""How well the demo pair's attention maps point, out of golden/pointing.json: golden/pointing.md's table, and
README.md's sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.markdown import NONE
from tests.markdown import table as markdown

RESULTS = Path(__file__).parents[1] / "golden" / "pointing.json"
WORDS = {"all": "all words", "several_kinds": "words of pictures with several kinds of objects"}
ROWS = {
    "mean": "map while the word is chosen, averaged over layers and heads",
    "mean_while_reading": "map one step later, while the word is read",
    "middle": "always the middle patch",
    "chance": "chance: the share of patches that the boxes cover",
    "other_word": "map of another object's word",
}


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The whole file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def sentence() -> str:
    """The result for README.md."""
    found = read()["all"]
    return (
        "The attention map of a word peaks on the object that the demo model names by it for "
        f"{percent(found['mean'])} of {found['words']} words, where chance gives {percent(found['chance'])}: "
        "[how that was counted](golden/pointing.md)."
    )


def table() -> str:
    """A column for each choice of words, in percent of them; rows as ROWS, with one for each layer alone."""
    found = read()
    columns = [found[name] for name in WORDS]
    lines = [["peaks inside the object's box", *(f"{WORDS[n]} ({found[n]['words']})" for n in WORDS)]]
    for key, title in ROWS.items():
        lines.append([title, *(percent(column[key]) if key in column else NONE for column in columns)])
        if key == "mean":
            intervals = (" to ".join(map(percent, column["mean_95_percent"])) for column in columns)
            lines.append(["its 95 % interval", *intervals])
            for i in range(len(found["all"]["layers"])):
                lines.append([f"map of block {i} alone", *(percent(column["layers"][i]) for column in columns)])
    return markdown(lines) + f"\n\n{found['pictures']} pictures, question {found['question']!r}.\n"


def percent(share: float) -> str:
    """96 %, and below one percent with a decimal: 0.4 %."""
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1f} %"
