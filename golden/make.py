"""Make golden files: python -m golden.make COMMAND, from the repository's root.

Each command needs its own environment (golden/README.md): some the original LLaVA with an old transformers,
some the current ones. A command overwrites its files in golden/ and their entries in golden/MANIFEST.json.
"""

import argparse
from collections.abc import Callable
from importlib import import_module

# command -> (module in golden.makers, function, its path arguments)
COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "hf-language": ("hf", "make_language", ()),
    "hf-clip": ("hf", "make_clip", ()),
    "llama-cpp-language": ("llama_cpp_logits", "make_language", ()),
    "llama-cpp-quantized": ("llama_cpp_logits", "make_quantized", ()),
    "hf-images": ("hf_llava", "make_images", ()),
    "llama-cpp-images": ("mtmd", "make_images", ()),
    "hf-dump": ("dumps", "make_hf", ()),
    "original-dump": ("dumps", "make_original", ()),
    "llava-cli-dump": ("llava_cli", "make_dump", ("library",)),
    "llama-cpp-dumps": ("dumps", "make_llama_cpp", ("tools",)),
    "llava-cli-images": ("llava_cli", "make_images", ("library",)),
    "original-images": ("original", "make_images", ()),
    "original-answers": ("original", "make_answers", ()),
    "anyres-grid": ("original", "make_grid", ()),
    "prompt-ids": ("prompts", "make_prompts", ("tokenizer_model",)),
    "spm": ("spm", "make_spm", ("tokenizer_model",)),
    "llama-vocabs": ("vocabularies", "make_llama_vocabularies", ("folder",)),
    "hf-convert": ("hf_convert", "make", ()),
    "convert-digests": ("converters", "make_digests", ("llama_cpp",)),
    "convert-projectors": ("converters", "make_projectors", ("llama_cpp",)),
    "smollm2": ("smollm", "make_smollm2", ("gguf",)),
    "pointing": ("pointing", "make_pointing", ()),
    "quantize-mixtures": ("quantize", "make_mixtures", ()),
    "quantize-errors": ("quantize", "make_errors", ()),
    "compat-llava": ("compat_original", "make_compat", ()),
    "compat-hf": ("compat_hf", "make_compat", ()),
    "compat-llava-cli": ("compat_cli", "make_compat", ("library",)),
    "compat-mtmd": ("compat_mtmd", "make_compat", ()),
    "answers-llava-cli": ("compat_answers", "make_cli", ("program",)),
    "answers-mtmd": ("compat_answers", "make_mtmd", ()),
    "answers-llava": ("torch_answers", "make_original", ()),
    "answers-hf": ("torch_answers", "make_hf", ()),
    "demo-llava": ("demo_answers", "make_original", ()),
    "demo-hf": ("demo_answers", "make_hf", ()),
    "hub-prompts": ("torch_answers", "make_hub_ids", ("tokenizer_model",)),
    "roofline-cpu": ("roofline", "make", ()),
    "accuracy": ("accuracy", "make", ("folder",)),
    "smollm-vocab": ("vocabularies", "make_smollm", ("gguf",)),
}


def main() -> None:
    """Parse the command line and run one maker."""
    parser = argparse.ArgumentParser(prog="python -m golden.make", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (_, _, paths) in COMMANDS.items():
        sub = commands.add_parser(command)
        for path in paths:
            sub.add_argument(path)
    arguments = vars(parser.parse_args())
    module, function, paths = COMMANDS[arguments["command"]]
    maker: Callable[..., None] = getattr(import_module(f"golden.makers.{module}"), function)
    maker(*(arguments[path] for path in paths))


if __name__ == "__main__":
    main()
