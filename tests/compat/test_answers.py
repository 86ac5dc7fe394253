"""Prompts and greedy answers of 32 tokens by the profiles llava-cli and mtmd, against those programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import tinyllava
from golden.compat import ANSWER_TOKENS, DEMO_ANSWERS, RANDOM_ANSWERS, SPECS
from golden.models import LANGUAGE, write_language_model, write_mmproj
from golden.pictures import picture
from golden.pruned import load_json
from tinyllava.llava import LLaVA
from tinyllava.text.prompt import ImageSlot
from tinyllava.vision.image import Source

CLI = load_json("answers-llava-cli.json.gz")
MTMD = load_json("answers-mtmd.json.gz")
SCENES = Path(__file__).parents[2] / "golden" / "demo" / "scenes"


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
        return tinyllava.load(backend="numpy", compat=compat), question, SCENES / name
    pair = folder / "vicuna.gguf", folder / f"{model}.gguf"
    width, height = map(int, name.split("x"))
    return tinyllava.load(*pair, backend="numpy", compat=compat), question, Image.fromarray(picture(width, height))


def test_all_cases_are_there() -> None:
    assert CLI.keys() == MTMD.keys() and len(CLI) == len(RANDOM_ANSWERS) + len(DEMO_ANSWERS)


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
