"""Explain: one answer about a picture or several, watched from the file to the last token.

    explanation = explain(llava, "What is this?", "cat.png")
    explanation.tokens[0].probability, explanation.maps.shape, explanation.walk[3].place

The page that shows it is page.py, the terminal's table text.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import UsageError
from tinyllava.generate import Plan, Result, picture_list
from tinyllava.language.llama import unembed
from tinyllava.llava import LLaVA
from tinyllava.progress import Progress, no_progress
from tinyllava.study.explain.maps import Ints, Keep, MapKeeper, Panel, choose_maps, panels_of_all
from tinyllava.study.explain.walk import Row, count_weights, make_walk, weight_owners
from tinyllava.study.explain.watch import ATTENTION, Event, Phase, Step, Watch, WatchedSampler
from tinyllava.text.prompt import ImageSlot
from tinyllava.text.sampling import Sampling, softmax
from tinyllava.text.tokenizer import Tokenizer
from tinyllava.vision.image import Pixels, Source, decode

Floats = npt.NDArray[Any]
N_BEST = 5  # tokens listed beside the chosen one
N_LENS = 3  # tokens listed for each layer of the logit lens
REPEATED_PARAMETERS = 300_000_000  # a smaller model runs several times, for steadier times
N_REPEATS = 4


@dataclass(frozen=True)
class Guess:
    """A token and its probability before any sampling setting touches it: softmax of the logits."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class TokenStep:
    """One token of the answer: what was chosen, what else was likely, what each layer would have said."""

    chosen: Guess
    rank: int  # 1: the most probable
    best: tuple[Guess, ...]  # the N_BEST most probable others
    is_end: bool  # it ended the answer, and is not part of the text
    lens: tuple[tuple[Guess, ...], ...]  # for what enters block 0, then for each block: N_LENS best
    lens_chosen: tuple[float, ...]  # the chosen token's probability there


@dataclass(frozen=True)
class Explanation:
    """All that the report draws. Maps: (n_tokens, 1 + layers kept, 1 + heads kept, tokens of all pictures)."""

    question: str
    llava: LLaVA
    plan: Plan
    result: Result
    walk: list[Row]
    tokens: list[TokenStep]
    given: tuple[Pixels, ...]  # the pictures as given
    tiles: npt.NDArray[np.uint8]  # (n_tiles, tile_px, tile_px, 3): what the vision tower sees, of all pictures
    panels: list[Panel]
    keep: Keep
    maps: Floats  # index 0 on the axes of layers and heads is the mean over all of them
    shares: Floats  # (n_tokens, 1 + layers, 1 + heads, 5): attention on each of explain_maps.SEGMENTS


def explain(
    llava: LLaVA,
    question: str,
    images: Source | Sequence[Source],
    *,
    max_tokens: int = 64,
    sampling: Sampling | None = None,
    template: str = "auto",
    progress: Progress = no_progress,
    lens: bool = True,
) -> Explanation:
    """Answer ``question`` about ``images`` (greedily unless ``sampling`` says otherwise) and watch it happen.

    Raises what ``generate`` raises, and UsageError for a prompt without a picture.
    """
    sources = picture_list(images)
    plan = llava.plan(question, sources, max_tokens=max_tokens, template=template)
    sampling = sampling or Sampling(temperature=0.0)
    result, watch, keeper = observe(llava, plan, sampling, progress)
    again = replace(sampling, seed=result.seed)
    events = steady([watch.events, *_run_again(llava, plan, again)])
    decoded = [_decode_again(source) for source in sources]
    tokens = _tokenize_again(question, plan, llava)
    return Explanation(
        question=question,
        llava=llava,
        plan=plan,
        result=result,
        walk=make_walk(_in_order(decoded, tokens, events), llava),
        tokens=[_token(step, llava, lens) for step in watch.steps],
        given=plan.pixels,
        tiles=as_seen(np.concatenate(watch.pixels), llava),
        panels=panels_of_all(plan.pictures),
        keep=keeper.keep,
        maps=np.stack(keeper.maps),
        shares=np.stack(keeper.shares),
    )


def picture_columns(plan: Plan) -> Ints:
    """Where the pictures' tokens stand in the prompt, in the pictures' order. UsageError if there is none."""
    if not plan.pictures:
        raise UsageError("--image", "no picture", wanted="a picture to explain", hint="Give one with --image")
    columns: list[Ints] = [np.empty(0, int)] * len(plan.pictures)
    place = 0
    for part in plan.parts:
        if isinstance(part, ImageSlot):
            n = plan.pictures[part.index].n_tokens
            columns[part.index] = np.arange(place, place + n)
            place += n
        else:
            place += len(part)
    return np.concatenate(columns)


# ---- the run


def observe(
    llava: LLaVA, plan: Plan, sampling: Sampling, progress: Progress = no_progress
) -> tuple[Result, Watch, MapKeeper]:
    """Run a plan with pictures, watched: the answer, what the taps saw, and the attention to the pictures."""
    columns, config = picture_columns(plan), llava.language.llama.config
    keep = choose_maps(config.n_layer, config.n_head, plan.image_tokens, plan.max_tokens)
    keeper = MapKeeper(config.n_layer, columns, plan.prompt_tokens, keep)
    watch = Watch(llava.ops, plan.prompt_tokens, keeper)
    return _run(llava, plan, sampling, watch, progress), watch, keeper


def _run(llava: LLaVA, plan: Plan, sampling: Sampling, watch: Watch, progress: Progress) -> Result:
    stream = llava.answer(plan, sampling, progress)
    stream.sampler = WatchedSampler(sampling, llava.language.llama.config.n_vocab, watch)
    stream.tap = watch.tap()
    for _ in stream:
        pass
    return stream.result


def _run_again(llava: LLaVA, plan: Plan, sampling: Sampling) -> list[list[Event]]:
    """The events of further runs of a small model, for times that the first run's compiling does not spoil.

    A large model would take as long again; its times include reading its weights from disk.
    """
    if n_parameters(llava) > REPEATED_PARAMETERS:
        return []
    watches = [Watch(llava.ops, plan.prompt_tokens) for _ in range(N_REPEATS)]
    for watch in watches:
        _run(llava, plan, sampling, watch, no_progress)
    return [watch.events for watch in watches]


def steady(runs: list[list[Event]]) -> list[Event]:
    """The first run's events with the median of their times in all runs that went alike.

    Attention that was computed a second time to be looked at is no part of a run.
    """
    plain = [[event for event in run if not event.name.endswith(ATTENTION)] for run in runs]
    first = plain[0]
    alike = [run for run in plain if [event.name for event in run] == [event.name for event in first]]
    seconds = np.median([[event.seconds for event in run] for run in alike], axis=0)  # (n_events,)
    return [replace(event, seconds=float(s)) for event, s in zip(first, seconds, strict=True)]


def _decode_again(image: Source) -> Event:
    """Decoding and tokenising happen in the plan, out of the taps' reach: they are repeated for their times."""
    started = time.perf_counter()
    rgb = decode(image)
    return _event("picture", "decode", rgb.shape, started, decode.__code__)


def _tokenize_again(question: str, plan: Plan, llava: LLaVA) -> Event:
    started = time.perf_counter()
    llava.tokenizer.encode(question)
    return _event("prompt", "tokens", (len(plan.text_ids),), started, Tokenizer.encode.__code__)


def n_parameters(llava: LLaVA) -> int:
    """All parameters of the loaded pair."""
    return sum(count_weights({"any": objects}, "any:*") for objects in weight_owners(llava).values())


def _event(phase: Phase, name: str, shape: tuple[int, ...], started: float, code: CodeType) -> Event:
    """What happened since ``started`` outside the taps' reach."""
    return Event(phase, name, tuple(shape), time.perf_counter() - started, code, code.co_firstlineno)


def _in_order(decoded: list[Event], tokens: Event, watched: list[Event]) -> list[Event]:
    """All events, those that no tap reported in their places."""
    n_picture = sum(event.phase == "picture" for event in watched)
    return [*decoded, *watched[:n_picture], tokens, *watched[n_picture:]]


# ---- what came out


def _token(step: Step, llava: LLaVA, with_lens: bool) -> TokenStep:
    probabilities = softmax(step.logits.astype(np.float64))  # (n_vocab,)
    chosen, tokenizer = step.token, llava.tokenizer
    others = _best(probabilities, N_BEST + 1, tokenizer)
    layers = layer_probabilities(step.hidden, llava) if with_lens else np.empty((0, 1))
    return TokenStep(
        chosen=Guess(chosen, show(chosen, tokenizer), float(probabilities[chosen])),
        rank=1 + int((probabilities > probabilities[chosen]).sum()),
        best=tuple(guess for guess in others if guess.id != chosen)[:N_BEST],
        is_end=chosen in tokenizer.end_ids,
        lens=tuple(_best(row, N_LENS, tokenizer) for row in layers),
        lens_chosen=tuple(float(row[chosen]) for row in layers),
    )


def layer_probabilities(hidden: Floats, llava: LLaVA) -> Floats:
    """The logit lens (nostalgebraist 2020): the residual stream (layers, n_embd), each row read by the model's
    own last norm and head as if it were the last -> probabilities (layers, n_vocab)."""
    llama, ops = llava.language.llama, llava.ops
    normed = ops.rms_norm(ops.array(hidden), llama.output_norm, llama.config.norm_eps)  # (layers, n_embd)
    logits = ops.numpy(unembed(normed, llama, ops)).astype(np.float64)  # (layers, n_vocab)
    return np.stack([softmax(row) for row in logits])


def _best(probabilities: Floats, n: int, tokenizer: Tokenizer) -> tuple[Guess, ...]:
    """The ``n`` most probable tokens, the lower id first where two are equal."""
    order = np.argsort(-probabilities, kind="stable")[:n]
    return tuple(Guess(int(i), show(int(i), tokenizer), float(probabilities[i])) for i in order)


def show(token: int, tokenizer: Tokenizer) -> str:
    """A token's text for the eye: its characters, or the file's own spelling where it has none ("</s>")."""
    data = tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace") if data else tokenizer.text_of(token)
    return text if "\ufffd" not in text else tokenizer.text_of(token)  # a fraction of a character: "<0xE2>"


def as_seen(pixels: Floats, llava: LLaVA) -> npt.NDArray[np.uint8]:
    """What the vision tower sees, back in colours: (n_tiles, 3, H, W) normalised -> (n_tiles, H, W, 3)."""
    config = llava.vision_model.config
    mean, std = (np.asarray(x)[:, None, None] for x in (config.mean, config.std))
    colours = np.clip((pixels * std + mean) * 255, 0, 255)
    return np.asarray(np.rint(colours), dtype=np.uint8).transpose(0, 2, 3, 1)
