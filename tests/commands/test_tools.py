"""`tinyllava tokenize` and `tinyllava inspect`."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tinyllava import cli
from tinyllava.text.tokenizer import Tokenizer

Files = Any  # conftest.py's
Out = pytest.CaptureFixture[str]
Start = Callable[..., subprocess.Popen[bytes]]


def test_tokenize(files: Files, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_gguf(files.model)
    ids = tokenizer.encode("hello you")
    words = ["tokenize", "-m", str(files.model), "hello you"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "".join(f"{i:6d} -> {tokenizer.text_of(i)!r}\n" for i in ids)
    assert cli.main([*words, "--ids"]) == 0
    assert capsys.readouterr().out.split() == [str(i) for i in ids]
    assert cli.main([*words, "--json", "--no-bos"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == tokenizer.encode("hello you", add_bos=False)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello you")))
    assert cli.main([*words[:-1], "-", "--ids"]) == 0
    assert capsys.readouterr().out.split() == [str(i) for i in ids]
    assert cli.main([*words[:-1], "--ids", "--", "-p"]) == 0
    assert capsys.readouterr().out.split() == [str(i) for i in tokenizer.encode("-p")]


def test_inspect(files: Files, capsys: Out) -> None:
    assert cli.main(["inspect", str(files.model)]) == 0
    out = capsys.readouterr().out
    assert "language model, runs." in out and "blk.0.attn_q.weight" not in out
    assert cli.main(["inspect", str(files.model), "--tensors"]) == 0
    assert "blk.0.attn_q.weight" in capsys.readouterr().out
    assert cli.main(["inspect", str(files.model), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["runnable"] and "tensors" not in description
    assert cli.main(["inspect", str(files.model), "--json", "--tensors"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == description["n_tensors"]


def test_a_terminal_that_knows_no_utf_8(files: Files, start: Start) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start("tokenize", "-m", files.model, "é", "--json", env=environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b'"tokens"' in out
