"""The GPU backend at true sizes, beside transformers on the same card: python -m tests.gpu [speed-gpu.json]

Checks first: the demo pair's answers against the CPU's, logits and image embeddings against float64 with the
errors of transformers' half precision beside them. Then times, with the card's own limits measured in the same
run. The table comes last, and everything goes into the JSON file (golden/speed-gpu.json is such a run).
Needs a CUDA device with 120 GB of memory, CuPy, torch and transformers.
"""

from __future__ import annotations

import datetime
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch

import tinyllava
from golden import manifest
from tests.gpu import own, peer
from tests.gpu.models import YI_34B, random_file, random_mmproj
from tests.true_shapes import LLAMA_7B

PICTURE, TEXT = 616, 2928  # tokens of a prompt with a picture, and of a long text
N_PROMPT, N_ANSWER = 64, 16  # tokens whose logits are checked
SCENES = Path(__file__).parents[2] / "golden" / "demo" / "scenes"
QUESTIONS = ("What is in the picture?", "Describe the image.")


def free() -> None:
    """Give back what deleted models held."""
    gc.collect()
    torch.cuda.empty_cache()
    cupy.get_default_memory_pool().free_all_blocks()


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


# ---- checks


def check_demo() -> dict[str, int]:
    """The demo pair's greedy answers on the CPU and on the card."""
    on_cpu, on_card = (tinyllava.load(backend=name) for name in ("numba", "cupy"))
    asked = same = 0
    for scene in sorted(SCENES.glob("*.png"))[:8]:
        for question in QUESTIONS:
            answers = [llava.generate(question, [scene], max_tokens=64).tokens for llava in (on_cpu, on_card)]
            asked, same = asked + 1, same + (answers[0] == answers[1])
    return {"asked": asked, "same": same}


def check_logits(name: str, file: Any, ours: own.Language) -> list[dict[str, Any]]:
    """Errors of logits against float64, ours and transformers' in half precision: a prompt's, then an answer's."""
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 32000, N_PROMPT + N_ANSWER)]
    embeds = file.tensors["token_embd.weight"].rows(np.array(ids), np.float64)
    found = []
    for dtype in (torch.float64, torch.float16):
        model = peer.language(file, dtype)
        found.append(peer.logits(model, embeds))
        del model
        free()
    truth, half = found
    parts = {"read at once": slice(0, N_PROMPT), "read one by one": slice(N_PROMPT, None)}
    return [
        {"what": f"logits of tokens {what}, {name}", "ours": relative(mine, truth[part]),
         "peer": relative(half[part], truth[part])}
        for (what, part), mine in zip(parts.items(), ours.logits(ids, N_PROMPT), strict=True)
    ]  # fmt: skip


# ---- work and its least time


def work_of(file: Any, n: int, n_seen: int) -> Work:
    """Bytes and operations of n tokens of a language model, the last of which sees n_seen."""
    layers = [t for name, t in file.tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
    head = file.tensors["output.weight"]
    kv = sum(t.shape[0] for name, t in file.tensors.items() if ".attn_k." in name or ".attn_v." in name)
    width = sum(t.shape[0] for name, t in file.tensors.items() if ".attn_q." in name)
    pairs = n * (2 * n_seen - n + 1) / 2  # of queries and keys they see
    n_bytes = sum(t.nbytes for t in layers) + head.nbytes + 2 * kv * n_seen
    return n_bytes, 2 * (n * sum(t.n_elements for t in layers) + head.n_elements) + 4 * pairs * width


Work = tuple[float, float]  # bytes, operations


def row(what: str, ours: float, theirs: float | None, work: Work, card: dict[str, float]) -> dict[str, Any]:
    """One line of the table: times, what they mean a second in what limits them, and the least time possible."""
    by_bytes, by_work = work[0] / card["bytes_per_s"], work[1] / card["flop_per_s"]
    found: dict[str, Any] = {"what": what, "ours_s": ours, "peer_s": theirs, "limit_s": max(by_bytes, by_work)}
    found["bytes_per_s"] = work[0] / ours if by_bytes > by_work else None
    found["flop_per_s"] = None if by_bytes > by_work else work[1] / ours
    print(json.dumps(found), flush=True)
    return found


def measure_language(
    name: str, file: Any, times: dict[str, float], card: dict[str, float], embeds: np.ndarray, ours: own.Language
) -> list[dict[str, Any]]:
    """The rows of a language model; ``times`` are transformers', or empty."""
    graph, answer = ours.time_decode(embeds[:PICTURE])
    decode, their_decode = work_of(file, 1, PICTURE + 32), times.get("decode_s")
    return [
        row(f"prompt of {PICTURE} tokens with a picture, {name}", ours.time_prefill(embeds[:PICTURE]),
            times.get("prefill_picture_s"), work_of(file, PICTURE, PICTURE), card),
        row(f"prompt of {TEXT:,} tokens, {name}", ours.time_prefill(embeds),
            times.get("prefill_text_s"), work_of(file, TEXT, TEXT), card),
        row(f"one token, {name}", graph, their_decode, decode, card),
        row(f"one token and its choice on the host, {name}", answer, their_decode, decode, card),
    ]  # fmt: skip


# ---- the run


def about() -> dict[str, str]:
    """The card and the software."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    version = subprocess.run(driver, capture_output=True, text=True, check=True).stdout.strip()
    return {**own.about(), "driver": version, **peer.about(), "date": datetime.date.today().isoformat()}


def measure_vision(found: dict[str, Any], embeds: np.ndarray) -> dict[str, float]:
    """The image encoder's error and time; transformers' times of everything, 7B in half precision."""
    pixels = np.random.default_rng(6).standard_normal((3, 336, 336)).astype(np.float32)
    mmproj = random_mmproj(LLAMA_7B.n_embd)
    encoder, language = peer.vision(mmproj), peer.language(random_file(LLAMA_7B, "F16"))
    times = peer.measure(language, encoder, embeds, pixels)
    truth, ours = peer.embeddings(peer.vision(mmproj, torch.float64), pixels), own.Vision(mmproj)
    errors = relative(ours.embeddings(pixels), truth), relative(peer.embeddings(encoder, pixels), truth)
    found["errors"].append({"what": "embeddings of a picture", "ours": errors[0], "peer": errors[1]})
    # Multiplications: of each block's matrices, the patches' and the projector's; then attention's.
    n = 577 * 23 * 12 * 1024**2 + 576 * (588 * 1024 + 1024 * 4096 + 4096**2) + 2 * 577**2 * 1024 * 23
    work = float(sum(t.nbytes for t in mmproj.tensors.values())), 2.0 * n
    what = "picture of 336 pixels to 576 embeddings, F16"
    found["steps"].append(row(what, ours.time_encode(pixels), times["encode_s"], work, found["ceilings"]))
    return times


def run() -> dict[str, Any]:
    """Everything, as it goes into the file."""
    found: dict[str, Any] = {"about": about(), "demo": check_demo(), "ceilings": own.ceilings()}
    print(json.dumps(found), flush=True)
    free()
    found |= {"steps": [], "errors": [], "memory": []}
    embeds = (np.random.default_rng(5).standard_normal((TEXT, YI_34B.n_embd)) * 0.02).astype(np.float32)
    found["peer_times"] = measure_vision(found, embeds[:, : LLAMA_7B.n_embd])
    free()
    models = [(shape, ftype) for shape in (LLAMA_7B, YI_34B) for ftype in ("F16", "Q4_K_M")]
    for shape, ftype in models:
        name = f"{'7B' if shape is LLAMA_7B else '34B'} {ftype}"
        file, before = random_file(shape, ftype), own.device_bytes()
        model = own.Language(file)
        times = found["peer_times"] if shape is LLAMA_7B else {}
        steps = measure_language(name, file, times, found["ceilings"], embeds[:, : shape.n_embd], model)
        before += sum(a.nbytes for a in (*model.cache.k, *model.cache.v))
        peak, held = own.device_bytes(peak=True) - before, own.device_bytes() - before
        size = sum(t.nbytes for t in file.tensors.values())
        found["steps"] += steps
        found["memory"].append({"what": name, "file_bytes": size, "device_bytes": held, "peak_bytes": peak})
        if shape is LLAMA_7B:
            found["errors"] += check_logits(name, file, model)
        print(found["memory"][-1], found["errors"][-2:], flush=True)
        del model, file
        free()
    return found


def table(found: dict[str, Any]) -> str:
    """The steps to be read, in milliseconds: ours, transformers', the ratio, the least time, how near that is."""
    lines = [str(found["about"]), f"{'':56}{'ours':>9}{'peer':>9}{'ratio':>7}{'limit':>9}{'reached':>9}"]
    for r in found["steps"]:
        theirs = f"{r['peer_s'] * 1e3:9.2f}{r['ours_s'] / r['peer_s']:7.2f}" if r["peer_s"] else " " * 16
        times = f"{r['ours_s'] * 1e3:9.2f}{theirs}{r['limit_s'] * 1e3:9.2f}"
        lines.append(f"{r['what']:56}{times}{r['limit_s'] / r['ours_s']:9.0%}")
    return "\n".join(lines)


def note(path: Path, about: dict[str, str]) -> None:
    """The manifest's entry of golden/speed-gpu.json."""
    packages = {name: about[name] for name in ("cupy", "numpy", "torch", "transformers")}
    manifest.record(path, "", packages, "none: times and errors of one run on the card it names")
    entries = json.loads(manifest.MANIFEST.read_text(encoding="utf-8"))
    entries[path.name]["command"] = f"python -m tests.gpu golden/{path.name}"
    manifest.MANIFEST.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Run all, print the table, write the file that was asked for."""
    found = run()
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if path.resolve().parent == manifest.FOLDER:
            note(path, found["about"])
    rest = {key: value for key, value in found.items() if key not in ("about", "steps")}
    print(json.dumps(rest, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
