"""From a question and pictures to an answer: the plan, prefill (reading the prompt), and the decode loop.

    plan = make_plan(language, vision, profile, "What is this?", ["cat.png"], ...)  # nothing is computed yet
    for text in Stream(language, vision, plan, sampling, progress):
        ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np

from tinyllava.errors import ContextError, UsageError
from tinyllava.language.cache import KVCache
from tinyllava.language.model import LanguageModel
from tinyllava.ops import Array
from tinyllava.ops.split import hand_over
from tinyllava.profile import Profile
from tinyllava.progress import Progress, no_progress
from tinyllava.tap import NULL, Tap
from tinyllava.text import prompt as prompts
from tinyllava.text.prompt import ImageSlot, Part, StopScanner, Template
from tinyllava.text.sampling import Sampler, Sampling
from tinyllava.text.tokenizer import TextStream
from tinyllava.vision.anyres import PicturePlan
from tinyllava.vision.encoder import VisionModel
from tinyllava.vision.image import Pixels, Source, decode

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Plan:
    """What a prompt will be and need. Made before any work, so that what cannot fit is refused at once."""

    family: str  # "LLaVA-1.5", "LLaVA-1.6", or "text" for a prompt without pictures
    template: str  # its name, or "none" for a full prompt
    template_reason: str
    stop_texts: tuple[str, ...]
    parts: tuple[list[int] | ImageSlot, ...]  # token ids, and where the pictures stand among them
    pixels: tuple[Pixels, ...]  # the decoded pictures, each (h, w, 3)
    pictures: tuple[PicturePlan, ...]
    max_tokens: int  # of the answer
    n_ctx: int

    @property
    def image_tokens(self) -> int:
        """Tokens that the pictures take."""
        return sum(picture.n_tokens for picture in self.pictures)

    @property
    def text_ids(self) -> list[int]:
        """The prompt's text tokens, without the pictures."""
        return [i for part in self.parts if not isinstance(part, ImageSlot) for i in part]

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, those of the pictures included."""
        return len(self.text_ids) + self.image_tokens

    @property
    def context_needed(self) -> int:
        """Tokens that the prompt and the longest answer take together."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True)
class Result:
    """A finished answer."""

    text: str
    tokens: list[int]  # all that were sampled, the end token excepted
    finish_reason: FinishReason
    prompt_tokens: int  # those of the pictures included
    image_tokens: int
    timings: dict[str, float]  # seconds, and tokens a second
    seed: int


def make_plan(
    language: LanguageModel,
    vision: VisionModel | None,
    profile: Profile,
    prompt: str,
    images: Source | Sequence[Source],
    *,
    n_ctx: int,
    max_tokens: int,
    template: str,
) -> Plan:
    """Read the prompt, decode the pictures, count. ``max_tokens`` below 0: all that the context can still hold.

    Raises UsageError for a prompt that is empty or does not match its pictures, PictureError, and ContextError
    when prompt and answer exceed ``n_ctx``.
    """
    if max_tokens == 0:
        raise UsageError("max_tokens", "0", wanted="1 or more, or below 0 for all that fits")
    chosen, reason = _template(language, profile, template)
    parts, sources = _parts(prompt, picture_list(images), chosen)
    if prompts.is_full_prompt(prompt):
        template, reason = "none", "the prompt says itself where its pictures go"
    else:
        template = chosen.name
    pixels = tuple(decode(source, profile.exif) for source in sources)
    pictures = tuple(loaded(vision).plan(rgb) for rgb in pixels)
    plan = Plan(
        family=f"LLaVA-{pictures[0].kind}" if pictures else "text",
        template=template,
        template_reason=reason,
        stop_texts=profile.stop_texts,
        parts=tuple(prompts.encode_prompt(parts, language.tokenizer, profile.space_prefix)),
        pixels=pixels,
        pictures=pictures,
        max_tokens=max_tokens,
        n_ctx=n_ctx,
    )
    return _fit(plan)


def picture_list(images: Source | Sequence[Source]) -> list[Source]:
    """The pictures as a list, also when there is just one, without a list around it."""
    if isinstance(images, str | bytes | Path) or hasattr(images, "convert"):
        return [cast("Source", images)]
    return list(images)


def _parts(prompt: str, images: list[Source], template: Template) -> tuple[list[Part], Sequence[Source]]:
    """The prompt's text with the places of its pictures, and the pictures: those given and those in the text."""
    if prompts.is_full_prompt(prompt):
        return prompts.place_pictures(prompts.parse_full_prompt(prompt), images)
    question, inline = prompts.take_pictures(prompt)
    if not question.strip():
        raise UsageError("prompt", "empty", wanted="a question", hint="Give one with -p")
    sources = [*images, *inline]
    return prompts.build(template, question, len(sources)), sources


def loaded(vision: VisionModel | None) -> VisionModel:
    """The vision model. UsageError if none was loaded."""
    if vision is None:
        hint = "Give the image encoder's file with --mmproj"
        raise UsageError("mmproj", "none given", wanted="an image encoder, to read a picture", hint=hint)
    return vision


def _template(language: LanguageModel, profile: Profile, name: str) -> tuple[Template, str]:
    if name != "auto":
        return prompts.template_for(name, profile.wording), "asked for"
    return prompts.choose_template(language.metadata, language.tokenizer, language.path.name, profile)


def _fit(plan: Plan) -> Plan:
    """The plan with its answer's length settled. ContextError if prompt and answer do not fit the context."""
    if plan.prompt_tokens == 0:
        raise UsageError("prompt", "no tokens", wanted="some text or a picture")
    if plan.max_tokens < 0:
        plan = replace(plan, max_tokens=max(1, plan.n_ctx - plan.prompt_tokens))
    if plan.context_needed > plan.n_ctx:
        needed = f"{plan.prompt_tokens} prompt tokens and an answer of up to {plan.max_tokens}"
        hint = f"Use -c {plan.context_needed} or more, or a shorter answer with -n"
        raise ContextError("context", needed, wanted=f"at most {plan.n_ctx} together", hint=hint)
    return plan


class Stream:
    """An answer while it is computed: iterate for its text; ``result`` is there once the iteration has ended."""

    def __init__(
        self,
        language: LanguageModel,
        vision: VisionModel | None,
        plan: Plan,
        sampling: Sampling,
        progress: Progress = no_progress,
        tap: Tap = NULL,
        *,
        load_s: float = 0.0,  # seconds that loading took, for the result's timings
    ) -> None:
        self.language = language
        self.vision = vision
        self.plan = plan
        self.sampler = Sampler(sampling, language.llama.config.n_vocab)
        self.progress = progress
        self.tap = tap
        self.load_s = load_s
        self._result: Result | None = None
        self._pieces = self._run()

    @property
    def result(self) -> Result:
        """The finished answer. UsageError while the iteration has not ended."""
        if self._result is None:
            raise UsageError("result", "the answer is not finished", wanted="iterate over the stream first")
        return self._result

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self) -> Iterator[str]:
        language, plan, ops = self.language, self.plan, self.language.ops
        clock = [time.perf_counter()]
        pictures = [self._encode(rgb) for rgb in plan.pixels]  # (n_tokens, n_embd) each
        clock.append(time.perf_counter())
        cache = language.new_cache(plan.context_needed)
        hidden = self._prefill(pictures, cache)  # (n, n_embd): the last piece
        clock.append(time.perf_counter())
        step: Callable[[list[int]], Array] = partial(language.step, cache=cache, tap=self.tap)
        if self.tap is NULL:  # a replayed step would fire no taps
            step = ops.capture(step)
        answer, logits = Answer(self), language.unembed(hidden[-1:], self.tap)  # (1, n_vocab)
        while True:
            yield from answer.take(self.sampler.sample(ops.numpy(logits)[0]))
            if answer.finish_reason is not None:
                break
            logits = step(answer.tokens[-1:])
        yield from answer.rest()
        clock.append(time.perf_counter())
        self._result = Result(
            text=answer.text,
            tokens=answer.tokens,
            finish_reason=answer.finish_reason,
            prompt_tokens=plan.prompt_tokens,
            image_tokens=plan.image_tokens,
            timings=timings(self.load_s, np.diff(clock).tolist(), plan.prompt_tokens, answer.n_sampled),
            seed=self.sampler.seed,
        )

    def _encode(self, rgb: Pixels) -> Array:
        """A picture (h, w, 3) -> its embeddings (n_tokens, n_embd), an array of the language model's backend."""
        vision = loaded(self.vision)
        return hand_over(vision.ops, self.language.ops, vision.encode(rgb, self.tap, self.progress))

    def _prefill(self, pictures: Sequence[Array], cache: KVCache) -> Array:
        """Read the whole prompt, pictures in their places -> what the last piece gives for the head."""
        n = self.plan.prompt_tokens
        parts = [pictures[part.index] if isinstance(part, ImageSlot) else part for part in self.plan.parts]
        for piece in self.language.pieces(*parts):
            self.progress("prompt", cache.length, n)
            hidden = self.language.forward(piece, cache, self.tap)
        self.progress("prompt", n, n)
        return hidden


class Answer:
    """The tokens sampled so far, their text, and why the answer ended, once it has."""

    def __init__(self, stream: Stream) -> None:
        self.sampler = stream.sampler
        self.plan = stream.plan
        self.end_ids = stream.language.tokenizer.end_ids
        self.tokens: list[int] = []
        self.text = ""
        self.n_sampled = 0  # the end token included
        self.finish_reason: FinishReason | None = None
        self._characters = TextStream(stream.language.tokenizer)
        self._scanner = StopScanner(stream.plan.stop_texts)

    def take(self, token: int) -> Iterator[str]:
        """Append a sampled token; yields the text that it completes, if any."""
        self.n_sampled += 1
        self.sampler.accept(token)  # penalties see the answer alone, as in llama-llava-cli, not the prompt
        if token in self.end_ids:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        yield from self._emit(self._scanner.push(self._characters.push(token)))
        if self._scanner.stopped is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.plan.max_tokens:
            self.finish_reason = "length"

    def rest(self) -> Iterator[str]:
        """The text that was held back in case it became a character or a stop text."""
        yield from self._emit(self._scanner.push(self._characters.finish()) + self._scanner.finish())

    def _emit(self, piece: str) -> Iterator[str]:
        self.text += piece
        if piece:
            yield piece


def timings(load_s: float, stages: list[float], n_prompt: int, n_answer: int) -> dict[str, float]:
    """Seconds of encode, prefill and decode, and the speeds that follow.

    The first answer token comes out of the prefill, so decoding n tokens runs the model n - 1 times.
    """
    encode_s, prefill_s, decode_s = stages
    return {
        "load_s": load_s,
        "encode_s": encode_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "prefill_tokens_per_s": n_prompt / prefill_s if prefill_s > 0 else 0.0,
        "decode_tokens_per_s": (n_answer - 1) / decode_s if decode_s > 0 else 0.0,
    }
