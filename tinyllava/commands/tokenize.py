"""``tinyllava tokenize``: the tokens of a text, as a model sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava.commands.parser import Parser
from tinyllava.errors import UsageError

DESCRIPTION = """\
Show the tokens of a text: each id and the piece of text that it stands for.
"""


def make_parser() -> Parser:
    """The parser of ``tokenize``."""
    parser = Parser("tokenize", DESCRIPTION)
    group = parser.add_argument_group("options")
    what = "model file (GGUF; default: the embedded demo model)"
    parser.option(group, "-m --model", metavar="FILE", type=Path, help=what)
    parser.option(group, "-e --escape", action="store_true", help=r"read \n, \t, \\ and the like as in C")
    parser.option(group, "--no-bos", action="store_true", help="do not put the start token in front")
    parser.option(group, "--no-special", action="store_true", help="read <s> and the like as plain text")
    parser.option(group, "--ids", action="store_true", help="print the ids alone, on one line")
    parser.option(group, "--json", action="store_true", help="print JSON")
    parser.add_standard_options(group)
    parser.positional("text", metavar="TEXT", help="the text; - reads it from stdin")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    text = _text(arguments.text)
    from tinyllava.text.tokenizer import Tokenizer

    if arguments.escape:
        from tinyllava.text.prompt import unescape

        text = unescape(text)
    tokenizer = Tokenizer.from_gguf(arguments.model or _demo_model())
    for note in tokenizer.notes:
        print(f"note: {note}", file=sys.stderr)
    add_bos = tokenizer.add_bos and not arguments.no_bos
    ids = tokenizer.encode(text, add_bos=add_bos, parse_special=not arguments.no_special)
    pieces = [tokenizer.text_of(token) for token in ids]
    if arguments.json:
        vocabulary = {"kind": tokenizer.kind, "pre": tokenizer.pre}
        answer = {"tokens": ids, "pieces": pieces, "count": len(ids), **vocabulary}
        print(json.dumps(answer, ensure_ascii=False))
    elif arguments.ids:
        print(*ids)
    else:
        for token, piece in zip(ids, pieces, strict=True):
            print(f"{token:6d} -> {piece!r}")
    return 0


def _text(word: str | None) -> str:
    """The text of the command line, or of stdin."""
    if word is None:
        raise UsageError("TEXT", "not given", wanted="the text to tokenize", hint="Put it between quotes")
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if word == "-" else word


def _demo_model() -> Path:
    from tinyllava import demo

    print("note: without -m, these are the embedded demo model's tokens", file=sys.stderr)
    return demo.MODEL
