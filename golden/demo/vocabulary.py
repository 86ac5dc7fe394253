"""The words of the demo's small world: nouns, colours, shapes, backgrounds.

A noun is a thing that the model can name.  `nouns.txt` lists 266 of them with plural, category and the
emoji names that draw them; twelve plain shapes are added here, each in eleven colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

# The middle of each colour's range, sRGB 0..255; scenes.py jitters around it.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (60, 160, 70),
    "blue": (45, 100, 215),
    "purple": (130, 60, 175),
    "pink": (245, 150, 190),
    "brown": (125, 78, 42),
    "black": (22, 22, 24),
    "white": (248, 248, 248),
    "gray": (142, 142, 146),
}
COLOR_NAMES = tuple(COLORS)

# Colours too near each other to draw one on the other and ask about it.
CLOSE_COLORS = {
    frozenset(pair)
    for pair in [("red", "orange"), ("orange", "yellow"), ("red", "brown"), ("brown", "black"),
                 ("white", "gray"), ("orange", "brown"), ("blue", "purple"), ("red", "pink")]
}  # fmt: skip

SHAPES = ("circle", "square", "triangle", "rectangle", "oval", "diamond", "star", "heart", "cross",
          "pentagon", "hexagon", "arrow")  # fmt: skip

PATTERNS = ("plain", "gradient", "cloudy", "striped", "checkered", "dotted")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Categories that people ask about: question word -> (singular, plural).
CATEGORIES = {
    "animal": ("animal", "animals"),
    "fruit": ("fruit", "fruits"),
    "vehicle": ("vehicle", "vehicles"),
    "food": ("piece of food", "pieces of food"),
}


@dataclass(frozen=True)
class Noun:
    """One nameable thing."""

    name: str  # "red apple"
    plural: str  # "red apples"
    category: str  # "fruit"
    icons: tuple[str, ...]  # emoji names, empty for a plain shape

    def counted(self, count: int) -> str:
        """ "a dog", "two dogs", "an owl"."""
        return f"{article(self.name)} {self.name}" if count == 1 else f"{NUMBERS[count]} {self.plural}"


def article(phrase: str) -> str:
    """The indefinite article of a phrase: "an owl", "a unicorn"."""
    return "an" if phrase[0] in "aeiou" and not phrase.startswith("uni") else "a"


def read_nouns() -> list[Noun]:
    """The 266 drawn nouns followed by the 12 shapes; the position in the list is the noun's id."""
    nouns = []
    for line in (HERE / "nouns.txt").read_text(encoding="utf8").splitlines():
        if line and not line.startswith("#"):
            name, plural, category, icons = line.split("|")
            nouns.append(Noun(name, plural, category, tuple(icons.split(","))))
    return nouns + [
        Noun(shape, f"{shape}es" if shape == "cross" else f"{shape}s", "shape", ()) for shape in SHAPES
    ]


# What people also call some of the nouns; an alias may mean several nouns.
ALIASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "apple": ("apples", ("red apple", "green apple")),
}
