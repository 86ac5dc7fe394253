"""README.md's commands and their output, and what golden/ generates into it and into the pages beside it.

    python -m tests.readme    rewrites what has changed

A block marked ```console holds lines that begin with "$ ", each followed by what the command printed on stdout.
The commands run in the repository's folder; `tinyllava` and `python` are the ones that run this file. Between the
comments "begin NAME" and "end NAME" stands a table or a sentence that golden/'s data give.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GOLDEN = ROOT / "golden"
PAGES = [README, *(GOLDEN / f"{name}.md" for name in ("differences", "rounding", "cpu", "gpu", "pointing"))]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BEGIN = re.compile(r"<!-- begin ([\w-]+)")
SET_UP = ("pip ", "git ", "cd ")  # commands that install: shown, but not run here; .ci/run does


@dataclass(frozen=True)
class Command:
    """One command and what README.md says it prints."""

    line: str
    output: str

    @property
    def runs(self) -> bool:
        return not self.line.startswith(SET_UP)


def commands(text: str) -> list[Command]:
    """All commands of all console blocks, in order."""
    found = []
    for block in BLOCK.findall(text):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            while line.endswith("\\"):  # continued on the next line
                more, _, output = output.partition("\n")
                line = f"{line}\n{more}"
            found.append(Command(line, output))
    return found


def run(command: Command) -> str:
    """What the command prints on stdout, with this interpreter's tinyllava."""
    shell = f'tinyllava() {{ "{sys.executable}" -m tinyllava "$@"; }}; python() {{ "{sys.executable}" "$@"; }}\n'
    words = ["bash", "-ec", shell + command.line]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"$ {command.line}\nexit code {done.returncode}\n{done.stderr}")
    return done.stdout


def generated(page: Path) -> dict[str, str]:
    """What stands between the comments of one page, by the name in them."""
    from golden import accuracy, differences
    from tests import gpu_table, pointing_table, speed_table

    found = {
        "README.md": {
            "speed": speed_table.summary(),
            "rounding": accuracy.sentence(),
            "gpu": gpu_table.sentence(),
            "differences": differences.sentence(),
            "pointing": pointing_table.sentence(),
        },
        "differences.md": {"differences": differences.table()},
        "rounding.md": {"rounding": accuracy.table()},
        "cpu.md": {"speed": speed_table.table()},
        "gpu.md": {"gpu": gpu_table.table()},
        "pointing.md": {"pointing": pointing_table.table()},
    }
    return found[page.name]


def with_generated(page: Path) -> str:
    """The page's text with what is generated as golden/'s data give it now."""
    text, parts = page.read_text(encoding="utf-8"), generated(page)
    if sorted(BEGIN.findall(text)) != sorted(parts):
        raise RuntimeError(f"{page.name} has places for {BEGIN.findall(text)}; wanted {list(parts)}")
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- begin {name}\b.*?-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, n = pattern.subn(lambda match, part=part: f"{match[1]}{part.strip()}\n{match[2]}", text)
        if n != 1:
            raise RuntimeError(f"{page.name} has no end for {name}")
    return text


def main() -> None:
    """Rewrite every page with what golden/'s data give and what its commands print now."""
    for page in PAGES:
        text = with_generated(page)
        for command in commands(text):
            if command.runs:
                text = text.replace(f"$ {command.line}\n{command.output}", f"$ {command.line}\n{run(command)}")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
