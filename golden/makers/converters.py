"""What llama.cpp's own conversion scripts make of the small checkpoints: every tensor's digest, all metadata.

The scripts of February 2025 (llama_cpp_python 0.3.7's source distribution, vendor/llama.cpp) run unchanged, each
in its own process, as the guides for LLaVA-1.5 and 1.6 tell people to run them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from golden.checkpoints import (
    CHECKPOINTS,
    CheckpointSpec,
    guide_config,
    other_projector,
    split_state,
    write_checkpoint,
    write_shards,
    write_torch_zip,
)
from golden.manifest import record, save_json, versions
from golden.models import hf_config
from golden.tokenizer_files import to_bytes

# convert_hf_to_gguf knows tokenizers by what they make of a text; ours is none that it knows.
HF_SCRIPT = "import sys; sys.argv[0] = {path!r}; sys.path.insert(0, {folder!r}); import convert_hf_to_gguf as c\n"
HF_SCRIPT += "c.Model.get_vocab_base_pre = lambda self, tokenizer: {pre!r}; c.main()"
LONG = 16  # arrays of more elements are stored as their length and checksum


def run(llama_cpp: Path, *words: str | Path) -> None:
    """Run a script with the gguf package that lies beside it. SystemExit with its output if it fails."""
    environment = os.environ | {"PYTHONPATH": str(llama_cpp / "gguf-py"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def digest(path: Path) -> dict[str, Any]:
    """{"tensors": [[name, type, shape in NumPy's order, crc32 of its bytes], ...], "metadata": {key: value}}"""
    reader = gguf.GGUFReader(path)
    tensors = [
        [t.name, t.tensor_type.name, [int(n) for n in t.shape[::-1]], zlib.crc32(np.ascontiguousarray(t.data))]
        for t in reader.tensors
    ]
    fields = [field for field in reader.fields.values() if not field.name.startswith("GGUF.")]
    metadata = {field.name: value_of(field) for field in fields}
    return {"tensors": tensors, "metadata": metadata}


def value_of(field: Any) -> Any:
    """[GGUF type, value]; of a long array [type, length, crc32 of its JSON]."""
    value, kind = field.contents(), "/".join(t.name for t in field.types)
    if isinstance(value, list) and len(value) > LONG:
        return [kind, len(value), zlib.crc32(json.dumps(value).encode())]
    return [kind, value]


def image_encoder(llama_cpp: Path, folder: Path, spec: CheckpointSpec) -> dict[str, Any]:
    """Surgery and the image encoder's conversion, in f16 and f32."""
    scripts = llama_cpp / "examples" / "llava"
    if spec.tower == "inside":
        run(llama_cpp, scripts / "llava_surgery_v2.py", "-C", "-m", folder)
        tower = folder / "vit"
        tower.mkdir()
        shutil.copy(folder / "llava.clip", tower / "pytorch_model.bin")
        (tower / "config.json").write_bytes(to_bytes(guide_config(spec)))
    else:
        surgery = "llava_surgery.py" if spec.format == "bin" else "llava_surgery_v2.py"
        run(llama_cpp, scripts / surgery, "-m", folder)
        tower = folder / "clip"
        add_text_tokenizer(tower)
    flags = [] if spec.tower == "clip" else ["--clip-model-is-vision"]
    made = {}
    for name, more in {"mmproj-f16": [], "mmproj-f32": ["--use-f32"]}.items():
        out = folder / name
        words = ["-m", tower, "--llava-projector", folder / "llava.projector", "--output-dir", out, *flags, *more]
        run(llama_cpp, scripts / "convert_image_encoder_to_gguf.py", *words)
        made[name] = digest(next(out.glob("*.gguf")))
    return made


def add_text_tokenizer(tower: Path) -> None:
    """A tokenizer for CLIP's text tower: the script loads it, and then does not use it."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    (tower / "vocab.json").write_bytes(to_bytes({token: i for i, token in enumerate(["a", "a</w>", *ends])}))
    (tower / "merges.txt").write_text("#version: 0.2\n")


def language_model(llama_cpp: Path, folder: Path, spec: CheckpointSpec) -> dict[str, Any]:
    """The language model in each type: by convert_legacy_llama, and in bf16 by convert_hf_to_gguf."""
    legacy = spec.language.arch == "llama"
    bpe = ["--vocab-type", "bpe"] if spec.language.vocabulary == "bpe" else []
    made = {}
    for kind in ("f32", "f16", "q8_0") if legacy else ():
        out = folder / f"language-{kind}.gguf"
        words = [folder, "--skip-unknown", "--pad-vocab", "--outtype", kind, "--outfile", out, *bpe]
        run(llama_cpp, llama_cpp / "examples" / "convert_legacy_llama.py", *words)
        made[kind] = digest(out)
    text_only(folder / "text", spec, folder)
    for kind in ("bf16",) if legacy else ("f32", "f16", "bf16", "q8_0"):
        out, path = folder / f"hf-{kind}.gguf", llama_cpp / "convert_hf_to_gguf.py"
        pre = "llama-bpe" if legacy else "qwen2"
        script = HF_SCRIPT.format(path=str(path), folder=str(llama_cpp), pre=pre)
        run(llama_cpp, "-c", script, folder / "text", "--outtype", kind, "--outfile", out)
        made[kind] = digest(out)
    return made


def text_only(folder: Path, spec: CheckpointSpec, source: Path) -> None:
    """The language model alone, as its own publisher would lay it out."""
    folder.mkdir()
    state, _ = split_state(spec)
    kept = {k: v for k, v in state.items() if not k.startswith(("model.mm_", "model.vision_", "model.image_"))}
    write_shards(folder, spec, kept)
    config = hf_config(spec.language)
    if spec.language.vocabulary == "bpe":
        config |= {"bos_token_id": 354, "eos_token_id": 356}
    (folder / "config.json").write_bytes(to_bytes(config))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    if (path := folder / "tokenizer.json").exists():  # this transformers cannot read merges that are pairs
        content = json.loads(path.read_text())
        merges = content["model"]["merges"]
        content["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in merges]
        path.write_bytes(to_bytes(content))


def make_digests(llama_cpp: str) -> None:
    """convert-digests.json.gz: checkpoint -> "mmproj-f16", "mmproj-f32", "f32", "f16", "bf16", "q8_0" -> digest"""
    tree = Path(llama_cpp).resolve()
    made: dict[str, Any] = {}
    for spec in CHECKPOINTS.values():
        if spec.layout == "hf-new":
            continue  # the same weights as "hf-old"
        if spec.layout == "hf-old":  # no script takes this; they get the same weights by the original's names
            spec = replace(spec, layout="original", tokenizer="spm-image")
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_checkpoint(Path(temporary) / spec.name, spec)
            made[spec.name] = language_model(tree, folder, spec) | image_encoder(tree, folder, spec)
        print(spec.name, {kind: len(value["tensors"]) for kind, value in made[spec.name].items()})
    path = save_json("convert-digests.json.gz", made)
    packages = versions("torch", "transformers", "safetensors", "numpy", "sentencepiece")
    record(path, "convert-digests LLAMA_CPP", packages, "exact: names, types, shapes, bytes", llama_cpp="c392e50")


def make_projectors(llama_cpp: str) -> None:
    """convert-projectors.json.gz: kind of projector -> the digest of its mmproj file; tower of llava15-one"""
    tree = Path(llama_cpp).resolve()
    made = {}
    for kind, type_name in {"linear": "mlp", "ldp": "ldp", "ldpv2": "ldpv2"}.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_checkpoint(Path(temporary) / "in", CHECKPOINTS["llava15-one"])
            projector = {name: ("F32", values) for name, values in other_projector(kind).items()}
            write_torch_zip(folder / "llava.projector", projector)
            words = ["-m", folder / "clip", "--clip-model-is-vision", "--llava-projector"]
            words += [folder / "llava.projector", "--projector-type", type_name, "--output-dir", folder / "out"]
            run(tree, tree / "examples" / "llava" / "convert_image_encoder_to_gguf.py", *words)
            made[kind] = digest(next((folder / "out").glob("*.gguf")))
    path = save_json("convert-projectors.json.gz", made)
    packages = versions("torch", "transformers", "safetensors", "numpy")
    tolerance = "exact: names, types, shapes, bytes"
    record(path, "convert-projectors LLAMA_CPP", packages, tolerance, llama_cpp="c392e50")
