"""Render the icons to sprites: 128-pixel pictures with transparency, packed into one file.

    python golden/demo/sprites.py ICONS_DIR sprites.npz

Every coloured drawing of a noun also comes with a black outline around each of its parts: a style of
its own, free of charge, and near to how hand-inked sets look.  One-colour icons are kept white and get
their colour when a scene is composed.  openmoji is packed for evaluation only, never for training.
"""

from __future__ import annotations

import io
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from fetch_icons import read_pins
from icon_names import is_held_out, noun_table, plain_name, unknown_names
from PIL import Image
from vocabulary import read_nouns

SPRITE_PX = 128
UNKNOWN = -1
OUTLINED_SETS = {"noto", "noto-v1", "twemoji", "fluent-emoji-flat", "emojione", "fxemoji"}


@dataclass
class Sprite:
    """What is known about one sprite."""

    icon_set: str
    icon: str
    noun: int  # id in vocabulary.read_nouns(), or UNKNOWN
    role: str  # "train", "held out unknown" or "held out style"
    tinted: bool  # white, to be coloured by the scene
    outlined: bool
    width: float  # of the drawing, as a fraction of the sprite's side; the larger of the two is 1
    height: float


def load_set(folder: Path) -> dict[str, tuple[str, float, float]]:
    """All icons of one set, aliases included: name -> (SVG body, width, height)."""
    data = json.loads((folder / "icons.json").read_text(encoding="utf8"))
    side = (data.get("width", 16), data.get("height", 16))
    icons = {name: (icon["body"], icon.get("width", side[0]), icon.get("height", side[1]))
             for name, icon in data["icons"].items()}  # fmt: skip
    for name, alias in data.get("aliases", {}).items():
        if alias["parent"] in icons and set(alias) <= {"parent"}:
            icons.setdefault(name, icons[alias["parent"]])
    return icons


def svg_text(body: str, width: float, height: float, outline: float, tinted: bool) -> str:
    """A whole SVG document; outline is the stroke's width as a fraction of the side, 0 for none."""
    if outline:
        stroke = f'stroke="#000" stroke-width="{outline * width:.3g}" stroke-linejoin="round"'
        body = f"<g {stroke}>{body}</g>"
    margin = 0.06 * width if outline else 0
    box = f"{-margin} {-margin} {width + 2 * margin} {height + 2 * margin}"
    color = ' color="#fff"' if tinted else ""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}"{color}>{body}</svg>'


def render(job: tuple[Sprite, str]) -> tuple[Sprite, bytes] | None:
    """Draw one SVG at twice the size, crop it to what is visible, centre it in the sprite's square."""
    import resvg_py

    sprite, svg = job
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_PX, height=2 * SPRITE_PX)
    except Exception:  # a few icons use SVG features that the renderer refuses; they are left out
        return None
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 10:
        return None
    image = image.crop(box)
    scale = SPRITE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    sprite.width, sprite.height = size[0] / SPRITE_PX, size[1] / SPRITE_PX
    square = Image.new("RGBA", (SPRITE_PX, SPRITE_PX))
    square.paste(
        image.resize(size, Image.Resampling.BICUBIC), ((SPRITE_PX - size[0]) // 2, (SPRITE_PX - size[1]) // 2)
    )
    buffer = io.BytesIO()
    square.save(buffer, "WEBP", quality=85, alpha_quality=100, method=4)
    return sprite, buffer.getvalue()


def jobs_of(pin: dict, folder: Path) -> list[tuple[Sprite, str]]:
    """Every sprite that one set gives."""
    nouns = read_nouns()
    icons = load_set(folder / pin["name"])
    table = noun_table(nouns, pin["name"])
    names = {
        name: table[plain_name(pin["name"], name)] for name in icons if plain_name(pin["name"], name) in table
    }
    names |= dict.fromkeys(unknown_names(pin["name"], sorted(icons), nouns), UNKNOWN)
    jobs, seen = [], set()
    for name, noun in sorted(names.items()):
        body, width, height = icons[name]
        if (body, noun) in seen or '"animate' in body or "<animate" in body:
            continue
        seen.add((body, noun))
        role = "train"
        if noun == UNKNOWN and is_held_out(plain_name(pin["name"], name)):
            role = "held out unknown"
        if pin["role"] != "train":
            role = "held out style" if noun != UNKNOWN or role != "train" else ""
        if not role:
            continue
        half_known = noun != UNKNOWN or len(jobs) % 3 == 0
        outlines = [0.0, 0.026] if pin["name"] in OUTLINED_SETS and half_known else [0.0]
        for outline in outlines:
            tinted = not pin["colored"]
            sprite = Sprite(pin["name"], name, noun, role, tinted, bool(outline), 1.0, 1.0)
            jobs.append((sprite, svg_text(body, width, height, outline, tinted)))
    return jobs


def main() -> None:
    """Render all pinned sets and write one .npz: a byte string of all WebP files, their ends, and the facts."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    jobs = [job for pin in read_pins() for job in jobs_of(pin, folder)]
    with ProcessPoolExecutor(2) as pool:
        drawn = [result for result in pool.map(render, jobs, chunksize=64) if result]
    blob = np.frombuffer(b"".join(data for _, data in drawn), np.uint8)
    ends = np.cumsum([len(data) for _, data in drawn])
    facts = np.frombuffer(json.dumps([asdict(sprite) for sprite, _ in drawn]).encode(), np.uint8)
    np.savez(target, blob=blob, ends=ends, facts=facts)
    print(f"{len(drawn)} of {len(jobs)} sprites, {blob.size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
