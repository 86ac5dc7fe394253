"""What a converted pair answers: as transformers does on the checkpoint itself, and in llama.cpp at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyllava
import tinyllava.generate
from golden.checkpoints import CHECKPOINTS
from golden.pictures import picture
from tests.convert.conftest import Convert, load_json
from tinyllava import cli
from tinyllava.tap import Recorder
from tinyllava.text.prompt import ImageSlot

THEIRS = load_json("hf-convert.json.gz")
BEFORE, AFTER = [1, 300, 290], [310, 320, 305, 288]  # golden/makers/hf_convert.py
SIDE = {"hf-llava": 28, "hf-llava-new": 28, "hf-next": 56, "hf-next-new": 56}


@pytest.mark.parametrize("name", THEIRS)
def test_logits_and_greedy_tokens_are_transformers(name: str, converted: Convert) -> None:
    mmproj, model = converted(name)
    llava, tap = tinyllava.load(model, mmproj), Recorder(["llm.result_output"])
    image = Image.fromarray(picture(SIDE[name], SIDE[name]))
    plan = llava.plan("<image>x", [image], max_tokens=len(THEIRS[name]["greedy"]))
    changes = {"parts": (BEFORE, ImageSlot(0), AFTER), "stop_texts": ()}
    plan = tinyllava.generate.Plan(**{**vars(plan), **changes})
    stream = llava.answer(plan, tap=tap)
    assert isinstance("".join(stream), str)
    expected = np.array(THEIRS[name]["logits"])
    assert np.abs(tap.values["llm.result_output"][0][0] - expected).max() < 1e-3 * np.ptp(expected)
    assert stream.result.tokens == THEIRS[name]["greedy"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_pair_runs(
    name: str, converted: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mmproj, model = converted(name)
    Image.fromarray(picture(40, 30)).save(tmp_path / "photo.png")
    words = ["run", "-m", str(model), "--mmproj", str(mmproj), "--image", str(tmp_path / "photo.png")]
    assert cli.main([*words, "-p", "What is this?", "-n", "4", "--temp", "0"]) == 0
    assert "image embedding created" in capsys.readouterr().err


@pytest.mark.peers
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_pair_runs_in_llama_cpp(name: str, converted: Convert) -> None:
    """libmtmd loads both files, encodes a picture between two texts, and the logits are numbers."""
    pytest.importorskip("llama_cpp")
    from tests.convert.peer_llama_cpp import logits_after_picture

    mmproj, model = converted(name)
    logits = logits_after_picture(str(model), str(mmproj), picture(28, 28), b"the <__media__> dog")
    assert np.isfinite(logits).all() and logits.std() > 0
