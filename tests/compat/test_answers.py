"""Prompts and greedy answers of 32 tokens by each profile, against the implementation that it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import tinyllava
from golden.compat import (
    ANSWER_TOKENS,
    DEMO_ANSWERS,
    IMAGE,
    RANDOM_ANSWERS,
    SPECS,
    TORCH_PROMPTS,
    picture_path,
)
from golden.models import LANGUAGE, write_language_model, write_mmproj
from golden.pictures import picture
from golden.pruned import load, load_json
from tinyllava.llava import LLaVA
from tinyllava.profile import PROFILES
from tinyllava.text.prompt import ImageSlot, build, encode_prompt, template_for
from tinyllava.text.tokenizer import Tokenizer
from tinyllava.vision.image import Source

CLI = load_json("answers-llava-cli.json.gz")
MTMD = load_json("answers-mtmd.json.gz")
DEMO = {name: load_json(f"demo-{name}.json.gz") for name in ("llava", "hf")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers")
    write_language_model(path / "vicuna.gguf", LANGUAGE["vicuna"])
    for spec in ("clip_15", "clip_16"):
        write_mmproj(path / f"{spec}.gguf", SPECS[spec])
    return path


def asked(key: str, folder: Path, compat: str) -> tuple[LLaVA, str, Source]:
    """The model, the question and the picture of a golden case."""
    model, name, question = key.split("|")
    if model == "demo":
        # The reference is slow; the fast backend rounds activations to 8 bits, and still says the same.
        backend = "numpy" if name == "demo.png" else "numba"
        return tinyllava.load(backend=backend, compat=compat), question, picture_path(name)
    pair = folder / "vicuna.gguf", folder / f"{model}.gguf"
    width, height = map(int, name.split("x"))
    return tinyllava.load(*pair, backend="numpy", compat=compat), question, Image.fromarray(picture(width, height))


def test_all_cases_are_there() -> None:
    assert CLI.keys() == MTMD.keys() and len(CLI) == len(RANDOM_ANSWERS) + len(DEMO_ANSWERS)


def test_every_implementation_answers_about_twenty_pictures_with_the_demo() -> None:
    asked = [f"{file}|{question}" for file, question in DEMO_ANSWERS]
    assert len({file for file, _ in DEMO_ANSWERS}) >= 20
    assert all(list(answers) == sorted(asked) for answers in DEMO.values())


@pytest.mark.parametrize("name, key", [(name, key) for name, answers in DEMO.items() for key in answers])
def test_the_demo_answers_as_transformers_and_the_original_do(name: str, key: str, folder: Path) -> None:
    """Both load the pair as a checkpoint (golden/demo_checkpoint.py) and do all of it with their own code."""
    llava, question, source = asked(f"demo|{key}", folder, name)
    plan = llava.plan(question, [source], max_tokens=ANSWER_TOKENS)
    ours = [i for part in plan.parts for i in ([IMAGE] if isinstance(part, ImageSlot) else part)]
    prompt, answer = DEMO[name][key]
    assert ours == prompt
    end = answer[-1] in llava.tokenizer.end_ids
    assert llava.generate(question, [source], ANSWER_TOKENS).tokens == answer[: len(answer) - end]


@pytest.mark.parametrize("key", CLI)
def test_llava_cli_prints_the_same(key: str, folder: Path) -> None:
    llava, question, source = asked(key, folder, "llava-cli")
    tokens = llava.generate(question, [source], ANSWER_TOKENS).tokens
    printed = b"".join(llava.tokenizer.token_bytes(token, special=True) for token in tokens)
    assert printed == bytes.fromhex(CLI[key])


@pytest.mark.parametrize("key", MTMD)
def test_mtmd_reads_the_same_prompt_and_answers_the_same(key: str, folder: Path) -> None:
    llava, question, source = asked(key, folder, "mtmd")
    plan = llava.plan(question, [source], max_tokens=ANSWER_TOKENS)
    ours = [-1 if isinstance(part, ImageSlot) else part for part in plan.parts]
    flat = [i for part in ours for i in (part if isinstance(part, list) else [part])]
    prompt, answer = MTMD[key]
    assert flat == _one_mark(prompt)
    assert llava.generate(question, [source], ANSWER_TOKENS).tokens == answer


def _one_mark(ids: list[int]) -> list[int]:
    """The same ids with one -1 for all the pieces of a picture."""
    return [i for n, i in enumerate(ids) if i != -1 or ids[n - 1] != -1]


# ---- the two implementations on PyTorch: token ids in, token ids out

TORCH = {name: load_json(f"answers-{name}.json.gz") for name in ("llava", "hf")}


@pytest.mark.parametrize("name, key", [(name, key) for name, answers in TORCH.items() for key in answers])
def test_the_same_tokens_follow_the_same_ids(name: str, key: str, folder: Path) -> None:
    spec, size, prompt = key.split("|")
    ids = TORCH_PROMPTS[int(prompt)]
    at = ids.index(IMAGE)
    llava = tinyllava.load(folder / "vicuna.gguf", folder / f"{spec}.gguf", backend="numpy", compat=name)
    rgb = Image.fromarray(picture(*map(int, size.split("x"))))
    plan = llava.plan("<image>x", [rgb], max_tokens=ANSWER_TOKENS)
    plan = replace(plan, parts=(ids[:at], ImageSlot(0), ids[at + 1 :]), stop_texts=())
    stream = llava.answer(plan)
    for _ in stream:
        pass
    theirs = TORCH[name][key]
    ends = [i for i, token in enumerate(theirs) if token in llava.tokenizer.end_ids]
    assert stream.result.tokens == theirs[: ends[0] if ends else None]


def test_there_are_enough_of_them() -> None:
    for answers in TORCH.values():
        assert len(answers) >= 8
        assert {key.split("|")[0] for key in answers} == {"clip_15", "clip_16"}


@pytest.mark.parametrize("case", load_json("hub-prompts.json.gz"), ids=lambda case: case[0][:10])
def test_transformers_prompts_have_its_ids(case: tuple[str, list[int]]) -> None:
    question, theirs = case
    vocabulary = load("mistral-spm")
    lists = ("tokens", "token_type", "scores", "merges")
    keys = vocabulary.scalars | {key: getattr(vocabulary, key) for key in lists}
    tokenizer = Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    parts = build(template_for("vicuna", PROFILES["hf"].wording), question)
    encoded = encode_prompt(parts, tokenizer, PROFILES["hf"].space_prefix)
    ours = [id for part in encoded for id in ([IMAGE] if isinstance(part, ImageSlot) else part)]
    assert ours == [tokenizer.bos_id, *theirs]
