"""``tinyllava convert-llama``: the language model alone, with the flags of convert_legacy_llama.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava.commands.parser import Parser, whole
from tinyllava.errors import ModelError, UsageError

if TYPE_CHECKING:
    from tinyllava.convert.layout import Parts
    from tinyllava.convert.vocabulary import Vocabulary

DESCRIPTION = """\
Convert the language model of a LLaVA, or a LLaMA, Mistral, Yi or Qwen2 of its own, to GGUF, as
convert_legacy_llama.py does. `tinyllava convert` does this and the image encoder at once.
"""
IGNORED = {"--concurrency": 1, "--verbose": 0}
REFUSED = {
    "--big-endian": "little-endian files, which every reader takes",
    "--dump": "tinyllava inspect, for the file that is written",
    "--dump-single": "tinyllava inspect, for the file that is written",
    "--vocab-only": "a whole model",
    "--no-vocab": "a model with its tokenizer, without which it answers nothing",
    "--metadata": "what the checkpoint says",
    "--get-outfile": "--outfile",
}


def make_parser() -> Parser:
    """The parser of ``convert-llama``."""
    parser = Parser("convert-llama", DESCRIPTION, ignored=IGNORED, refused=REFUSED)
    group = parser.add_argument_group("options")
    what = "leave out what is no part of a language model, such as a LLaVA's projector, instead of stopping"
    parser.option(group, "--skip-unknown", action="store_true", help=what)
    what = "f32, f16, bf16, q8_0, q4_k_m, ... (default: as the checkpoint has it)"
    parser.option(group, "--outtype", metavar="T", help=what)
    parser.option(group, "--outfile", metavar="FILE", type=Path, help="file to write (default: in DIR)")
    parser.option(group, "--vocab-dir", metavar="DIR", type=Path, help="folder of the tokenizer (default: DIR)")
    what = "kinds of tokenizers to try, in order (default: spm,bpe,hfft)"
    parser.option(group, "--vocab-type", metavar="T", default="spm,bpe,hfft", help=what)
    parser.option(group, "--ctx", metavar="N", type=whole, help="tokens of context (default: as config.json says)")
    what = "name the embedding's rows that have no token, instead of stopping"
    parser.option(group, "--pad-vocab", action="store_true", help=what)
    parser.option(group, "--model-name", metavar="NAME", help="general.name of the file")
    parser.add_standard_options(group)
    parser.positional("folder", metavar="DIR", type=Path, help="the folder with config.json and the weights")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``."""
    arguments = make_parser().parse(words)
    if arguments.folder is None:
        raise UsageError("DIR", "not given", wanted="the folder of a language model")
    from tinyllava.commands.convert import describe
    from tinyllava.convert.language_model import plan_language_model
    from tinyllava.convert.layout import open_folder, refuse_unknown
    from tinyllava.convert.pipeline import write_all

    parts = open_folder(arguments.folder)
    if not parts.language:
        raise ModelError(arguments.folder, "no array of a language model", wanted="a LLaMA or a LLaVA")
    others = (parts.tower, parts.projector, parts.newline)
    parts.unknown += [stored.name for group in others for stored in group.values()]
    notes = refuse_unknown(parts, arguments.skip_unknown)
    plan = plan_language_model(
        parts.language,
        parts.text_config,
        parts.folder,
        arguments.outtype,
        vocabulary=vocabulary_of(parts, arguments),
        n_ctx=arguments.ctx or 0,
    )
    if arguments.model_name:
        plan.metadata["general.name"] = arguments.model_name
    plan.notes += notes
    label = "-".join(str(plan.metadata[f"general.{key}"]).replace(" ", "-") for key in ("name", "size_label"))
    path = arguments.outfile or parts.folder / f"{label}-{plan.mixture.name}.gguf"
    for line in describe(write_all(path.parent, {path.stem: plan}, parts.files, lambda *_: None, path.suffix)):
        print(line)
    return 0


def vocabulary_of(parts: Parts, arguments: argparse.Namespace) -> Vocabulary:
    """The tokenizer, with as many tokens as the embedding has rows. ModelError if that takes --pad-vocab."""
    from tinyllava.convert.vocabulary import TYPES, fit, read_vocabulary

    kinds = arguments.vocab_type.split(",")
    unknown = [kind for kind in kinds if kind not in TYPES]
    if unknown:
        raise UsageError("--vocab-type", repr(unknown[0]), wanted=", ".join(TYPES))
    vocabulary = read_vocabulary(arguments.vocab_dir or parts.folder, parts.text_config, kinds)
    n_rows = parts.language["token_embd.weight"].shape[0] if "token_embd.weight" in parts.language else 0
    if n_rows > len(vocabulary.tokens) and not arguments.pad_vocab:
        found = f"{len(vocabulary.tokens)} tokens, but the embedding has {n_rows} rows"
        raise ModelError(vocabulary.source, found, hint="--pad-vocab names the others <dummy00001> and so on")
    fit(vocabulary, n_rows)
    return vocabulary
