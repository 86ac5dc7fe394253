"""The walk as HTML: a card for each stage, and inside it each step with its line of code."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tinyllava.study.explain.walk import STAGES, Row

if TYPE_CHECKING:
    from tinyllava.study.explain.explain import Explanation


COLUMNS = ("comes out", "runs", "parameters", "ms", "ms a token")
HEADINGS = '<th scope="col">step and line of code</th>' + "".join(
    f'<th scope="col" class="{"num" if i else ""}">{name}</th>' for i, name in enumerate(COLUMNS)
)


def walk_html(e: Explanation) -> dict[str, str]:
    """The values of $walk and $walk_lead in the page's template."""
    stages = by_stage(e.walk)
    most = max(sum(row.parameters for row in rows) for rows in stages.values()) or 1
    longest = max(sum(row.seconds for row in rows) for rows in stages.values()) or 1.0
    cards = [
        _stage(number, stage, rows, most, longest) for number, (stage, rows) in enumerate(stages.items(), start=1)
    ]
    before = sum(row.seconds for row in e.walk)
    each = sum(row.seconds_each or 0.0 for row in e.walk)
    lead = f"{milliseconds(before)} from the file to the first token"
    lead += f", then {milliseconds(each)} for each further one" if each else ""
    lead += ". Open a stage to see its steps and the line of code that did each."
    return {"walk": "\n".join(cards), "walk_lead": escape(lead)}


def by_stage(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by stage, stages in the order of the walk."""
    stages: dict[str, list[Row]] = {stage: [] for stage in STAGES}
    for row in rows:
        stages[row.stage].append(row)
    return {stage: own for stage, own in stages.items() if own}


def _stage(number: int, stage: str, rows: list[Row], most: int, longest: float) -> str:
    title, what = STAGES[stage]
    parameters, seconds = sum(row.parameters for row in rows), sum(row.seconds for row in rows)
    each = sum(row.seconds_each or 0.0 for row in rows)
    again = f"<small>+ {milliseconds(each)} a token</small>" if each else "<small>once</small>"
    steps = f"{len(rows)} steps" if len(rows) > 1 else "1 step"
    weights = count(parameters) if parameters else "none"
    shape = f"{shape_text(rows[-1].shape)}<small>{_comes_out(rows[-1])}</small>"
    return f"""<details class="stage card"><summary>
<span class="n">{number}</span>
<div class="what"><b>{title}</b><p>{escape(what)} <span class="more">{steps} ▾</span></p></div>
<div class="shape">{shape}</div>
<div class="qty params">{weights}<small>parameters</small>{_track(parameters / most)}</div>
<div class="qty ms">{milliseconds(seconds)}{again}{_track(seconds / longest)}</div>
</summary><div class="parts" tabindex="0" role="region" aria-label="Steps of {title}"><table>
<thead><tr>{HEADINGS}</tr></thead>
<tbody>{"".join(_row(row) for row in rows)}</tbody></table></div></details>"""


def _comes_out(row: Row) -> str:
    return "comes out" if row.times == 1 else f"comes out, {row.times} times"


def _track(share: float) -> str:
    return f'<span class="track"><i style="width:{100 * share:.1f}%"></i></span>'


def _row(row: Row) -> str:
    step = f"{escape(row.title)}<code>{escape(row.place)} in {escape(row.function)}</code>"
    values = (
        shape_text(row.shape),
        str(row.times),
        f"{row.parameters:,}" if row.parameters else "",
        f"{1e3 * row.seconds:.2f}",
        "" if row.seconds_each is None else f"{1e3 * row.seconds_each:.3f}",
    )
    cells = (
        f'<td class="{"num" if i else "mono"}" data-label="{name}">{value}</td>'
        for i, (name, value) in enumerate(zip(COLUMNS, values, strict=True))
    )
    return f"<tr><td>{step}<code>{escape(row.source)}</code></td>{''.join(cells)}</tr>"


# ---- numbers for people


def shape_text(shape: tuple[int, ...]) -> str:
    """``(1, 3, 168, 168)`` -> ``1 × 3 × 168 × 168``."""
    return " × ".join(map(str, shape))


def count(n: int) -> str:
    """``5712384`` -> ``5.71 M``."""
    for size, sign in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if n >= size:
            return f"{n / size:.3g}{sign}"
    return str(n)


def milliseconds(seconds: float) -> str:
    """``0.01234`` -> ``12.3 ms``; seconds from 10 s on."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"
