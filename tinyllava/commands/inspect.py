"""``tinyllava inspect``: what a model file holds, and whether tinyllava runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tinyllava.commands.parser import Parser
from tinyllava.errors import UsageError

DESCRIPTION = """\
Show what a GGUF file holds, and whether tinyllava runs it.
"""


def make_parser() -> Parser:
    """The parser of ``inspect``."""
    parser = Parser("inspect", DESCRIPTION)
    group = parser.add_argument_group("options")
    parser.option(group, "--tensors", action="store_true", help="list every tensor")
    parser.option(group, "--json", action="store_true", help="print JSON")
    parser.add_standard_options(group)
    parser.positional("file", metavar="FILE", type=Path, help="the file")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    if arguments.file is None:
        raise UsageError("FILE", "not given", wanted="the GGUF file to inspect")
    from tinyllava.files.gguf import open_gguf
    from tinyllava.study.inspect import describe, format_report

    with open_gguf(arguments.file) as file:
        description = describe(file)
    if arguments.json:
        if not arguments.tensors:
            del description["tensors"]
        print(json.dumps(description, ensure_ascii=False))
    else:
        print(format_report(description, tensors=arguments.tensors))
    return 0
