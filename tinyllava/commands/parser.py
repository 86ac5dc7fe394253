"""A parser that reads options as llama.cpp does, and says what is wrong in one line.

argparse keeps the table of options, the conversions and the help. Splitting the line is done here first, by
llama.cpp's rule (common/arg.cpp): an option that takes a value takes the next word, whatever it looks like,
so that ``-p "-- what is this?"`` and ``--temp -1`` work; ``--top_k`` is ``--top-k``; options are not
abbreviated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

from tinyllava.errors import UsageError
from tinyllava.version import __version__

HELP = ("-h", "--help", "--usage")
VERSION = "--version"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that looks like ``name``, or nothing if none does."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"The nearest is {close[0]}" if close else ""


def whole(text: str) -> int:
    """A whole number. Its bounds are checked by what it is for."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a whole number") from None


def real(text: str) -> float:
    """A number, inf and nan among them: what it is for refuses those."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a number") from None


class Parser(argparse.ArgumentParser):
    """``ignored`` and ``refused`` are options of llama-llava-cli without a meaning, or without support, here.

    ``ignored`` maps each to the number of its values; those met are listed in the result's ``ignored``.
    ``refused`` maps each to a reason. They would change the answer, so passing over them would be a lie.
    """

    def __init__(
        self,
        command: str,
        description: str,
        *,
        ignored: Mapping[str, int] | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            prog=f"tinyllava {command}",
            description=description,
            add_help=False,
            allow_abbrev=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110),
        )
        self.command = command
        self.ignored = dict(ignored or {})
        self.refused = dict(refused or {})
        self.known: dict[str, tuple[str, bool]] = {}  # option -> its last name, whether it takes a value
        self.n_positional = 0

    def option(self, group: argparse._ActionsContainer, names: str, **settings: Any) -> None:
        """Add an option to a group of the help. ``names``: "-m --model", the last with two dashes."""
        all_names = names.split()
        action = group.add_argument(*all_names, **settings)
        for name in all_names:
            self.known[name] = (all_names[-1], action.nargs != 0)

    def positional(self, name: str, **settings: Any) -> None:
        """Add a word without an option in front. Optional here: the command says what is missing."""
        self.add_argument(name, nargs="?", **settings)
        self.n_positional += 1

    def add_standard_options(self, group: argparse._ActionsContainer) -> None:
        """List help and version in the help; parse() acts on them wherever they stand."""
        group.add_argument(*HELP, action="help", help="show this")
        group.add_argument(VERSION, action="store_true", help="show the version")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The settings of a command line. Help and version print and exit with 0."""
        options, positional, ignored = self._split(list(words))
        for word in positional[self.n_positional :]:
            raise UsageError(word, "no option before it", hint="Put a text with spaces between quotes")
        arguments = self.parse_args([*options, "--", *positional] if positional else options)
        arguments.ignored = ignored
        return arguments

    def _split(self, words: list[str]) -> tuple[list[str], list[str], list[str]]:
        """Words -> options as ``--name=value``, positional words, and the ignored options among them."""
        options: list[str] = []
        positional: list[str] = []
        ignored: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                return options, positional + words, ignored
            name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            if name.startswith("--"):
                name = name.replace("_", "-")
            if not _is_option(name):
                positional.append(word)
            elif name in HELP:
                self._print_and_exit(self.format_help())
            elif name == VERSION:
                self._print_and_exit(f"tinyllava {__version__}\n")
            elif name in self.known:
                long_name, takes_value = self.known[name]
                if equals and not takes_value:
                    raise UsageError(name, f"the value {value!r}", wanted="none")
                if takes_value and not equals:
                    value, equals = self._value(name, words), "="
                options.append(long_name + equals + value)
            else:
                self._pass_over(name, bool(equals), words)
                ignored.append(name)
        return options, positional, ignored

    def _value(self, name: str, words: list[str]) -> str:
        """The word after an option. UsageError if there is none, or if it is an option itself."""
        if not words or words[0] in self.known:
            found = f"no value, but {words[0]}" if words else "no value"
            raise UsageError(name, found, wanted="a value after it")
        return words.pop(0)

    def _pass_over(self, name: str, has_value: bool, words: list[str]) -> None:
        """Skip an ignored option with its values. UsageError for an option that is refused or unknown."""
        if name in self.refused:
            raise UsageError(name, "not supported", wanted=self.refused[name])
        if name not in self.ignored:
            known = [*self.known, *self.ignored, *HELP, VERSION]
            hint = nearest(name, known) or f"See tinyllava {self.command} --help"
            raise UsageError(name, "not an option", hint=hint)
        if name in ("-fa", "--flash-attn") and words[:1] in (["on"], ["off"], ["auto"]):
            del words[0]  # a flag in llama-llava-cli; newer programs of llama.cpp give it a value
        n_values = self.ignored[name] - has_value
        if len(words) < n_values:
            raise UsageError(name, "no value", wanted="a value after it")
        del words[: max(n_values, 0)]

    def _print_and_exit(self, text: str) -> NoReturn:
        sys.stdout.write(text)
        sys.stdout.flush()
        raise SystemExit(0)

    def error(self, message: str) -> NoReturn:
        """argparse's complaints: "argument -n/--predict: 'x'; wanted a whole number"."""
        where, colon, found = message.removeprefix("argument ").partition(": ")
        raise UsageError(where if colon else "arguments", found if colon else message)


def _is_option(word: str) -> bool:
    """Whether a word is an option's name: it starts with a dash, and is no dash or negative number."""
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit()
