"""README.md tells the truth: its commands print what it says they print, its files and names exist."""

from __future__ import annotations

import re

import pytest

import tinyllava
from tests.readme import README, ROOT, Command, commands, run, with_tables

TEXT = README.read_text(encoding="utf-8")


RUN = [c for c in commands(TEXT) if c.runs]


@pytest.mark.parametrize("command", RUN, ids=lambda c: c.line.split("\n")[0][:60])
def test_a_command_prints_what_the_readme_says(command: Command) -> None:
    assert run(command) == command.output


def test_the_two_commands_of_a_fresh_machine_are_there() -> None:
    assert "$ pip install . && tinyllava demo\n" in TEXT
    assert re.search(r"^pip install '\.\[test\]' && python -m pytest$", TEXT, re.MULTILINE)


def test_the_first_screen_has_three_doors_with_real_output() -> None:
    screen = TEXT.split("\n## ")[0]
    assert len([c for c in commands(screen) if c.runs and c.output]) >= 3


def test_tables_are_what_golden_makes() -> None:
    assert with_tables(TEXT) == TEXT


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tinyllava|tests|golden)/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_python_examples_run() -> None:
    for example in re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        exec(compile(example, "README.md", "exec"), {})


def test_the_version_is_the_packages() -> None:
    assert f"tinyllava {tinyllava.__version__}" in TEXT
