"""Tokenizer files of the small vocabularies, as they lie in checkpoints: tokenizer.model, tokenizer.json, ...

Written by hand, so that tests can build them without sentencepiece and transformers; the makers load the very
same files with both.
"""

import json
import struct
from typing import Any

from golden.vocab import NORMAL, Vocabulary, bpe_vocabulary, spm_vocabulary

# The words in front of byte-level BPE, as the models' own tokenizer.json files have them.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


# ---- tokenizer.model: protocol buffers, https://protobuf.dev/programming-guides/encoding


def varint(n: int) -> bytes:
    """Seven bits a byte, lowest first, the top bit set on all but the last."""
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def blob(number: int, data: bytes) -> bytes:
    """A field of text, bytes or a message."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """A ModelProto (sentencepiece_model.proto) of a BPE model with byte fallback, as LLaMA's is."""
    out = b""
    for text, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        piece = blob(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        out += blob(1, piece + (b"" if kind == NORMAL else varint(3 << 3) + varint(kind)))
    numbers = {3: 2, 4: len(vocabulary.tokens), 35: 1, 40: 0, 41: 1, 42: 2}  # BPE, vocab_size, byte_fallback, ids
    trainer = b"".join(varint(number << 3) + varint(value) for number, value in numbers.items())
    normalizer = blob(1, b"identity") + varint(3 << 3) + varint(1) + varint(4 << 3) + varint(0)
    return out + blob(2, trainer) + blob(3, normalizer)


# ---- JSON


def added(id: int, content: str, special: bool = True) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **flags, "special": special}


def byte_level_json(vocabulary: Vocabulary, split: str, special: list[str], **model: Any) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE; `special` follow the vocabulary's own normal tokens."""
    normal = [text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == NORMAL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    isolated = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [added(len(normal) + i, text) for i, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [isolated, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            **model,
            "vocab": {text: id for id, text in enumerate(normal)},
            "merges": list(vocabulary.merges),
        },
    }


def sentencepiece_json(vocabulary: Vocabulary, extra: dict[str, int]) -> dict[str, Any]:
    """tokenizer.json of the same pieces as sentencepiece_model(), as transformers converts LLaMA's."""
    tokens = {text: id for id, text in enumerate(vocabulary.tokens)}
    scores = vocabulary.scores
    merges = []
    for text, id in tokens.items():
        if vocabulary.types[id] == NORMAL and len(text) > 1:
            halves = ((text[:i], text[i:]) for i in range(1, len(text)))
            merges += [(scores[id], left, right) for left, right in halves if left in tokens and right in tokens]
    merges.sort(key=lambda merge: -merge[0])
    control = [added(id, vocabulary.tokens[id]) for id in range(3)]
    return {
        "version": "1.0",
        "added_tokens": control + [added(id, text) for text, id in extra.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": tokens,
            "merges": [f"{left} {right}" for _, left, right in merges],
        },
    }


def to_bytes(value: object) -> bytes:
    """JSON as transformers writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


SPM_CONFIG = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer", "legacy": False}


def spm_files(extra: dict[str, int] | None = None) -> dict[str, bytes]:
    """tokenizer.model and what lies beside it; `extra`: added tokens by text."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    files = {
        "tokenizer.model": sentencepiece_model(spm_vocabulary()),
        "tokenizer_config.json": to_bytes(SPM_CONFIG | special),
    }
    return files | ({"added_tokens.json": to_bytes(extra)} if extra else {})


def spm_json_files(extra: dict[str, int]) -> dict[str, bytes]:
    """The same vocabulary as tokenizer.json alone, with a chat template."""
    template = "{% for m in messages %}USER: {{ m.content }} ASSISTANT:{% endfor %}"
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    return {
        "tokenizer.json": to_bytes(sentencepiece_json(spm_vocabulary(), extra)),
        "tokenizer_config.json": to_bytes(SPM_CONFIG | special),
    }


def llama3_files() -> dict[str, bytes]:
    """LLaMA-3's: no add_bos_token, merges of pairs, whole words before merges."""
    vocabulary = byte_level_json(bpe_vocabulary(), LLAMA3_SPLIT, LLAMA3_SPECIAL, ignore_merges=True)
    special = {"bos_token": LLAMA3_SPECIAL[0], "eos_token": LLAMA3_SPECIAL[2]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    return {"tokenizer.json": to_bytes(vocabulary), "tokenizer_config.json": to_bytes(config)}


def qwen2_files() -> dict[str, bytes]:
    """Qwen2's: vocab.json and merges.txt too, a chat template, merges as pairs (transformers since 4.45)."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = byte_level_json(bpe_vocabulary(), QWEN2_SPLIT, special, ignore_merges=False)
    vocab, merges = vocabulary["model"]["vocab"], vocabulary["model"]["merges"]
    vocabulary["model"]["merges"] = [merge.split(" ") for merge in merges]
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    return {
        "tokenizer.json": to_bytes(vocabulary),
        "tokenizer_config.json": to_bytes(config),
        "vocab.json": to_bytes(vocab),
        "merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode(),
        "added_tokens.json": to_bytes({text: len(vocab) + i for i, text in enumerate(special)}),
    }


