"""One checkout at work, in a process of its own: reads a request a line as JSON, and answers a line.

two_checkouts.py starts it with the checkout as its working directory, so `import tinyllava` is that checkout's. It
uses only names that every version has: load, Sampling, logits, encode_image, generate, and Sampler.sample.

    {"do": "demo", "out": F, "profiles": [...], ...}       the demo pair's numbers, as arrays in F (.npz)
    {"do": "model", "out": F, "model": M, ...}             a language model's
    {"do": "open", "model": M, "mmproj": null, ...}        load for what follows
    {"do": "talk", "n_prompt": 512, "n_answer": 32}        {"prompt": 4.1, "answer": 1.2} in seconds
    {"do": "encode", "size_px": 336}                       {"picture": 1.9}

The dots stand for load's settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tinyllava
from tinyllava.text.sampling import Sampler

Found = dict[str, Any]
QUESTION = "What is in the picture?"
DEMO_IDS = list(range(3, 120))
N_PROMPT, N_SINGLE, N_STEPS = 300, 20, 8  # tokens of a prompt, tokens read one by one, steps of an answer
REST_S, REST_STEPS = 0.02, 100
GREEDY = tinyllava.Sampling(temperature=0.0)


def watch_sampler() -> list[np.ndarray]:
    """From now on, copies of the logits (n_vocab,) that a sampler gets are appended to this list."""
    seen: list[np.ndarray] = []
    choose = Sampler.sample

    def sample(self: Sampler, logits: Any) -> int:
        seen.append(np.array(logits))
        return choose(self, logits)

    Sampler.sample = sample  # type: ignore[method-assign]
    return seen


def answer(llava: Any, prompt: str, pictures: list[Path], max_tokens: int, seen: list[np.ndarray]) -> Found:
    """A greedy answer's text and tokens, and the logits of each of its steps, which a backend may capture."""
    seen.clear()
    result = llava.generate(prompt, pictures, max_tokens=max_tokens, sampling=GREEDY)
    text = np.array(list(result.text.encode()), np.uint8)
    return {"text": text, "tokens": np.array(result.tokens), "logits of steps": np.stack(seen)}


def demo_items(settings: Found, profiles: list[str], seen: list[np.ndarray]) -> Found:
    """The demo pair's embeddings, logits and answer, for each profile."""
    picture = Path(tinyllava.__file__).parent / "demo" / "demo.png"
    items: Found = {}
    for name in profiles:
        llava = tinyllava.load(compat=name, **settings)
        embeddings = [llava.encode_image(picture) for _ in range(3)]  # a backend may capture early ones
        found = {"embeddings": embeddings[0], "embeddings, 3rd": embeddings[2], "logits": llava.logits(DEMO_IDS)}
        found |= answer(llava, QUESTION, [picture], 60, seen)
        items |= {f"{name}: {key}": value for key, value in found.items()}
    return items


def model_items(settings: Found, model: str, seen: list[np.ndarray]) -> Found:
    """A language model's logits of a prompt at once, of single tokens, and of an answer's steps."""
    ids = [3 + 7 * i % 200 for i in range(N_PROMPT)]
    items = {"prompt": tinyllava.load(model, n_batch=512, **settings).logits(ids)}
    items["single steps"] = tinyllava.load(model, n_batch=1, **settings).logits(ids[:N_SINGLE])
    llava = tinyllava.load(model, **settings)
    return items | answer(llava, "token " * 8, [], N_STEPS + 1, seen)  # the first token comes out of the prompt


@cache
def template_tokens(llava: Any) -> int:
    """How many tokens stand around a question: "x" is one token in a vocabulary of bytes."""
    return int(llava.generate("x", max_tokens=1).prompt_tokens) - 1


def talk(llava: Any, n_prompt: int, n_answer: int) -> Found:
    """Seconds for a prompt of n_prompt tokens, and for n_answer steps after it."""
    prompt = "x" * (n_prompt - template_tokens(llava))
    result = llava.generate(prompt, max_tokens=n_answer + 1, sampling=GREEDY)
    assert (result.prompt_tokens, len(result.tokens)) == (n_prompt, n_answer + 1), result
    return {"prompt": result.timings["prefill_s"], "answer": result.timings["decode_s"]}


def encode(llava: Any, size_px: int) -> Found:
    """Seconds for a square picture, from pixels to embeddings."""
    pixels = np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    start = time.perf_counter()
    llava.encode_image(picture)
    return {"picture": time.perf_counter() - start}


def rest() -> None:
    """Wait until this process uses no processor: threads that share work spin for a while before they sleep."""
    for _ in range(REST_STEPS):
        used = time.process_time()
        time.sleep(REST_S)
        if time.process_time() - used < REST_S / 20:
            break


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    assert Path(tinyllava.__file__).is_relative_to(Path.cwd()), f"{tinyllava.__file__} is not the checkout's"
    seen = watch_sampler()
    llava: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        do, found = request.pop("do"), {}
        if do in ("demo", "model"):
            out, what = request.pop("out"), request.pop("profiles" if do == "demo" else "model")
            np.savez(out, **(demo_items if do == "demo" else model_items)(request, what, seen))
        elif do == "open":
            llava = tinyllava.load(request.pop("model"), request.pop("mmproj"), **request)
        else:
            found = talk(llava, **request) if do == "talk" else encode(llava, **request)
            rest()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
