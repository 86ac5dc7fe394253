"""golden/gpu.md's tables and README.md's sentence: from a file of results to lines of text, by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tests.gpu_table import SHOWN, sentence, table

ABOUT = {"card": "H200", "driver": "580.1", "cuda": "13.0", "date": "2026-11-22", "cupy": "14.2.0"}
RESULTS = {
    "about": {**ABOUT, "torch": "2.11.0", "transformers": "5.17.0", "attention": "sdpa"},
    "ceilings": {"bytes_per_s": 4.1e12, "flop_per_s": 7.04e14},
    "steps": [
        {"what": "one token", "ours_s": 0.004, "peer_s": 0.054, "limit_s": 0.0032, "bytes_per_s": 3.28e12},
        {"what": "prompt, 34B", "ours_s": 1.5, "peer_s": None, "limit_s": 0.75, "flop_per_s": 3.52e14},
    ],
    "errors": [{"what": "logits", "ours": 1e-3, "peer": 1.26e-3}, {"what": "embeddings", "ours": 2e-3}],
    "memory": [{"what": "7B Q4_K_M", "file_bytes": 4_000_000_000, "device_bytes": 4_100_000_000}],
}
TABLE = """\
| step | tinyllava, ms | transformers in float16, ms | times as fast | reached | of the card's |
|---|---|---|---|---|---|
| one token | 4.00 | 54.00 | 13.50 | 3.28 TB/s | 80 % |
| prompt, 34B | 1,500.00 | – | – | 352 TFLOP/s | 50 % |

| error against float64, relative 2-norm | tinyllava | transformers, float16 |
|---|---|---|
| logits | 1.0e-03 | 1.3e-03 |
| embeddings | 2.0e-03 | – |

| memory of the weights | file, GB | GPU, GB | ratio |
|---|---|---|---|
| 7B Q4_K_M | 4.00 | 4.10 | 1.02 |

H200, driver 580.1, CUDA 13.0, 2026-11-22; its own copies reach 4.10 TB/s, its float16 products 704 TFLOP/s. \
cupy 14.2.0, torch 2.11.0, transformers 5.17.0 (sdpa).
"""


def test_results_become_tables(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    assert table(path) == "Not measured yet.\n"
    path.write_text(json.dumps(RESULTS), encoding="utf-8")
    assert table(path) == TABLE


def test_results_become_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    steps = [{"what": what, "ours_s": 0.5, "peer_s": 1.0 + i} for i, what in enumerate(SHOWN)]
    path.write_text(json.dumps({**RESULTS, "steps": steps}), encoding="utf-8")
    assert sentence(path) == (
        "Beside transformers in float16 on an H200, tinyllava encodes a picture 2.00 times as fast, reads 2,928 "
        "tokens with a 7B model in F16 4.00 times as fast, and writes one 6.00 times as fast, with 0.79 to "
        "0.79 times its error; weights take at most 1.02 times their file's size: [every step](golden/gpu.md)."
    )
