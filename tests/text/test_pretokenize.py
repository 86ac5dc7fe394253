"""Cutting text into words: cases by hand, what must always hold, and the engines the patterns were made for."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.texts import nasty_texts
from tinyllava.text.pretokenize import DEEPSEEK_LETTERS, HAN_AND_HANGUL, PATTERNS, PATTERNS_OF, SIGNS, splitter

# Characters that patterns treat in different ways, so that short texts meet many rules.
tricky = st.text(
    st.sampled_from("aZ sſ'tTreveLld19²½٣\n\r\t \u00a0\u3000\x1c\x0b\x85!?$`<|_-。一가éßΩЯא\u0301🙂\u200d\ud7fb")
    | st.characters(codec="utf-8", exclude_categories=["Cn", "Cs"]),  # unassigned here may be a letter elsewhere
    max_size=30,
)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's  2 cats!", "It|'s| | 2| cats|!"),
        ("gpt-2", "IT'S", "IT|'|S"),
        ("gpt-2", "a\n\n b", "a|\n\n| b"),
        ("gpt-2", "end  ", "end|  "),
        ("llama-bpe", "IT'S 12345", "IT|'S| |123|45"),
        ("llama-bpe", "(x)\n\ny ", "(x|)\n\n|y| "),
        ("llama-bpe", "a  \n  b", "a|  \n| | b"),
        ("llama-bpe", "it'ſa", "it|'ſ|a"),  # the long s is an s when case does not matter
        ("qwen2", "a1234", "a|1|2|3|4"),
        ("starcoder", "x 12", "x| |1|2"),
        ("falcon", "1234 a+b", "123|4| a|+|b"),
        ("default", "a+=b `c", "a|+=|b| `|c"),
        ("deepseek-llm", "Hi, 你好1 2\n", "Hi|,| |你好|1| |2|\n"),
        ("deepseek-coder", "a,  b12", "a|,| | b|1|2"),
        ("deepseek-coder", "。££", "。|££"),  # punctuation is one thing, a currency sign another
    ],
)
def test_by_hand(pre: str, text: str, words: str) -> None:
    assert splitter(pre)(text) == words.split("|")


def test_white_space_is_that_of_unicode_and_not_that_of_python() -> None:
    assert "\x1c".isspace()
    assert splitter("gpt-2")(" \x1c") == [" \x1c"]  # one word of signs
    assert splitter("gpt-2")("\u3000\x85x") == ["\u3000", "\x85", "x"]


@pytest.mark.parametrize("pre", sorted(PATTERNS))
@given(text=tricky)
def test_no_character_is_lost(pre: str, text: str) -> None:
    words = splitter(pre)(text)
    assert "".join(words) == text
    assert all(words)


# The same patterns in the notation of the tokenizer.json files, for an engine that knows \p{...}.
SHORT = "'s|'t|'re|'ve|'m|'ll|'d"
ORIGINALS = {
    "gpt-2": [rf"{SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"],
    "llama-bpe": [
        rf"(?i:{SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-llm": [
        "[\r\n]", rf"\s?[{DEEPSEEK_LETTERS}]+", r"\s?" + SIGNS, r"\s+$", HAN_AND_HANGUL, r"\p{N}+",
    ],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_AND_HANGUL, r"\p{N}"],
}  # fmt: skip
ORIGINALS["qwen2"] = [ORIGINALS["llama-bpe"][0].replace("{1,3}", "")]
ORIGINALS["starcoder"] = [r"\p{N}", *ORIGINALS["gpt-2"]]
ORIGINALS["falcon"] = [r"[\p{P}\$\+<=>\^~\|`]+", *ORIGINALS["gpt-2"], "[0-9][0-9][0-9]"]
ORIGINALS["default"] = [r"[\p{P}\$\+<=>\^~\|]+", *ORIGINALS["gpt-2"], r"\p{N}+", "[0-9][0-9][0-9]"]


@pytest.mark.peers
@pytest.mark.parametrize("pre", sorted(PATTERNS))
def test_the_engine_of_the_models_own_tokenizers_cuts_alike(pre: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    steps = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in ORIGINALS[pre]
    ]
    original = tokenizers.pre_tokenizers.Sequence(steps)

    @given(text=tricky)
    def cuts_alike(text: str) -> None:
        assert splitter(pre)(text) == [word for word, _ in original.pre_tokenize_str(text)]

    cuts_alike()
    for text in nasty_texts():
        assert splitter(pre)(text) == [word for word, _ in original.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", sorted(PATTERNS))
@pytest.mark.parametrize("repeated", [" ", "\n", "你 ", "1", "!", "\u00a0", " \n"])
def test_no_pattern_is_quadratic(pre: str, repeated: str) -> None:
    text = repeated * 50_000 + "你"
    start = time.perf_counter()
    assert "".join(splitter(pre)(text)) == text
    assert time.perf_counter() - start < 5  # 0.3 s; a search from each of the spaces takes half a minute


def test_every_alias_has_its_pattern() -> None:
    assert {"llama3", "smollm", "refact", "phi-2", "stablelm2"} <= set(PATTERNS_OF)
