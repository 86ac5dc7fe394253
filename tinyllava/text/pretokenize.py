r"""Cutting a text into words before byte-level BPE, so that no merge crosses from one word into the next.

Each model brings one or more regular expressions, made for engines that know Unicode classes such as \p{L}
(letters). Python's ``re`` does not, so the expression is matched against a *sketch* of the text: of the same
length, with every character outside ASCII replaced by a stand-in for its class. "naïve ２" is sketched as
"naÀve ²", and \p{L} is then simply [A-Za-zÀ].

Classes come from ``unicodedata``; a character that is newer than Python's Unicode version counts as "other".
Patterns: the models' own tokenizer.json files, as collected in llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial

from tinyllava.errors import ModelError

# White space of the Unicode standard. Python's \s also has U+001C to U+001F, which these engines do not.
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
IS_WHITE = re.compile(f"[{WHITE}]").match

# Class -> its members in a sketch: those of ASCII, and the stand-in for all others. "ſ" stands for itself,
# because it is an "s" to a pattern that ignores case.
CLASSES = {
    r"\p{L}": "A-Za-zſÀ",
    r"\p{N}": "0-9²",
    r"\p{P}": r"!-#%-*,-/:;?@\[-\]_{}¡",
    r"\s": WHITE,
}
STAND_INS = {"L": "À", "N": "²", "P": "¡"}
OTHER = "£"  # symbols, marks, controls, unassigned

# 's 't 're 've 'm 'll 'd, as GPT-2 wrote them and with any case, as LLaMA-3 did
SHORT_FORMS = r"'s|'t|'re|'ve|'m|'ll|'d"
ANY_CASE = r"'[sSſ]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
SPACES = r"[\s]+(?![^\s])|[\s]+"  # all but the last space, which belongs to the next word

GPT2 = SHORT_FORMS + r"| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|" + SPACES
LLAMA3 = ANY_CASE + (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|[\s]*[\r\n]+|" + SPACES
)
QWEN2 = LLAMA3.replace("{1,3}", "")  # one token a digit
FALCON_SIGNS = r"[\p{P}$+<=>^~|`]+"
# Upper, lower and title case letters, less some scripts; in escapes, as an editor may normalise such letters.
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
SIGNS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

# Pre-tokenizer -> its patterns: each cuts what the ones before it left. What no pattern matches stays a word.
PATTERNS: dict[str, list[str]] = {
    "gpt-2": [GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "starcoder": [r"[\p{N}]", GPT2],
    "falcon": [FALCON_SIGNS, GPT2, "[0-9][0-9][0-9]"],
    "deepseek-llm": [
        r"[\r\n]",
        rf"[\s]?[{DEEPSEEK_LETTERS}]+",
        r"[\s]?" + SIGNS,
        r"(?<![\s])[\s]+\Z",  # the lookbehind only spares a search from every space of a long run
        HAN_AND_HANGUL,
        r"[\p{N}]+",
    ],
    "deepseek-coder": [r"[\r\n]", r"[\s]?[\p{L}]+", r"[\s]?[\p{P}]+", HAN_AND_HANGUL, r"[\p{N}]"],
    "default": [FALCON_SIGNS.replace("`", ""), GPT2, r"[\p{N}]+", "[0-9][0-9][0-9]"],
}
ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "exaone4", "granite-docling"),
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"),
    "starcoder": ("refact", "smollm", "command-r", "codeshell", "exaone", "minerva-7b"),
}
PATTERNS_OF = PATTERNS | {alias: PATTERNS[name] for name, aliases in ALIASES.items() for alias in aliases}

# A word that is a token as a whole is taken at once, though no merges may lead to it.
IGNORES_MERGES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"})


class _Sketch(dict[int, str]):
    """Code point -> its character in the sketch, worked out when it is first met (for ``str.translate``)."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code < 128 or character == "ſ":
            stand_in = character
        elif IS_WHITE(character):
            stand_in = "\x0b"
        else:
            stand_in = STAND_INS.get(unicodedata.category(character)[0], OTHER)
        self[code] = stand_in
        return stand_in


SKETCH = _Sketch()


def splitter(name: str, where: object = "tokenizer") -> Callable[[str], list[str]]:
    """The function text -> words of the pre-tokenizer ``name``; joining the words gives the text again.

    >>> splitter("gpt-2")("It's  2 cats")
    ['It', "'s", ' ', ' 2', ' cats']
    """
    if name not in PATTERNS_OF:
        raise ModelError(where, f"pre-tokenizer '{name}'", wanted="one of " + ", ".join(sorted(PATTERNS_OF)))
    # Patterns without \p{...} name their characters one by one, so they look at the text itself.
    steps = [(_compile(pattern), r"\p{" in pattern) for pattern in PATTERNS_OF[name]]
    return partial(_split, steps)


def _compile(pattern: str) -> re.Pattern[str]:
    for name, members in CLASSES.items():
        pattern = pattern.replace(name, members)
    return re.compile(pattern)


def _split(steps: list[tuple[re.Pattern[str], bool]], text: str) -> list[str]:
    words = [text] if text else []
    for pattern, sketched in steps:
        words = [word for piece in words for word in _isolate(pattern, sketched, piece)]
    return words


def _isolate(pattern: re.Pattern[str], sketched: bool, text: str) -> list[str]:
    """Matches of the pattern, and what lies between them."""
    words, end = [], 0
    for match in pattern.finditer(text.translate(SKETCH) if sketched else text):
        if match.start() > end:
            words.append(text[end : match.start()])
        end = match.end()
        words.append(text[match.start() : end])
    if end < len(text):
        words.append(text[end:])
    return words
