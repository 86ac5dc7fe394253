"""Train the demo's tokenizer: sentencepiece BPE with byte fallback, 1,536 pieces, LLaMA's settings.

    python golden/demo/tokenizer.py tokenizer.model

The corpus is what the demo will read and write: questions, answers and prompt frames of random scenes.
"""

from __future__ import annotations

import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from chat import ELSEWHERE, GREETINGS, NO_PICTURE, ONLY_PICTURES, STRANGE_WORDS, UNKNOWN_WORD
from compose import shape_polygon
from prompts import HUMAN, USER
from questions import ask
from scenes import Library, invent
from vocabulary import COLOR_NAMES, SHAPES, read_nouns

PIECES = 1536


def stand_in_library() -> Library:
    """Every noun as one fictitious square sprite: enough to invent sentences."""
    nouns = read_nouns()
    facts = [
        {
            "icon_set": "shapes" if not noun.icons else "any",
            "noun": i,
            "role": "train",
            "tinted": not noun.icons,
            "width": 1.0,
            "height": 1.0,
        }
        for i, noun in enumerate(nouns)
    ]
    facts.append({"icon_set": "any", "noun": -1, "role": "train", "tinted": False, "width": 1.0, "height": 1.0})
    assert all(shape_polygon(shape) for shape in SHAPES)
    return Library(facts, nouns, np.ones((len(facts), len(COLOR_NAMES))))


def corpus(count: int) -> Iterator[str]:
    """Sentences in the proportions in which the model meets them, rare words often enough to become pieces."""
    rng, library = random.Random(0), stand_in_library()
    for _ in range(count):
        scene = invent(rng, library)
        for _ in range(3):
            asked = ask(scene, rng)
            if asked:
                yield f"USER: {asked[1]} ASSISTANT: {asked[2]}"
    yield from [HUMAN, USER] * (count // 20)
    yield from [*GREETINGS, *GREETINGS.values(), *ELSEWHERE, NO_PICTURE, ONLY_PICTURES, UNKNOWN_WORD] * 30
    yield from [f"Is there a {word} in the picture?" for word in STRANGE_WORDS] * 2
    yield from [string.printable.strip()] * 3


def main() -> None:
    """Train and write the tokenizer model."""
    target = Path(sys.argv[1])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(30000),
        model_prefix=str(target.with_suffix("")),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        add_dummy_prefix=True,
        num_threads=2,
        minloglevel=1,
    )


if __name__ == "__main__":
    main()
