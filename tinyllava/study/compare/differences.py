"""Known differences: which choice of a profile explains that two programs part ways at a tap.

The table with reasons and measured effects is golden/known_differences.toml; the file of that name beside this
one is a link to it, so that an installed tinyllava has it, too. Each entry names the field of the profile
(profile.py) that is the choice; here stands only where on the walk a choice shows first.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tinyllava.profile import PROFILES
from tinyllava.study import tap_names
from tinyllava.study.compare.dumps import Dump

FILE = Path(__file__).parent / "known_differences.toml"
# Field of the profile -> the tap at which the choice shows first.
SHOWS = {
    "exif": "pixels",
    "one_tile": "pixels",
    "pad_place": "pixels",
    "pad_colour": "pixels",
    "resample": "pixels",
    "pinpoint_order": "pixels",
    "size_precision": "pixels",
    "small_pictures": "pixels",
    "tiles_of_flat_files": "pixels",
    "anyres_resample": "pixels",
    "anyres_pad_colour": "pixels",
    "overview": "image_tokens",
    "class_token": "vit.inp_embd",
    "vit_gelu": "vit.blk.0.ffn_act",
    "blocks": "vit.features",
    "post_norm": "vit.features",
    "projector_gelu": "mm.0.act",
    "merge": "image_tokens",
    "unpad_rounding": "image_tokens",
    "wording": "ids",
    "templates": "ids",
    "space_prefix": "ids",
}
ONLY_15 = {"one_tile", "pad_place", "pad_colour", "resample"}
ONLY_16 = {
    "pinpoint_order", "size_precision", "small_pictures", "tiles_of_flat_files", "anyres_resample",
    "anyres_pad_colour", "overview", "merge", "unpad_rounding",
}  # fmt: skip
_TILES, _TOKENS = ("resized", "resolution", "grid"), ("merge", "unpadded", "n_tokens")
PLANNED = {  # what each choice decides in a picture's plan
    "pinpoint_order": _TILES,
    "size_precision": _TILES,
    "tiles_of_flat_files": _TILES,
    "merge": _TOKENS,
    "unpad_rounding": _TOKENS,
    "overview": ("overview",),
}
Place = tuple[int, int, int]


def choices(dump: Dump) -> dict[str, Any]:
    """The choices that made a dump: a trace says them, another program's are its profile's; {} if unknown."""
    if dump.is_trace:
        found = dump.settings.get("profile", {})
        return found if isinstance(found, dict) else {}
    known = PROFILES.get(dump.compat)
    return {} if known is None else asdict(known)


def differing(a: Dump, b: Dump) -> dict[str, tuple[Any, Any]]:
    """The choices in which two dumps differ: field -> (a's, b's), where both are known."""
    ours, theirs = choices(a), choices(b)
    known = [field for field in SHOWS if field in ours and field in theirs]
    both = ((field, _plain(ours[field]), _plain(theirs[field])) for field in known)
    return {field: (x, y) for field, x, y in both if x != y and _matters(field, a, b)}


def _matters(field: str, a: Dump, b: Dump) -> bool:
    """Whether a choice has a say in this run: tiles only in LLaVA-1.6, GELU's form only where there is a GELU."""
    settings = a.settings or b.settings
    kinds = {picture.get("kind") for picture in settings.get("pictures", [])}
    if (field in ONLY_15 and kinds == {"1.6"}) or (field in ONLY_16 and kinds == {"1.5"}):
        return False
    vit = settings.get("vit", {})
    if field == "vit_gelu":
        return str(vit.get("activation", "gelu_erf")) in ("gelu_erf", "gelu_tanh")
    if field == "pad_colour" and "mean" in vit:
        colours = [choices(dump)["pad_colour"] for dump in (a, b)]
        mean = [int(255 * value) for value in vit["mean"]]
        return [_plain(c) if c != "mean" else mean for c in colours] != [mean, mean]
    if field == "small_pictures":
        return any(max(picture["size"]) <= picture["tile_px"] for picture in settings.get("pictures", []))
    return not (a.is_trace and b.is_trace) or _decided(field, a.settings) != _decided(field, b.settings)


def _decided(field: str, settings: dict[str, Any]) -> Any:
    """What a choice comes to for a trace's file and pictures; the field itself where nothing tells."""
    if field in ("blocks", "post_norm"):
        return settings.get("vit", {}).get({"blocks": "n_block"}.get(field, field))
    keys = PLANNED.get(field)
    return [[p[key] for key in keys] for p in settings.get("pictures", [])] if keys else settings["profile"][field]


def explaining(name: str, after: Place, fields: dict[str, tuple[Any, Any]]) -> list[str]:
    """Of the differing ``fields``, those that show first after the place ``after`` and up to ``name``."""
    return [field for field in fields if after < tap_names.walk(SHOWS[field]) <= tap_names.walk(name)]


def describe(field: str, pair: tuple[Any, Any]) -> str:
    """``class_token: first against last``, and what the table knows of it."""
    text = f"{field}: {pair[0]} against {pair[1]}"
    entries = [entry for entry in table() if entry.get("choice") == field]
    if not entries:
        return text
    entry = next((entry for entry in entries if _plain(entry.get("flip")) in pair), entries[0])
    effect = entry.get("effect")
    measured = f"; alone it changes the embeddings by {effect:.2g}" if isinstance(effect, float) else ""
    return f"{text}. {entry.get('what', '')}{measured}"


@cache
def table() -> list[dict[str, Any]]:
    """The table's entries; none where the file was not installed."""
    if not FILE.exists():
        return []
    entries: list[dict[str, Any]] = read_table(FILE.read_text(encoding="utf-8"))["difference"]
    return entries


# A header, [[of a list]] or [of a table], or a key with its value, on one line or as a list on several.
_LINE = re.compile(r"^(?:\[\[(\w+)\]\]|\[(\w+)\]|([\w-]+) = (\[\n(?: .*\n)*\]|.+))$", re.MULTILINE)


def read_table(text: str) -> dict[str, Any]:
    """The TOML that known_differences.toml is written in: its values are JSON, but for a comma before "]".

    Python reads all of TOML since 3.11 only.
    """
    tables: dict[str, Any] = {}
    here = tables
    for found in _LINE.finditer(text):
        listed, single, key, value = found.groups()
        if key:
            here[key] = json.loads(re.sub(r",\s*\]$", "]", value))
        elif listed:
            here = {}
            tables.setdefault(listed, []).append(here)
        else:
            here = tables[single] = {}
    return tables


def _plain(value: Any) -> Any:
    """A value as JSON has it: no tuples."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
