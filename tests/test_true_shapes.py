"""What only shows at full size: the memory that a 7B model takes, and the time until it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.true_shapes import LLAMA_7B, write_llama

RUN = """
import json, resource, sys, tinyllava
llava = tinyllava.load(sys.argv[1], threads=2)
result = llava.generate("token " * 8, max_tokens=3)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
print(json.dumps({"peak_rss_bytes": peak, **result.timings}))
"""


@pytest.mark.big
@pytest.mark.timeout(1200)
def test_a_7b_model_runs_within_a_quarter_more_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "7b.gguf"
    write_llama(path, LLAMA_7B, "Q4_K_M")
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    print(path.stat().st_size, seen)
    assert seen["peak_rss_bytes"] < 1.25 * path.stat().st_size
    assert seen["load_s"] < 10
