"""README.md and golden/'s pages tell the truth: commands print what they say, figures and links are right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tinyllava
from tests import speed_table
from tests.readme import GOLDEN, PAGES, README, ROOT, Command, commands, run, with_generated

TEXT = README.read_text(encoding="utf-8")
MAX_LINES = 300  # README.md is for arriving: what is longer has a page in golden/
LINKING = [*PAGES, GOLDEN / "README.md", GOLDEN / "demo" / "README.md"]
RUN = [c for page in PAGES for c in commands(page.read_text(encoding="utf-8")) if c.runs]


@pytest.mark.parametrize("command", RUN, ids=lambda c: c.line.split("\n")[0][:60])
def test_a_command_prints_what_the_readme_says(command: Command) -> None:
    assert run(command) == command.output


def test_the_two_commands_of_a_fresh_machine_are_there() -> None:
    assert "$ pip install . && tinyllava demo\n" in TEXT
    assert re.search(r"^pip install '\.\[test\]' && python -m pytest$", TEXT, re.MULTILINE)


def test_the_first_screen_has_three_doors_with_real_output() -> None:
    screen = TEXT.split("\n## ")[0]
    assert len([c for c in commands(screen) if c.runs and c.output]) >= 3


def test_the_readme_is_short() -> None:
    assert TEXT.count("\n") <= MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_and_sentences_are_what_golden_makes(page: Path) -> None:
    assert with_generated(page) == page.read_text(encoding="utf-8")


def test_the_readme_links_every_page() -> None:
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT)})" in TEXT, page.name


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([\w./-]*)(#[\w-]+)?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not heading or heading in headings(path), f"{target}{heading}"
    for name in re.findall(r"`((?:tinyllava|tests|golden)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings: lower case, signs left out, hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_python_examples_run() -> None:
    for example in re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        exec(compile(example, "README.md", "exec"), {})


def test_the_version_is_the_packages() -> None:
    assert f"tinyllava {tinyllava.__version__}" in TEXT


AIMS = {  # the least ratio, of memory the largest; golden/cpu.md states them
    "prefill": {"llama.cpp": 1.8, "ik": 1.25},
    "decode": {"llama.cpp": 1.0, "ik": 1.0},
    "encode": {"llama.cpp": 2.0, "torch": 1.0},
    "memory": {"llama.cpp": 1.1},
}


def test_the_aims_that_are_missed_are_the_two_that_the_page_names() -> None:
    missed = set()
    for row in json.loads(speed_table.RESULTS.read_text(encoding="utf-8"))["rows"]:
        kind = row["work"].split()[0]
        aim, ratio = AIMS.get(kind, {}).get(row["peer"]), row["ratio"]
        if aim is not None and (ratio > aim if kind == "memory" else ratio < aim):
            missed.add((row["model"], row["work"]))
    assert missed == {("1.26B Q5_K_M", "prefill 512"), ("1.26B Q5_K_M", "memory 2500")}
