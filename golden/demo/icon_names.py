"""Which icon of which set draws which noun, and which icons draw something the model must not know.

Most sets use the Unicode short names ("dog-face").  Others need the few translations below.  An icon
that draws no listed noun may teach "I am not sure what this is." unless it looks like one: those are
in `near_nouns.txt` and are used nowhere.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from vocabulary import Noun

HERE = Path(__file__).parent
EMOJI_SETS = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji",
              "streamline-emojis", "fluent-emoji-high-contrast", "emojione-monotone", "openmoji")  # fmt: skip
# How many unknown icons each set may give, at most.
UNKNOWN_QUOTA = {"mdi": 350, "ph": 250, "tabler": 250, "fa6-solid": 150, "game-icons": 450}

# fxemoji and others: their name -> our noun.
OTHER_NAMES = {
    "mouseside": "mouse",
    "dogside": "dog",
    "catside": "cat",
    "pigside": "pig",
    "tigerside": "tiger",
    "leopardside": "leopard",
    "gamedie": "die",
    "europeancastle": "castle",
    "boot": "boot",
    "tie": "necktie",
    "hampster": "hamster",
    "bunny": "rabbit",
    "bunnyside": "rabbit",
    "dragonside": "dragon",
    "dragonhead": "dragon",
    "spurtingwhale": "whale",
    "racecar": "racing car",
    "steamlocomotive": "train",
    "highspeedtrain": "train",
    "highspeedtrainbulletnose": "train",
    "aubergine": "eggplant",
    "earofmaize": "ear of corn",
    "chilipepper": "hot pepper",
    "sliceofpizza": "pizza",
    "evergreen": "pine tree",
    "bolt": "lightning bolt",
    "housebuilding": "house",
    "cellphone": "mobile phone",
    "personalcomputer": "laptop",
    "present": "gift",
    "schoolsatchel": "backpack",
    "gem": "gem",
    "sunrays": "sun",
    "electrictorch": "flashlight",
    "lock": "lock",
    "mensshoe": "shoe",
    "meridianglobe": "",
    "europeafricaglobe": "globe",
    "asiaaustraliaglobe": "globe",
    "americasglobe": "globe",
    "foxsmiling": "fox",
    "foxgrin": "fox",
    "dromedarycamel": "camel",
    "bactriancamel": "camel",
    "darksunglasses": "pair of sunglasses",
    "blackscissors": "pair of scissors",
    "gem-stone": "gem",
    "red-wine-glass": "glass of wine",
    "robot-face": "robot",
    "lion-face": "lion",
    "game-dice": "die",
    "jeans": "pair of jeans",
    "tulip": "tulip",
    "forkknife": "fork and knife",
    "grapes": "bunch of grapes",
    "french-fries": "box of fries",
    "beer-mug": "mug of beer",
    "cheese": "piece of cheese",
    "snowmanwithoutsnow": "snowman",
    "mansshirt": "shirt",
    "leftmagnifyingglass": "magnifying glass",
    "rightmagnifyingglass": "magnifying glass",
    "tennisball": "",
    "bowtie": "",
    "cat-face": "cat",
    "food-apple": "",
    "fruit-pineapple": "pineapple",
    "fruit-watermelon": "watermelon",
    "fruit-cherries": "cherry",
    "fruit-grapes": "bunch of grapes",
    "fruit-citrus": "",
    "duck": "duck",
    "ice-cream": "ice cream",
    "pine-tree": "pine tree",
    "palm-tree": "palm tree",
    "airplane": "airplane",
    "fire-truck": "fire engine",
    "motorbike": "motorcycle",
    "tshirt-crew": "shirt",
    "glass-wine": "glass of wine",
    "glass-cocktail": "cocktail",
    "coffee": "cup of coffee",
    "beer": "mug of beer",
    "sail-boat": "sailboat",
    "sword": "",
    "gift": "gift",
    "bird": "bird",
    "fish": "fish",
    "horse": "horse",
    "cow": "cow",
    "mobile-phone": "mobile phone",
    "cellphone-": "",
    "school-bag": "backpack",
    "plane": "airplane",
    "camera": "camera",
    "house-simple": "house",
    "house-chimney": "house",
    "car-side": "car",
    "carrot": "carrot",
    "lemon": "lemon",
    "pepper-hot": "hot pepper",
    "burger": "hamburger",
    "scissors": "pair of scissors",
    "sunglasses": "pair of sunglasses",
    "eyeglasses": "pair of glasses",
    "t-shirt": "shirt",
    "dress": "dress",
    "boot-outline": "boot",
    "wine": "glass of wine",
    "umbrella": "umbrella",
    "bathtub": "bathtub",
    "bed": "bed",
    "armchair": "",
    "toilet": "toilet",
    "trophy": "trophy",
    "ghost": "ghost",
    "skull": "skull",
    "snowman": "snowman",
    "rocket": "rocket",
    "rocket-launch": "rocket",
    "crown": "crown",
    "helicopter": "helicopter",
    "tractor": "tractor",
    "truck": "truck",
    "bicycle": "bicycle",
    "bike": "bicycle",
    "airplane-tilt": "airplane",
    "egg-crack": "",
    "pizza": "pizza",
    "cookie": "cookie",
    "hamburger": "hamburger",
    "cheese-": "",
    "popcorn": "box of popcorn",
    "tent": "tent",
    "moon": "crescent moon",
    "sun": "sun",
    "weather-night": "crescent moon",
    "weather-sunny": "sun",
    "lightning": "lightning bolt",
    "lightning-bolt": "lightning bolt",
    "flash": "lightning bolt",
    "water": "drop of water",
    "drop": "drop of water",
    "flower-tulip": "tulip",
    "tree": "tree",
    "tree-evergreen": "pine tree",
    "castle-turret": "",
    "lightbulb": "light bulb",
    "bulb": "light bulb",
    "home": "house",
    "flame": "fire",
    "mail": "envelope",
    "email": "envelope",
    "alarm": "alarm clock",
    "alarm-clock": "alarm clock",
    "soccer": "soccer ball",
    "soccer-ball": "soccer ball",
    "basketball": "basketball",
    "baseball": "baseball",
    "football": "football",
    "volleyball": "volleyball",
    "dice-5": "die",
    "dice-five": "die",
    "puzzle": "puzzle piece",
    "silverware-fork-knife": "fork and knife",
    "fork-knife": "fork and knife",
    "utensils": "fork and knife",
    "briefcase": "briefcase",
    "handbag": "handbag",
    "tote": "",
    "key": "key",
    "hammer": "hammer",
    "axe": "axe",
    "wrench": "wrench",
    "screwdriver": "screwdriver",
    "magnet": "magnet",
    "broom": "broom",
    "bucket": "bucket",
    "basket": "basket",
    "anchor": "anchor",
    "bell": "bell",
    "bomb": "bomb",
    "robot": "robot",
    "ant": "ant",
    "spider": "spider",
    "bee": "bee",
    "snake": "snake",
    "butterfly": "butterfly",
    "rabbit": "rabbit",
}
SKIPPED = re.compile(r"(^|-)(flag|oclock|thirty|light|dark|medium|tone\d)(-|$)|thirty|oclock|arrow|flag$")
PEOPLE = re.compile(r"(^|-)(man|woman|men|women|person|people|boy|girl|family|couple|kiss|face)(-|$)")
NOT_IN_ONE_COLOR = {"red apple", "green apple"}  # their colour is part of their name
VARIANTS = {"ph": ("", "-fill", "-duotone", "-bold"), "tabler": ("", "-filled"), "mdi": ("", "-outline")}


def near_noun_words() -> set[str]:
    """Icon names that look like a noun, and are therefore nobody's example of an unknown thing."""
    return set((HERE / "near_nouns.txt").read_text(encoding="utf8").split())


def plain_name(icon_set: str, name: str) -> str:
    """An icon's name without its set's own endings: streamline numbers its drawings, ph its weights."""
    if icon_set == "streamline-emojis":
        name = re.sub(r"-\d$", "", name)
    for ending in VARIANTS.get(icon_set, ()):
        if ending and name.endswith(ending):
            return name.removesuffix(ending)
    return name


def noun_table(nouns: list[Noun], icon_set: str) -> dict[str, int]:
    """Plain icon name -> noun id, for one set.  Only emoji sets are trusted with every emoji name."""
    table: dict[str, int] = {}
    ids = {noun.name: index for index, noun in enumerate(nouns) if noun.icons}
    for name, index in ids.items():
        own = name.replace(" ", "-")
        for icon in (own, *nouns[index].icons):
            table.setdefault(icon, index)
            table.setdefault(icon.replace("-", "") if icon_set == "fxemoji" else icon, index)
    for icon, name in OTHER_NAMES.items():
        if name:
            table.setdefault(icon, ids[name])
    if icon_set not in EMOJI_SETS or icon_set in ("fluent-emoji-high-contrast", "emojione-monotone"):
        table = {icon: i for icon, i in table.items() if nouns[i].name not in NOT_IN_ONE_COLOR}
    return table


def unknown_names(icon_set: str, names: list[str], nouns: list[Noun]) -> list[str]:
    """The set's icons that draw none of the nouns and nothing that looks like one."""
    known = noun_table(nouns, icon_set)
    words = {word for noun in nouns for word in noun.name.split() if len(word) > 2} - {"and", "box", "cup"}
    words |= {word for noun in nouns for icon in noun.icons for word in icon.split("-") if len(word) > 2}
    words |= {"circle", "square", "heart", "star", "arrow", "arrows", "cheers", "toad", "flag", "clock"}
    near = near_noun_words()
    kept = []
    for name in names:
        plain = plain_name(icon_set, name)
        parts = {part for word in plain.split("-") for part in (word, word.removesuffix("s"))}
        if plain in known or plain in near or SKIPPED.search(plain):
            continue
        if PEOPLE.search(plain) and zlib.crc32(plain.encode()) % 4:
            continue
        if icon_set in EMOJI_SETS or not parts & (words | near):
            kept.append(name)
    quota = UNKNOWN_QUOTA.get(icon_set, 700)
    kept.sort(key=lambda name: zlib.crc32(name.encode()))  # a fixed, mixed order
    return kept[:quota]


def is_held_out(name: str) -> bool:
    """One unknown name in five is kept for evaluation, in every set alike."""
    return zlib.crc32(b"held out " + name.encode()) % 5 == 0
