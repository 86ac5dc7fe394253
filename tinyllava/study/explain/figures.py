"""The report's pictures: data URIs, SVG figures with a patch grid, map panels with labelled axes."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.study.explain.maps import Panel
from tinyllava.vision.anyres import PicturePlan
from tinyllava.vision.image import Pixels, Size, resize, size_of

if TYPE_CHECKING:
    from tinyllava.study.explain.explain import Explanation

LONGEST_PX = 900  # of the picture as given; larger ones are shrunk for the page
MARGIN = 26  # units of the map's axes, beside a map whose longer side is MAP units
MAP = 400


def data_uri(rgb: Pixels) -> str:
    """Pixels (h, w, 3) as PNG or JPEG, whichever is smaller: drawings as the one, photos as the other."""
    from PIL import Image

    image, encoded = Image.fromarray(rgb), []
    for kind, settings in (("PNG", {"optimize": True}), ("JPEG", {"quality": 88})):
        out = io.BytesIO()
        image.save(out, kind, **settings)
        encoded.append((len(out.getvalue()), kind.lower(), out.getvalue()))
    _, kind, data = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shrunk(rgb: Pixels, longest: int = LONGEST_PX) -> Pixels:
    """The picture with its longer side at most ``longest`` pixels."""
    size = size_of(rgb)
    factor = min(1.0, longest / max(size))
    small = Size(max(1, round(size.height * factor)), max(1, round(size.width * factor)))
    return rgb if small == size else resize(rgb, small)


def compose(tiles: npt.NDArray[Any], panel: Panel) -> Pixels:
    """Tiles (n_tiles, px, px, 3) put back in place: (rows * px, columns * px, 3)."""
    rows = [np.concatenate([tiles[number] for number in row], axis=1) for row in panel.tiles]
    return np.concatenate(rows)


# ---- SVG


def symbol(name: str, rgb: Pixels) -> str:
    """A picture to be used several times, embedded once."""
    height, width = rgb.shape[:2]
    image = f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{data_uri(rgb)}"/>'
    return f'<symbol id="{name}" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{image}</symbol>'


def use(name: str, size: tuple[int, int], label: str, inner: str = "") -> str:
    """An SVG that shows a symbol at its own (height, width), with more drawn over it."""
    height, width = size
    box = f'width="{width}" height="{height}"'
    return (
        f'<svg viewBox="0 0 {width} {height}" {box} role="img" aria-label="{escape(label)}">'
        f'<use href="#{name}" {box}/>{inner}</svg>'
    )


def grid_lines(size: tuple[int, int], step: float, width: float, colour: str = "var(--card)") -> str:
    """Lines every ``step`` units over a (height, width), edges included."""
    rows, columns = (round(side / step) for side in size)
    path = [f"M0 {i * step:g}H{size[1]}" for i in range(rows + 1)]
    path += [f"M{i * step:g} 0V{size[0]}" for i in range(columns + 1)]
    drawn = f'<path d="{"".join(path)}" fill="none" stroke'
    shade = f'{drawn}="#15101f" stroke-opacity=".3" stroke-width="{1.5 * width:g}"/>'  # on white pictures
    return f'{shade}{drawn}="{colour}" stroke-width="{width:g}"/>'


def figures(e: Explanation) -> str:
    """Every picture three times: as given, as prepared, as the vision tower sees it."""
    several = len(e.given) > 1
    rows = []
    for number in range(len(e.given)):
        title = f"<h3>Picture {number + 1}</h3>\n" if several else ""
        rows.append(f'{title}<div class="figures">\n{_figures_of(e, number)}\n</div>')
    return "\n".join(rows)


def picture_name(e: Explanation, number: int) -> str:
    """What a text alternative calls a picture."""
    return "The picture" if len(e.given) == 1 else f"Picture {number + 1}"


def _figures_of(e: Explanation, number: int) -> str:
    """The three figures of one picture."""
    plan, name = e.plan.pictures[number], picture_name(e, number)
    panels = [i for i, panel in enumerate(e.panels) if panel.picture == number]
    given = use(f"given-{number}", size_of(shrunk(e.given[number])), f"{name} as given")
    prepared = _figure_of_tiles(e, panels[-1], f"{name} as prepared for the vision tower", patches=False)
    seen = "".join(
        _figure_of_tiles(e, i, f"{e.panels[i].title}, cut into patches", patches=True) for i in panels
    )
    patch_px, side = e.llava.vision_model.config.patch_px, plan.tile_patches
    tiles = f"{plan.n_tiles} tiles, each" if plan.n_tiles > 1 else "One tile,"
    cut = f"{tiles} {side} × {side} patches of {patch_px} × {patch_px} pixels. "
    captions = (
        (given, "As given", f"{plan.size} pixels."),
        (prepared, "As prepared", prepared_caption(plan)),
        (seen, "As the vision tower sees it", cut + f"{plan.n_tokens} tokens for the language model."),
    )
    return "\n".join(
        f'<figure{" class=double" if picture.count("<svg") > 1 else ""}><div class="frames">{picture}</div>'
        f"<figcaption><b>{title}</b>{escape(text)}</figcaption></figure>"
        for picture, title, text in captions
    )


def prepared_caption(plan: PicturePlan) -> str:
    """What became of the picture before the vision tower."""
    if plan.kind == "1.5":
        return f"Made {plan.resized} pixels large, in one square of {plan.resolution}; what is grey is padding."
    rows, columns = plan.grid
    overview = ", and whole once more as one tile, the overview" if plan.n_tiles > rows * columns else ""
    return f"Made {plan.resized} pixels large, in {plan.resolution}, cut into {columns} × {rows} tiles{overview}."


def _figure_of_tiles(e: Explanation, number: int, label: str, *, patches: bool) -> str:
    panel, px = e.panels[number], e.tiles.shape[1]
    size = (len(panel.tiles) * px, len(panel.tiles[0]) * px)
    lines = ""
    if patches:
        lines += grid_lines(size, px / panel.tile_patches, px / panel.tile_patches * 0.14)
    if size != (px, px):
        lines += grid_lines(size, px, px * 0.03)
    return use(f"tiles-{number}", size, label, lines)


def map_panel(number: int, panel: Panel) -> str:
    """An empty map over its picture, with numbered rows and columns; the script fills it in."""
    rows, columns = panel.tokens.shape
    unit = MAP / max(rows, columns)
    width, height = columns * unit, rows * unit
    ticks = "".join(
        f'<text x="{(i + 0.5) * unit:.1f}" y="{height + 15:.1f}" text-anchor="middle">{i + 1}</text>'
        for i in tick_places(columns)
    ) + "".join(
        f'<text x="-6" y="{(i + 0.5) * unit + 4:.1f}" text-anchor="end">{i + 1}</text>' for i in tick_places(rows)
    )
    box = f'width="{width:g}" height="{height:g}"'
    cell = 'width="1" height="1" visibility="hidden"'
    view = f"{-MARGIN - 14} -3 {width + MARGIN + 20:g} {height + MARGIN + 14:g}"
    name = escape(panel.title)
    wide = " wide" if columns > 1.3 * rows or len(panel.tiles) > 1 else ""
    return f"""<figure class="panel{wide}"><figcaption>{name}</figcaption>
<svg id="panel-{number}" viewBox="{view}" role="img" tabindex="0" aria-label="{name}">
<rect class="cut" {box}/><use class="under" href="#tiles-{number}" {box}/>
<image class="heat" id="heat-{number}" {box} preserveAspectRatio="none"/><rect class="frame" {box}/>
<g transform="scale({unit:g})"><rect class="peak halo" {cell}/>
<rect class="peak line" {cell}/><rect class="cursor" {cell}/></g>
{ticks}
<text x="{width / 2:g}" y="{height + 31:.1f}" text-anchor="middle">column of patches</text>
<text transform="translate({-MARGIN - 2} {height / 2:g}) rotate(-90)" text-anchor="middle">row of patches</text>
</svg></figure>"""


def tick_places(n: int) -> list[int]:
    """Which of n rows to number: the first, the last, and every few between."""
    step = next(step for step in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48, n) if n / step <= 8)
    between = range(2 * step - 1, n - 1, step) if step > 1 else range(n)
    return sorted({0, n - 1, *(place for place in between if n - 1 - place > step // 2)})
