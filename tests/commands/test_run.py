"""`tinyllava run` and `demo`: stdout is the answer, stderr the plan, and every end has its exit code."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import tinyllava
from tinyllava import cli, demo
from tinyllava.commands.report import Report
from tinyllava.text.sampling import Sampling
from tinyllava.text.tokenizer import Tokenizer

Files = Any  # conftest.py's
Out = pytest.CaptureFixture[str]
Start = Callable[..., subprocess.Popen[bytes]]

# ---- run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.5", "1.6"])
def test_stdout_is_the_text_and_stderr_the_plan(files: Files, version: str, capsys: Out) -> None:
    mmproj = files.mmproj if version == "1.5" else files.mmproj_16
    assert cli.main(files.pair("--image", files.picture, "-p", "What?", "-n", 8, mmproj=mmproj)) == 0
    out, err = capsys.readouterr()
    llava = tinyllava.load(files.model, mmproj, backend="numpy")
    result = llava.generate("What?", [files.picture], 8, Sampling(temperature=0))
    assert out == result.text + "\n" * (not result.text.endswith("\n"))
    grid = "one tile" if version == "1.5" else "2x2 tiles of 56 px and the whole picture"
    n_text = result.prompt_tokens - result.image_tokens
    for line in (
        f"LLaVA-{version}, numpy backend, float32, ",
        f"photo.png: 100x60 px, resized into {'56x56' if version == '1.5' else '112x112'} px, {grid}\n",
        f"image embedding created: {result.image_tokens} tokens\n",
        f"prompt: {result.prompt_tokens} tokens ({n_text} of text, {result.image_tokens} of pictures)\n",
        f"context: {result.prompt_tokens + 8} needed with an answer of up to 8 tokens, 1024 there\n",
        " tokens/s)",
    ):
        assert line in err
    assert "[#" not in err and "\r" not in err  # no progress bar where nobody watches


def test_json_holds_the_answer_and_how_it_came_about(files: Files, capsys: Out) -> None:
    ask = files.pair("--image", files.picture, "-p", "What?", "-n", 4, "--json")
    words = [*ask, "--temp", "1", "-s", "5", "-l", "3-inf"]
    assert cli.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    keys = "text tokens finish_reason image_tokens prompt_tokens timings backend settings seed"
    assert set(answer) == set(keys.split())
    keys = "load_s encode_s prefill_s decode_s prefill_tokens_per_s decode_tokens_per_s"
    assert set(answer["timings"]) == set(keys.split())
    assert (answer["seed"], answer["backend"], answer["image_tokens"]) == (5, "numpy", 16)
    assert answer["settings"]["logit_bias"] == [[3, "-inf"]] and answer["settings"]["max_tokens"] == 4
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == answer["tokens"]  # the seed decides


def test_a_seed_that_chance_chose_can_be_used_again(files: Files, capsys: Out) -> None:
    words = files.pair("--image", files.picture, "-p", "What?", "-n", 6, "--json", "--temp", 3)
    assert cli.main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert cli.main([*words, "--seed", str(first["seed"])]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == first["tokens"]


def test_several_pictures_get_an_answer_each(files: Files, capsys: Out) -> None:
    """As llama-llava-cli does it, with a question or with one <image>."""
    for prompt in ("What?", "<image> What?"):
        images = ["--image", files.picture, "--image", files.small]
        assert cli.main(files.pair(*images, "-p", prompt, "-n", 2, "--json")) == 0
        out, err = capsys.readouterr()
        answers = [json.loads(line) for line in out.splitlines()]
        asked = [answer["settings"]["images"] for answer in answers]
        assert asked == [[str(files.picture)], [str(files.small)]]
        assert "--- picture 2 of 2" in err


def test_several_slots_take_several_pictures(files: Files, capsys: Out) -> None:
    images = ["--image", files.picture, "--image", files.small]
    assert cli.main(files.pair(*images, "-p", "A <image> and <image>", "-n", 2, "--json")) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["image_tokens"] == 32 and answer["settings"]["template"] == "none"
    assert err.count("image embedding created: 16 tokens") == 2


def test_a_picture_inside_the_prompt(files: Files, capsys: Out) -> None:
    tag = f'<img src="data:image/jpeg;base64,{base64.b64encode(files.small.read_bytes()).decode()}">'
    assert cli.main(files.pair("-p", f"{tag}What?", "--image", files.picture, "-n", 1, "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["image_tokens"] == 16
    assert "note: the picture in the prompt is used, not --image" in err and "picture 1: 40x30 px" in err


def test_escapes_are_read_only_if_asked(files: Files, capsys: Out) -> None:
    words = files.pair("-p", r"a\nb", "-n", 1, "--json", "--template", "plain")
    counts = []
    for extra in ([], ["--no-escape"], ["-e"]):
        assert cli.main([*words, *extra]) == 0
        out, err = capsys.readouterr()
        counts.append(json.loads(out)["prompt_tokens"])
        assert (r"note: the prompt has \n in it" in err) == (extra == [])
    assert counts[0] == counts[1] == counts[2] + 1


def test_the_prompt_from_a_file_and_its_tokens(files: Files, capsys: Out) -> None:
    path = files.folder / "prompt.txt"
    path.write_text("Hé?\n", encoding="utf-8")
    assert cli.main(files.pair("-f", path, "-n", 1, "--template", "plain", "--verbose-prompt")) == 0
    said = capsys.readouterr().err
    tokenizer = Tokenizer.from_gguf(files.model)
    for token in tokenizer.encode("Hé?\n"):
        assert f"{token:6d} -> {tokenizer.text_of(token)!r}\n" in said


def test_quiet_says_nothing_but_the_answer(files: Files, capsys: Out) -> None:
    assert cli.main(files.pair("--image", files.picture, "-n", 2, "-q", "--mlock", "-ngl", 0)) == 0
    assert capsys.readouterr().err == ""


def test_ignored_options_are_noted_in_one_line(files: Files, capsys: Out) -> None:
    assert cli.main(files.pair("--image", files.picture, "-n", 1, "--mlock", "--keep", 9)) == 0
    err = capsys.readouterr().err
    assert err.startswith("note: --mlock, --keep: accepted, but without effect in tinyllava\n")
    assert "note: without -p, the question is 'describe the image in detail.'" in err


def test_ignore_eos_runs_to_the_limit(files: Files, capsys: Out) -> None:
    end = sorted(Tokenizer.from_gguf(files.model).end_ids)[0]
    words = files.pair("-p", "x", "-n", 3, "--json", "-l", f"{end}+1000")
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "stop"
    assert cli.main([*words, "--ignore-eos"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish_reason"] == "length" and end not in answer["tokens"]


def test_without_a_limit_the_default_bends_to_the_context(files: Files, capsys: Out) -> None:
    assert cli.main(files.pair("-p", "x", "--json", "-c", 150, "--ignore-eos")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["settings"]["max_tokens"] == 150 - answer["prompt_tokens"] == len(answer["tokens"])


def test_demo_asks_about_its_own_picture(files: Files, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", files.model)
    monkeypatch.setattr(demo, "MMPROJ", files.mmproj)
    monkeypatch.setattr(demo, "PICTURE", files.picture)
    assert cli.main(["demo", "-n", "1", "--backend", "numpy"]) == 0
    err = capsys.readouterr().err
    assert "photo.png: 100x60 px" in err and "this is the embedded demo model" in err
    assert cli.main(["demo", "--image", str(files.small), "-p", "x", "-n", "1", "--backend", "numpy"]) == 0
    assert "small.png: 40x30 px" in capsys.readouterr().err
    assert cli.main(["--image", str(files.small), "-p", "x", "-n", "1", "--backend", "numpy"]) == 0


def test_bad_input_about_files(files: Files, capsys: Out) -> None:
    not_text = files.folder / "binary.txt"
    not_text.write_bytes(b"ab\xff")
    ask = files.pair("--image", files.picture, "-p", "x")
    for words, message in (
        (["-m", files.model, "--image", files.picture], "--mmproj: not given; wanted the image encoder that"),
        (["-f", not_text], f"{not_text}: not UTF-8 at byte 2; wanted a text file"),
        ([*ask, "-c", 8], "context: "),
        ([*ask, "--template", "y"], "template: 'y'; wanted auto, vicuna"),
        ([*ask, "-l", "999999+1"], "--logit-bias: token 999999; wanted 0.."),
        ([*ask, "-p", "<image> and <image>"], "prompt: <image> twice, but 1 picture"),
        (files.pair("--image", files.model, "-p", "x"), f"{files.model}: "),
        (["inspect", files.picture], f"{files.picture}: this is a PNG picture; wanted a GGUF file."),
    ):
        assert cli.main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.splitlines()[-1].startswith(f"tinyllava: {message}"), err


def test_the_context_message_names_a_size_that_works(files: Files, capsys: Out) -> None:
    words = files.pair("--image", files.picture, "-p", "x", "-n", 2)
    assert cli.main([*words, "-c", "8"]) == 2
    size = capsys.readouterr().err.split("Use -c ")[1].split()[0]
    assert cli.main([*words, "-c", str(int(size) - 1)]) == 2
    assert cli.main([*words, "-c", size]) == 0


# ---- how a run ends ------------------------------------------------------------------------------------


def endless(files: Files) -> list[str]:
    return files.pair("-p", "x", "-n", -1, "-c", 100_000, "--ignore-eos", "-q")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_exits_with_130(files: Files, start: Start) -> None:
    # Where the tests run in the background, Ctrl-C may be ignored, and a process inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*endless(files))
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.read(1) != b""  # it has begun to answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip() == "tinyllava: interrupted"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_kill_exits_with_143(files: Files, start: Start) -> None:
    process = start(*endless(files))
    assert process.stdout is not None
    assert process.stdout.read(1) != b""
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_error(files: Files, start: Start) -> None:
    process = start(*endless(files))
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1) != b""
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_bad_input_in_a_process_of_its_own(files: Files, start: Start) -> None:
    for words in (["runn"], files.pair("--image", "nowhere.png", "-p", "x")):
        process = start(*words)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, b"") and err.count(b"\n") == 1 and b"Traceback" not in err


# ---- the progress bar ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_progress_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    report = Report()
    report.progress("picture", 0, 5)
    time.sleep(0.06)
    report.progress("picture", 3, 5)
    report.progress("picture", 5, 5)
    report.say("done")
    drawn = terminal.getvalue().split("\r")
    assert drawn[1] == "picture [" + "." * 30 + "] 0/5 tiles"
    assert drawn[2] == "picture [" + "#" * 18 + "." * 12 + "] 3/5 tiles"
    assert drawn[3].strip() == "" and len(drawn[3]) == len(drawn[2])  # wiped
    assert drawn[4] == "done\n"
