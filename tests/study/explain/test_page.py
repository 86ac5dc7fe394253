"""The page that `tinyllava explain` writes: whole, legible to all, and closed to what it quotes."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.study.explain.explained import EVIL, Page, make
from tinyllava.study.explain.colour import TO_CONES, TO_RGB, ramp
from tinyllava.study.explain.explain import Explanation
from tinyllava.study.explain.figures import tick_places
from tinyllava.study.explain.page import as_json, first_shown, render, visible, write_page


def test_nothing_from_prompt_tokens_or_metadata_breaks_out(folder: Path, tmp_path: Path) -> None:
    e = make(folder, model="evil", question=f"What is {EVIL}?", max_tokens=24)
    assert any("<script>" in step.chosen.text for step in e.tokens), "the test needs such a token"
    write_page(tmp_path / "report.html", e)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.scripts) == 2 and "alert(1)" not in page.scripts[1]
    assert "<" not in page.scripts[0]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert EVIL in page.text and EVIL in page.data["question"]
    assert {a.get("src", "data:") for a in page.all("img")} == {"data:,"}
    assert f"What is {EVIL}?"[:60] in page.text  # the title


def test_json_in_the_page_cannot_end_its_element() -> None:
    text = as_json({"<!--<script>": "</script>\u2028&"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"<!--<script>": "</script>\u2028&"}


def test_the_page_needs_nothing_else(explained: Explanation) -> None:
    html = render(explained)
    page = Page(html)
    assert "http" not in html.replace("http-equiv", "") and "@import" not in html and "url(" not in html
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    assert "default-src 'none'" in page.all("meta")[4]["content"]
    assert all(word in html for word in ("prefers-color-scheme: dark", "prefers-reduced-motion"))
    assert "width=device-width" in html
    assert len(html.encode()) < 2_000_000


def test_pictures_have_texts_and_choices_have_names(explained: Explanation) -> None:
    page = Page(render(explained))
    drawings = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) == (5 if len(explained.panels) == 1 else 7)
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert all("alt" in a for a in page.all("img"))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = [a["href"][1:] for a in page.all("use")] + [a["href"][1:] for a in page.all("a")]
    assert set(used) <= set(ids)
    assert len(page.all("input")) == len(explained.tokens) + 1
    assert sum("checked" in a for a in page.all("input")) == 1


def test_the_colour_scale_is_even_and_gets_lighter() -> None:
    colours = ramp() / 255.0
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ np.linalg.inv(TO_RGB).T) @ np.linalg.inv(TO_CONES).T
    assert (np.diff(lab[::4, 0]) > 0).all()
    steps = np.linalg.norm(np.diff(lab[::8], axis=0), axis=1)
    assert steps.max() / steps.min() < 1.25  # 8 bits alone make a tenth of that


@pytest.mark.parametrize("n", [1, 2, 4, 12, 24, 48, 72])
def test_axes_number_their_ends_and_not_too_many_between(n: int) -> None:
    places = tick_places(n)
    assert places[0] == 0 and places[-1] == n - 1 and len(places) <= 10
    assert n <= 8 or min(np.diff(places)) > 1


def test_what_cannot_be_seen_is_spelled_out() -> None:
    assert visible(" a\n\t\x1b\u202e") == "␣a⏎⇥\\x1b\\x202e"


# ---- in a browser

DRIVER = """
const seen = [];
const note = () => seen.push([document.body.dataset.shown, document.getElementById("heat-0").getAttribute("href")]);
const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("change", {bubbles: true})); };
note();
set("layer", "1"); note();
set("head", "2"); note();
set("scale", "all"); note();
document.querySelector("#film input:not(:checked)").click(); note();
document.querySelectorAll("#grid button")[0].click(); note();
document.querySelector("table.lens td[data-token='1']").click(); note();
document.getElementById("panel-0").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
seen.push(document.getElementById("readout").textContent);
document.body.dataset.seen = JSON.stringify(seen);
"""  # noqa: E501


@pytest.mark.browser
@pytest.mark.parametrize("vision", ["clip_15", "clip_16"])
def test_selectors_work_in_a_browser_without_errors(vision: str, folder: Path, tmp_path: Path) -> None:
    e = make(folder, vision)
    page = Page(browse(render(e), tmp_path))
    errors = next(a for a in page.all("p") if a.get("id") == "errors")
    assert "hidden" in errors
    *steps, readout = json.loads(page.all("body")[0]["data-seen"])
    first = first_shown(e.tokens)
    other = 0 if first else 1
    assert [shown for shown, _ in steps] == [
        f"{first},0,0,own", f"{first},1,0,own", f"{first},1,2,own", f"{first},1,2,all", f"{other},1,2,all",
        f"{other},0,0,all", "1,0,0,all",
    ]  # fmt: skip
    maps = [href for _, href in steps]
    assert all(href.startswith("data:image/png") for href in maps)
    assert len(set(maps[:3])) == 3 and maps[4] != maps[3]
    assert readout.startswith("Row ")


def browse(html: str, folder: Path) -> str:
    """The page after Chromium has run it, and DRIVER after it; skips where there is no Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    allowed = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{allowed}' ")
    html = html.replace("</body>", f"<script>{DRIVER}</script></body>")
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --dump-dom""".split()
    line = [chromium, *flags, f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()]
    done = subprocess.run(line, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()
