"""Invent scenes: what stands where, how large, in which colour, on which background.

A scene is a description only; compose.py draws it.  All lengths are fractions of the square canvas
that the picture is padded into, so a 2:1 picture occupies y in 0.25..0.75, exactly as LLaVA's own
padding will place it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
from vocabulary import CLOSE_COLORS, COLOR_NAMES, COLORS, PATTERNS, Noun

MAX_OBJECTS = 5
UNKNOWN = -1
SMALLEST = 0.20  # an object's longer side, 34 of 168 pixels
ORDER_GAP = 0.03  # centres differ at least so much in x: "from left to right" is then unambiguous


@dataclass(slots=True)
class Item:
    """One object of a scene."""

    noun: int  # id, or UNKNOWN
    sprite: int  # row of the sprite table
    color: int  # of COLOR_NAMES for shapes and one-colour icons, else -1
    x: float  # centre
    y: float
    half_width: float  # of the upright box around the turned drawing
    half_height: float
    size: float  # the drawing's longer side before it is turned
    angle: float  # radians
    shear: float
    flip: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return (self.x - self.half_width, self.y - self.half_height,
                self.x + self.half_width, self.y + self.half_height)  # fmt: skip


@dataclass(slots=True)
class Scene:
    """One picture: its shape, its background and its objects from left to right."""

    width: float  # of the picture; the larger of the two is 1
    height: float
    background: int  # of COLOR_NAMES
    pattern: int  # of PATTERNS
    photo: bool = False  # photo-like: nothing in it can be named
    items: list[Item] = field(default_factory=list)


class Library:
    """Which sprites draw what, ready for random choice."""

    def __init__(self, facts: list[dict], nouns: list[Noun], contrast: np.ndarray, role: str = "train") -> None:
        """contrast[sprite, color]: the share of a sprite that stands out from a background of that colour.

        role: "train", "held out style" (openmoji), or "held out unknown" (known things as in training).
        """
        self.nouns, self.facts, self.contrast = nouns, facts, contrast.tolist()
        known_role = "held out style" if role == "held out style" else "train"
        unknown_role = "train" if role == "train" else role
        self.colored: dict[int, list[int]] = {}
        self.tinted: dict[int, list[int]] = {}
        self.unknown: list[int] = []
        for row, fact in enumerate(facts):
            noun = fact["noun"]
            if noun == UNKNOWN and fact["role"] == unknown_role:
                self.unknown.append(row)
            elif noun != UNKNOWN and fact["icon_set"] == "shapes":
                self.tinted.setdefault(noun, []).append(row)
            elif noun != UNKNOWN and fact["role"] == known_role:
                (self.tinted if fact["tinted"] else self.colored).setdefault(noun, []).append(row)
        self.drawn = sorted(self.colored)
        self.shapes = [i for i, noun in enumerate(nouns) if noun.category == "shape"]
        self.one_color = [noun for noun in self.tinted if noun not in self.shapes]

    def pick_noun(self, rng: random.Random) -> tuple[int, bool]:
        """A noun and whether it is drawn in one colour."""
        chance = rng.random()
        if chance < 0.12:
            return rng.choice(self.shapes), True
        if chance < 0.22 and self.one_color:
            return rng.choice(self.one_color), True
        return rng.choice(self.drawn), False

    def pick_sprite(self, rng: random.Random, noun: int, tinted: bool) -> int:
        """A drawing of a noun."""
        if noun == UNKNOWN:
            return rng.choice(self.unknown)
        return rng.choice((self.tinted if tinted else self.colored)[noun])


def pick_size(rng: random.Random, letterbox: float) -> tuple[float, float]:
    """A picture's width and height, the larger being 1; `letterbox` is the share that is not square."""
    if rng.random() >= letterbox:
        return 1.0, 1.0
    short = rng.choice((0.75, 0.667, 0.625, 0.5625, 0.5, rng.uniform(0.36, 1.0)))
    return (1.0, short) if rng.random() < 0.6 else (short, 1.0)


def pick_count(rng: random.Random, width: float, height: float) -> int:
    """How many objects: one most often, five seldom, fewer where the picture is narrow."""
    count = rng.choices((1, 2, 3, 4, 5), (30, 22, 20, 15, 13))[0]
    return count if min(width, height) > 0.45 else min(count, 4)


def fits(scene: Scene, x: float, y: float, half_width: float, half_height: float) -> bool:
    """Whether a box is inside the picture, free of the others, and unambiguous in the left-right order."""
    if abs(x - 0.5) + half_width > scene.width / 2 or abs(y - 0.5) + half_height > scene.height / 2:
        return False
    for other in scene.items:
        if abs(other.x - x) < ORDER_GAP:
            return False
        if abs(other.x - x) < other.half_width + half_width and abs(other.y - y) < other.half_height + half_height:
            return False
    return True


def place(rng: random.Random, scene: Scene, fact: dict, size: float, item: tuple[int, int, int]) -> bool:
    """Try to put one object of about this size somewhere free; item is (noun, sprite, color)."""
    turn = 0.16 if fact["icon_set"] == "shapes" else 0.35
    for attempt in range(24):
        side = max(size * 0.97**attempt, min(SMALLEST, 0.9 * min(scene.width, scene.height)))
        angle, shear = rng.uniform(-turn, turn), rng.uniform(-turn, turn) * 0.4
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        wide, high = fact["width"] * side / 2, fact["height"] * side / 2
        wide += abs(shear) * high
        half_width, half_height = wide * cos + high * sin, wide * sin + high * cos
        x = 0.5 + (rng.random() - 0.5) * max(0.0, scene.width - 2 * half_width)
        y = 0.5 + (rng.random() - 0.5) * max(0.0, scene.height - 2 * half_height)
        if fits(scene, x, y, half_width, half_height):
            flip = rng.random() < 0.4 and fact["icon_set"] != "shapes"
            scene.items.append(Item(*item, x, y, half_width, half_height, side, angle, shear, flip))
            return True
    return False


def pick_tint(rng: random.Random, background: int) -> int:
    """A colour that stands out from the background."""
    while True:
        color = rng.randrange(len(COLOR_NAMES))
        pair = frozenset((COLOR_NAMES[color], COLOR_NAMES[background]))
        if color != background and pair not in CLOSE_COLORS:
            return color


def pick_things(rng: random.Random, library: Library, count: int, unknown: float) -> list[tuple[int, bool]]:
    """The nouns of a scene, with repetitions in almost half of the scenes."""
    things: list[tuple[int, bool]] = []
    repeat = rng.random() < 0.45
    while len(things) < count:
        if things and repeat and rng.random() < 0.6:
            things.append(rng.choice(things))
        elif rng.random() < unknown:
            things.append((UNKNOWN, False))
        else:
            things.append(library.pick_noun(rng))
    return things


def invent(rng: random.Random, library: Library, letterbox: float = 0.45, unknown: float = 0.10,
           empty: float = 0.02, photo: bool = False, objects: int = 0) -> Scene:  # fmt: skip
    """A random scene.  unknown: the chance of an unknown thing in it; objects: how many, 0 for a random number."""
    width, height = pick_size(rng, letterbox)
    plain = 0.3
    pattern = 0 if rng.random() < plain else rng.randrange(1, len(PATTERNS))
    scene = Scene(width, height, rng.randrange(len(COLOR_NAMES)), pattern, photo)
    if photo or (not objects and rng.random() < empty):
        return scene
    count = objects or pick_count(rng, width, height)
    share = 0.0
    if rng.random() < unknown:
        share = 1.0 if count == 1 else 0.4
    chosen = []
    for noun, tinted in pick_things(rng, library, count, share):
        chosen.append((noun, tinted, library.pick_sprite(rng, noun, tinted)))
    scene.background = pick_background(rng, library, [sprite for _, tinted, sprite in chosen if not tinted])
    room = math.sqrt(width * height / count)
    # One size for several copies makes counting fair; others vary freely.
    for noun, tinted, sprite in chosen:
        fact = library.facts[sprite]
        size = room * (rng.uniform(0.4, 0.95) if count == 1 else rng.uniform(0.5, 0.9))
        size = min(max(size, SMALLEST), 0.95 * min(width, height))
        color = pick_tint(rng, scene.background) if tinted or fact["tinted"] else -1
        place(rng, scene, fact, size, (noun, sprite, color))
    scene.items.sort(key=lambda item: item.x)
    return scene


def pick_background(rng: random.Random, library: Library, sprites: list[int]) -> int:
    """A background colour that every coloured sprite stands out from, if one is found soon."""
    color = 0
    for _ in range(8):
        color = rng.randrange(len(COLOR_NAMES))
        if all(library.contrast[sprite][color] > 0.4 for sprite in sprites):
            break
    return color


def jittered(rng: random.Random, color: int) -> tuple[float, float, float]:
    """A colour near the middle of a named one, 0..1."""
    red, green, blue = COLORS[COLOR_NAMES[color]]
    gain = (
        rng.uniform(0.88, 1.12)
        if COLOR_NAMES[color] not in ("white", "black", "gray")
        else rng.uniform(0.95, 1.05)
    )
    wobble = 14 if COLOR_NAMES[color] not in ("white", "black", "gray") else 5
    return tuple(
        min(1.0, max(0.0, (channel * gain + rng.uniform(-wobble, wobble)) / 255)) for channel in (red, green, blue)
    )  # type: ignore[return-value]
