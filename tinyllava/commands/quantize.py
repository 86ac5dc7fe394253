"""``tinyllava quantize``: a model file in fewer bits."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.commands.parser import Parser, whole
from tinyllava.errors import UsageError

if TYPE_CHECKING:
    from tinyllava.convert.requantize import Summary

DESCRIPTION = """\
Write a model in fewer bits a weight: either file of a pair, the language model or the image encoder.

The types, as in llama.cpp: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K_S, Q3_K_M, Q3_K_L,
Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, IQ4_NL, IQ4_XS. For a language model Q4_K_M is a good start; an
image encoder is small, and Q8_0 leaves it as good as it was.

  tinyllava quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M
"""


def make_parser() -> Parser:
    """The parser of ``quantize``."""
    parser = Parser("quantize", DESCRIPTION)
    group = parser.add_argument_group("options")
    parser.option(group, "-t --threads", metavar="N", type=whole, help="threads (default: all cores)")
    parser.option(group, "-q --quiet", action="store_true", help="print nothing but errors")
    parser.add_standard_options(group)
    parser.positional("source", metavar="IN.gguf", type=Path, help="the file to read")
    parser.positional("target", metavar="OUT.gguf", type=Path, help="the file to write")
    parser.positional("type", metavar="TYPE", help="the type, in upper or lower case")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    for name, value in (("IN.gguf", arguments.source), ("OUT.gguf", arguments.target), ("TYPE", arguments.type)):
        if value is None:
            raise UsageError(name, "not given", wanted="tinyllava quantize IN.gguf OUT.gguf TYPE")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError("-t", str(arguments.threads), wanted="1 or more")
    from tinyllava.commands.report import Report
    from tinyllava.convert.requantize import requantize

    report = Report(quiet=arguments.quiet)
    start = time.monotonic()

    def progress(done: int, total: int) -> None:
        report.begin()
        report.progress("quantize", done >> 20, total >> 20)  # in MiB

    try:
        summary = requantize(
            arguments.source,
            arguments.target,
            arguments.type,
            threads=arguments.threads,
            progress=progress,
            warn=report.note,
        )
    finally:
        report.clear()
    if not arguments.quiet:
        seconds, peak = time.monotonic() - start, peak_memory()
        memory = f", peak memory {peak >> 20} MiB" if peak else ""
        print(f"{arguments.target}: {describe(summary)}, in {seconds:.1f} s{memory}")
    return 0


def describe(summary: Summary) -> str:
    """``Q4_K_M, 3.80 GiB of 12.55 GiB, 4.85 bits a weight (193 Q4_K, 65 F32, 33 Q6_K)``."""
    gib = f"{_gib(summary.bytes_out)} of {_gib(summary.bytes_in)}"
    bits = f"{8 * summary.bytes_out / max(summary.n_parameters, 1):.2f} bits a weight"
    types = ", ".join(f"{n} {name}" for name, n in sorted(summary.types.items(), key=lambda item: -item[1]))
    return f"{summary.mixture}, {gib}, {bits} ({types})"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def peak_memory() -> int:
    """The most memory that this process has had, in bytes; 0 where the system does not tell."""
    try:  # Linux: getrusage would count the process that started this one, too
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
