"""Two small vocabularies written by hand: one SentencePiece-like ("llama"), one byte-level BPE ("gpt2").

Both can spell any byte sequence (256 byte tokens, or the 256 letters of the byte alphabet), so every text
round-trips, and both know some English words, so merging has work to do. They are toys: the real
vocabularies are in the golden files that `make.py spm` and `make.py llama-vocabs` write.
"""

from dataclasses import dataclass

N_TOKENS = 512

# GGUF's tokenizer.ggml.token_type values
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

WORDS = (
    "the and that what this picture image shows with from there USER ASSISTANT Human question answer cat dog "
    "red green blue small large house street water people describe detail animal colour left right between "
    "sitting standing holding looking wearing"
).split()


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file's tokenizer.ggml.* keys hold."""

    model: str  # "llama" (SPM) or "gpt2" (BPE)
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    bos: int
    eos: int
    add_bos: bool
    unk: int | None = None
    scores: tuple[float, ...] = ()  # SPM only: higher merges first
    merges: tuple[str, ...] = ()  # BPE only: "left right", first line merges first
    pre: str | None = None  # BPE only: how text is cut into words before merging


def prefixes(words: list[str], least: int) -> list[str]:
    """Every beginning of every word, once, shortest first: a merge then always finds its next step."""
    found = {word[:end] for word in words for end in range(least, len(word) + 1)}
    return sorted(found, key=lambda piece: (len(piece), piece))


def pad(tokens: list[str]) -> list[str]:
    """Fill up to N_TOKENS with tokens that no text can produce."""
    if len(tokens) > N_TOKENS:
        raise ValueError(f"{len(tokens)} tokens, but at most {N_TOKENS} fit: shorten WORDS")
    return tokens + [f"<unused{i}>" for i in range(N_TOKENS - len(tokens))]


def spm_vocabulary() -> Vocabulary:
    """<unk> <s> </s>, 256 byte tokens, then pieces: letters and beginnings of words after a space.

    The score of piece i is -i, as in the files of LLaMA: a lower id is merged first.
    """
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(code) for code in range(0x21, 0x7F)]
    words = prefixes(["\u2581" + word for word in WORDS if word.islower()][:24], least=2)
    pieces = ["\u2581", "\u2581\u2581", *letters, "é", "\u4f60", *words]
    tokens = pad(special + byte_tokens + pieces)
    n_real = len(special) + 256 + len(pieces)
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    types += [UNUSED] * (N_TOKENS - n_real)
    scores = [0.0] * 259 + [float(-i) for i in range(N_TOKENS - 259)]
    return Vocabulary("llama", tuple(tokens), tuple(types), 1, 2, True, 0, tuple(scores))


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte 0..255: itself where printable, else U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, shifted = [], 0x100
    for byte in range(256):
        alphabet.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return alphabet


def bpe_vocabulary() -> Vocabulary:
    """256 letters of the byte alphabet, beginnings of words after a space, then ChatML's control tokens."""
    space = byte_alphabet()[0x20]
    words = prefixes([space + word for word in WORDS if word.islower()][:24], least=2)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    real = byte_alphabet() + words
    tokens = pad(real + control)
    types = [NORMAL] * len(real) + [CONTROL] * 3 + [UNUSED] * (N_TOKENS - len(real) - 3)
    merges = [f"{word[:-1]} {word[-1]}" for word in words]
    bos, eos = len(real), len(real) + 2
    return Vocabulary("gpt2", tuple(tokens), tuple(types), bos, eos, False, merges=tuple(merges), pre="qwen2")


VOCABULARIES = {"spm": spm_vocabulary, "bpe": bpe_vocabulary}
