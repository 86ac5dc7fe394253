"""The pointing game: does the attention map of an object's word peak on that object?

For each scene of golden/demo/scenes, as it is and mirrored, the demo model is asked what is in the picture. Where
its answer names an object, the map of that word, as `tinyllava explain` draws it, is a hit if its brightest patch
has its middle inside a box of that object (Zhang et al. 2018, "Top-down neural attention by excitation backprop",
without their tolerance around the box). What a map must beat:

    chance        the share of the picture's patches whose middle is inside: a map that peaks anywhere
    middle        the patch in the middle of the picture, where single objects often are
    other_word    where the scene has several kinds of objects: the map of another one's word
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

import tinyllava
from golden.manifest import record, save_json, sha256, versions
from tinyllava import demo
from tinyllava.llava import LLaVA
from tinyllava.study.explain.explain import observe
from tinyllava.study.explain.maps import make_panels
from tinyllava.text.sampling import Sampling

SCENES = Path(__file__).parents[1] / "demo" / "scenes"
NOUNS = SCENES.parent / "nouns.txt"
QUESTION = "What is in the picture?"
Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels of the picture
Array = np.ndarray[Any, Any]


@dataclass
class Trial:
    """One word of one answer. Maps have the shape (1 + n_layer, 1 + n_head, rows, columns), means first."""

    scene: int
    inside: Array  # (rows, columns): the patches whose middle is in a box of the object
    drawn: Array  # (rows, columns): those whose middle is in the picture, not in its padding
    choosing: Array  # the maps while the word was chosen
    reading: Array  # the maps while the word was read, one token later


def plurals() -> dict[str, str]:
    """Noun -> plural; the shapes, which the file leaves out, take an s."""
    lines = [line for line in NOUNS.read_text(encoding="utf8").splitlines() if line and line[0] != "#"]
    return {line.split("|")[0]: line.split("|")[1] for line in lines}


def scenes() -> Iterator[tuple[int, Image.Image, dict[str, list[Box]]]]:
    """Number, picture and boxes by noun of each scene with known objects: as it is, then mirrored."""
    for number, entry in enumerate(json.loads((SCENES / "scenes.json").read_text(encoding="utf8"))):
        boxes: dict[str, list[Box]] = {}
        for thing in entry["objects"]:
            if thing["noun"] != "unknown":
                boxes.setdefault(thing["noun"], []).append(tuple(thing["box"]))
        if boxes:
            with Image.open(SCENES / entry["file"]) as file:
                picture = file.convert("RGB")
            yield number, picture, boxes
            turned = {noun: [mirrored(box, picture.width) for box in own] for noun, own in boxes.items()}
            yield number, ImageOps.mirror(picture), turned


def mirrored(box: Box, width: int) -> Box:
    """The box in the mirrored picture."""
    left, top, right, bottom = box
    return width - right, top, width - left, bottom


def patch_middles(picture: Image.Image, n: int) -> tuple[Array, Array]:
    """x and y (n, n) of the middles of the patches of the padded square, in pixels of the picture."""
    side = max(picture.size)
    left, top = (side - picture.width) // 2, (side - picture.height) // 2
    middle = (np.arange(n) + 0.5) * side / n
    x, y = np.meshgrid(middle - left, middle - top)
    return x, y


def covered(x: Array, y: Array, boxes: list[Box]) -> Array:
    """Whether each point lies in one of the boxes."""
    return np.any([(x >= a) & (x < c) & (y >= b) & (y < d) for a, b, c, d in boxes], axis=0)


def play(llava: LLaVA, number: int, picture: Image.Image, boxes: dict[str, list[Box]]) -> list[Trial]:
    """Ask about one picture; a trial for each noun that the answer names."""
    plan = llava.plan(QUESTION, [picture], max_tokens=64)
    result, _, keeper = observe(llava, plan, Sampling(temperature=0.0))
    (panel,) = make_panels(plan.pictures[0])
    maps = np.stack(keeper.maps)[..., panel.tokens]  # (n_tokens, layers, heads, rows, columns)
    ends = np.array([len(llava.tokenizer.decode(result.tokens[: i + 1])) for i in range(len(result.tokens))])
    x, y = patch_middles(picture, len(panel.tokens))
    drawn = covered(x, y, [(0, 0, *picture.size)])
    trials = []
    for noun, own in boxes.items():
        names = f"{re.escape(noun)}|{re.escape(plurals().get(noun, noun + 's'))}"
        word = re.search(rf"\b({names})\b", result.text)
        if word:
            start = len(llava.tokenizer.decode(result.tokens)) - len(result.text)  # 0 unless text was held back
            first, last = (
                int(np.searchsorted(ends, at + start, "right")) for at in (word.start(), word.end() - 1)
            )
            trials.append(Trial(number, covered(x, y, own), drawn, maps[first], maps[last + 1]))
    return trials


def peaks(maps: Array) -> Array:
    """(..., rows, columns) -> the brightest patch of each, as a number."""
    return np.asarray(maps.reshape(*maps.shape[:-2], -1).argmax(axis=-1))


def hits(trials: list[Trial], when: str) -> Array:
    """(n_trials, 1 + n_layer, 1 + n_head): whether each map peaks inside."""
    return np.stack([trial.inside.reshape(-1)[peaks(getattr(trial, when))] for trial in trials])


def rival_rate(groups: list[list[Trial]]) -> float:
    """How often the mean map of another noun of the same picture peaks on an object."""
    found = [
        group[i].inside.reshape(-1)[peaks(group[j].choosing[0, 0])]
        for group in groups
        for i in range(len(group))
        for j in range(len(group))
        if i != j
    ]
    return float(np.mean(found))


def figures(trials: list[Trial]) -> dict[str, Any]:
    """Rates over some trials. Best layers and heads are chosen on even scenes and counted on odd ones."""
    choosing, reading = hits(trials, "choosing"), hits(trials, "reading")
    scene = np.array([trial.scene for trial in trials])
    even = choosing[scene % 2 == 0].mean(axis=0)  # (1 + n_layer, 1 + n_head)
    odd = choosing[scene % 2 == 1].mean(axis=0)
    layer = 1 + int(even[1:, 0].argmax())
    head = np.unravel_index(even[1:, 1:].argmax(), even[1:, 1:].shape)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(2000):  # scenes are drawn, not words: words of one scene are not independent
        chosen = rng.choice(np.unique(scene), len(np.unique(scene)))
        draws.append(np.concatenate([choosing[scene == s, 0, 0] for s in chosen]).mean())
    middles = [trial.inside[tuple(n // 2 for n in trial.inside.shape)] for trial in trials]
    return {
        "words": len(trials),
        "chance": float(np.mean([(t.inside & t.drawn).sum() / t.drawn.sum() for t in trials])),
        "middle": float(np.mean(middles)),
        "mean": float(choosing[:, 0, 0].mean()),
        "mean_95_percent": [float(q) for q in np.quantile(draws, [0.025, 0.975])],
        "mean_while_reading": float(reading[:, 0, 0].mean()),
        "layers": choosing[:, 1:, 0].mean(axis=0).tolist(),
        "heads": choosing[:, 1:, 1:].mean(axis=0).tolist(),
        "best_layer": {"block": layer - 1, "odd_scenes": float(odd[layer, 0])},
        "best_head": {"block": int(head[0]), "head": int(head[1]), "odd_scenes": float(odd[1:, 1:][head])},
    }


def make_pointing() -> None:
    """golden/pointing.json"""
    llava = tinyllava.load(backend="numpy")
    played = [(play(llava, *scene), len(scene[2])) for scene in scenes()]
    groups = [group for group, _ in played]
    several = [trial for group, n_nouns in played if n_nouns > 1 for trial in group]
    value = {
        "question": QUESTION,
        "pictures": len(played),
        "objects": sum(n_nouns for _, n_nouns in played),
        "all": figures([trial for group in groups for trial in group]),
        "several_kinds": {**figures(several), "other_word": rival_rate(groups)},
    }
    path = save_json("pointing.json", rounded(value))
    files = {p.name: sha256(p) for p in (demo.MODEL, demo.MMPROJ, SCENES / "scenes.json")}
    record(path, "pointing", versions("numpy", "pillow"), "a figure of the demo pair: 0.03 on rates", files=files)


def rounded(value: Any) -> Any:
    """Rates to four digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
