"""``tinyllava surgery``: the first step of the guide of 2023, for both versions of LLaVA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyllava.commands.parser import Parser
from tinyllava.errors import UsageError

DESCRIPTION = """\
Take the projector, and the vision tower if it is inside, out of a LLaVA: llava.projector and llava.clip, as
safetensors. For those who follow llama.cpp's old guide (llava_surgery.py, llava_surgery_v2.py); `tinyllava
convert` does all of its steps at once. The model's own files stay as they are.
"""


def make_parser() -> Parser:
    """The parser of ``surgery``."""
    parser = Parser("surgery", DESCRIPTION)
    group = parser.add_argument_group("options")
    parser.option(group, "-m --model", metavar="DIR", type=Path, help="the folder of the LLaVA")
    what = "accepted, as the old script has it; the tower is written whenever it is inside"
    parser.option(group, "-C --clean-vision-tower", action="store_true", help=what)
    what = "folder to write to (default: the LLaVA's)"
    parser.option(group, "-o --output-dir", metavar="DIR", type=Path, help=what)
    parser.add_standard_options(group)
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    if arguments.model is None:
        raise UsageError("-m", "not given", wanted="the folder of a LLaVA")
    from tinyllava.commands.convert import size
    from tinyllava.convert.layout import open_llava
    from tinyllava.convert.pipeline import made_folder
    from tinyllava.convert.surgery import take_apart

    parts = open_llava(arguments.model)
    out = arguments.output_dir or arguments.model
    print(f"found {parts.describe()}")
    with made_folder(out):
        for file in take_apart(parts, out):
            print(f"wrote {file.path}: {file.n_arrays} arrays, {size(file.n_bytes)}")
    tower = out if parts.tower else f"<folder of {parts.config.get('mm_vision_tower', 'the CLIP model')}>"
    projector = out / "llava.projector"
    print(f"next: tinyllava convert-image-encoder -m {tower} --llava-projector {projector} --output-dir {out}")
    print(f"and:  tinyllava convert-llama {arguments.model} --skip-unknown")
    return 0
