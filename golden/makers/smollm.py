"""A real small model, SmolLM2-135M-Instruct (Q4_1), as llama.cpp runs it."""

from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from golden.makers.hf import load
from golden.makers.llama_cpp_logits import Model
from golden.makers.vocabularies import Tokenizer
from golden.manifest import record, save_arrays, sha256, versions
from golden.models import halves_from_pairs, hf_name

TEXT = """\
The lighthouse keeper had two jobs: to keep the lamp burning, and to write down everything that he
saw. On most nights nothing happened, and the second job was done in a line. Wind from the west, sea
calm, two fishing boats at dusk, both home before ten. He wrote it slowly, in a round hand that he
had learned at school, and then he put the pen back into its jar and climbed the stairs again.

In the winter of his ninth year on the rock, a ship came past that did not answer his signals. It
was painted grey and carried no flag. He counted four masts, which was unusual, and seven windows
with light in them, which was stranger still, because a ship of that size should have shown twenty
or more. He wrote all of this into the book. When he read the page again in the morning, he saw that
he had forgotten the most important thing: the direction in which it went.

A machine that describes a picture has the same two jobs. First it must look, and it must look
everywhere, because it cannot know in advance which part of the picture somebody will ask about.
Then it must choose, since nobody wants to read a list of ten thousand dots. What is large? What is
moving? What would a person miss if it were not there? The answer is short, but the way to it is
long: numbers are multiplied, added, compared and thrown away, layer after layer, until a few words
are left. If one step is done in the wrong order, the words are still words, and often they are good
words. They are only about some other picture.
"""

PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, there was a little",
)
# transformers' config key -> GGUF key
CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
N_ANSWER = 24  # tokens
N_BEST = 5


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Natural logarithms of the probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def llama_cpp(path: str, ids: list[int], exact: bool) -> np.ndarray[Any, Any]:
    """llama.cpp's logits at every position."""
    model = Model(path, exact=exact)
    logits = model.logits(ids)
    model.close()
    return logits


def truth(path: str, ids: list[int]) -> np.ndarray[Any, Any]:
    """transformers' logits at every position, float32, with the weights dequantized."""
    reader = gguf.GGUFReader(path)
    number = {key: reader.fields[f"llama.{key}"].contents() for key in CONFIG.values()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    heads = {"attn_q": number["attention.head_count"], "attn_k": number["attention.head_count_kv"]}
    state = {}
    for name, values in tensors.items():
        n_head = heads.get(name.split(".")[-2])
        state[hf_name(name)] = halves_from_pairs(values, n_head) if n_head else values
    config = {hf_key: number[key] for hf_key, key in CONFIG.items()}
    tied = "output.weight" not in tensors
    n_vocab = tensors["token_embd.weight"].shape[0]
    hf = LlamaConfig(**config, vocab_size=n_vocab, tie_word_embeddings=tied, attn_implementation="eager")
    model = load(LlamaForCausalLM(hf), state, ("lm_head.weight",))
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def greedy(path: str, ids: list[int]) -> list[int]:
    """The N_ANSWER most likely tokens after `ids`, one by one."""
    model = Model(path, exact=False)
    answer, fed = [], ids
    for _ in range(N_ANSWER):
        answer.append(int(model.logits(fed)[-1].argmax()))
        fed = answer[-1:]
    model.close()
    return answer


def make_smollm2(path: str) -> None:
    """smollm2.npz: ids of TEXT; per position the five best tokens and log-probabilities, of the next one too

    "truth" is transformers in float32 on the dequantized weights, "default" llama.cpp as it comes, "exact"
    llama.cpp with float32 keys and values and without flash attention.
    """
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(TEXT, True, False)
    arrays: dict[str, Any] = {"ids": np.array(ids, np.int32)}
    for kind in ("truth", "default", "exact"):
        log_p = log_softmax(truth(path, ids) if kind == "truth" else llama_cpp(path, ids, kind == "exact"))
        best = np.argsort(-log_p, axis=-1)[:, :N_BEST]
        arrays[f"{kind}.best"] = best.astype(np.int32)  # (n_ids, 5)
        arrays[f"{kind}.best_log_p"] = np.take_along_axis(log_p, best, axis=-1)
        arrays[f"{kind}.next_log_p"] = log_p[np.arange(len(ids) - 1), ids[1:]]  # (n_ids - 1,)
        print(kind, len(ids), "tokens, perplexity", np.exp(-arrays[f"{kind}.next_log_p"].mean()))
    for i, prompt in enumerate(PROMPTS):
        prompt_ids = tokenizer.encode(prompt, True, True)
        arrays[f"prompt{i}.ids"] = np.array(prompt_ids, np.int32)
        arrays[f"prompt{i}.greedy"] = np.array(greedy(path, prompt_ids), np.int32)
    tokenizer.close()
    out = save_arrays("smollm2.npz", arrays)
    tolerance = (
        "truth: 5e-3 on log-probabilities, for float32 in another order. llama.cpp rounds activations to 8 "
        "bits: it is 0.08 (rms) and 0.35 (most) away from truth, and top-1 agrees at 95% of the positions"
    )
    source = {"sha256": sha256(path)}
    packages = versions("llama-cpp-python", "transformers", "torch", "numpy")
    record(out, "smollm2 SMOLLM2_GGUF", packages, tolerance, model=source)
