"""``tinyllava run``: answer a question about a picture, like llama-llava-cli."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.commands.report import Report, as_json
from tinyllava.commands.run_options import make_parser
from tinyllava.errors import ContextError, FileError, UsageError

if TYPE_CHECKING:
    from tinyllava.generate import Plan, Stream
    from tinyllava.llava import LLaVA
    from tinyllava.text.sampling import Sampling

# What llama-llava-cli means to ask when there is no -p (it forgets to, and asks nothing).
DEFAULT_QUESTION = "describe the image in detail."


@dataclass(frozen=True)
class Task:
    """What to ask, and about what: each group of pictures gets an answer of its own."""

    prompt: str
    groups: list[list[Path]]


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    return run(make_parser("run").parse(words))


def run(arguments: argparse.Namespace) -> int:
    """Answer, and say so if kernels have to be compiled for it."""
    from tinyllava.ops.compiling import watch

    report = Report(quiet=arguments.quiet)
    report.ignored(arguments)
    with watch(report.compiling):
        return answer_all(arguments, report)


def answer_all(arguments: argparse.Namespace, report: Report) -> int:
    """Check everything that can be checked without the model, load it, and answer."""
    check_settings(arguments)
    task = read_task(arguments, report)
    sampling = read_sampling(arguments)
    check_pictures(task)
    llava = load_pair(arguments, report)
    sampling = complete(sampling, arguments, llava)
    # All plans and streams come before the first answer: what is wrong with any of them is said at once.
    plans = [make_plan(llava, task.prompt, pictures, arguments) for pictures in task.groups]
    streams = [llava.answer(plan, sampling, report.progress) for plan in plans]
    report.begin()
    for i, (pictures, stream) in enumerate(zip(task.groups, streams, strict=True)):
        if len(task.groups) > 1:
            report.say(f"--- picture {i + 1} of {len(task.groups)}")
        answer(llava, stream, pictures, sampling, arguments, report)
    return 0


# ---- before the model is loaded


def check_settings(arguments: argparse.Namespace) -> None:
    """UsageError for a number without a meaning, or a template that does not exist."""
    for option, value, least in (
        ("-c/--ctx-size", arguments.ctx_size, 0),
        ("-b/--batch-size", arguments.batch_size, 1),
    ):
        if value is not None and value < least:
            raise UsageError(option, str(value), wanted=f"{least} or more")
    if arguments.chat_template not in (None, "auto"):
        from tinyllava.text.prompt import template_for

        template_for(arguments.chat_template)
    if arguments.n_predict == 0:
        raise UsageError("-n/--predict", "0", wanted="1 or more, or -1 for an answer until it ends")


def read_task(arguments: argparse.Namespace, report: Report) -> Task:
    """The prompt, from -p or -f, and the pictures that go with it."""
    images: list[Path] = arguments.image or []
    prompt = _prompt(arguments, report)
    if prompt is None:
        if not images:
            raise UsageError("--image", "no picture and no prompt", wanted="a picture, or text with -p")
        report.note(f"without -p, the question is '{DEFAULT_QUESTION}'")
        prompt = DEFAULT_QUESTION
    n_slots = prompt.count("<image>")
    if "<img src=" in prompt and n_slots == 0 and images:
        report.note("the picture in the prompt is used, not --image")
        return Task(prompt, [[]])
    if len(images) > 1 and n_slots <= 1:
        return Task(prompt, [[image] for image in images])  # asked again about each, as llama-llava-cli does
    return Task(prompt, [images])


def _prompt(arguments: argparse.Namespace, report: Report) -> str | None:
    """The text of -p or -f, with its escapes if -e was given; None if neither was."""
    text: str | None = arguments.prompt
    if arguments.file is not None:
        if text is not None:
            raise UsageError("-f/--file", "given with -p", wanted="one of the two")
        text = _read_text(arguments.file)
    if text is None:
        return None
    if arguments.escape and not arguments.no_escape:
        from tinyllava.text.prompt import unescape

        return unescape(text)
    if "\\n" in text and not arguments.no_escape:
        report.note(r"the prompt has \n in it, two characters: -e turns it into a newline")
    return text


def _read_text(path: Path) -> str:
    """A text file without its last newline. FileError if it cannot be read as UTF-8."""
    try:
        return path.read_bytes().decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read") from None
    except UnicodeDecodeError as error:
        raise FileError(path, f"not UTF-8 at byte {error.start}", wanted="a text file") from None


def read_sampling(arguments: argparse.Namespace) -> Sampling:
    """The sampling settings: what was set, and the profile's for the rest."""
    from tinyllava.profile import profile
    from tinyllava.text.sampling import Sampling

    names = {field.name for field in fields(Sampling)}
    chosen = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    p = profile(arguments.compat)
    usual = {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p}
    return Sampling(**{**usual, **chosen})


def check_pictures(task: Task) -> None:
    """PictureError for a picture that cannot be opened: found out before a model of gigabytes is loaded."""
    from tinyllava.vision.image import read_size

    for picture in {picture: None for group in task.groups for picture in group}:
        read_size(picture)


# ---- the model


def load_pair(arguments: argparse.Namespace, report: Report) -> LLaVA:
    """The model pair of -m and --mmproj, or the embedded one. UsageError if one of the two is missing."""
    model, mmproj = arguments.model, arguments.mmproj
    if mmproj is not None and model is None:
        raise UsageError("-m/--model", "not given", wanted=f"the language model that {mmproj} belongs to")
    if model is not None and mmproj is None and arguments.image:
        raise UsageError("--mmproj", "not given", wanted=f"the image encoder that belongs to {model}")
    if model is None:
        report.note("without -m and --mmproj, this is the embedded demo model: it knows only a few things")
    from tinyllava.llava import load

    threads: int | None = arguments.threads
    llava = load(
        model,
        mmproj,
        backend=arguments.backend,
        threads=threads if threads and threads > 0 else None,
        n_ctx=arguments.ctx_size or None,
        n_batch=arguments.batch_size or None,
        dtype=arguments.dtype,
        compat=arguments.compat,
        n_gpu_layers=arguments.n_gpu_layers,
    )
    for note in llava.placement.notes:
        report.note(note)
    if threads and threads > llava.ops.threads:
        report.note(f"-t {threads}: only {llava.ops.threads} processors are there to use")
    for note in llava.tokenizer.notes:
        report.note(note)
    return llava


def complete(sampling: Sampling, arguments: argparse.Namespace, llava: LLaVA) -> Sampling:
    """The settings with what only the model knows: the tokens that --ignore-eos forbids."""
    if not arguments.ignore_eos:
        return sampling
    forbidden = tuple((token, float("-inf")) for token in sorted(llava.tokenizer.end_ids))
    return replace(sampling, logit_bias=sampling.logit_bias + forbidden)


# ---- the answer


def answer(
    llava: LLaVA,
    stream: Stream,
    pictures: list[Path],
    sampling: Sampling,
    arguments: argparse.Namespace,
    report: Report,
) -> None:
    """Say the plan, and print the answer as it is made, or at its end as JSON."""
    plan = stream.plan
    report.plan(plan, pictures, llava)
    if arguments.verbose_prompt:
        report.tokens(plan, llava.tokenizer)
    if arguments.json:
        for _ in stream:
            pass
        print(as_json(stream.result, plan, llava, sampling, pictures), flush=True)
    else:
        _print_pieces(stream, report)
    report.timings(stream.result, plan)


def make_plan(llava: LLaVA, prompt: str, pictures: list[Path], arguments: argparse.Namespace) -> Plan:
    """The plan for -n tokens. Without -n, a long prompt may leave the answer less room than the default."""
    template = arguments.chat_template or "auto"
    if arguments.n_predict is not None:
        return llava.plan(prompt, pictures, max_tokens=arguments.n_predict, template=template)
    usual = llava.profile.max_tokens
    try:
        plan = llava.plan(prompt, pictures, max_tokens=-1, template=template)
    except ContextError:  # not even one token fits: the message shall ask for room for a usual answer
        return llava.plan(prompt, pictures, max_tokens=usual, template=template)
    return replace(plan, max_tokens=min(plan.max_tokens, usual) if usual >= 0 else plan.max_tokens)


def _print_pieces(stream: Stream, report: Report) -> None:
    """Print the text, piece by piece, and a newline at its end."""
    text_ends_line = False
    for piece in stream:
        report.clear()
        sys.stdout.write(piece)
        sys.stdout.flush()
        text_ends_line = piece.endswith("\n")
    report.clear()
    if not text_ends_line:
        sys.stdout.write("\n")
        sys.stdout.flush()
