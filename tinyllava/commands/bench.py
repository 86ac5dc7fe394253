"""``tinyllava bench``: how fast a model runs here, and how fast beside another program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tinyllava.commands.parser import Parser, whole

DESCRIPTION = """\
Time a prompt, an answer and a picture. First one forward pass is checked against the reference.
With --peer, the other program does the same work in turn; ratios are medians over the pairs.
"""


def make_parser() -> Parser:
    """The parser of ``bench``."""
    parser = Parser("bench", DESCRIPTION)
    group = parser.add_argument_group("options")
    demo = "(GGUF; default: the embedded demo model)"
    parser.option(group, "-m --model", metavar="FILE", type=Path, help=f"language model {demo}")
    parser.option(group, "--mmproj", metavar="FILE", type=Path, help="image encoder: time a picture, too")
    parser.option(group, "-p --prompt-tokens", metavar="N", type=whole, default=512, help="tokens of the prompt")
    parser.option(group, "-n --predict", metavar="N", type=whole, default=32, help="tokens of the answer")
    parser.option(group, "-t --threads", metavar="N", type=whole, help="threads (default: the physical cores)")
    parser.option(group, "--repeat", metavar="N", type=whole, default=3, help="repetitions")
    parser.option(group, "--backend", metavar="NAME", default="auto", help="auto, numba or numpy")
    parser.option(group, "--peer", metavar="NAME", help="llama.cpp or ik")
    parser.option(group, "--json", action="store_true", help="print JSON")
    parser.add_standard_options(group)
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    from tinyllava import demo
    from tinyllava.study.bench import Work, need, report, run

    both = arguments.model is None and arguments.mmproj is None
    work = Work(
        model=arguments.model or demo.MODEL,
        mmproj=demo.MMPROJ if both else arguments.mmproj,
        n_prompt=arguments.prompt_tokens,
        n_answer=arguments.predict,
        threads=arguments.threads,
        repeat=arguments.repeat,
        backend=arguments.backend,
    )
    need(work)
    found = run(work, arguments.peer)
    print(json.dumps(found) if arguments.json else report(found))
    return 0
