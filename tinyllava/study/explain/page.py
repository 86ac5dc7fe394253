"""The explanation as one HTML file that needs nothing else: no network, no library, no font.

Texts of the prompt, the model and its files reach the page in two ways only: through ``escape``, or as JSON in a
script element that is no script, with every "<" written as \\u003c; from there the script sets them as text.
Should one slip through, the page's content security policy runs no script but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.files.gguf_write import put, replacing
from tinyllava.study.explain.colour import ramp
from tinyllava.study.explain.explain import Explanation, Guess, TokenStep, n_parameters
from tinyllava.study.explain.figures import compose, figures, map_panel, picture_name, shrunk, symbol, use
from tinyllava.study.explain.maps import PICTURE, SEGMENTS, SEGMENTS_OF_SEVERAL, quantise
from tinyllava.study.explain.walk_page import count, walk_html
from tinyllava.version import __version__
from tinyllava.vision.image import size_of

NOTES = (
    "A map shows the attention of the position that chose the word: the last one read before it. The word itself "
    "is read one step later, so its own look at the picture is on the next word’s map.",
    "Attention says where information was fetched, not why the word was chosen. Much of it often rests on a few "
    "positions that matter little, such as the first token.",
    "A patch’s features have passed the vision tower, where all patches look at each other: a bright one may "
    "stand for more than what is drawn there.",
    "Probabilities are the softmax of the model’s logits, before temperature and the other sampling settings.",
    "The logit lens reads middle layers with a head that was trained for the last one only.",
    "Times are medians: over five runs (one, for a large model), and over the tokens of the answer.",
    "Attention is stored in 256 steps of each map’s own peak.",
)  # fmt: skip


def write_page(path: str | Path, explanation: Explanation) -> int:
    """Write the report, all of it or nothing; its size in bytes. FileError if it cannot be written."""
    page = render(explanation).encode("utf-8", "replace")
    with replacing(path, needs_bytes=len(page)) as out:
        return put(out, page, path)


def render(e: Explanation) -> str:
    """The whole page."""
    report = files("tinyllava.study.explain") / "report"
    template, style, script = (
        (report / name).read_text("utf-8") for name in ("page.html", "style.css", "script.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(
        version=__version__,
        script_hash=f"sha256-{digest}",
        style=style,
        script=script,
        title=escape(f"{e.question[:60]} – tinyllava explain"),
        question=escape(e.question),
        answer=escape(e.result.text.strip() or "(nothing)"),
        facts=escape(" · ".join(facts(e))),
        symbols=_symbols(e),
        given_small="".join(
            use(f"given-{i}", size_of(shrunk(rgb)), picture_name(e, i)) for i, rgb in enumerate(e.given)
        ),
        figures=figures(e),
        film=_film(e),
        layer_options=_options(layer_names(e)),
        head_options=_options(head_names(e)),
        map_note=f'<p class="note">{escape(e.keep.note)}</p>' if e.keep.note else "",
        panels="\n".join(map_panel(i, panel) for i, panel in enumerate(e.panels)),
        gradient=",".join(colour(level) for level in range(0, 256, 15)),
        lens=_lens(e),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in NOTES),
        data=as_json(data(e)),
        **walk_html(e),
    )


def facts(e: Explanation) -> list[str]:
    """What ran, in a few words each."""
    language, vision, ops = e.llava.language, e.llava.vision_model, e.llava.ops
    pictures = "the picture" if len(e.given) == 1 else f"{len(e.given)} pictures"
    name = language.metadata.get("general.name")
    return [
        e.plan.family,
        *([str(name)] if name else []),
        f"{language.path.name} + {vision.path.name}",
        f"{count(n_parameters(e.llava))} parameters",
        f"{ops.name}, {ops.dtype.name}",
        f"{e.plan.prompt_tokens} tokens of prompt, {e.plan.image_tokens} of them {pictures}",
        f"template {e.plan.template}",
    ]


# ---- data for the script


def data(e: Explanation) -> dict[str, Any]:
    """What the script draws, and what anyone may read out of the page."""
    values, peaks = quantise(e.maps)
    return {
        "question": e.question,
        "answer": e.result.text,
        "facts": facts(e),
        "ramp": _base64(ramp()),
        "panels": [
            {
                "title": panel.title,
                "picture": panel.picture,
                "rows": panel.tokens.shape[0],
                "columns": panel.tokens.shape[1],
                "tokens": _base64(panel.tokens.astype("<i2")),  # -1: no token; little-endian, as browsers are
            }
            for panel in e.panels
        ],
        "maps": {
            "n": e.maps.shape[-1],
            "layers": layer_names(e),
            "heads": head_names(e),
            "values": _base64(values),
            "peaks": _base64(peaks.astype("<f4")),
            "segments": SEGMENTS if len(e.given) == 1 else SEGMENTS_OF_SEVERAL,
            "pictureSegment": PICTURE,
            "shares": _base64(np.rint(e.shares * 255).clip(0, 255).astype(np.uint8)),
        },
        "tokens": [
            {
                "id": step.chosen.id,
                "text": visible(step.chosen.text),
                "probability": step.chosen.probability,
                "rank": step.rank,
                "best": [[visible(guess.text), guess.probability, guess.id] for guess in step.best],
            }
            for step in e.tokens
        ],
    }


def as_json(value: object) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def layer_names(e: Explanation) -> list[str]:
    """The selectable layers, the mean first."""
    return ["all (mean)", *(f"block {i}" for i in e.keep.layers)]


def head_names(e: Explanation) -> list[str]:
    """The selectable heads, the mean first."""
    return ["all (mean)", *(f"head {i}" for i in range(e.keep.heads))]


def visible(text: str) -> str:
    """Text whose spaces and line ends can be seen."""
    marks = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(marks.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


# ---- parts of the page


def _symbols(e: Explanation) -> str:
    parts = [symbol(f"given-{i}", shrunk(rgb)) for i, rgb in enumerate(e.given)]
    parts += [symbol(f"tiles-{i}", compose(e.tiles, panel)) for i, panel in enumerate(e.panels)]
    return "\n".join(parts)


def _options(names: list[str]) -> str:
    return "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(names))


def _film(e: Explanation) -> str:
    """The answer's tokens as a row of choices, each with a small map that the script draws."""
    items = []
    first = first_shown(e.tokens)
    for i, step in enumerate(e.tokens):
        word, p = escape(visible(step.chosen.text)), step.chosen.probability
        checked = " checked" if i == first else ""
        items.append(
            f'<label{" class=end" if step.is_end else ""}><input type="radio" name="token" value="{i}"{checked}>'
            f'<img class="mini" alt="" src="data:,"><span class="word" title="{word}">{word}</span>'
            f'<span class="p">{percent(p)}</span>'
            f'<span class="meter"><i style="width:{100 * p:.1f}%"></i></span></label>'
        )
    return "\n".join(items)


def first_shown(tokens: list[TokenStep]) -> int:
    """The token to open the page with: the one that the last block changed most, a telling word as a rule."""
    words = [
        i for i, step in enumerate(tokens) if len(step.chosen.text.strip()) > 2 and not step.is_end and step.lens
    ]
    return max(words, key=lambda i: tokens[i].lens_chosen[-1] - tokens[i].lens_chosen[-2], default=0)


def _lens(e: Explanation) -> str:
    """The table of blocks (the last on top) and tokens; the colour is the probability of the cell's word."""
    n_rows = len(e.tokens[0].lens)
    if n_rows == 0:
        return '<p class="note">Left out.</p>'
    words = "".join(
        f'<th scope="col" data-token="{i}">{escape(visible(step.chosen.text))}</th>'
        for i, step in enumerate(e.tokens)
    )
    rows = []
    for layer in reversed(range(n_rows)):
        name = "before block 0" if layer == 0 else f"after block {layer - 1}"
        cells = "".join(_lens_cell(i, step.lens[layer], layer == n_rows - 1) for i, step in enumerate(e.tokens))
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    head = f'<thead><tr><th scope="col">it said</th>{words}</tr></thead>'
    return f'<table class="lens">{head}<tbody>{"".join(rows)}</tbody></table>'


def _lens_cell(token: int, guesses: tuple[Guess, ...], is_last: bool) -> str:
    best = guesses[0]
    level = round(255 * best.probability)
    title = ", ".join(f"{visible(guess.text)} {percent(guess.probability)}" for guess in guesses)
    ink = "#15101f" if level > 120 else "#ffffff"
    return (
        f'<td data-token="{token}" data-last="{int(is_last)}" title="{escape(title)}" '
        f'style="background:{colour(level)};color:{ink}">'
        f"{escape(visible(best.text))}<small>{percent(best.probability)}</small></td>"
    )


def colour(level: int) -> str:
    """The scale's colour for 0..255, as CSS writes it."""
    red, green, blue = COLOURS[level]
    return f"#{red:02x}{green:02x}{blue:02x}"


def percent(x: float) -> str:
    """``0.0432`` -> ``4.3 %``."""
    p = 100 * x
    return f"{p:.0f} %" if p >= 9.95 else f"{p:.1f} %" if p >= 0.95 else f"{p:.2f} %"


COLOURS = ramp().tolist()
