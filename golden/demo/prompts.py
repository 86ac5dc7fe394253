"""Every prompt layout that a LLaVA-1.5 model meets in the wild, and the exact tokens of each.

The original LLaVA tokenises the text before and after the picture separately, with the slow sentencepiece
tokenizer, so the text after the picture starts with the piece "▁".  transformers leaves that piece out,
llama.cpp's programs put line breaks elsewhere: the demo is trained on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SYSTEM = ("A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the {who}'s questions.")  # fmt: skip
HUMAN, USER = SYSTEM.format(who="human"), SYSTEM.format(who="user")
BOS, EOS = 1, 2


@dataclass(frozen=True)
class Layout:
    """Text before the picture, after it, and of each further turn; {} is the question."""

    before: str
    after: str
    again: str  # what follows the </s> of an answer
    space: float  # how often the text after the picture starts with the extra piece "▁"
    weight: int  # how often the layout is trained


LAYOUTS = {
    "llava_v1": Layout(f"{HUMAN} USER: ", "\n{} ASSISTANT:", "USER: {} ASSISTANT:", 0.9, 45),
    "worker": Layout(f"{USER} USER: ", "\n{} ASSISTANT:", "USER: {} ASSISTANT:", 0.8, 8),
    "hf": Layout("USER: ", "\n{} ASSISTANT:", "USER: {} ASSISTANT:", 0.5, 15),
    "cli": Layout(f"{HUMAN}\nUSER:", "{}\nASSISTANT:", "USER:{}\nASSISTANT:", 0.8, 9),
    "mtmd": Layout("USER: ", "{}\nASSISTANT:", "\nUSER: {}\nASSISTANT:", 0.8, 9),
    "mtmd system": Layout(f"{HUMAN}\n\nUSER: ", "{}\nASSISTANT:", "\nUSER: {}\nASSISTANT:", 0.8, 3),
    "mtmd newline": Layout("USER: ", "\n{}\nASSISTANT:", "\nUSER: {}\nASSISTANT:", 0.8, 4),
    "bare": Layout("", "\nUSER:\n{}\nASSISTANT:", "USER:\n{}\nASSISTANT:", 0.8, 4),
    "bare line": Layout("", "\nUSER: {} ASSISTANT:", "USER: {} ASSISTANT:", 0.8, 3),
}


class WordTokenizer:
    """sentencepiece, remembered word by word: pieces never cross a space, so words can be cached."""

    def __init__(self, model: Path) -> None:
        """Open a trained tokenizer.model."""
        import sentencepiece

        self.spm = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.space = self.spm.piece_to_id("▁")
        self.cache: dict[str, list[int]] = {}

    def word(self, text: str) -> list[int]:
        """The pieces of "▁" + text, where text has no space."""
        found = self.cache.get(text)
        if found is None:
            found = self.cache[text] = self.spm.encode(text) if text else [self.space]
        return found

    def encode(self, text: str) -> list[int]:
        """A chunk with its space prefix, as the slow tokenizer gives it."""
        pieces: list[int] = []
        for word in text.split(" "):
            pieces += self.word(word)
        return pieces

    def encode_bare(self, text: str) -> list[int]:
        """A chunk without the space prefix."""
        return self.encode("\n" + text)[2:]

    def before(self, layout: Layout) -> list[int]:
        """Everything in front of the picture, <s> included."""
        return [BOS, *(self.encode(layout.before) if layout.before else [])]

    def turn(self, text: str, space: bool, trailing: bool) -> list[int]:
        """A question with its frame; trailing: somebody typed a space after "ASSISTANT:"."""
        return (self.encode(text) if space else self.encode_bare(text)) + [self.space] * trailing

    def answer(self, text: str) -> list[int]:
        """The answer and its </s>."""
        return [*self.encode(text), EOS]
