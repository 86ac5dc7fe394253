"""Small LLaVA checkpoints in every layout in which the large ones are published, rebuilt from seeds.

    from golden.checkpoints import CHECKPOINTS, write_checkpoint

    write_checkpoint("folder", CHECKPOINTS["llava15-bin"])  # and folder/clip, where the tower lies apart

Needs NumPy only: the two file formats are written by hand here, and the maker of convert-digests.json.gz loads
the same files with torch and safetensors. Weights are those of golden/models.py, in the checkpoint's precision.
"""

import json
import struct
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from golden.clip_models import ClipSpec, hf_clip_config, original_clip
from golden.draw import uniform
from golden.models import LlamaSpec, hf_config, hf_state_dict
from golden.tokenizer_files import llama3_files, qwen2_files, spm_files, spm_json_files, to_bytes

Array = np.ndarray[Any, Any]
TOWER = "model.vision_tower.vision_tower.vision_model."
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))  # (width, height) px, LLaVA-1.6's in tiles of 28

# Heads of 64 features as in CLIP, so that the number of heads can be told from the width.
CLIP = ClipSpec("small-clip", 301, image_size=28, n_embd=128, n_head=2, n_ff=160, n_block=2, n_llm=64)
CLIP_16 = ClipSpec(
    "small-clip", 302, image_size=28, n_embd=128, n_head=2, n_ff=160, n_block=2, n_llm=64, pinpoints=PINPOINTS,
    merge_type="spatial_unpad",
)  # fmt: skip
VICUNA = LlamaSpec("small-vicuna", 311, n_embd=64, n_head=4, n_head_kv=4, head_dim=16, n_ff=96, n_layer=2)
MISTRAL = LlamaSpec(
    "small-mistral", 312, n_embd=64, n_head=4, n_head_kv=2, head_dim=16, n_ff=96, n_layer=2, rope_base=1e6
)
LLAMA3 = LlamaSpec(
    "small-llama3", 313, vocabulary="bpe", n_embd=64, n_head=4, n_head_kv=2, head_dim=16, n_ff=96, n_layer=2,
    rope_base=500000.0,
)  # fmt: skip
QWEN2 = LlamaSpec(
    "small-qwen2", 314, "qwen2", "bpe", n_embd=64, n_head=4, n_head_kv=2, head_dim=16, n_ff=96, n_layer=2,
    rope_base=1e6, norm_eps=1e-6, qkv_bias=True, tied=True,
)  # fmt: skip
TIED = LlamaSpec("small-tied", 315, n_embd=64, n_head=4, n_head_kv=4, head_dim=16, n_ff=96, n_layer=2, tied=True)


@dataclass(frozen=True)
class CheckpointSpec:
    """One checkpoint: its models, and how its folder is laid out."""

    name: str
    language: LlamaSpec
    vision: ClipSpec
    dtype: str  # F32, F16 or BF16
    layout: str = "original"  # names: "original", or transformers' "hf-old" and "hf-new" (prefix "model.")
    format: str = "safetensors"  # or "bin"
    n_shards: int = 2
    index: bool = True
    tower: str = "inside"  # or "clip" (a CLIPModel in its own folder), "vision" (the vision part alone)
    tokenizer: str = "spm"  # a key of TOKENIZERS
    n_rows: int = 0  # rows of the embeddings; 0: as many as the language model has
    inv_freq: bool = False  # rotary_emb.inv_freq in every layer, as files of 2023 have


TOKENIZERS = {
    "spm": spm_files,
    "spm-image": lambda: spm_files({"<image>": 512, "<pad>": 513}),
    "spm-json": lambda: spm_json_files({"<image>": 512, "<pad>": 513}),
    "llama3": llama3_files,
    "qwen2": qwen2_files,
}
CHECKPOINTS = {
    spec.name: spec
    for spec in (
        CheckpointSpec("llava15-bin", VICUNA, CLIP, "F16", format="bin", tower="clip", inv_freq=True),
        CheckpointSpec("llava15-one", VICUNA, CLIP, "F16", format="bin", n_shards=1, index=False, tower="vision"),
        CheckpointSpec("llava15-f32", VICUNA, CLIP, "F32", n_shards=3, index=False, tower="vision"),
        CheckpointSpec("llava16", VICUNA, CLIP_16, "BF16"),
        CheckpointSpec("llava16-mistral", MISTRAL, CLIP_16, "BF16", format="bin"),
        CheckpointSpec("llava16-llama3", LLAMA3, CLIP_16, "F16", tokenizer="llama3"),
        CheckpointSpec("llava16-qwen2", QWEN2, CLIP_16, "BF16", n_shards=1, index=False, tokenizer="qwen2"),
        CheckpointSpec("llava15-tied", TIED, CLIP, "F16", n_shards=1, index=False),
        CheckpointSpec("hf-llava", VICUNA, CLIP, "F16", "hf-old", tokenizer="spm-image", n_rows=576),
        CheckpointSpec("hf-llava-new", VICUNA, CLIP, "F16", "hf-new", tokenizer="spm-image", n_rows=576),
        CheckpointSpec("hf-next", MISTRAL, CLIP_16, "BF16", "hf-old", tokenizer="spm-json", n_rows=576),
        CheckpointSpec("hf-next-new", MISTRAL, CLIP_16, "BF16", "hf-new", tokenizer="spm-json", n_rows=576),
    )
}


# ---- weights by name


def split_state(spec: CheckpointSpec) -> tuple[dict[str, Array], dict[str, Array]]:
    """float32 arrays by name: the checkpoint's own, and the vision tower's if it lies apart."""
    state = hf_state_dict(spec.language)
    if spec.inv_freq:
        head_dim = spec.language.head_dim
        inv_freq = (spec.language.rope_base ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
        for i in range(spec.language.n_layer):
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = inv_freq
    if spec.n_rows:
        state = {name: padded(name, values, spec) for name, values in state.items()}
    vision = original_clip(spec.vision)
    tower = {name.removeprefix(TOWER): values for name, values in vision.items() if name.startswith(TOWER)}
    rest = {name: values for name, values in vision.items() if not name.startswith(TOWER)}
    if spec.tower != "inside":
        return state | rest, tower_apart(spec, tower)
    state |= rest | {TOWER + name: values for name, values in tower.items()}
    return (state if spec.layout == "original" else {hf_name(k, spec.layout): v for k, v in state.items()}), {}


def padded(name: str, values: Array, spec: CheckpointSpec) -> Array:
    """Embeddings with more rows, as resize_token_embeddings leaves them."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return values
    n_new = spec.n_rows - spec.language.n_vocab
    new = uniform(spec.language.seed, name + " padding", (n_new, spec.language.n_embd), std=0.5)
    return np.concatenate([values, new])


def tower_apart(spec: CheckpointSpec, tower: dict[str, Array]) -> dict[str, Array]:
    """A CLIPVisionModel's arrays, or a CLIPModel's with a text part of one layer."""
    n, positions = spec.vision.n_embd, np.arange(spec.vision.n_position, dtype=np.int64)[None]
    state = {"vision_model." + name: values for name, values in tower.items()}
    if spec.tower == "vision":
        return state
    text = {
        "logit_scale": (),
        "visual_projection.weight": (32, n),
        "text_projection.weight": (32, 32),
        "text_model.embeddings.token_embedding.weight": (40, 32),
        "text_model.embeddings.position_embedding.weight": (16, 32),
        "text_model.final_layer_norm.weight": (32,),
        "text_model.final_layer_norm.bias": (32,),
    }
    layer = "text_model.encoder.layers.0."
    for word in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"):
        text |= {f"{layer}{word}.weight": (32, 32), f"{layer}{word}.bias": (32,)}
    mlp = {"layer_norm1": (32,), "layer_norm2": (32,), "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}
    for word, shape in mlp.items():
        text |= {f"{layer}{word}.weight": shape, f"{layer}{word}.bias": shape[:1]}
    drawn = {name: uniform(9, name, shape, std=0.1) for name, shape in text.items()}
    return {**drawn, "vision_model.embeddings.position_ids": positions, **state}


def hf_name(name: str, layout: str) -> str:
    """An original LLaVA's name as transformers has it: its converter's rule, and "model." in front since 4.52."""
    projector = {"model.mm_projector.0.": "linear_1.", "model.mm_projector.2.": "linear_2."}
    for old, new in projector.items():
        if name.startswith(old):
            name = "multi_modal_projector." + new + name.removeprefix(old)
            return name if layout == "hf-old" else "model." + name
    if name.startswith(TOWER):
        name = "vision_tower.vision_model." + name.removeprefix(TOWER)
        return name if layout == "hf-old" else "model." + name
    if name == "model.image_newline":
        return "image_newline" if layout == "hf-old" else name
    if layout == "hf-old":
        return "language_model." + name
    return name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)


def other_projector(kind: str, n: int = CLIP.n_embd, n_llm: int = CLIP.n_llm) -> dict[str, Array]:
    """llava.projector of other kinds than mlp: LLaVA v1's "linear", MobileVLM's "ldp" and "ldpv2"."""
    matrix, vector, kernel = (n_llm, n_llm), (n_llm,), (n_llm, 1, 3, 3)
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "linear":
        shapes = {"weight": (n_llm, n), "bias": vector}
    elif kind == "ldpv2":
        shapes = {"mlp.mlp.0.weight": (n_llm, n), "mlp.mlp.0.bias": vector, "mlp.mlp.2.weight": matrix}
        shapes |= {"mlp.mlp.2.bias": vector, "peg.peg.0.weight": kernel, "peg.peg.0.bias": vector}
    else:
        shapes = {"model.mlp.1.weight": (n_llm, n), "model.mlp.1.bias": vector, "model.mlp.3.weight": matrix}
        narrow, wide = (n_llm // 4, n_llm, 1, 1), (n_llm, n_llm // 4, 1, 1)
        for block in ("model.mb_block.1.block.", "model.mb_block.2.block."):
            shapes |= {f"{block}0.0.weight": kernel, f"{block}0.1.weight": vector, f"{block}0.1.bias": vector}
            shapes |= {f"{block}1.fc1.weight": narrow, f"{block}1.fc1.bias": narrow[:1]}
            shapes |= {f"{block}1.fc2.weight": wide, f"{block}1.fc2.bias": vector}
            shapes |= {f"{block}2.0.weight": (*matrix, 1, 1)}
            shapes |= {f"{block}2.1.weight": vector, f"{block}2.1.bias": vector}
    return {f"model.mm_projector.{name}": uniform(7, name, shape, std=0.2) for name, shape in shapes.items()}


# ---- config.json


def config_of(spec: CheckpointSpec) -> dict[str, Any]:
    """The checkpoint's config.json."""
    language = hf_config(spec.language) | {"vocab_size": spec.n_rows or spec.language.n_vocab}
    language["torch_dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[spec.dtype]
    if spec.tokenizer in ("llama3", "qwen2"):
        language |= {"bos_token_id": 354, "eos_token_id": 356}
    if spec.layout != "original":
        return hf_llava_config(spec, language)
    anyres = bool(spec.vision.pinpoints)
    family = "Qwen2" if spec.language.arch == "qwen2" else "Mistral" if spec.language is MISTRAL else "Llama"
    del language["head_dim"]  # 2023's config.json had none
    return language | {
        "architectures": [f"Llava{family}ForCausalLM"],
        "model_type": {"Llama": "llava_llama", "Mistral": "llava_mistral", "Qwen2": "llava_qwen"}[family],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": spec.vision.n_embd,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "image_grid_pinpoints": [list(p) for p in spec.vision.pinpoints] if anyres else None,
        **({"mm_patch_merge_type": spec.vision.merge_type} if anyres else {}),
        **({"image_crop_resolution": 224, "image_split_resolution": 224} if anyres else {}),
        "use_mm_proj": True,
    }


def hf_llava_config(spec: CheckpointSpec, language: dict[str, Any]) -> dict[str, Any]:
    """transformers' nested config. It reads pinpoints as (height, width); published ones are the original's."""
    anyres = bool(spec.vision.pinpoints)
    language["model_type"] = "mistral" if spec.language is MISTRAL else "llama"
    return {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "image_token_index": 512,
        "pad_token_id": 513,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": language,
        "vision_config": clip_config(spec.vision) | {"model_type": "clip_vision_model"},
        "torch_dtype": language["torch_dtype"],
        "tie_word_embeddings": False,
        **({"image_grid_pinpoints": [list(p) for p in spec.vision.pinpoints]} if anyres else {}),
    }


VISION_MODEL = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}


def clip_config(vision: ClipSpec) -> dict[str, Any]:
    """A CLIPVisionConfig."""
    return hf_clip_config(vision) | {"projection_dim": 32}


def tower_config(spec: CheckpointSpec) -> dict[str, Any]:
    """config.json of a tower in its own folder: a CLIPModel's, or a CLIPVisionModel's."""
    vision = clip_config(spec.vision)
    if spec.tower == "vision":
        return vision | VISION_MODEL
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 16, "vocab_size": 40, "projection_dim": 32, "bos_token_id": 0}
    parts = {"vision_config": vision, "text_config": text | {"eos_token_id": 39, "pad_token_id": 39}}
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 32, **parts}


def guide_config(spec: CheckpointSpec) -> dict[str, Any]:
    """The vision config.json that the guide of LLaVA-1.6 in llama.cpp tells people to fetch."""
    keys = ("image_aspect_ratio", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution")
    model = config_of(spec)
    extra = {key: model[key] for key in (*keys, "mm_patch_merge_type", "mm_projector_type") if model.get(key)}
    return clip_config(spec.vision) | extra | VISION_MODEL


# ---- files


def write_checkpoint(folder: str | Path, spec: CheckpointSpec) -> Path:
    """Write the whole folder, and folder/clip if the tower lies apart. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    state, tower = split_state(spec)
    write_shards(folder, spec, state)
    (folder / "config.json").write_bytes(to_bytes(config_of(spec)))
    for name, data in TOKENIZERS[spec.tokenizer]().items():
        (folder / name).write_bytes(data)
    if tower:
        (folder / "clip").mkdir()
        suffix = "pytorch_model.bin" if spec.format == "bin" else "model.safetensors"
        arrays = {name: cast(values, "F32") for name, values in tower.items()}
        WRITERS[spec.format](folder / "clip" / suffix, arrays)
        (folder / "clip" / "config.json").write_bytes(to_bytes(tower_config(spec)))
        (folder / "clip" / "preprocessor_config.json").write_bytes(to_bytes(PREPROCESSOR | {"size": 28}))
    return folder


PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}


def write_shards(folder: Path, spec: CheckpointSpec, state: dict[str, Array]) -> None:
    """Arrays in their order, evenly over n_shards files, the projector among the last ones."""
    stem, ending = ("pytorch_model", "bin") if spec.format == "bin" else ("model", "safetensors")
    names = list(state)
    ends = [i * len(names) // spec.n_shards for i in range(spec.n_shards + 1)]
    parts = [names[start:end] for start, end in pairwise(ends)]
    weight_map = {}
    for i, part in enumerate(parts):
        number = f"-{i + 1:05}-of-{spec.n_shards:05}" if spec.n_shards > 1 else ""
        file = f"{stem}{number}.{ending}"
        WRITERS[spec.format](folder / file, {name: cast(state[name], spec.dtype) for name in part})
        weight_map |= dict.fromkeys(part, file)
    if spec.index:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_bytes(to_bytes(index))


Stored = tuple[str, Array]  # type, array; BF16 as uint16 bits


def cast(values: Array, dtype: str) -> Stored:
    """An array in the precision of a checkpoint; integers stay."""
    if values.dtype.kind == "i":
        return "I64", values
    if dtype == "BF16":  # to nearest, ties to even; no value here is near overflow
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return dtype, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return dtype, values.astype({"F32": np.float32, "F16": np.float16}[dtype])


def write_safetensors(path: Path, arrays: dict[str, Stored]) -> None:
    """u64 length, JSON header, data."""
    header, offset = {}, 0
    for name, (dtype, values) in arrays.items():
        end = offset + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(values).tobytes() for _, values in arrays.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "I64": "LongStorage"}


def write_torch_zip(path: Path, arrays: dict[str, Stored]) -> None:
    """A file as torch.save writes a state dict: a zip archive of a pickle and the arrays' bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)

        put("data.pkl", pickled(arrays))
        put("version", b"3\n")
        for i, (_, values) in enumerate(arrays.values()):
            put(f"data/{i}", np.ascontiguousarray(values).tobytes())


def pickled(arrays: dict[str, Stored]) -> bytes:
    """{name: torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}, protocol 2."""
    out = [b"\x80\x02}("]
    for i, (name, (dtype, values)) in enumerate(arrays.items()):
        strides = [int(np.prod(values.shape[axis + 1 :])) for axis in range(values.ndim)]
        storage = [text("storage"), b"ctorch\n%s\n" % STORAGES[dtype].encode(), text(str(i)), text("cpu")]
        storage.append(integer(values.size))
        out += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n("]
        out += [b"(", *storage, b"tQ", integer(0)]  # a persistent id
        out += [b"(", *map(integer, values.shape), b"t(", *map(integer, strides), b"t"]
        out += [b"\x89ccollections\nOrderedDict\n)R", b"tR"]
    return b"".join([*out, b"u."])


def text(value: str) -> bytes:
    """BINUNICODE"""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    """BININT"""
    return b"J" + struct.pack("<i", value)


WRITERS = {"safetensors": write_safetensors, "bin": write_torch_zip}
