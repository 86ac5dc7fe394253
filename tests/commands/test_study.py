"""``tinyllava trace`` and ``tinyllava compare`` as commands: exit codes, tables, JSON, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tinyllava.cli import main


@pytest.fixture
def traces(files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Path]:
    """One picture by two profiles."""
    paths = {}
    for compat in ("llava", "mtmd"):
        paths[compat] = tmp_path / f"{compat}.npz"
        words = [*pair(files), "--image", files.picture, "-p", "What?", "--compat", compat, "-o", paths[compat]]
        assert run("trace", *words) == 0
    capsys.readouterr()
    return paths


def pair(files) -> list[object]:
    return ["-m", files.model, "--mmproj", files.mmproj, "--backend", "numpy"]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_trace_writes_what_np_load_reads_and_says_so_on_stderr(files, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.npz"
    words = ["-p", "hi", "--only", "llm.blk.0.*", "--only", "ids", "--dtype", "f64"]
    assert run("trace", *pair(files), *words[:4], *words[6:], "-o", out) == 0
    said = capsys.readouterr()
    assert said.out == "" and f"{out}: " in said.err
    with np.load(out) as file:
        assert "llm.blk.0.l_out" in file.files and file["llm.blk.0.l_out"].dtype == np.float64
        assert not any(name.startswith("llm.blk.1") for name in file.files)


def test_trace_without_o_prints_a_table(files, capsys) -> None:
    assert run("trace", *pair(files), "-p", "hi", "--only", "llm.result_norm", "-q") == 0
    said = capsys.readouterr()
    assert said.err == ""
    heading, *lines = said.out.splitlines()
    assert heading.split() == ["name", "shape", "rms", "min", "max"]
    assert [line.split()[0] for line in lines] == ["ids", "llm.result_norm", "answer_ids"]


def test_trace_lists_the_names_of_all_programs(files, capsys) -> None:
    assert run("trace", "--list") == 0
    table = capsys.readouterr().out
    line = next(line for line in table.splitlines() if line.startswith("llm.blk.{i}.attn_q_rope"))
    assert "(n, n_head, head_dim)" in line and "ROPE Qcur-{i}" in line
    assert "model.language_model.layers.{i}.self_attn.q_proj" in table
    assert run("trace", "--list", *pair(files)) == 0
    table = capsys.readouterr().out
    assert "vit.blk.2.l_out" in table and "layer_out-2" in table and "vit.blk.3" not in table


def test_a_picture_can_be_traced_without_a_language_model(files, capsys) -> None:
    words = ["--mmproj", files.mmproj, "--backend", "numpy", "--image", files.picture, "--only", "image_tokens"]
    assert run("trace", *words) == 0
    assert "16 x 256" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "llm.blk.0.atn_q"], "tap llm.blk.0.atn_q: no tap of this model; wanted llm.blk.0.attn_q"),
        (["-n", "0"], "-n/--predict: 0; wanted 1 or more"),
        (["--dtype", "f16"], "dtype: 'f16'"),
        (["--compat", "vllm"], "vllm"),
        (["--image", "absent.png"], "absent.png"),
    ],
)
def test_bad_input_to_trace_is_one_line_and_2(files, words: list[str], message: str, capsys) -> None:
    assert run("trace", *pair(files), "-p", "hi", *words) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.splitlines()[-1].startswith("tinyllava: ")


def test_trace_wants_a_prompt_and_a_model_that_reads_it(files, capsys) -> None:
    assert run("trace", *pair(files)) == 2
    assert "-p/--prompt: not given" in capsys.readouterr().err
    assert run("trace", "--mmproj", files.mmproj, "-p", "hi", "--image", files.picture) == 2
    assert "given without -m" in capsys.readouterr().err


# ---- compare


def test_equal_traces_give_0_and_different_ones_1(traces: dict[str, Path], capsys) -> None:
    assert run("compare", traces["llava"], traces["llava"]) == 0
    assert "equal to the last bit" in capsys.readouterr().out
    assert run("compare", traces["llava"], traces["mtmd"]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("first diverging: pixels (relative ")
    line = next(line for line in text.splitlines() if line.startswith("vit.inp_embd"))
    assert "17 x 96" in line and "differs" in line and "[class_token]" in line
    assert "note: first difference in length: vision tower, 3 blocks against 2" in text
    assert "known differences:" in text and "  class_token: first against last" in text


def test_json_holds_all_that_the_table_does(traces: dict[str, Path], capsys) -> None:
    assert run("compare", "--json", traces["llava"], traces["mtmd"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["agree"] is False and answer["first_diverging"] == "pixels" and answer["tolerance"] == 1e-3
    row = next(row for row in answer["rows"] if row["name"] == "vit.inp_embd")
    assert row["verdict"] == "differs" and row["known"] == ["class_token"] and 0 < row["relative"] < 10
    assert "class_token" in answer["known_differences"] and any("vit.blk.2" in name for name in answer["only_a"])


def test_model_files_are_compared_tensor_by_tensor(files, capsys) -> None:
    assert run("compare", files.model, files.model) == 0
    assert "agree: " in capsys.readouterr().out
    assert run("compare", files.mmproj, files.mmproj_16) == 1
    assert "v.blk.3.attn_k.weight" in capsys.readouterr().out


def test_names_from_files_do_not_command_the_terminal(tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "a.npz", **{"\x1b[2Jx": np.ones(3)})
    assert run("compare", tmp_path / "a.npz", tmp_path / "a.npz") == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\\x1b[2Jx" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["one"], "A and B: not both given"),
        (["absent", "absent"], "absent: No such file"),
        (["{picture}", "{picture}"], "no dump of activations"),
        (["{model}", "{trace}"], "a model file against a dump"),
        (["{trace}", "{trace}", "--tolerance", "-1"], "tolerance: -1.0; wanted 0 or more"),
        (["{trace}", "{trace}", "--tolerance", "much"], "wanted a number"),
        (["a", "b", "c"], "c: no option before it"),
    ],
)
def test_bad_input_to_compare_is_one_line_and_2(files, traces, words: list[str], message: str, capsys) -> None:
    known = {"picture": files.picture, "model": files.model, "trace": traces["llava"]}
    assert run("compare", *(word.format(**known) for word in words)) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and len(said.err.splitlines()) == 1
