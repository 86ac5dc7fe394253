"""``tinyllava trace``: everything that passes through the models during one run, as an .npz file or a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.commands.parser import Parser, whole
from tinyllava.commands.report import Report
from tinyllava.commands.run_options import BACKEND_HELP, gpu_layers
from tinyllava.errors import UsageError

if TYPE_CHECKING:
    from tinyllava.llava import LLaVA
    from tinyllava.study.trace import Trace

DESCRIPTION = """\
Record named activations of a whole run: pixels, each part of each block, the picture's tokens, logits,
and the run's settings. With -o they go to an .npz file, which np.load and `tinyllava compare` read;
without, a table of them is printed. --list shows the names, here and in llama.cpp and transformers.
"""
DTYPES = {"f32": "float32", "f64": "float64"}


def make_parser() -> Parser:
    """The parser of ``trace``."""
    parser = Parser("trace", DESCRIPTION)
    group = parser.add_argument_group("model, pictures, prompt")
    parser.option(group, "-m --model", metavar="FILE", type=Path, help="language model (GGUF)")
    parser.option(group, "-mm --mmproj", metavar="FILE", type=Path, help="image encoder and projector (GGUF)")
    parser.option(group, "--image", metavar="FILE", type=Path, action="append", help="picture; may be repeated")
    parser.option(group, "-p --prompt", metavar="TEXT", help="question, or with <image> in it the whole prompt")
    what = "text around the question (default auto)"
    parser.option(group, "--chat-template --template", metavar="NAME", default="auto", help=what)
    what = "tokens of the answer, chosen greedily (default 1)"
    parser.option(group, "-n --predict", metavar="N", type=whole, default=1, help=what)
    group = parser.add_argument_group("what to record")
    what = "names, with * and ?: 'llm.blk.0.*'; may be repeated (default: all but attention)"
    parser.option(group, "--only", metavar="NAMES", action="append", help=what)
    parser.option(group, "--attention", action="store_true", help="attention's probabilities, too")
    parser.option(group, "--list", action="store_true", help="list the names, and run nothing")
    group = parser.add_argument_group("how to run")
    what = "whose details to follow (default llava)"
    parser.option(group, "--compat", metavar="NAME", default="llava", help=what)
    parser.option(group, "--backend", metavar="NAME", default="auto", help=BACKEND_HELP)
    what = "layers on the GPU; 99 or all: all (default: what fits)"
    parser.option(group, "-ngl --n-gpu-layers", metavar="N", type=gpu_layers, help=what)
    what = "f32 (default), or f64: the truth that others are measured against (numpy)"
    parser.option(group, "--dtype", metavar="NAME", default="float32", help=what)
    parser.option(group, "-t --threads", metavar="N", type=whole, help="threads (default: the physical cores)")
    parser.option(group, "-c --ctx-size", metavar="N", type=whole, help="most tokens in all")
    parser.option(group, "-b --batch-size", metavar="N", type=whole, help="tokens of the prompt at once")
    group = parser.add_argument_group("output")
    parser.option(group, "-o --output", metavar="FILE", type=Path, help="write an .npz file")
    parser.option(group, "-q --quiet", action="store_true", help="nothing on stderr but errors")
    parser.add_standard_options(group)
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    arguments.dtype = DTYPES.get(arguments.dtype, arguments.dtype)
    if arguments.list and arguments.model is None and arguments.mmproj is None:
        from tinyllava.study.tap_names import ENTRIES

        print_lines(name_table({name: entry.shape for name, entry in ENTRIES.items()}))
        return 0
    from tinyllava.ops import compiling

    report = Report(quiet=arguments.quiet)
    with_demo(arguments)
    check(arguments)
    llava = load(arguments, report)
    if arguments.list:
        from tinyllava.study.trace import taps_of

        print_lines(name_table(taps_of(llava)))
        return 0
    with compiling.watch(report.compiling):
        trace = record(llava, arguments, report)
    if arguments.output is None:
        print_lines(summary(trace))
        return 0
    trace.save(arguments.output)
    n_bytes = sum(array.nbytes for array in trace.values())
    report.say(f"{arguments.output}: {len(trace)} arrays, {n_bytes / 2**20:.1f} MiB")
    return 0


def with_demo(arguments: argparse.Namespace) -> None:
    """Without any model, the embedded pair is asked about its own picture."""
    from tinyllava import demo

    if arguments.model is None and arguments.mmproj is None:
        if not arguments.image and arguments.prompt is None:
            arguments.image = [demo.PICTURE]
        if arguments.prompt is None:
            arguments.prompt = demo.QUESTION


def check(arguments: argparse.Namespace) -> None:
    """UsageError or PictureError for what can be refused before a model is loaded."""
    if arguments.list:
        return
    if arguments.predict < 1:
        raise UsageError("-n/--predict", str(arguments.predict), wanted="1 or more")
    if arguments.model is not None and arguments.prompt is None:
        raise UsageError("-p/--prompt", "not given", wanted="a question, or the whole prompt")
    from tinyllava.vision.image import read_size

    for picture in arguments.image or []:
        read_size(picture)


def load(arguments: argparse.Namespace, report: Report) -> LLaVA:
    """The model pair, or an image encoder alone."""
    from tinyllava.commands.run import load_pair
    from tinyllava.llava import load as load_llava

    if arguments.model is not None or arguments.mmproj is None:
        return load_pair(arguments, report)
    if arguments.prompt is not None:
        raise UsageError("-p/--prompt", "given without -m", wanted="a language model to read it")
    return load_llava(
        mmproj=arguments.mmproj,
        backend=arguments.backend,
        dtype=arguments.dtype,
        compat=arguments.compat,
        n_gpu_layers=arguments.n_gpu_layers,
    )


def record(llava: LLaVA, arguments: argparse.Namespace, report: Report) -> Trace:
    """Run, with a progress bar."""
    from tinyllava.study.trace import trace

    return trace(
        llava,
        arguments.prompt or "",
        arguments.image or [],
        only=arguments.only,
        attention=arguments.attention,
        max_tokens=arguments.predict,
        template=arguments.chat_template,
        progress=report.progress,
    )


def summary(trace: Trace) -> Iterator[str]:
    """A table of what was recorded."""
    import numpy as np

    yield f"{'name':<28}{'shape':<22}{'rms':>12}{'min':>12}{'max':>12}"
    for name, array in trace.items():
        values = array.astype(np.float64)
        shape = " x ".join(map(str, array.shape))
        rms = float(np.sqrt(np.mean(values**2)))
        yield f"{name:<28}{shape:<22}{rms:12.5g}{values.min():12.5g}{values.max():12.5g}"


def name_table(names: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Every name with its shape, and what llama.cpp and transformers call it."""
    from tinyllava.study import tap_names

    yield f"{'tinyllava':<25}{'shape':<41}{'llama.cpp':<25}transformers (of a module; < its input)"
    for name, shape in names.items():
        entry = tap_names.ENTRIES.get(name) or tap_names.entry(name)
        assert entry is not None, name
        number = name.split(".")[2] if entry.name != name else "{i}"
        others = (entry.llama_cpp[0] if entry.llama_cpp else "-", tap_names.full_name(entry.transformers) or "-")
        cpp, theirs = (other.replace("{i}", number) for other in others)
        yield f"{name:<25}{'(' + ', '.join(shape) + ')':<41}{cpp:<25}{theirs}"


def print_lines(lines: Iterator[str]) -> None:
    """Print a table as it comes."""
    for line in lines:
        sys.stdout.write(line.rstrip() + "\n")
