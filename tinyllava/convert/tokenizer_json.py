"""What tokenizer.json says in its own way: merges, how text is cut into words, whether a text begins with BOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyllava.errors import FileError

# How a tokenizer cuts text into words before merging -> llama.cpp's name for it (llama-vocab.cpp). A tokenizer
# is known by its regular expressions; "digits" and "words" stand for the steps Digits and ByteLevel's own.
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    (f"{_SHORT_FORMS}|{_WORDS % '{1,3}'}",): "llama-bpe",
    (f"{_SHORT_FORMS}|{_WORDS % ''}",): "qwen2",
    ("words",): "gpt-2",
    (_GPT2,): "gpt-2",
    ("digits", "words"): "smollm",
}


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which ``tokenizer`` cuts text into words; "" if it has none."""
    step = tokenizer.get("pre_tokenizer")
    steps = step.get("pretokenizers", [step]) if isinstance(step, dict) else []
    found: list[str] = []
    for step in steps:
        pattern = step.get("pattern") if isinstance(step, dict) else None
        if isinstance(pattern, dict):
            found.append(str(pattern.get("Regex", pattern.get("String"))))
        elif isinstance(step, dict) and step.get("type") == "Digits":
            found.append("digits" if step.get("individual_digits") else "numbers")
        elif isinstance(step, dict) and step.get("type") == "ByteLevel" and step.get("use_regex", True):
            found.append("words")
    return PRE_TOKENIZERS.get(tuple(found), "")


def merges_of(model: dict[str, Any], path: Path) -> list[str]:
    """Merges as "left right". They are pairs since transformers 4.45, for the sake of spaces inside tokens."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise FileError(path, "no merges", wanted="a tokenizer of type BPE", hint="Download the file again")
    texts = []
    for merge in merges:
        if isinstance(merge, list) and len(merge) == 2:
            # A space would look like the one between left and right: it is written as GPT-2's alphabet has it.
            merge = " ".join(str(half).replace(" ", "\u0120") for half in merge)
        if not isinstance(merge, str):
            raise FileError(path, f"a merge that reads {merge!r}", wanted="two tokens")
        texts.append(merge)
    return texts


def sentencepiece_scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores with which SentencePiece merges in the order of ``merges``: minus the place of the first that fits.

    A token that no merge makes is there from the start (a letter, a byte) or never, so its score has no effect.
    convert_legacy_llama.py gave all tokens the same score, and then merges in another order.
    """
    place: dict[str, int] = {}
    for i, merge in enumerate(merges):
        place.setdefault(merge.replace(" ", "", 1), i)
    return [-float(place[text]) if text in place else 0.0 for text in tokens]


def puts_bos_first(tokenizer: dict[str, Any]) -> bool:
    """Whether the post-processor's template begins with a special token, as LLaMA-3's does."""
    processor = tokenizer.get("post_processor")
    parts = [processor] if isinstance(processor, dict) else []
    if parts and isinstance(parts[0].get("processors"), list):
        parts = [part for part in parts[0]["processors"] if isinstance(part, dict)]
    templates = (part.get("single") for part in parts if part.get("type") == "TemplateProcessing")
    return any(isinstance(t, list) and t and isinstance(t[0], dict) and "SpecialToken" in t[0] for t in templates)


def puts_space_first(tokenizer: dict[str, Any]) -> bool:
    """Whether a text gets a space in front: by a normalizer Prepend, or by a pre-tokenizer Metaspace."""
    steps: list[Any] = [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
    for step in steps:  # grows while it is walked: a Sequence adds its own steps
        if not isinstance(step, dict):
            continue
        steps += step.get("normalizers") or step.get("pretokenizers") or []
        prepends = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and prepends != "never"):
            return True
    return False
