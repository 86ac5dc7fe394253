"""The command line: finds the command, and turns every way to end into a line and an exit code.

    0  done
    1  done, and the two that were compared differ
    2  bad input, in one line: where, what was found, what was wanted, what to do
    130  Ctrl-C
    141  whoever read the output went away (``| head``), as the shell counts it for C programs
    143  SIGTERM (``kill``), with unfinished files removed as after Ctrl-C

A command is a module in tinyllava/commands with ``main(words) -> exit code``. It is imported when it is
called, and imports NumPy only when it works, so that help answers at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from tinyllava.errors import TinyLLaVAError, UsageError
from tinyllava.version import __version__

BAD_INPUT, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 130, 141, 143

#: Command -> what it does, for the overview.
COMMANDS = {
    "run": "answer a question about a picture",
    "demo": "the same, with the embedded model and its own picture",
    "tokenize": "show the tokens of a text",
    "inspect": "show what a model file holds",
    "explain": "show what happens inside, as a page to look at",
    "trace": "record what passes through the models",
    "compare": "find where two runs, or two model files, part ways",
    "bench": "measure speed, beside another program if there is one",
    "convert": "convert a LLaVA checkpoint to GGUF",
    "quantize": "write a model file in fewer bits",
    "surgery": "take projector and vision tower out of a checkpoint (a step of the old guide)",
    "convert-image-encoder": "convert these two to an mmproj file (the same)",
    "convert-llama": "convert the language model alone (the same)",
}

OVERVIEW = """\
tinyllava {version}: LLaVA in NumPy, from a picture and a question to an answer

  tinyllava demo
  tinyllava run -m model.gguf --mmproj mmproj.gguf --image photo.jpg -p "What is this?"

commands:
{commands}

`tinyllava COMMAND --help` lists a command's options. Without a command it is `run`, with the options of
llama-llava-cli. Without -m and --mmproj it uses the embedded demo model.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        with ended_by_kill():
            code = dispatch(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()  # here, where a broken pipe is still caught
        return code
    except SystemExit as end:  # help, version, and SIGTERM
        return int(end.code or 0)
    except TinyLLaVAError as error:
        return complain(str(error))
    except MemoryError:
        return complain("memory: there is not enough; wanted a smaller model or a smaller -c.")
    except BrokenPipeError:
        # What is left in the buffer would fail again when Python closes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return complain(f"{error.filename or 'system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        # On a terminal, ^C stands at the end of a line that is not finished.
        print("\n" * sys.stderr.isatty() + "tinyllava: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def ended_by_kill() -> Iterator[None]:
    """Inside, SIGTERM ends the program as an exception does, so that files half written are removed."""

    def end(_signal: int, _frame: object) -> None:
        raise SystemExit(TERMINATED)

    unset = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    ours = unset and threading.current_thread() is threading.main_thread()
    if not ours:  # signals are the main thread's, and whoever has a handler keeps it
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def dispatch(argv: list[str]) -> int:
    """Call the command that ``argv`` names; options without a command belong to ``run``."""
    if not argv or argv[0] in ("-h", "--help", "--usage"):
        lines = (f"  {name:<23}{what}" for name, what in COMMANDS.items())
        print(OVERVIEW.format(version=__version__, commands="\n".join(lines)), end="")
        return 0
    if argv[0] == "--version":
        print(f"tinyllava {__version__}")
        return 0
    name, rest = ("run", argv) if argv[0].startswith("-") else (argv[0], argv[1:])
    if name not in COMMANDS:
        raise unknown_command(name)
    module = import_module(f"tinyllava.commands.{name.replace('-', '_')}")
    command: Callable[[list[str]], int] = module.main
    return command(rest)


def unknown_command(name: str) -> UsageError:
    """The error for a first word that is no command, with the nearest one that is."""
    from tinyllava.commands.parser import nearest

    return UsageError(name, "not a command", wanted=", ".join(COMMANDS), hint=nearest(name, COMMANDS))


def complain(message: str) -> int:
    """Say what was wrong with the input. Returns the exit code for it."""
    print(f"tinyllava: {message}", file=sys.stderr)
    return BAD_INPUT
