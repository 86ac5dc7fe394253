"""Stop texts: found wherever a piece ends, and nothing of them ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava.text.prompt import StopScanner


def scan(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    output = "".join(scanner.push(piece) for piece in pieces)
    return output + scanner.finish(), scanner.stopped


def definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first place where the text so far ends with a stop text; the longest of several."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("pieces", "output", "stopped"),
    [
        (["Hello", " world"], "Hello world", None),
        (["Hello USER: hi"], "Hello ", "USER:"),
        (["Hello U", "S", "ER", ": hi"], "Hello ", "USER:"),
        (["a #", "# b ##"], "a ## b ##", None),  # held back, then given out
        (["a ##", "## b"], "a ", "###"),
        (["a<|im_", "start|>"], "a", "<|im_start|>"),
        (["a<|im_e", "XX"], "a<|im_eXX", None),
    ],
)
def test_by_hand(pieces: list[str], output: str, stopped: str | None) -> None:
    assert scan(pieces, ["###", "<|im_end|>", "<|im_start|>", "USER:"]) == (output, stopped)


def test_text_that_may_become_a_stop_text_is_held_back() -> None:
    scanner = StopScanner(["USER:"])
    assert scanner.push("done. US") == "done. "
    assert scanner.push("A") == "USA"
    assert scanner.push("USER") == ""
    assert scanner.finish() == "USER"


def test_nothing_comes_after_a_stop() -> None:
    scanner = StopScanner(["."])
    assert scanner.push("a.b") == "a"
    assert scanner.push("c") == ""
    assert scanner.finish() == ""


def test_without_stop_texts_everything_passes_at_once() -> None:
    assert StopScanner([]).push("USER: ###") == "USER: ###"
    assert StopScanner([""]).push("x") == "x"


short = st.text("ab", max_size=6)


@given(st.lists(short), st.lists(st.text("ab", max_size=4), max_size=4))
def test_the_output_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    assert scan(pieces, stops) == definition("".join(pieces), stops)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_no_more_is_held_back_than_a_stop_text_less_one(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    given_out = ""
    for at, letter in enumerate(text, 1):
        given_out += scanner.push(letter)
        if scanner.stopped is not None:
            break
        assert at - len(given_out) < max((len(stop) for stop in stops), default=1)
