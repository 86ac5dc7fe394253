"""Runs llama.cpp's samplers for test_sampling.py, in the interpreter that has llama-cpp-python.

stdin: a JSON list of {logits, recent, settings}; stdout: for each, {ids, p} after all stages but the draw.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

from llama_cpp import llama_cpp as L


def samplers(settings: dict[str, Any], recent: list[int], n_vocab: int) -> Any:
    """The chain of llama-llava-cli, but with the min_keep of 1 that "typical" needs to work."""
    get = settings.get
    chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
    biases = get("logit_bias", [])
    array = (L.llama_logit_bias * len(biases))(*[L.llama_logit_bias(t, b) for t, b in biases])
    if get("mirostat"):
        eta, tau = get("mirostat_lr", 0.1), get("mirostat_ent", 5.0)
        if get("mirostat") == 1:
            stages = [L.llama_sampler_init_mirostat(n_vocab, 1, tau, eta, 100)]
        else:
            stages = [L.llama_sampler_init_mirostat_v2(1, tau, eta)]
    else:
        strengths = [get("repeat_penalty", 1.0), get("frequency_penalty", 0.0), get("presence_penalty", 0.0)]
        window = get("repeat_last_n", 64)
        try:
            penalties = L.llama_sampler_init_penalties(n_vocab, window, *strengths)
        except TypeError:  # before 2026 it did not ask for the size of the vocabulary
            penalties = L.llama_sampler_init_penalties(window, *strengths)
        for token in recent:
            L.llama_sampler_accept(penalties, token)
        stages = [L.llama_sampler_init_logit_bias(n_vocab, len(biases), array), penalties]
        if get("top_k"):
            stages.append(L.llama_sampler_init_top_k(get("top_k")))
        stages += [
            L.llama_sampler_init_typical(get("typical_p", 1.0), 1),
            L.llama_sampler_init_top_p(get("top_p", 1.0), 1),
            L.llama_sampler_init_min_p(get("min_p", 0.0), 1),
            L.llama_sampler_init_temp(get("temperature", 1.0)),
            L.llama_sampler_init_dist(1),  # fills in the probabilities
        ]
    for stage in stages:
        L.llama_sampler_chain_add(chain, stage)
    return chain


def run(job: dict[str, Any]) -> dict[str, list[float]]:
    logits = job["logits"]
    data = (L.llama_token_data * len(logits))(*[L.llama_token_data(i, x, 0.0) for i, x in enumerate(logits)])
    array = L.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    chain = samplers(job["settings"], job["recent"], len(logits))
    L.llama_sampler_apply(chain, ctypes.byref(array))
    left = [array.data[i] for i in range(array.size)]
    return {"ids": [x.id for x in left], "p": [x.p for x in left]}


json.dump([run(job) for job in json.load(sys.stdin)], sys.stdout)
