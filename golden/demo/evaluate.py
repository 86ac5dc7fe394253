"""Ask the exported pair about the committed pictures, through PIL and the original LLaVA's preprocessing.

    python golden/demo/evaluate.py tinyllava/demo tokenizer.model golden/demo/scenes [PHOTO ...]

Photographs named after it must be answered with "I am not sure ...".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from loader import load_pair, network_input
from PIL import Image
from prompts import WordTokenizer
from score import Case, admitted, mistakes, run_cases, summary


def scene_cases(folder: Path) -> tuple[torch.Tensor, list[Case]]:
    """Network inputs and cases of scenes.json (or demo.json)."""
    entries = json.loads(next(folder.glob("*.json")).read_text(encoding="utf8"))
    entries = entries if isinstance(entries, list) else [entries]
    pictures, cases = [], []
    for i, entry in enumerate(entries):
        with Image.open(folder / (entry.get("file") or entry["picture"])) as image:
            pictures.append(network_input(image))
        cases += [Case(i, q["kind"], q["question"], q["answer"]) for q in entry["questions"]]
    return torch.stack(pictures), cases


def photo_cases(paths: list[str]) -> tuple[torch.Tensor, list[Case]]:
    """Three naming questions about each photograph."""
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(network_input(image))
    questions = ("What is this?", "What is in the picture?", "Describe the picture.")
    return torch.stack(pictures), [Case(i, "photo", q, "") for i in range(len(paths)) for q in questions]


def main() -> None:
    """Print accuracies and mistakes."""
    pair, tokenizer = Path(sys.argv[1]), WordTokenizer(Path(sys.argv[2]))
    model = load_pair(pair)
    for folder in (pair, Path(sys.argv[3])):
        pictures, cases = scene_cases(folder)
        run_cases(model, pictures, cases, tokenizer, rows=32)
        print(folder, json.dumps(summary(cases)))
        print("  " + "\n  ".join(mistakes(cases, 40)))
    if sys.argv[4:]:
        pictures, cases = photo_cases(sys.argv[4:])
        run_cases(model, pictures, cases, tokenizer, rows=32)
        print("photographs admitted", admitted(cases))


if __name__ == "__main__":
    main()
