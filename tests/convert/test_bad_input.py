"""Whatever is wrong: one line, exit code 2, the inputs as they were, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from golden.checkpoints import CHECKPOINTS, WRITERS, cast, split_state, write_checkpoint
from tinyllava import cli

ROOT = Path(__file__).parents[2]
Out = pytest.CaptureFixture[str]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file's name, time and checksum."""
    return {
        str(path.relative_to(folder)): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def copy(checkpoints: Path, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(checkpoints / name, tmp_path / "in"))


def rewrite(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """The same checkpoint in one shard, with its arrays changed."""
    spec = CHECKPOINTS[name]
    state, _ = split_state(spec)
    change(state)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json")]:
        path.unlink()
    WRITERS["safetensors"](folder / "model.safetensors", {k: cast(v, spec.dtype) for k, v in state.items()})


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 4000)


def promise_more(folder: Path) -> None:
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def arrays(change: Callable[[dict[str, np.ndarray]], object], name: str = "llava16") -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, name, change)


Q = "model.layers.1.self_attn.q_proj.weight"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (drop("model-00002-of-00002.safetensors"), "1 of 2 shards are missing, first model-00002"),
    "a truncated shard": (truncate("model-00001-of-00002.safetensors"), "truncated"),
    "an index with too much": (promise_more, "names 1 arrays that no shard holds, first model.layers.9"),
    "no config": (drop("config.json"), "config.json: not there"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "no tokenizer": (drop("tokenizer.model"), "no tokenizer; wanted tokenizer.model"),
    "a missing array": (
        arrays(lambda s: s.pop(Q)),
        "no blk.1.attn_q.weight (GGUF's name); wanted a whole language model",
    ),
    "an unknown array": (
        arrays(lambda s: s.update({"model.layers.0.extra.weight": s[Q]})),
        "1 array that LLaVA does not have, first model.layers.0.extra.weight. --skip-unknown leaves them out",
    ),
    "a wide projector": (
        arrays(lambda s: s.update({"model.mm_projector.2.weight": np.zeros((80, 64), np.float32)})),
        "the projector gives 80 features, the language model takes 64",
    ),
    "another tower's projector": (
        arrays(lambda s: s.update({"model.mm_projector.0.weight": np.zeros((64, 96), np.float32)})),
        "the projector takes 96 features, the vision tower gives 128",
    ),
    "no projector": (
        arrays(lambda s: [s.pop(k) for k in list(s) if "mm_projector" in k]),
        "a language model without a projector; wanted a LLaVA. For a language model alone: tinyllava",
    ),
    "no tower": (
        arrays(lambda s: [s.pop(k) for k in list(s) if "vision_tower" in k]),
        "no vision tower inside; wanted --vision-tower with the folder of openai/clip-vit-large-patch14-336",
    ),
    "half a tower": (
        arrays(lambda s: [s.pop(k) for k in list(s) if "fc2.bias" in k]),
        "no v.blk.0.ffn_up.bias (GGUF's name) and 1 other arrays",
    ),
    "not a number": (arrays(lambda s: s[Q].fill(np.nan)), "a weight is NaN"),
    "another family": (config(model_type="llava_gemma"), "a language model of type gemma"),
    "experts": (config(num_local_experts=8), "a language model of type mixture of experts"),
    "no head": (
        arrays(lambda s: s.pop("lm_head.weight")),
        "no output.weight (GGUF's name); wanted a whole language model",
    ),
    "heads": (config(num_attention_heads=7), "7 heads for 64 rows of q"),
    "key heads": (config(num_key_value_heads=2), "num_key_value_heads 2; wanted 4, as k's 64 rows say"),
    "rope": (config(rope_scaling={"type": "dynamic", "factor": 2}), "rope scaling 'dynamic'"),
    "class embedding": (config(mm_vision_select_feature="cls_patch"), "features 'cls_patch'"),
    "layers": (config(mm_vision_select_layer=[-2, -5]), "features of layer [-2, -5]"),
    "pinpoints": (config(image_grid_pinpoints="(1x1),...,(6x6)"), "image_grid_pinpoints '(1x1),...,(6x6)'"),
    "a LoRA": (lambda f: (f / "adapter_config.json").write_text("{}"), "a LoRA adapter; wanted a whole"),
    "a file in the way": (lambda f: (f.parent / "out").write_text(""), "cannot be made: File exists"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(case: str, checkpoints: Path, tmp_path: Path, capsys: Out) -> None:
    damage, message = CASES[case]
    folder = copy(checkpoints, tmp_path, "llava16")
    damage(folder)
    before = snapshot(tmp_path)
    outtype = "q8_0" if case == "not a number" else "f16"
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "out"), "--outtype", outtype, "-q"]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert snapshot(tmp_path) == before and not (tmp_path / "out").is_dir()


def test_skip_unknown_leaves_the_array_out(checkpoints: Path, tmp_path: Path, capsys: Out) -> None:
    folder = copy(checkpoints, tmp_path, "llava16")
    rewrite(folder, "llava16", lambda s: s.update({"model.layers.0.extra.weight": s[Q]}))
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "out"), "--skip-unknown"]) == 0
    assert "note: 1 unknown array left out, first model.layers.0.extra.weight" in capsys.readouterr().out


WRONG_FOLDERS = {
    "llava99": "no such folder. The nearest is",
    ".": "no *.safetensors, *.bin or *.pth; wanted a checkpoint. Did you mean",
    "llava15-bin/clip": "a vision tower alone; wanted a LLaVA. Give it as --vision-tower",
    "llava16/config.json": "a file; wanted the folder that config.json and the weights lie in",
    "converted": "GGUF files; wanted a checkpoint. They are converted already",
    "legacy": "torch.save",
}


@pytest.mark.parametrize("where", WRONG_FOLDERS)
def test_wrong_folders(where: str, checkpoints: Path, tmp_path: Path, capsys: Out) -> None:
    root = Path(shutil.copytree(checkpoints, tmp_path / "all"))
    (root / "converted").mkdir()
    (root / "converted" / "a.gguf").write_bytes(b"GGUF")
    (root / "legacy").mkdir()
    (root / "legacy" / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99))
    before = snapshot(tmp_path)
    assert cli.main(["convert", str(root / where)]) == 2
    err = capsys.readouterr().err
    assert WRONG_FOLDERS[where] in err and err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_wrong_vision_tower(checkpoints: Path, capsys: Out) -> None:
    words = ["convert", str(checkpoints / "llava15-one"), "--vision-tower"]
    assert cli.main([*words, str(checkpoints / "llava15-one")]) == 2
    assert "no vision tower; wanted a CLIP model" in capsys.readouterr().err
    assert cli.main([*words, str(checkpoints / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


class Bomb:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_pickle_that_calls_something_runs_nothing(
    checkpoints: Path, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(checkpoints, tmp_path, "llava15-one")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model.norm.weight": Bomb()}, protocol=2))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(folder), "-o", "out"]) == 2
    assert "system" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_ctrl_c_leaves_nothing(
    checkpoints: Path, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_self: object, stage: str, *_: int) -> None:
        if stage == "model":  # the second file, in the middle
            raise KeyboardInterrupt

    monkeypatch.setattr("tinyllava.commands.report.Report.progress", interrupt)
    before = snapshot(tmp_path)
    assert cli.main(["convert", str(checkpoints / "llava16"), "-o", str(tmp_path / "out")]) == 130
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()
    assert "interrupted" in capsys.readouterr().err


def test_a_result_that_was_there_stays_when_the_next_fails(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["convert", str(checkpoints / "llava16"), "-o", str(out), "-q"]) == 0
    before = snapshot(out)
    folder = copy(checkpoints, tmp_path, "llava16")
    rewrite(folder, "llava16", lambda s: s[Q].fill(np.inf))
    assert cli.main(["convert", str(folder), "-o", str(out), "-q", "--outtype", "q4_0"]) == 2
    assert snapshot(out) == before


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from tinyllava.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_a_disk_that_fills_up(checkpoints: Path, tmp_path: Path) -> None:
    """Writing fails in the middle of a file: here at a limit on its size, which Linux reports in the same way."""
    words = ["convert", str(checkpoints / "llava16"), "-o", str(tmp_path / "out"), "-q"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written: File too large" in done.stderr and "room" in done.stderr
    assert list(tmp_path.iterdir()) == []


SLOW = """
import signal, sys, time
from tinyllava.commands.report import Report
from tinyllava.cli import main
def wait(self, stage, done, total):
    print(stage, flush=True)
    time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
Report.progress = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_ctrl_c_or_kill(checkpoints: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    words = ["convert", str(checkpoints / "llava16"), "-o", str(tmp_path / "out"), "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "mmproj\n"
    assert (tmp_path / "out").is_dir()  # something is there to be cleared away
    time.sleep(0.1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ---- no PyTorch

ALONE = """
import sys
NAMES = ("torch", "transformers", "safetensors", "sentencepiece", "tokenizers", "gguf")
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ImportError(f"{name} is not to be imported here")
sys.meta_path.insert(0, Nothing())
for name in NAMES:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported")
from tinyllava.cli import main
code = main(sys.argv[1:])
sys.exit(code or "numba" in sys.modules and "numba was loaded" or 0)
"""


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_numpy_alone_converts(name: str, tmp_path: Path) -> None:
    """In a process where torch, transformers, safetensors, sentencepiece and gguf cannot be imported."""
    folder = write_checkpoint(tmp_path / "in", CHECKPOINTS[name])
    before = snapshot(folder)
    words = ["convert", str(folder), "-o", str(tmp_path / "out")]
    words += ["--vision-tower", str(folder / "clip")] if (folder / "clip").exists() else []
    done = subprocess.run([sys.executable, "-c", ALONE, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("found ") and lines[-1].startswith("next: tinyllava run -m ")
    assert snapshot(folder) == before
    assert len(list((tmp_path / "out").glob("*.gguf"))) == 2
