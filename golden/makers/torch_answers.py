"""Greedy continuations by the original LLaVA or by transformers, from token ids with a picture among them."""

from collections.abc import Callable
from typing import Any

import torch

from golden.compat import ANSWER_TOKENS, IMAGE, SPECS, TORCH_PROMPTS, TORCH_SIZES
from golden.manifest import record, save_json
from golden.pictures import Picture, picture

CLOSE = 0.01  # of two logits: what float32 sums in another order might turn round


def greedy(step: Callable[[Any], Any], embed_token: Callable[[Any], Any], x: Any) -> list[int] | None:
    """The most likely tokens after embeddings x (1, n, n_embd); None where two are too close to tell apart."""
    chosen = []
    for _ in range(ANSWER_TOKENS):
        with torch.no_grad():
            best = torch.topk(step(x)[0, -1], 2)
            if best.values[0] - best.values[1] < CLOSE:
                return None
            chosen.append(int(best.indices[0]))
            x = torch.cat([x, embed_token(best.indices[:1])[None]], dim=1)
    return chosen


Answer = Callable[[str, Picture, list[int]], list[int] | None]


def make(name: str, answer: Answer, packages: dict[str, str]) -> None:
    """answers-<name>.json.gz: <spec>|<width>x<height>|<prompt's index> -> ids"""
    answers = {}
    for spec in ("clip_15", "clip_16"):
        for width, height in TORCH_SIZES:
            for i, ids in enumerate(TORCH_PROMPTS):
                tokens = answer(spec, picture(width, height), ids)
                print(spec, width, height, tokens)
                if tokens is not None:
                    answers[f"{spec}|{width}x{height}|{i}"] = tokens
    path = save_json(f"answers-{name}.json.gz", answers)
    record(path, f"answers-{name}", packages, "exact: greedy tokens (the two best are far apart at each)")


def joined(ids: list[int], embed_token: Callable[[Any], Any], features: Any) -> Any:
    """Embeddings of ids with a picture's features (n_tokens, n_embd) at IMAGE: (1, n, n_embd)."""
    at = ids.index(IMAGE)
    before, after = torch.tensor(ids[:at]), torch.tensor(ids[at + 1 :])
    return torch.cat([embed_token(before), features, embed_token(after)])[None]


def make_hf() -> None:
    """answers-hf.json.gz"""
    from golden.makers.compat_hf import Transformers
    from golden.manifest import versions

    peers: dict[str, Any] = {}

    def answer(spec: str, rgb: Picture, ids: list[int]) -> list[int] | None:
        if spec not in peers:
            peers[spec] = Transformers(None, SPECS[spec])  # type: ignore[arg-type]
        peer = peers[spec]
        table = peer.model.get_input_embeddings()
        x = joined(ids, table, torch.from_numpy(peer.embed(rgb)))

        def step(x: Any) -> Any:
            return peer.model.lm_head(peer.model.model.language_model(inputs_embeds=x).last_hidden_state)

        return greedy(step, table, x.detach())

    make("hf", answer, versions("torch", "transformers", "pillow", "numpy"))


def make_original() -> None:
    """answers-llava.json.gz"""
    import tempfile
    from pathlib import Path

    from golden.makers.compat_original import Original
    from golden.makers.original import original_versions

    peers: dict[str, Any] = {}

    def answer(spec: str, rgb: Picture, ids: list[int]) -> list[int] | None:
        if spec not in peers:
            with tempfile.TemporaryDirectory() as folder:
                peers[spec] = Original(Path(folder), SPECS[spec])
        model = peers[spec].model
        size = (rgb.shape[1], rgb.shape[0])
        with torch.no_grad():
            x = model.prepare_inputs_labels_for_multimodal(
                torch.tensor([ids]), None, None, None, None, peers[spec].pixels(rgb), image_sizes=[size]
            )[4]
        table = model.get_model().embed_tokens
        return greedy(lambda x: model(inputs_embeds=x, use_cache=False).logits, table, x)

    make("llava", answer, original_versions())


def make_hub_ids(tokenizer_model: str) -> None:
    """hub-prompts.json.gz: [question, ids by LlamaTokenizer of transformers 5, -200 for the picture]"""
    import tempfile
    from pathlib import Path

    from transformers import LlamaTokenizer

    from golden.compat import HUB_QUESTIONS
    from golden.manifest import sha256, versions

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(Path(tokenizer_model).read_bytes())
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    picture_id = tokenizer.convert_tokens_to_ids("<image>")
    cases = []
    for question in HUB_QUESTIONS:
        ids = tokenizer(f"USER: <image>\n{question} ASSISTANT:", add_special_tokens=False).input_ids
        cases.append([question, [IMAGE if i == picture_id else i for i in ids]])
    path = save_json("hub-prompts.json.gz", cases)
    source = {"file": Path(tokenizer_model).name, "sha256": sha256(tokenizer_model)}
    packages = versions("transformers", "tokenizers", "sentencepiece")
    record(path, "hub-prompts TOKENIZER_MODEL", packages, "exact: integers", source=source)
