"""``tinyllava convert-image-encoder``: vision tower and projector to mmproj, with the old script's flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.commands.parser import Parser, real
from tinyllava.errors import ModelError, UsageError
from tinyllava.names import PROJECTOR_TYPES

if TYPE_CHECKING:
    from tinyllava.convert.layout import Parts

DESCRIPTION = """\
Convert a vision tower and llava.projector to mmproj-model-<type>.gguf, as convert_image_encoder_to_gguf.py
does. `tinyllava convert` needs none of these steps.
"""
COLOURS = ("--image-mean", "--image-std")
REFUSED = {
    "--text-only": "an image encoder; the text half of CLIP is no part of LLaVA",
    "--vision-only": "--llava-projector; an image encoder without one is no use to LLaVA",
    "--clip-model-is-openclip": "a tower in the layout of transformers",
}


def make_parser() -> Parser:
    """The parser of ``convert-image-encoder``."""
    parser = Parser("convert-image-encoder", DESCRIPTION, refused=REFUSED)
    group = parser.add_argument_group("options")
    what = "folder of the vision tower: config.json with model.safetensors, pytorch_model.bin or llava.clip"
    parser.option(group, "-m --model-dir", metavar="DIR", type=Path, help=what)
    parser.option(group, "--llava-projector", metavar="FILE", type=Path, help="llava.projector, from surgery")
    what = "folder to write to (default: the tower's)"
    parser.option(group, "-o --output-dir", metavar="DIR", type=Path, help=what)
    what = "accepted; whether the folder holds all of CLIP or the vision part is told from its files"
    parser.option(group, "--clip-model-is-vision", action="store_true", help=what)
    what = f"{', '.join(PROJECTOR_TYPES)} (default: told from the projector's arrays)"
    parser.option(group, "--projector-type", metavar="T", choices=PROJECTOR_TYPES, help=what)
    parser.option(group, "--use-f32", action="store_true", help="the tower in f32 (default: f16)")
    for name in COLOURS:
        what = f"three numbers, red, green, blue (default: {name[8:]} of preprocessor_config.json, or CLIP's)"
        parser.option(group, name, metavar="R G B", help=what)
    parser.add_standard_options(group)
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(joined(words))
    if arguments.model_dir is None:
        raise UsageError("-m", "not given", wanted="the folder of a vision tower")
    if arguments.llava_projector is None:
        hint = "Make it: tinyllava surgery"
        raise UsageError("--llava-projector", "not given", wanted="llava.projector", hint=hint)
    from tinyllava.commands.convert import describe
    from tinyllava.convert.image_encoder import plan_image_encoder, read_vision_parameters
    from tinyllava.convert.language_model import name_of
    from tinyllava.convert.layout import open_tower
    from tinyllava.convert.pipeline import check_widths, write_all

    tower = open_tower(arguments.model_dir)
    parts = open_projector(arguments.llava_projector)
    check_widths(parts, tower.arrays)
    preprocessor = dict(tower.preprocessor)
    for name, value in (("image_mean", arguments.image_mean), ("image_std", arguments.image_std)):
        if value is not None:
            preprocessor[name] = colours(f"--{name.replace('_', '-')}", value)
    where = arguments.model_dir
    parameters = read_vision_parameters(tower.arrays, tower.config, tower.model, preprocessor, where)
    outtype = "F32" if arguments.use_f32 else "F16"
    arrays = parts.projector | parts.newline
    name = name_of(where, tower.model or tower.config)
    plan = plan_image_encoder(tower.arrays, arrays, parameters, name, outtype, arguments.projector_type)
    out = arguments.output_dir or where
    written = write_all(out, {f"mmproj-model-{outtype.lower()}": plan}, [], lambda *_: None)
    for line in describe(written):
        print(line)
    return 0


def open_projector(path: Path) -> Parts:
    """The arrays of llava.projector, of ours (safetensors) or of the old script's (PyTorch)."""
    from tinyllava.convert.layout import sort_arrays
    from tinyllava.files.checkpoint import Checkpoint, open_shard

    parts = sort_arrays(Checkpoint(path, (path,), {}, dict(open_shard(path))))
    if not parts.projector:
        raise ModelError(path, "no projector in it", wanted="llava.projector", hint="Make it: tinyllava surgery")
    return parts


def joined(words: Sequence[str]) -> list[str]:
    """The words with ``--image-mean R G B`` as one option and one value."""
    rest, out = list(words), []
    while rest:
        word = rest.pop(0)
        out.append(word)
        if word.replace("_", "-") in COLOURS:
            out.append(" ".join(rest[:3]))
            del rest[:3]
    return out


def colours(name: str, text: str) -> list[float]:
    """Three numbers. UsageError for anything else."""
    import argparse

    try:
        values = [real(word) for word in text.replace(",", " ").split()]
    except argparse.ArgumentTypeError as error:
        raise UsageError(name, str(error)) from None
    if len(values) != 3:
        raise UsageError(name, f"{len(values)} numbers", wanted="three: red, green, blue")
    return values
