"""``tinyllava explain``: one answer, watched from the picture to the last token, as a page or as a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.commands.report import Report
from tinyllava.commands.run import check_pictures, check_settings, complete, load_pair, read_sampling, read_task
from tinyllava.commands.run_options import make_parser
from tinyllava.errors import FileError, UsageError

if TYPE_CHECKING:
    from tinyllava.study.explain.explain import Explanation

DESCRIPTION = """\
Answer a question about a picture, and show what happened inside: what the model saw, where it looked for
each word, what else it had in mind, and each step with its shape, parameters, time and line of code.
Writes one HTML page that needs no network (-o), or prints the steps (--text). Without -m it explains the
embedded demo model, and without --image and -p its own picture and question. Several pictures are explained
together, in one prompt. It answers greedily unless --temp says otherwise.
"""
MAX_TOKENS = 64  # of an answer, unless -n says otherwise: each has its maps


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    parser = make_parser("explain", DESCRIPTION)
    group = parser.add_argument_group("explain")
    parser.option(
        group, "-o --output", metavar="FILE", type=Path, help="where the page goes (default report.html)"
    )
    parser.option(group, "--text", action="store_true", help="print the walk instead of writing a page")
    arguments = parser.parse(words)
    from tinyllava.ops import compiling

    report = Report(quiet=arguments.quiet)
    report.ignored(arguments)
    if arguments.text and arguments.output is not None:
        raise UsageError("-o/--output", "given with --text", wanted="one of the two")
    for option in ("json", "verbose_prompt"):
        if getattr(arguments, option):
            raise UsageError(f"--{option.replace('_', '-')}", "given to explain", wanted="-o or --text")
    output = arguments.output or Path("report.html")
    if not arguments.text and not output.parent.is_dir():
        raise FileError(output, "there is no such directory to write to", hint="Make it first")
    with compiling.watch(report.compiling):
        explanation = watch(arguments, report)
    if arguments.text:
        from tinyllava.study.explain.text import as_text

        print(as_text(explanation))
        return 0
    from tinyllava.study.explain.page import write_page

    size = write_page(output, explanation)
    report.say(f"answer: {explanation.result.text.strip()}")
    report.say(f"{output}: {size / 1e6:.1f} MB, open it in a browser")
    return 0


def watch(arguments: argparse.Namespace, report: Report) -> Explanation:
    """Check the settings, load the pair, and explain one answer."""
    check_settings(arguments)
    _fill_in(arguments)
    task = read_task(arguments, report)
    pictures = [picture for group in task.groups for picture in group]
    if not pictures:
        raise UsageError("--image", "no picture", wanted="a picture to explain", hint="Give one with --image")
    check_pictures(task)
    if arguments.temperature is None:
        arguments.temperature = 0.0
    sampling = read_sampling(arguments)
    llava = load_pair(arguments, report)
    from tinyllava.study.explain.explain import explain

    sampling = complete(sampling, arguments, llava)
    template = arguments.chat_template or "auto"
    room = llava.plan(task.prompt, pictures, max_tokens=-1, template=template).max_tokens
    return explain(
        llava,
        task.prompt,
        pictures,
        max_tokens=arguments.n_predict or min(MAX_TOKENS, room),
        sampling=sampling,
        template=template,
        progress=report.progress,
    )


def _fill_in(arguments: argparse.Namespace) -> None:
    """The demo's picture and question, where the demo pair is used and the command line leaves them out."""
    if arguments.model is not None or arguments.mmproj is not None:
        return
    from tinyllava import demo

    if not arguments.image:
        arguments.image = [demo.PICTURE]
    if arguments.prompt is None and arguments.file is None:
        arguments.prompt = demo.QUESTION
