"""Two runs of different lengths: which stage first made more of one thing than the other did, and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from tinyllava.study.compare import differences
from tinyllava.study.compare.dumps import Dump

# The choices of a profile that set a number: of tiles, of a picture's tokens, of the prompt's tokens.
TILES = ("pinpoint_order", "size_precision", "small_pictures", "tiles_of_flat_files")
TOKENS = ("merge", "unpad_rounding", "tiles_of_flat_files", "pinpoint_order")
TEXT = ("wording", "templates", "space_prefix")


def explain_lengths(a: Dump, b: Dump) -> list[str]:
    """One sentence for the first stage of two traces that differs in length, with its reason; or nothing."""
    if not (a.is_trace and b.is_trace):
        return []
    return list(islice(_differences(a, b), 1))


def _differences(a: Dump, b: Dump) -> Iterator[str]:
    """All stages that differ in length, in the order of the walk."""
    ours, theirs = a.settings, b.settings
    yield from _pictures(a, b, ours.get("pictures", []), theirs.get("pictures", []))
    for part, what in (("vit", "n_block"), ("llm", "n_layer")):
        counts = [settings.get(part, {}).get(what) for settings in (ours, theirs)]
        if None not in counts and counts[0] != counts[1]:
            name = {"vit": "vision tower", "llm": "language model"}[part]
            why = _why(a, b, ("blocks",)) if part == "vit" else "these are two models"
            yield _sentence(name, counts, "blocks", why)
    counts = [settings.get("text_tokens") for settings in (ours, theirs)]
    if None not in counts and counts[0] != counts[1]:
        yield _sentence("prompt", counts, "tokens of text", _why_text(a, b))
    if "answer_ids" in a.values and "answer_ids" in b.values:
        answers = [dump.values["answer_ids"].load().tolist() for dump in (a, b)]
        if len(answers[0]) != len(answers[1]):
            yield _sentence("answer", [len(ids) for ids in answers], "tokens", _why_answer(a, b, answers))


def _pictures(a: Dump, b: Dump, ours: list[Any], theirs: list[Any]) -> Iterator[str]:
    if len(ours) != len(theirs):
        yield _sentence("pictures", [len(ours), len(theirs)], "pictures", "the runs were given different pictures")
        return
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        where = f"picture {i + 1}"
        if x["n_tiles"] != y["n_tiles"]:
            why = f"grids of {_grid(x)} and {_grid(y)}: {_why_size(a, b, x, y, TILES)}"
            yield _sentence(where, [x["n_tiles"], y["n_tiles"]], "tiles", why)
        elif x["n_tokens"] != y["n_tokens"]:
            why = f"{_kept(x)} and {_kept(y)}: {_why_size(a, b, x, y, TOKENS)}"
            yield _sentence(where, [x["n_tokens"], y["n_tokens"]], "tokens", why)


def _sentence(stage: str, counts: list[Any], what: str, why: str) -> str:
    return f"first difference in length: {stage}, {counts[0]} {what} against {counts[1]}, because of {why}"


def _grid(picture: dict[str, Any]) -> str:
    rows, columns = picture["grid"]
    return f"{rows} x {columns} tiles of {picture['tile_px']} px"


def _kept(picture: dict[str, Any]) -> str:
    box = picture["unpadded"]
    return f"{picture['merge']} with {box['height']} x {box['width']} patches kept"


def _why_size(a: Dump, b: Dump, x: dict[str, Any], y: dict[str, Any], fields: tuple[str, ...]) -> str:
    if x["size"] != y["size"]:
        sizes = [f"{p['size'][1]} x {p['size'][0]}" for p in (x, y)]
        return f"the picture is {sizes[0]} px, or {sizes[1]} px"
    if x["kind"] != y["kind"]:
        return f"one model is LLaVA-{x['kind']}, the other LLaVA-{y['kind']}"
    return _why(a, b, fields)


def _why(a: Dump, b: Dump, fields: tuple[str, ...]) -> str:
    """The choices of the profiles that set this number, or what else is different."""
    differing = differences.differing(a, b)
    found = [differences.describe(field, differing[field]) for field in fields if field in differing]
    if found:
        return "; ".join(found)
    files = [dump.settings.get("mmproj") for dump in (a, b)]
    return f"the files {files[0]} and {files[1]}" if files[0] != files[1] else "the files' own settings"


def _why_text(a: Dump, b: Dump) -> str:
    one, other = a.settings, b.settings
    if one.get("prompt") != other.get("prompt"):
        return "the prompts are not the same"
    if one.get("template") != other.get("template"):
        return f"template {one.get('template')} against {other.get('template')}"
    differing = differences.differing(a, b)
    found = [differences.describe(field, differing[field]) for field in TEXT if field in differing]
    return "; ".join(found) or "the models' tokenizers"


def _why_answer(a: Dump, b: Dump, answers: list[list[int]]) -> str:
    same = sum(1 for _ in _common_start(*answers))
    limits = [dump.settings.get("max_tokens") for dump in (a, b)]
    if same == min(map(len, answers)) and limits[0] != limits[1]:
        return f"limits of {limits[0]} and {limits[1]} tokens"
    if same == min(map(len, answers)):
        return f"one ends after token {same}, the other goes on"
    return f"the answers part at token {same + 1}"


def _common_start(x: list[int], y: list[int]) -> Iterator[int]:
    for left, right in zip(x, y, strict=False):
        if left != right:
            return
        yield left
