"""``tinyllava demo``: the embedded model, asked about its own picture."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllava.commands.run import run
from tinyllava.commands.run_options import make_parser
from tinyllava.errors import UsageError

DESCRIPTION = """\
Answer a question about a picture with the model that comes with tinyllava: small, real, and quick on any
machine. Without --image it looks at its own picture; without -p it asks what that is.
"""


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``, with the demo's picture and question for what it leaves out."""
    from tinyllava import demo

    arguments = make_parser("demo", DESCRIPTION).parse(words)
    if arguments.model is not None or arguments.mmproj is not None:
        hint = "Use `tinyllava run` for other models"
        raise UsageError("-m/--mmproj", "given to demo", wanted="none", hint=hint)
    has_own_prompt = arguments.prompt is not None or arguments.file is not None
    if not has_own_prompt:
        arguments.prompt = demo.QUESTION
    if not arguments.image and "<img src=" not in arguments.prompt:
        arguments.image = [demo.PICTURE]
    return run(arguments)
