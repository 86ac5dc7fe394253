"""``tinyllava bench``: how fast a model runs here, and how fast beside other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tinyllava.commands.parser import Parser, whole
from tinyllava.commands.run_options import BACKEND_HELP

DESCRIPTION = """\
Time a prompt, an answer after it, and a picture. First one forward pass is checked against the reference.
The answer's tokens are decoded after the prompt's: -p 2500 -n 32 times them at a depth of 2500.

With --peer, other programs do the same work in turn, each in a process of its own, with the same number of
threads and their own defaults; ratios are medians over the pairs. Peers:
  llama.cpp  llama-cpp-python, and its libmtmd for the picture (then both cut it as --compat mtmd does)
  ik         ik-llama-cpp-python: ik_llama.cpp, whose package has no image encoder
  torch      transformers on PyTorch, bfloat16, random weights of the file's sizes
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
    parser.option(group, "--backend", metavar="NAME", default="auto", help=BACKEND_HELP)
    peer = "llama.cpp, ik or torch, in this Python or in the one named; may be given several times"
    parser.option(group, "--peer", metavar="NAME[=PYTHON]", action="append", default=[], help=peer)
    parser.option(group, "--json", action="store_true", help="print JSON")
    parser.add_standard_options(group)
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    from tinyllava import demo
    from tinyllava.study.peers.bench import need, report, run
    from tinyllava.study.peers.worker import Work

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
    named = (text.partition("=") for text in arguments.peer)
    peers = {name: python or None for name, _, python in named}
    need(work, peers)
    found = run(work, peers)
    print(json.dumps(found) if arguments.json else report(found))
    return 0
