"""The options of ``tinyllava run``: llama-llava-cli's (llama.cpp c392e50, common/arg.cpp) and a few more."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllava.commands.parser import Parser, real, whole

DESCRIPTION = """\
Answer a question about a picture. The answer goes to stdout as it is made, all else to stderr.

Without `<image>` in it, -p is a question, and the model's template is put around it; several pictures are
asked about one after another. With `<image>` in it, -p is the whole prompt, for experts; several `<image>`
take the pictures in order. A picture can also stand in -p itself: <img src="data:image/jpeg;base64,...">
"""

# ---- options of llama-llava-cli that mean nothing here, with the number of their values

_NO_VALUE = """--mlock --no-mmap -fa --flash-attn -nkvo --no-kv-offload -dkvc --dump-kv-cache --no-perf
    --check-tensors --log-disable --log-colors --log-prefix --log-timestamps -v --verbose --log-verbose
    --no-warmup --no-context-shift --jinja"""
_ONE_VALUE = """-tb --threads-batch -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Crb
    --cpu-range-batch -Cb --cpu-mask-batch --cpu-strict-batch --prio-batch --poll-batch -ub --ubatch-size
    --keep --numa -sm --split-mode -ts --tensor-split -mg --main-gpu -dev --device -ctk --cache-type-k -ctv
    --cache-type-v -dt --defrag-thold -np --parallel --rpc --log-file -lv --verbosity --log-verbosity"""
IGNORED = {**dict.fromkeys(_NO_VALUE.split(), 0), **dict.fromkeys(_ONE_VALUE.split(), 1)}

# ---- its options that would change the answer, but do not exist here, with what does

_SAMPLERS = """--samplers --sampling-seq --sampler-seq --top-n-sigma --xtc-probability --xtc-threshold
    --dynatemp-range --dynatemp-exp --dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n
    --dry-sequence-breaker --grammar --grammar-file -j --json-schema"""
_DOWNLOADS = "-mu --model-url -hf -hfr --hf-repo -hff --hf-file -hft --hf-token"
_CHANGES = """--lora --lora-scaled --control-vector --control-vector-scaled --control-vector-layer-range
    --override-kv --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx
    --yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast"""
REFUSED = {
    **dict.fromkeys(_SAMPLERS.split(), "one of the samplers that --help lists"),
    **dict.fromkeys(_DOWNLOADS.split(), "a file on this machine, with -m"),
    **dict.fromkeys(_CHANGES.split(), "a model file that is right as it is"),
}


# ---- conversions


def logit_bias(text: str) -> tuple[int, float]:
    """``15043+1`` -> (15043, 1.0); ``15043-inf`` forbids the token."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*([+-])([^+-].*)", text)
    try:
        if match is not None:
            return int(match[1]), float(match[2] + match[3].strip())
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}; wanted TOKEN_ID(+/-)BIAS, such as 15043+1 or 15043-inf")


def gpu_layers(text: str) -> str:
    """llama.cpp takes a number, and lately also words."""
    return text if text in ("all", "auto") else str(whole(text))


# Without the list of backends, whose module imports NumPy; the error for a wrong name has it.
BACKEND_HELP = "what computes: auto (default), the fastest that is here; numpy, the reference; or another by name"

# ---- the options; the last name of each is the one that messages use

_INPUTS: list[tuple[str, dict[str, Any]]] = [
    ("-m --model", {"metavar": "FILE", "type": Path, "help": "language model (GGUF)"}),
    ("-mm --mmproj", {"metavar": "FILE", "type": Path, "help": "image encoder and projector (GGUF)"}),
    ("--image", {"metavar": "FILE", "type": Path, "action": "append", "help": "picture; may be repeated"}),
    ("-p --prompt", {"metavar": "TEXT", "help": "question, or with <image> in it the whole prompt"}),
    ("-f --file", {"metavar": "FILE", "type": Path, "help": "take the prompt from a file"}),
    ("-e --escape", {"action": "store_true", "help": r"read \n, \t, \\ and the like in the prompt as in C"}),
    ("--no-escape", {"action": "store_true", "help": "take the prompt as it is (default)"}),
    ("--chat-template --template", {"metavar": "NAME", "help": "text around the question (default auto)"}),
    ("--verbose-prompt", {"action": "store_true", "help": "show the prompt's tokens"}),
]
_SAMPLING: list[tuple[str, Callable[[str], Any], str]] = [
    ("--temperature --temp", real, "0: always the most probable token (default 0.2)"),
    ("--top-k", whole, "keep the N most probable tokens; 0: all (default 50)"),
    ("--top-p", real, "keep the fewest tokens with this probability together"),
    ("--min-p", real, "keep tokens with this share of the best one's probability"),
    ("--typical-p --typical", real, "keep locally typical tokens with this probability together"),
    ("--mirostat", whole, "1 or 2: aim at a surprise instead of the four above"),
    ("-lr --mirostat-lr", real, "mirostat's learning rate, eta (default 0.1)"),
    ("-ent --mirostat-ent", real, "mirostat's surprise in bits, tau (default 5)"),
    ("--repeat-penalty", real, "divide the logits of tokens seen lately; 1: no"),
    ("--repeat-last-n", whole, "how many tokens back is lately (default 64); -1: all"),
    ("--presence-penalty", real, "take this off the logits of tokens seen lately"),
    ("--frequency-penalty", real, "the same, for each time they were seen"),
    ("-s --seed", whole, "make the same draws again (default -1: any)"),
]
_LIMITS: list[tuple[str, Callable[[str], Any], str]] = [
    ("-n --n-predict --predict", whole, "most tokens in the answer; -1: until it ends (default 512)"),
    ("-c --ctx-size", whole, "most tokens in all; 0: what the model was made for (default)"),
    ("-b --batch-size", whole, "tokens of the prompt processed at once (default 512; 1536 on a GPU)"),
    ("-t --threads", whole, "threads (default: the physical cores)"),
    ("-ngl --n-gpu-layers --gpu-layers", gpu_layers, "layers on the GPU; 99 or all: all (default: what fits)"),
]
_NAMES: list[tuple[str, str, str]] = [
    ("--backend", "auto", BACKEND_HELP),
    ("--dtype", "float32", "float32 (default), or float64 with numpy"),
    ("--compat", "llava", "whose details to follow, where programs differ (default llava)"),
]


def make_parser(command: str, description: str = DESCRIPTION) -> Parser:
    """The parser of ``run`` and of ``demo``. What nobody set is None, False, or a name's default."""
    parser = Parser(command, description, ignored=IGNORED, refused=REFUSED)
    group = parser.add_argument_group("model, pictures, prompt")
    for names, settings in _INPUTS:
        parser.option(group, names, **settings)
    for title, table in (("sampling (another --compat, other defaults)", _SAMPLING), ("size and speed", _LIMITS)):
        group = parser.add_argument_group(title)
        for names, kind, help in table:
            parser.option(group, names, type=kind, metavar="N", help=help)
        if table is _SAMPLING:
            how: dict[str, Any] = {"metavar": "BIAS", "type": logit_bias, "action": "append"}
            what = "ID+1, ID-1, ID-inf: change a token's logit; may be repeated"
            parser.option(group, "-l --logit-bias", help=what, **how)
            parser.option(group, "--ignore-eos", action="store_true", help="never end before -n")
    for name, default, help in _NAMES:
        parser.option(group, name, metavar="NAME", default=default, help=help)
    group = parser.add_argument_group("output")
    parser.option(group, "--json", action="store_true", help="a line of JSON for each answer, at its end")
    parser.option(group, "-q --quiet", action="store_true", help="nothing on stderr but errors")
    parser.add_standard_options(group)
    return parser
