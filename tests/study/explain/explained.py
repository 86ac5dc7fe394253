"""A small explained answer, and a page taken apart: what test_explain.py and test_page.py share."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

import tinyllava
from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from golden.pictures import picture
from tinyllava.files.gguf import open_gguf
from tinyllava.files.gguf_write import NewTensor, copy_metadata, write_gguf
from tinyllava.study.explain.explain import Explanation, explain

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"


class Page(HTMLParser):
    """A parsed page: its elements in order, the text of scripts, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("script", "style"):
            self._inside = tag
            self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def make_files(folder: Path) -> Path:
    """A language model, two image encoders, a picture, and a language model full of markup."""
    write_language_model(folder / "vicuna.gguf", LANGUAGE["vicuna"])
    for name in ("clip_15", "clip_16"):
        write_mmproj(folder / f"{name}.gguf", VISION[name])
    Image.fromarray(picture(100, 60)).save(folder / "picture.png")
    make_evil(folder / "vicuna.gguf", folder / "evil.gguf")
    return folder


def make_evil(source: Path, target: Path) -> None:
    """A model whose name and whose every second token is markup."""
    with open_gguf(source) as file:
        metadata = copy_metadata(file)
        tokens = list(file.metadata["tokenizer.ggml.tokens"])
        metadata["general.name"] = EVIL
        metadata["tokenizer.ggml.tokens"] = [
            f"{EVIL}{i}" if i > 260 and i % 2 else token for i, token in enumerate(tokens)
        ]
        tensors = [NewTensor(t.name, t.shape, t.type, lambda t=t: [t.raw]) for t in file.tensors.values()]
        write_gguf(target, metadata, tensors)


def make(folder: Path, vision: str = "clip_15", model: str = "vicuna", **settings: Any) -> Explanation:
    llava = tinyllava.load(folder / f"{model}.gguf", folder / f"{vision}.gguf", backend="numpy")
    question = settings.pop("question", "What is this?")
    return explain(llava, question, folder / "picture.png", **{"max_tokens": 8, **settings})
