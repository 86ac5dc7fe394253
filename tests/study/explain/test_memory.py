"""What explaining takes beside answering, at a 7B model's width."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from golden.pictures import picture
from tests.true_shapes import LLAMA_7B, VIT_L_16, write_llama, write_mmproj

RUN = """
import json, resource, sys, tinyllava
from tinyllava.study.explain.explain import explain
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB; Linux counts in KiB
llava = tinyllava.load(sys.argv[1], sys.argv[2], n_ctx=4096)
n_tokens = llava.generate("What is this?", [sys.argv[3]], 4).prompt_tokens
answered = peak()
explain(llava, "What is this?", [sys.argv[3]], max_tokens=4)
print(json.dumps([n_tokens, answered, peak()]))
"""


@pytest.mark.big
@pytest.mark.timeout(600)
def test_explaining_a_tiled_picture_takes_little_more_memory_than_answering(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("model.gguf", "mmproj.gguf", "picture.png")]
    write_llama(files[0], replace(LLAMA_7B, n_layer=2), "Q4_0")
    write_mmproj(files[1], replace(VIT_L_16, n_embd=64, n_head=2, n_ff=64, n_block=1, n_llm=LLAMA_7B.n_embd))
    Image.fromarray(picture(640, 480)).save(files[2])
    command = [sys.executable, "-c", RUN, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    n_tokens, answered, explained = json.loads(done.stdout)
    assert n_tokens > 2500
    assert explained - answered < 300, (answered, explained)
