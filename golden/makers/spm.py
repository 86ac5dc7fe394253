"""What sentencepiece itself answers with a real model, and llama.cpp with the same vocabulary."""

import tempfile
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from golden.makers.vocabularies import Tokenizer
from golden.manifest import record, save_json, sha256, versions
from golden.pruned import PrunedVocabulary, load_json, prune, write_gguf
from golden.texts import nasty_texts

NAME = "mistral-spm"
SCALARS = {
    "model": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "add_bos_token": True,
}


def metadata_of(model: str) -> dict[str, Any]:
    """The model's pieces as GGUF writes them; sentencepiece's type numbers are GGUF's too."""
    proto = ModelProto()
    proto.ParseFromString(Path(model).read_bytes())
    return {
        "tokens": [piece.piece for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        **SCALARS,
    }


def whole(metadata: dict[str, Any]) -> PrunedVocabulary:
    """The unpruned vocabulary, to be written as GGUF."""
    tokens, types, scores = (metadata[key] for key in ("tokens", "token_type", "scores"))
    return PrunedVocabulary("", NAME, SCALARS, tokens, types, scores, [], [])


def make_spm(model: str) -> None:
    """vocab-mistral-spm.json.gz: also with "sentencepiece", a list of (text, ids, text decoded from ids)

    It is pruned to nasty_texts() and to the prompts of prompts.json.gz, so make that first.
    """
    texts = nasty_texts()
    metadata = metadata_of(model)
    processor = SentencePieceProcessor(model_file=model)
    answers = [(text, (ids := processor.encode(text)), processor.decode(ids)) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.gguf"
        write_gguf(path, whole(metadata))
        tokenizer = Tokenizer(path)
        cases = tokenizer.answers(texts)
        tokenizer.close()
    prompts = [part for case in load_json("prompts.json.gz") for part in case["prompt"].split("<image>")]
    stored = prune(metadata, texts + prompts)
    content = {"source": Path(model).name, "model_name": NAME, "vocabulary": stored, "cases": cases}
    out = save_json(f"vocab-{NAME}.json.gz", content | {"sentencepiece": answers})
    packages = versions("sentencepiece", "mistral-common", "llama-cpp-python")
    source = {"file": Path(model).name, "sha256": sha256(model), "license": "Apache-2.0"}
    record(out, "spm TOKENIZER_MODEL", packages, "exact: integers and text", source=source)
    differing = sum(ids != list(case[3]) for (_, ids, _), case in zip(answers, cases[::3], strict=True))
    print(f"{len(stored['ids'])} pieces; llama.cpp differs from sentencepiece on {differing} texts")
