"""The choice of block formats against llama-quantize's, and the names that people type."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from golden.mixture_models import SKELETONS, Skeleton
from tinyllava.convert.mixture import FALLBACK, MIXTURES, Model, choose_types, is_quantized, mixture
from tinyllava.errors import ModelError, UsageError
from tinyllava.quant.blocks import TYPES

GOLDEN = Path(__file__).parents[2] / "golden" / "quantize-mixtures.json.gz"
CHOICES = json.loads(gzip.decompress(GOLDEN.read_bytes()))  # model -> mixture -> types in the skeleton's order


def choose(skeleton: Skeleton, name: str) -> dict[str, str]:
    tensors = {n: (shape, "F32" if len(shape) == 1 else "F16") for n, shape in skeleton.shapes.items()}
    return choose_types(mixture(name), Model.from_metadata(skeleton.metadata), tensors)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("model", SKELETONS)
def test_types_are_those_of_llama_cpp(model: str, name: str) -> None:
    if name not in CHOICES[model]:
        assert name in ("Q2_K", "IQ4_NL", "IQ4_XS") and SKELETONS[model].metadata["general.architecture"] == "clip"
        pytest.skip("llama.cpp aborts: it asks an image encoder for its number of heads")
    assert list(choose(SKELETONS[model], name).values()) == CHOICES[model][name]


def test_the_order_in_the_file_does_not_matter() -> None:
    """Layers are counted by their numbers: a file may hold layer 10 before layer 2."""
    skeleton = SKELETONS["7b"]
    backwards = skeleton._replace(shapes=dict(reversed(skeleton.shapes.items())))
    assert choose(backwards, "Q4_K_M") == choose(skeleton, "Q4_K_M")


def test_q4_k_m_of_7b_by_hand() -> None:
    """More bits in the first and the last eighth of 32 layers, 0-3 and 28-31, and between in 6, 9, 12, ..."""
    types = choose(SKELETONS["7b"], "Q4_K_M")
    more = [i for i in range(32) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("model", ["clip-large", "clip-odd", "siglip"])
def test_an_image_encoder_keeps_what_its_loaders_want_plain(model: str, name: str) -> None:
    for tensor, kind in choose(SKELETONS[model], name).items():
        if "embd" in tensor or "ln" in tensor or tensor.endswith((".bias", "newline")):
            assert kind == ("F32" if len(SKELETONS[model].shapes[tensor]) == 1 else "F16")
        else:
            assert SKELETONS[model].shapes[tensor][-1] % TYPES[kind].block_size == 0


@pytest.mark.parametrize("typed, found", [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("iq4_xs", "IQ4_XS")])
def test_names_in_any_case_and_short(typed: str, found: str) -> None:
    assert mixture(typed).name == found


@pytest.mark.parametrize(
    "typed, guess", [("Q4_K_X", "Q4_K_S"), ("q4km", "Q4_K_M"), ("fp16", "F16"), ("Q8", "Q8_0"), ("float", "")]
)
def test_an_unknown_name_gets_a_list_and_a_guess(typed: str, guess: str) -> None:
    with pytest.raises(UsageError, match=r"wanted F32, F16, BF16, Q4_0, .*, IQ4_NL, IQ4_XS") as caught:
        mixture(typed)
    assert caught.value.hint == (f"The nearest is {guess}" if guess else "")


def test_fallbacks_have_smaller_blocks() -> None:
    for kind, smaller in FALLBACK.items():
        assert TYPES[kind].block_size == 256 and TYPES[smaller].block_size == 32


@pytest.mark.parametrize(
    "name, shape, changed",
    [
        ("blk.0.attn_q.weight", (8, 8), True),
        ("blk.0.attn_q.weight", (1, 8), False),  # a vector to GGUF, which drops leading 1s
        ("blk.0.attn_q.bias", (8, 8), False),
        ("blk.0.attn_norm.weight", (8, 8), False),
        ("v.patch_embd.weight", (8, 3, 14, 14), False),
        ("v.position_embd.weight", (8, 8), False),
        ("mm.2.weight", (8, 8), True),
    ],
)
def test_which_tensors_are_matrices(name: str, shape: tuple[int, ...], changed: bool) -> None:
    assert is_quantized(name, shape) is changed


@pytest.mark.parametrize("more", [{"llama.expert_count": 8}, {"general.architecture": "falcon"}])
def test_models_with_other_rules_are_refused(more: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"rules of its own.*Use llama-quantize"):
        Model.from_metadata(SKELETONS["7b"].metadata | more)


def test_counts_may_be_given_layer_by_layer() -> None:
    metadata = SKELETONS["mistral"].metadata | {"llama.attention.head_count_kv": [8] * 32}
    assert Model.from_metadata(metadata) == Model("llama", 32, 32, 8)
