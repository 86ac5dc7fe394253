"""What transformers computes, in float32 with its plainest attention."""

from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from golden.clip_models import VISION, ClipSpec, hf_clip_config
from golden.manifest import record, save_arrays, versions
from golden.models import LANGUAGE, LlamaSpec, hf_config, hf_state_dict
from golden.pictures import picture

N_IDS = 40  # tokens in a prompt
STORED_POSITIONS = [0, 1, 2, 7, 19, 38, 39]
TAP_PICTURE = (100, 60)  # width, height


def prompt_ids(spec: LlamaSpec) -> np.ndarray[Any, Any]:
    """Random ids, the same in every maker; some of them twice."""
    ids = np.random.RandomState(spec.seed).randint(0, spec.n_vocab, N_IDS)  # frozen by NEP 19
    ids[20:24] = ids[2:6]
    return ids.astype(np.int32)


def load(model: nn.Module, state: dict[str, Any], may_lack: tuple[str, ...] = ()) -> nn.Module:
    """Fill `model` with our weights; a name that does not fit is an error."""
    result = model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    missing = set(result.missing_keys) - set(may_lack)
    if missing or result.unexpected_keys:
        raise SystemExit(f"missing {sorted(missing)}, unexpected {result.unexpected_keys}")
    return model.eval().float()


def language_model(spec: LlamaSpec) -> nn.Module:
    """The transformers model of a spec."""
    config = hf_config(spec)
    kind = config.pop("architectures")[0].removesuffix("ForCausalLM")
    del config["model_type"]
    if kind == "Qwen2":  # has its biases by definition, and no keys for them
        del config["attention_bias"], config["mlp_bias"]
    hf = getattr(transformers, kind + "Config")(**config, attn_implementation="eager")
    model = load(getattr(transformers, kind + "ForCausalLM")(hf), hf_state_dict(spec), ("lm_head.weight",))
    model.tie_weights()
    return model


def make_language() -> None:
    """hf-language.npz: <spec>.ids, .positions, .hidden (embeddings and each block's output), .logits"""
    arrays = {}
    for spec in LANGUAGE.values():
        ids = prompt_ids(spec)
        with torch.no_grad():
            out = language_model(spec)(torch.from_numpy(ids)[None].long(), output_hidden_states=True)
        arrays[f"{spec.name}.ids"] = ids
        arrays[f"{spec.name}.positions"] = np.array(STORED_POSITIONS, np.int32)
        # transformers' last hidden state has been through output_norm already
        hidden = torch.cat(out.hidden_states)[:, STORED_POSITIONS]
        arrays[f"{spec.name}.hidden"] = hidden.numpy()  # (n_layer + 1, n_stored, n_embd)
        arrays[f"{spec.name}.logits"] = out.logits[0, STORED_POSITIONS].numpy()  # (n_stored, n_vocab)
    path = save_arrays("hf-language.npz", arrays)
    tolerance = "2e-4 absolute: float32 sums in another order; logits lie within 14, llama.cpp is 6e-5 away"
    record(path, "hf-language", versions("torch", "transformers", "numpy"), tolerance)


def tap_picture(spec: ClipSpec) -> np.ndarray[Any, Any]:
    """Normalised pixels, (1, 3, size, size): the top left square of a picture, without any resizing."""
    rgb = picture(*TAP_PICTURE)[: spec.image_size, : spec.image_size].astype(np.float32) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    return np.ascontiguousarray(((rgb - mean) / std).transpose(2, 0, 1)[None])


def make_clip() -> None:
    """hf-clip.npz: <spec>.hidden, the input of block 0 and the output of each stored block, CLS first."""
    arrays = {}
    for spec in (VISION[name] for name in ("clip_15", "clip_gelu", "clip_silu")):
        config = transformers.CLIPVisionConfig(**hf_clip_config(spec), attn_implementation="eager")
        state = {k.removeprefix("vision_model."): v for k, v in hf_state_dict(spec).items()}
        model = load(transformers.CLIPVisionModel(config), state)
        with torch.no_grad():
            out = model(torch.from_numpy(tap_picture(spec)), output_hidden_states=True)
        arrays[f"{spec.name}.hidden"] = torch.cat(out.hidden_states[:-1]).numpy()  # (n_block + 1, 17, n_embd)
    arrays["pixels"] = tap_picture(VISION["clip_15"])
    path = save_arrays("hf-clip.npz", arrays)
    tolerance = "1e-4 absolute: float32 sums in another order; values lie within 20"
    record(path, "hf-clip", versions("torch", "transformers", "numpy"), tolerance)
