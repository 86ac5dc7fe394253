"""Training batches: random scenes with as many questions as fit, as plain NumPy arrays.

A row is [text before the picture, right-aligned | 144 places for the picture | 256 places for text].  Seven
rows in ten hold independent questions side by side: each sees the text before, the picture and itself,
so one picture's cost is shared.  The others hold one true conversation.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from chat import ELSEWHERE, GREETINGS, NO_PICTURE, ONLY_PICTURES, STRANGE_WORDS, UNKNOWN_WORD
from compose import FIRST_NOUN_CLASS, UNKNOWN_CLASS
from prompts import LAYOUTS, Layout, WordTokenizer
from questions import ask
from scenes import MAX_OBJECTS, UNKNOWN, Library, Scene, invent, jittered
from vocabulary import COLOR_NAMES, article

BEFORE, IMAGE, TEXT = 40, 144, 256
ROW = BEFORE + IMAGE + TEXT
TARGETS = 144  # answer tokens per row, at most
NOT_A_TARGET = -100
LAYOUT_LIST = tuple(LAYOUTS.values())
LAYOUT_WEIGHTS = tuple(layout.weight for layout in LAYOUT_LIST)


@dataclass
class Row:
    """One training row while it is filled; the lists cover the text part only."""

    before: list[int]
    layout: Layout
    picture: bool
    tokens: list[int]
    segments: list[int]
    positions: list[int]
    target_at: list[int]  # index into the row of the token that predicts
    targets: list[int]

    def append(self, question: list[int], answer: list[int], segment: int, start: int) -> bool:
        """Add a turn if it fits; start is the position of its first token after the picture."""
        length = len(question) + len(answer)
        if len(self.tokens) + length > TEXT or len(self.targets) + len(answer) > TARGETS:
            return False
        base = BEFORE + IMAGE + len(self.tokens) + len(question)
        self.target_at += range(base - 1, base - 1 + len(answer))
        self.targets += answer
        self.tokens += question + answer
        self.segments += [segment] * length
        first = len(self.before) + (IMAGE if self.picture else 0) + start
        self.positions += range(first, first + length)
        return True


def untidy(rng: random.Random, question: str) -> str:
    """Questions as people type them: sometimes lower case, sometimes without the question mark."""
    if rng.random() < 0.06:
        question = question.lower()
    if rng.random() < 0.05:
        question = question.rstrip("?.")
    return question


def small_talk(rng: random.Random, picture: bool) -> tuple[str, str]:
    """A question that no picture answers."""
    chance = rng.random()
    if chance < 0.35:
        return rng.choice(tuple(GREETINGS.items()))
    if chance < 0.75 or not picture:
        return rng.choice(ELSEWHERE), ONLY_PICTURES
    word = rng.choice(STRANGE_WORDS)
    form = rng.choice(("Is there {} {} in the picture?", "Do you see {} {}?", "Is there {} {}?"))
    return form.format(article(word), word), UNKNOWN_WORD


def next_pair(rng: random.Random, scene: Scene, picture: bool) -> tuple[str, str] | None:
    """A question and its answer for this scene, or small talk."""
    if rng.random() < (0.03 if picture else 0.4):
        return small_talk(rng, picture)
    asked = ask(scene, rng)
    if asked is None:
        return None
    return asked[1], asked[2] if picture else NO_PICTURE


def fill_row(rng: random.Random, scene: Scene, tokenizer: WordTokenizer, picture: bool = True) -> Row:
    """A row full of questions about one scene."""
    layout = rng.choices(LAYOUT_LIST, LAYOUT_WEIGHTS)[0]
    row = Row(tokenizer.before(layout), layout, picture, [], [], [], [], [])
    conversation = rng.random() < 0.3
    again = False
    misses = 0
    for segment in range(1, 60):
        pair = next_pair(rng, scene, picture)
        if pair is None:
            continue
        frame = layout.again if again else layout.after
        text = frame.replace("{}", untidy(rng, pair[0]))
        space = rng.random() < (0.6 if again else layout.space)
        question = tokenizer.turn(text, space, rng.random() < 0.1)
        start = len(row.tokens) if conversation else 0
        if not row.append(question, tokenizer.answer(pair[1]), 1 if conversation else segment, start):
            misses += 1
            if misses > 1:
                break
        again = conversation and bool(row.tokens)
    return row


def second_color(rng: random.Random, color: tuple[float, float, float], name: str) -> tuple[float, ...]:
    """A lighter or darker shade for the background's pattern, never so far that its name changes."""
    amount = rng.uniform(0.12, 0.32)
    if name in ("white", "gray"):
        amount *= 0.35
    toward = 1.0 if name == "black" or (name != "white" and rng.random() < 0.5) else 0.0
    amount *= 0.6 if name == "black" else 1.0
    return tuple(channel + (toward - channel) * amount for channel in color)


def inverse_matrix(angle: float, shear: float, flip: bool, size: float) -> list[float]:
    """Canvas offset -> sprite coordinates, for a sprite that was flipped, sheared, scaled and turned."""
    cos, sin, sign = math.cos(angle), math.sin(angle), -1.0 if flip else 1.0
    return [sign * (cos + shear * sin) / size, sign * (sin - shear * cos) / size, -sin / size, cos / size]


Looks = tuple[list[float], float, list[float], float]


def looks(rng: random.Random, tint: tuple[float, float, float] | None) -> Looks:
    """Random tint, saturation, light and lift of one object."""
    if tint is not None:
        return list(tint), 1.0, [rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)], 0.0
    gains = [rng.uniform(0.87, 1.13) for _ in range(3)]
    saturation = rng.uniform(0.7, 1.3) if rng.random() < 0.93 else rng.uniform(0.0, 0.6)
    return gains, saturation, [rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)], rng.uniform(-0.06, 0.06)


def empty_spec(count: int) -> dict[str, np.ndarray]:
    """The arrays that compose.draw reads, for `count` pictures; unused objects are far away and tiny."""
    k = MAX_OBJECTS
    spec = {
        "extent": np.ones((count, 2)), "bg_color": np.zeros((count, 3)), "bg_second": np.zeros((count, 3)),
        "bg_pattern": np.zeros(count), "bg_angle": np.zeros(count), "bg_frequency": np.ones(count),
        "bg_phase": np.zeros(count), "bg_waves": np.zeros((count, 4, 3)), "matrix": np.ones((count, k, 4)),
        "centre": np.full((count, k, 2), 9.0), "size": np.ones((count, k)), "saturation": np.ones((count, k)),
        "light": np.zeros((count, k, 2)), "tint": np.ones((count, k, 3)), "lift": np.zeros((count, k)),
    }  # fmt: skip
    spec = {name: value.astype(np.float32) for name, value in spec.items()}
    spec["sprite"] = np.zeros((count, k), np.int64)
    spec["class"] = np.zeros((count, k), np.int64)
    spec["photo"] = np.full(count, -1, np.int64)
    return spec


def write_spec(spec: dict[str, np.ndarray], i: int, scene: Scene, rng: random.Random) -> None:
    """Fill row i of the drawing arrays."""
    name = COLOR_NAMES[scene.background]
    color = jittered(rng, scene.background)
    spec["extent"][i] = (scene.width, scene.height)
    spec["bg_color"][i], spec["bg_second"][i] = color, second_color(rng, color, name)
    spec["bg_pattern"][i] = scene.pattern
    spec["bg_angle"][i] = rng.choice((0, math.pi / 4, math.pi / 2, rng.uniform(0, 6.28)))
    if scene.pattern == 1:
        spec["bg_angle"][i] = rng.uniform(0, 6.28)
    spec["bg_frequency"][i], spec["bg_phase"][i] = rng.uniform(3.0, 9.0), rng.uniform(0, 6.28)
    spec["bg_waves"][i] = [[rng.uniform(-16, 16), rng.uniform(-16, 16), rng.uniform(0, 6.28)] for _ in range(4)]
    if scene.photo:
        spec["photo"][i] = rng.randrange(1 << 30)
    for k, item in enumerate(scene.items):
        spec["sprite"][i, k] = item.sprite
        spec["class"][i, k] = UNKNOWN_CLASS if item.noun == UNKNOWN else item.noun + FIRST_NOUN_CLASS
        spec["centre"][i, k] = (item.x, item.y)
        spec["size"][i, k] = item.size
        spec["matrix"][i, k] = inverse_matrix(item.angle, item.shear, item.flip, item.size)
        tint = jittered(rng, item.color) if item.color >= 0 else None
        spec["tint"][i, k], spec["saturation"][i, k], spec["light"][i, k], spec["lift"][i, k] = looks(rng, tint)


def write_row(arrays: dict[str, np.ndarray], i: int, row: Row) -> None:
    """Copy a filled row into the batch's arrays."""
    before, text = len(row.before), len(row.tokens)
    image = BEFORE + IMAGE
    arrays["tokens"][i, BEFORE - before : BEFORE] = row.before
    arrays["segments"][i, BEFORE - before : BEFORE] = 0
    arrays["positions"][i, BEFORE - before : image] = np.arange(before + IMAGE)
    if row.picture:
        arrays["segments"][i, BEFORE:image] = 0
    arrays["tokens"][i, image : image + text] = row.tokens
    arrays["segments"][i, image : image + text] = row.segments
    arrays["positions"][i, image : image + text] = row.positions
    arrays["target_at"][i, : len(row.targets)] = row.target_at
    arrays["targets"][i, : len(row.targets)] = row.targets


def empty_rows(count: int) -> dict[str, np.ndarray]:
    """Token arrays of `count` rows; segment -1 is seen by nobody."""
    return {
        "tokens": np.zeros((count, ROW), np.int32),
        "segments": np.full((count, ROW), -1, np.int32),
        "positions": np.zeros((count, ROW), np.int32),
        "target_at": np.zeros((count, TARGETS), np.int64),
        "targets": np.full((count, TARGETS), NOT_A_TARGET, np.int64),
    }


def make_batch(rng: random.Random, library: Library, tokenizer: WordTokenizer, count: int,
               photos: int) -> dict[str, np.ndarray]:  # fmt: skip
    """One training batch: the first `photos` rows are photo-like, 1.5% of the rows have no picture at all."""
    spec, arrays = empty_spec(count), empty_rows(count)
    for i in range(count):
        scene = invent(rng, library, photo=i < photos)
        write_spec(spec, i, scene, rng)
        write_row(arrays, i, fill_row(rng, scene, tokenizer, picture=rng.random() >= 0.015))
    return {**spec, **arrays}
