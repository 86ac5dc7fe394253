"""README.md's commands and their output, run for real: python -m tests.readme rewrites what has changed.

A block marked ```console holds lines that begin with "$ ", each followed by what the command printed on stdout.
The commands run in the repository's folder; `tinyllava` and `python` are the ones that run this file. Between the
comments "begin NAME" and "end NAME" stands a table that golden/ makes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


def tables() -> dict[str, str]:
    """The generated tables by the name in their comments."""
    from golden import accuracy, differences
    from tests import gpu_table, speed_table

    return {
        "accuracy": accuracy.table(),
        "differences": differences.table(),
        "speed": speed_table.table(),
        "gpu": gpu_table.table(),
    }


def with_tables(text: str) -> str:
    """README.md's text with its generated tables as golden/ makes them now."""
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- begin {name}\b.*?-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, n = pattern.subn(lambda match, table=table: f"{match[1]}{table.strip()}\n{match[2]}", text)
        if n != 1:
            raise RuntimeError(f"README.md has {n} places for the table {name}")
    return text


def main() -> None:
    """Rewrite README.md with what its commands print now."""
    text = with_tables(README.read_text(encoding="utf-8"))
    for command in commands(text):
        if command.runs:
            text = text.replace(f"$ {command.line}\n{command.output}", f"$ {command.line}\n{run(command)}")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
