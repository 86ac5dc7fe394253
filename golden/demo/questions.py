"""Ask about a scene, and answer: every kind of question, its paraphrases and its one canonical answer.

Each `ask_*` function takes a scene and returns (question, answer), or None where the scene gives no
unambiguous answer.  README.md lists the answers; they are sentences, and lists run from left to right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from scenes import UNKNOWN, Item, Scene
from vocabulary import ALIASES, CATEGORIES, COLOR_NAMES, NUMBERS, PATTERNS, Noun, article, read_nouns

Pair = tuple[str, str]
NOUNS: list[Noun] = read_nouns()
IDS = {noun.name: index for index, noun in enumerate(NOUNS)}
SHAPE_IDS = [i for i, noun in enumerate(NOUNS) if noun.category == "shape"]
DRAWN_IDS = [i for i, noun in enumerate(NOUNS) if noun.category != "shape"]
BY_CATEGORY = {c: [i for i, n in enumerate(NOUNS) if n.category == c] for c in {n.category for n in NOUNS}}
PATTERN_WORDS = tuple("shaded" if name == "gradient" else name for name in PATTERNS)
NOT_SURE, NOT_SURE_WHAT = "I am not sure.", "I am not sure what this is."
NOTHING = "There is nothing in the picture."
SOMETHING = "something I am not sure about"

WHAT = ("What is this?", "What is this?", "What's this?", "What do you see here?", "What is shown here?")
LIST = ("What objects are in the picture?", "What is in the picture?", "What is in this picture?",
        "What can you see in the picture?", "What do you see?", "What does the picture show?",
        "Which objects are in the picture?", "What is in the image?", "What objects are in the image?",
        "List the objects in the picture.", "What things are in the picture?")  # fmt: skip
DESCRIBE = (
    "Describe the picture.",
    "Describe this picture.",
    "Describe the image.",
    "Please describe the picture.",
    "Describe this image.",
    "Can you describe the picture?",
    "Give a short description of the picture.",
    "Write a caption for the picture.",
    "Describe the picture in one sentence.",
    "Describe the image in detail.",
)
BACKGROUND = ("What color is the background?", "What is the color of the background?",
              "Which color does the background have?", "What colour is the background?",
              "What is the background color?")  # fmt: skip
PATTERN = ("What pattern does the background have?", "What does the background look like?",
           "What kind of background is it?")  # fmt: skip
TOTAL = ("How many objects are there?", "How many objects are in the picture?", "How many things are there?",
         "How many things are in the picture?", "Count the objects.")  # fmt: skip
SIDES = {
    "left": (
        "to the left of",
        ("What is to the left of the {}?", "What is left of the {}?", "What is on the left of the {}?"),
    ),
    "right": (
        "to the right of",
        ("What is to the right of the {}?", "What is right of the {}?", "What is on the right of the {}?"),
    ),
    "above": ("above", ("What is above the {}?", "What is over the {}?")),
    "below": ("below", ("What is below the {}?", "What is under the {}?", "What is beneath the {}?")),
}


def item_name(item: Item) -> tuple[str, str]:
    """Singular and plural of an object as a list names it: shapes carry their colour."""
    if item.noun == UNKNOWN:
        return SOMETHING, SOMETHING
    noun = NOUNS[item.noun]
    if noun.category == "shape":
        color = COLOR_NAMES[item.color]
        return f"{color} {noun.name}", f"{color} {noun.plural}"
    return noun.name, noun.plural


def counted(names: tuple[str, str], count: int) -> str:
    """ "a dog", "two dogs", "no dogs"."""
    return f"{article(names[0])} {names[0]}" if count == 1 else f"{NUMBERS[count]} {names[1]}"


def joined(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def listing(items: Sequence[Item]) -> str:
    """Objects in words, equal ones together, in the order of their leftmost; the unknown come last, as one."""
    groups: dict[tuple[str, str], int] = {}
    for item in items:
        groups[item_name(item)] = groups.get(item_name(item), 0) + 1
    unknown = groups.pop((SOMETHING, SOMETHING), 0)
    return joined([counted(names, count) for names, count in groups.items()] + [SOMETHING] * bool(unknown))


def all_unknown(scene: Scene) -> bool:
    """Whether there is something, and none of it has a name."""
    return scene.photo or (bool(scene.items) and all(item.noun == UNKNOWN for item in scene.items))


def ask_what(scene: Scene, rng: random.Random) -> Pair | None:
    """What is this?"""
    question = rng.choice(WHAT)
    if all_unknown(scene):
        return question, NOT_SURE_WHAT
    if not scene.items:
        return question, NOTHING
    of = "" if len(scene.items) == 1 else "a picture of "
    return question, f"This is {of}{listing(scene.items)}."


def ask_list(scene: Scene, rng: random.Random) -> Pair | None:
    """What objects are in the picture?"""
    question = rng.choice(LIST)
    if all_unknown(scene):
        return question, NOT_SURE_WHAT
    return question, f"The picture shows {listing(scene.items)}." if scene.items else NOTHING


def ask_describe(scene: Scene, rng: random.Random) -> Pair | None:
    """Describe the picture."""
    question = rng.choice(DESCRIBE)
    if scene.photo:
        return question, NOT_SURE_WHAT
    if not scene.items:
        return question, NOTHING
    text = listing(scene.items)
    pattern, color = PATTERN_WORDS[scene.pattern], COLOR_NAMES[scene.background]
    return question, f"{text[0].upper()}{text[1:]} on a {pattern} {color} background."


def ask_background(scene: Scene, rng: random.Random) -> Pair | None:
    """What color is the background?"""
    answer = NOT_SURE if scene.photo else f"The background is {COLOR_NAMES[scene.background]}."
    return rng.choice(BACKGROUND), answer


def ask_pattern(scene: Scene, rng: random.Random) -> Pair | None:
    """What pattern does the background have?"""
    return rng.choice(PATTERN), NOT_SURE if scene.photo else f"The background is {PATTERN_WORDS[scene.pattern]}."


def pick_query(scene: Scene, rng: random.Random, present: bool) -> tuple[tuple[str, str], int] | None:
    """Something to ask for, (singular, plural), and how many of it the scene has."""
    known = [item for item in scene.items if item.noun != UNKNOWN]
    if present and not known:
        return None
    if present:
        item = rng.choice(known)
        noun = NOUNS[item.noun]
        if noun.category == "shape" and rng.random() < 0.5:
            return item_name(item), sum(item_name(other) == item_name(item) for other in known)
        for alias, (plural, members) in ALIASES.items():
            if noun.name in members and rng.random() < 0.5:
                return (alias, plural), sum(NOUNS[other.noun].name in members for other in known)
        return (noun.name, noun.plural), sum(other.noun == item.noun for other in known)
    return pick_absent(rng, known)


def pick_absent(rng: random.Random, known: list[Item]) -> tuple[tuple[str, str], int] | None:
    """Something that is not there: half the time of the same category as something that is."""
    if rng.random() < 0.12:
        color, shape = rng.choice(COLOR_NAMES), NOUNS[rng.choice(SHAPE_IDS)]
        shapes = [item for item in known if NOUNS[item.noun].category == "shape"]
        if shapes and rng.random() < 0.6:  # the right colour or the right shape, not both
            item = rng.choice(shapes)
            color, shape = (COLOR_NAMES[item.color], shape) if rng.random() < 0.5 else (color, NOUNS[item.noun])
        names = (f"{color} {shape.name}", f"{color} {shape.plural}")
        return (names, 0) if all(item_name(item) != names for item in known) else None
    if rng.random() < 0.01:
        alias, (plural, members) = rng.choice(list(ALIASES.items()))
        return ((alias, plural), 0) if all(NOUNS[item.noun].name not in members for item in known) else None
    noun = rng.choice(DRAWN_IDS) if rng.random() < 0.95 else rng.choice(SHAPE_IDS)
    if known and rng.random() < 0.5:
        noun = rng.choice(BY_CATEGORY[NOUNS[rng.choice(known).noun].category])
    if any(item.noun == noun for item in known):
        return None
    return (NOUNS[noun].name, NOUNS[noun].plural), 0


def ask_is_there(scene: Scene, rng: random.Random) -> Pair | None:
    """Is there a dog in the picture?  Half of the answers are yes."""
    query = pick_query(scene, rng, rng.random() < 0.5)
    if query is None:
        return None
    names, count = query
    one = f"{article(names[0])} {names[0]}"
    question = rng.choice((f"Is there {one} in the picture?", f"Is there {one}?", f"Do you see {one}?",
                           f"Are there any {names[1]} in the picture?", f"Can you see {one} in the picture?",
                           f"Is there {one} in the image?"))  # fmt: skip
    if scene.photo:
        return question, NOT_SURE
    if not count:
        return question, f"No, there is no {names[0]} in the picture."
    return question, f"Yes, there {'is' if count == 1 else 'are'} {counted(names, count)} in the picture."


def ask_how_many(scene: Scene, rng: random.Random) -> Pair | None:
    """How many dogs are there?"""
    query = pick_query(scene, rng, rng.random() < 0.8)
    if query is None:
        return None
    names, count = query
    question = rng.choice((f"How many {names[1]} are there?", f"How many {names[1]} are in the picture?",
                           f"How many {names[1]} do you see?", f"Count the {names[1]}."))  # fmt: skip
    return question, NOT_SURE if scene.photo else there_are(names, count)


def there_are(names: tuple[str, str], count: int) -> str:
    """ "There is one dog.", "There are no dogs."."""
    return f"There is one {names[0]}." if count == 1 else f"There are {NUMBERS[count]} {names[1]}."


def ask_total(scene: Scene, rng: random.Random) -> Pair | None:
    """How many objects are there?"""
    return rng.choice(TOTAL), NOT_SURE if scene.photo else there_are(("object", "objects"), len(scene.items))


def singles(scene: Scene) -> list[Item]:
    """The objects that "the dog" names without doubt: known, and the only one of their noun."""
    nouns = [item.noun for item in scene.items]
    return [item for item in scene.items if item.noun != UNKNOWN and nouns.count(item.noun) == 1]


def beside(item: Item, other: Item, side: str) -> bool | None:
    """Whether item is clearly on that side of the other; None if one could argue."""
    a, b = item.box, other.box
    if side in ("right", "below"):
        a, b = b, a
    axis = 0 if side in ("left", "right") else 1
    if a[axis + 2] <= b[axis] + 0.015:
        return True
    middle_a, middle_b = a[axis] + a[axis + 2], b[axis] + b[axis + 2]
    return False if middle_a >= middle_b - 0.03 else None


def ask_side(scene: Scene, rng: random.Random, side: str = "") -> Pair | None:
    """What is to the left of the dog?  (right of, above, below)"""
    side = side or rng.choice(tuple(SIDES))
    phrase, forms = SIDES[side]
    candidates = singles(scene)
    if not candidates or rng.random() < 0.1:
        query = pick_absent(rng, [item for item in scene.items if item.noun != UNKNOWN])
        if query is None or (scene.photo and rng.random() < 0.5):
            return None
        answer = NOT_SURE if scene.photo else f"There is no {query[0][0]} in the picture."
        return rng.choice(forms).format(query[0][0]), answer
    item = rng.choice(candidates)
    name = NOUNS[item.noun].name if rng.random() < 0.7 else item_name(item)[0]
    found = []
    for other in scene.items:
        if other is not item:
            beside_it = beside(other, item, side)
            if beside_it is None:
                return None
            if beside_it:
                found.append(other)
    question = rng.choice(forms).format(name)
    if not found:
        return question, f"There is nothing {phrase} the {name}."
    text = listing(found)
    verb = "is" if len(found) == 1 or text == SOMETHING else "are"
    return question, f"{text[0].upper()}{text[1:]} {verb} {phrase} the {name}."


def ask_is_beside(scene: Scene, rng: random.Random) -> Pair | None:
    """Is the dog to the left of the cat?"""
    candidates = singles(scene)
    if len(candidates) < 2:
        return None
    item, other = rng.sample(candidates, 2)
    side = rng.choice(tuple(SIDES))
    answer = beside(item, other, side)
    if answer is None:
        return None
    phrase, a, b = SIDES[side][0], NOUNS[item.noun].name, NOUNS[other.noun].name
    return (
        f"Is the {a} {phrase} the {b}?",
        f"{'Yes' if answer else 'No'}, the {a} is {'' if answer else 'not '}{phrase} the {b}.",
    )


def third(value: float) -> int | None:
    """0, 1, 2 for the first, middle and last third; None near a border."""
    return 0 if value < 0.30 else 2 if value > 0.70 else 1 if 0.38 < value < 0.62 else None


def ask_where(scene: Scene, rng: random.Random) -> Pair | None:
    """Where is the dog?"""
    candidates = singles(scene)
    if not candidates:
        return None
    item = rng.choice(candidates)
    column = third((item.x - 0.5) / scene.width + 0.5)
    row = third((item.y - 0.5) / scene.height + 0.5)
    if row is None or column is None:
        return None
    places = (
        ("at the top left", "at the top", "at the top right"),
        ("on the left", "in the middle", "on the right"),
        ("at the bottom left", "at the bottom", "at the bottom right"),
    )
    name = NOUNS[item.noun].name
    return rng.choice(
        (f"Where is the {name}?", f"Where is the {name} in the picture?")
    ), f"The {name} is {places[row][column]}."


def ask_color(scene: Scene, rng: random.Random) -> Pair | None:
    """What color is the circle?  Only of shapes and one-colour drawings."""
    candidates = [item for item in singles(scene) if item.color >= 0]
    if not candidates:
        return None
    item = rng.choice(candidates)
    name = NOUNS[item.noun].name
    form = rng.choice(("What color is the {}?", "Which color is the {}?", "What colour is the {}?"))
    return form.format(name), f"The {name} is {COLOR_NAMES[item.color]}."


def ask_category(scene: Scene, rng: random.Random) -> Pair | None:
    """What animals are in the picture?  Is there an animal?  How many animals are there?"""
    if any(item.noun == UNKNOWN for item in scene.items) or scene.photo:
        return None
    category = rng.choice(("animal", "animal", "fruit", "vehicle"))
    names = CATEGORIES[category]
    found = [item for item in scene.items if NOUNS[item.noun].category == category]
    if not found and rng.random() < 0.6:
        return None
    form = rng.randrange(3)
    if form == 0:
        question = rng.choice((f"What {names[1]} are in the picture?", f"Which {names[1]} do you see?"))
        if not found:
            return question, f"There are no {names[1]} in the picture."
        return question, f"The {names[0]} is {listing(found)}." if len(
            found
        ) == 1 else f"The {names[1]} are {listing(found)}."
    if form == 1:
        answer = "Yes, there is" if found else "No, there is no"
        one = f"{article(names[0])} {names[0]}"
        return f"Is there {one} in the picture?", f"{answer} {one if found else names[0]} in the picture."
    return f"How many {names[1]} are there?", there_are(names, len(found))


def ask_extreme(scene: Scene, rng: random.Random) -> Pair | None:
    """What is the largest object?"""
    if len(scene.items) < 2 or any(item.noun == UNKNOWN for item in scene.items):
        return None
    largest = rng.random() < 0.5
    ordered = sorted(scene.items, key=lambda item: item.half_width * item.half_height, reverse=largest)
    areas = [item.half_width * item.half_height for item in ordered[:2]]
    if max(areas) < 1.6 * min(areas):
        return None
    word = "largest" if largest else "smallest"
    names = item_name(ordered[0])
    return f"What is the {word} object?", f"The {word} object is {counted(names, 1)}."


Asker = Callable[[Scene, random.Random], Pair | None]
# kind -> (function, how often it is drawn)
KINDS: dict[str, tuple[Asker, float]] = {
    "what": (ask_what, 15),
    "list": (ask_list, 16),
    "describe": (ask_describe, 14),
    "background": (ask_background, 5),
    "pattern": (ask_pattern, 3),
    "is there": (ask_is_there, 13),
    "how many": (ask_how_many, 12),
    "total": (ask_total, 5),
    "side": (ask_side, 13),
    "is beside": (ask_is_beside, 4),
    "where": (ask_where, 5),
    "color": (ask_color, 5),
    "category": (ask_category, 4),
    "extreme": (ask_extreme, 3),
}
KIND_NAMES = tuple(KINDS)
KIND_WEIGHTS = tuple(weight for _, weight in KINDS.values())


def ask(scene: Scene, rng: random.Random, kind: str = "") -> tuple[str, str, str] | None:
    """(kind, question, answer) of a random or given kind."""
    kind = kind or rng.choices(KIND_NAMES, KIND_WEIGHTS)[0]
    pair = KINDS[kind][0](scene, rng)
    return (kind, *pair) if pair else None
