"""The command line as text: llama-llava-cli's lines, help, and one line for what is wrong."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinyllava
from tinyllava import cli, demo
from tinyllava.commands.run_options import IGNORED, REFUSED, make_parser
from tinyllava.errors import UsageError
from tinyllava.text.sampling import Sampling

Out = pytest.CaptureFixture[str]

# ---- reading a line ------------------------------------------------------------------------------------

LINES = {
    "-m ggml-model-q5_k.gguf --mmproj mmproj-model-f16.gguf --image a/b.jpg": {
        "model": Path("ggml-model-q5_k.gguf"),
        "mmproj": Path("mmproj-model-f16.gguf"),
        "image": [Path("a/b.jpg")],
        "prompt": None,
    },
    '-m m --mmproj p --image 1.jpg --image 2.jpg --temp 0.1 -p "describe the image in detail."': {
        "image": [Path("1.jpg"), Path("2.jpg")],
        "temperature": 0.1,
        "prompt": "describe the image in detail.",
    },
    "-m m --mmproj p --image i -c 4096 -ngl 99 -t 8 -b 512 -n 256 -s 42": {
        "ctx_size": 4096,
        "n_gpu_layers": "99",
        "threads": 8,
        "batch_size": 512,
        "n_predict": 256,
        "seed": 42,
    },
    r'-m m -e -p "<image>\nUSER:\nProvide a full description.\nASSISTANT:\n"': {
        "escape": True,
        "prompt": r"<image>\nUSER:\nProvide a full description.\nASSISTANT:\n",
    },
    "-m m --temp 0.7 --top-k 40 --top-p 0.95 --min-p 0.05 --typical 0.9 --n-predict -1 --ctx-size 0": {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 0.9,
        "n_predict": -1,
        "ctx_size": 0,
    },
    "-m m --mirostat 2 --mirostat-lr 0.05 --mirostat-ent 3 --predict 8 --threads 4 --gpu-layers all": {
        "mirostat": 2,
        "mirostat_lr": 0.05,
        "mirostat_ent": 3.0,
        "n_predict": 8,
        "n_gpu_layers": "all",
    },
    "-m m --mirostat 1 -lr 0.05 -ent 3 --n-gpu-layers 0 --batch-size 8 --verbose-prompt": {
        "mirostat_lr": 0.05,
        "mirostat_ent": 3.0,
        "n_gpu_layers": "0",
        "verbose_prompt": True,
    },
    "-m m --repeat-penalty 1.1 --repeat-last-n -1 --presence-penalty -0.5 --frequency-penalty .2 --seed -1": {
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.2,
        "seed": -1,
    },
    "-m m --logit-bias 15043+1 -l 15043-1.5 --logit-bias 7-inf --ignore-eos": {
        "logit_bias": [(15043, 1.0), (15043, -1.5), (7, -float("inf"))],
        "ignore_eos": True,
    },
    "--model m --top_k 3 --temp=-1 -p '-- what is --this?' -fa on --no-mmap -ub 256 -ctk q8_0": {
        "top_k": 3,
        "temperature": -1.0,
        "prompt": "-- what is --this?",
        "ignored": ["-fa", "--no-mmap", "-ub", "-ctk"],
    },
    "-m m -fa -p '' --template mistral": {"ignored": ["-fa"], "prompt": "", "chat_template": "mistral"},
    "-m m --chat-template vicuna -p hi --temperature 1": {"chat_template": "vicuna", "temperature": 1.0},
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_written_for_llama_llava_cli(line: str) -> None:
    arguments = vars(make_parser("run").parse(shlex.split(line)))
    assert {name: arguments[name] for name in LINES[line]} == LINES[line]


def test_every_option_of_the_sampler_reaches_it() -> None:
    """Each field of Sampling has an option of its name: a new field cannot be forgotten here."""
    arguments = vars(make_parser("run").parse([]))
    assert set(Sampling.__dataclass_fields__) <= set(arguments)


@pytest.mark.parametrize("option, n_values", IGNORED.items())
def test_options_without_a_meaning_are_taken_with_their_values(option: str, n_values: int) -> None:
    arguments = make_parser("run").parse([option, *["1"] * n_values, "-p", "hi"])
    assert arguments.prompt == "hi" and arguments.ignored == [option]


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_would_change_the_answer_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"^{option}: not supported; wanted "):
        make_parser("run").parse([option, "1", "2"])


@pytest.mark.parametrize(
    "words, command",
    [(["-p", "x"], "run"), (["run", "-p", "x"], "run"), (["demo"], "demo"), (["tokenize", "x"], "tokenize")],
)
def test_the_first_word_chooses_the_command(
    words: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(f"tinyllava.commands.{command}.main", lambda rest: seen.append(rest) or 0)
    assert cli.main(words) == 0
    assert seen == [words[words[0] == command :]]


# ---- help and version --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["--usage"]])
def test_the_overview_lists_the_commands(words: list[str], capsys: Out) -> None:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert all(f"\n  {name}" in out for name in cli.COMMANDS) and err == ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help(command: str, capsys: Out) -> None:
    assert cli.main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: tinyllava {command} ") and err == ""
    assert max(map(len, out.splitlines())) <= 110


def test_version(capsys: Out) -> None:
    for words in (["--version"], ["run", "--version"], ["-m", "x", "--version"]):
        assert cli.main(words) == 0
        assert capsys.readouterr() == (f"tinyllava {tinyllava.__version__}\n", "")


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import sys; from tinyllava.cli import main; main(['run', '--help']); main([]);"
        "sys.exit(bool({'numpy', 'numba', 'PIL'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    fastest = 9.0
    for _ in range(5):  # the best of five: other work on the machine must not fail this
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tinyllava", "--help"], check=True, capture_output=True)
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 0.3


# ---- bad input: one line, exit code 2 ------------------------------------------------------------------

BAD_LINES = [
    ("runn", f"runn: not a command; wanted {', '.join(cli.COMMANDS)}. The nearest is run."),
    ("run --temprature 1", "--temprature: not an option. The nearest is --temperature."),
    ("run -mmprj x", "-mmprj: not an option. The nearest is --mmproj."),
    ("run --what", "--what: not an option. See tinyllava run --help."),
    ("run", "--image: no picture and no prompt; wanted a picture, or text with -p"),
    ("run -p", "-p: no value; wanted a value after it"),
    ("run -p --image x", "-p: no value, but --image; wanted a value after it"),
    ("run -ub", "-ub: no value; wanted a value after it"),
    ("run -p hello you", "you: no option before it. Put a text with spaces between quotes."),
    ("run -n x", "-n/--n-predict/--predict: 'x'; wanted a whole number"),
    ("run --temp warm", "--temperature/--temp: 'warm'; wanted a number"),
    ("run --json=1", "--json: the value '1'; wanted none"),
    ("run -l abc", "-l/--logit-bias: 'abc'; wanted TOKEN_ID(+/-)BIAS, such as 15043+1 or 15043-inf"),
    ("run -l 1+nan -p x", "--logit-bias: 1 by nan; wanted a finite number, or -inf"),
    ("run -p x --top-p 1.5", "--top-p: 1.5; wanted 0..1"),
    ("run -p x --mirostat 3", "--mirostat: 3; wanted 0, 1 or 2"),
    ("run -p x --seed -7", "--seed: -7; wanted a whole number, -1 for any"),
    ("run -p x -n 0", "-n/--predict: 0; wanted 1 or more, or -1 for an answer until it ends"),
    ("run -p x -b 0", "-b/--batch-size: 0; wanted 1 or more"),
    ("run -p x -c -1", "-c/--ctx-size: -1; wanted 0 or more"),
    ("run -p x -f y", "-f/--file: given with -p; wanted one of the two"),
    ("run -f nowhere.txt", "nowhere.txt: No such file or directory"),
    ("run -p x --image nowhere.png", "nowhere.png: no such file; wanted a picture file"),
    ("run -p x --mmproj y", "-m/--model: not given; wanted the language model that y belongs to"),
    ("run -p x -m nowhere.gguf", "nowhere.gguf: no such file. Check the path."),
    ("run -p x -m m --lora y", "--lora: not supported; wanted a model file that is right as it is"),
    ("demo -m m", "-m/--mmproj: given to demo; wanted none. Use `tinyllava run` for other models."),
    ("tokenize", "TEXT: not given; wanted the text to tokenize. Put it between quotes."),
    ("inspect", "FILE: not given; wanted the GGUF file to inspect"),
    ("inspect nowhere.gguf", "nowhere.gguf: no such file. Check the path."),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_input_gets_one_line(line: str, message: str, capsys: Out) -> None:
    assert cli.main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    said = [text for text in err.splitlines() if not text.startswith("note: ")]
    assert (out, said) == ("", [f"tinyllava: {message}"])


WORDS = [*make_parser("run").known, *IGNORED, *REFUSED, *cli.COMMANDS]
VALUES = ["--", "-", "--json=", "-1", "0", "1e999", "nan", "x", "<image>"]
words_of_any_kind = st.sampled_from(WORDS + VALUES) | st.text(st.characters(exclude_characters="\0"), max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(words_of_any_kind, max_size=6))
def test_no_line_gives_a_traceback(words: list[str], capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any words: help, or one line of complaint. The model is out of reach, so nothing gets as far as working."""
    monkeypatch.setattr(demo, "MODEL", Path("no-model.gguf"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    code = cli.main(words)
    out, err = capsys.readouterr()
    complaints = [line for line in err.splitlines() if not line.startswith("note: ")]
    if code == 0:
        assert complaints == []
    else:
        assert code == 2 and out == "" and len(complaints) == 1 and complaints[0].startswith("tinyllava: ")
