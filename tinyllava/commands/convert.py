"""``tinyllava convert``: a LLaVA as it is published, to the pair of files that ``run`` takes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.commands.parser import Parser
from tinyllava.errors import UsageError

if TYPE_CHECKING:
    from tinyllava.convert.pipeline import Written

DESCRIPTION = """\
Convert a LLaVA to GGUF: its folder in, model-<type>.gguf and mmproj-<type>.gguf out. Without PyTorch, and
without a change to the folder.

  tinyllava convert llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 -o llava-gguf
  tinyllava convert llava-v1.6-mistral-7b --outtype q4_k_m
"""
TYPES = "f32, f16, bf16, q8_0, q4_k_m and whatever else `tinyllava quantize` knows"


def make_parser() -> Parser:
    """The parser of ``convert``."""
    parser = Parser("convert", DESCRIPTION)
    group = parser.add_argument_group("options")
    what = "folder of the CLIP model, where the LLaVA has no vision tower inside (1.5) or does not say its sizes"
    parser.option(group, "--vision-tower", metavar="DIR", type=Path, help=what)
    what = "config.json of the vision tower (default: that of --vision-tower, or what the arrays tell)"
    parser.option(group, "--vision-config", metavar="FILE", type=Path, help=what)
    parser.option(group, "-o --output-dir", metavar="DIR", type=Path, help="where to write to (default: DIR-gguf)")
    what = f"type of the language model: {TYPES} (default: as the checkpoint has it)"
    parser.option(group, "--outtype", metavar="T", help=what)
    parser.option(group, "--mmproj-outtype", metavar="T", help="type of the image encoder (default: f16)")
    what = "leave out arrays that no LLaVA is known to have, instead of stopping"
    parser.option(group, "--skip-unknown", action="store_true", help=what)
    parser.option(group, "-q --quiet", action="store_true", help="print nothing but errors")
    parser.add_standard_options(group)
    parser.positional("folder", metavar="DIR", type=Path, help="the folder with config.json and the weights")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    if arguments.folder is None:
        raise UsageError("DIR", "not given", wanted="the folder of a LLaVA", hint="See tinyllava convert --help")
    from tinyllava.commands.report import Report
    from tinyllava.convert.pipeline import Settings, convert

    report = Report(quiet=arguments.quiet)
    settings = Settings(
        folder=arguments.folder,
        vision_tower=arguments.vision_tower,
        vision_config=arguments.vision_config,
        out=arguments.output_dir,
        outtype=arguments.outtype,
        mmproj_outtype=arguments.mmproj_outtype,
        skip_unknown=arguments.skip_unknown,
    )

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, flush=True)

    def progress(name: str, done: int, total: int) -> None:
        report.progress(name.partition("-")[0], done >> 20, total >> 20)  # in MiB

    try:
        written = convert(settings, say, progress)
    finally:
        report.clear()
    for line in [*describe(written), next_line(written)]:
        say(line)
    return 0


def describe(written: Sequence[Written]) -> list[str]:
    """What was written, what is to be known about it, and what it took."""
    from tinyllava.commands.quantize import peak_memory

    lines = []
    for file in written:
        lines.append(f"wrote {file.path}: {file.n_tensors} tensors, {size(file.n_bytes)}, {file.seconds:.1f} s")
        lines += [f"note: {note}" for note in file.notes]
    peak = peak_memory()
    return [*lines, f"peak memory {size(peak)}"] if peak else lines


def next_line(written: Sequence[Written]) -> str:
    """The command to go on with."""
    mmproj, model = (shlex.quote(str(file.path)) for file in written)
    return f'next: tinyllava run -m {model} --mmproj {mmproj} --image photo.jpg -p "What is this?"'


def size(n_bytes: int) -> str:
    """``12.55 GiB``, ``3.1 MiB``."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
