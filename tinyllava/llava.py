"""LLaVA: the join of an image encoder and a language model.

    picture --vision tower--> features --projector--> embeddings \
                                                                  > one row of embeddings --> LLaMA --> words
    text ----tokenizer------> ids ------embedding table---------/

A picture's embeddings stand in the prompt where the picture does; from there on they are tokens like others.
(Liu et al. 2023, "Visual Instruction Tuning"; in the original, prepare_inputs_labels_for_multimodal.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import ModelError, UsageError
from tinyllava.files.gguf import GGUFFile, open_gguf
from tinyllava.language import llama as language
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.offload import Placement, estimate, place
from tinyllava.ops import Array, Ops, hand_over
from tinyllava.ops.threads import processors
from tinyllava.profile import Profile, profile
from tinyllava.text.sampling import Sampling
from tinyllava.text.tokenizer import Tokenizer
from tinyllava.trace import NULL, Tap
from tinyllava.vision.anyres import PicturePlan, make_tiles, merge, plan_picture
from tinyllava.vision.clip import VisionConfig, VisionWeights, encode_tile, load_vision
from tinyllava.vision.image import Pixels, Source, decode, size_of
from tinyllava.vision.projector import ProjectorWeights, load_projector, project

if TYPE_CHECKING:
    from tinyllava.generate import Plan, Result, Stream
    from tinyllava.study.tracing import Trace

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
PathLike = str | Path


GREEDY = Sampling(temperature=0.0)  # always the most probable token


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """The progress callback of those who do not watch."""


@dataclass(frozen=True)
class VisionModel:
    """An mmproj file, loaded: vision tower and projector."""

    path: Path
    config: VisionConfig
    weights: VisionWeights
    projector: ProjectorWeights
    ops: Ops  # who computes it: not the language model's backend if a GPU holds only a part of that


@dataclass(frozen=True)
class LanguageModel:
    """A language model's file, loaded."""

    path: Path
    metadata: dict[str, Any]
    tokenizer: Tokenizer
    llama: language.Llama


def load(
    model: PathLike | None = None,
    mmproj: PathLike | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
    n_ctx: int | None = None,
    n_batch: int | None = None,
    dtype: str = "float32",
    compat: str = "llava",
    n_gpu_layers: int | str | None = None,
) -> LLaVA:
    """Load a GGUF pair; neither given means the embedded demo pair.

    A language model alone answers text; an mmproj alone encodes pictures. Weights stay memory-mapped.

    backend  "numpy" (the reference), "numba", "cupy" (a GPU), or "auto" (the fastest that computes in ``dtype``)
    threads  for the backend, at most the processors there are; None: the physical cores
    n_ctx    the most tokens of a prompt and its answer together; None: what the model was trained for
    n_batch  tokens of a prompt processed at once; None: what suits the backend
    dtype    "float32", or "float64" with the numpy backend: the truth that errors are measured against
    compat   the profile (profile.py): whose choices to follow where implementations of LLaVA differ
    n_gpu_layers  layers on the GPU, from the last; the output head counts as one; "all", 0, or None: what fits

    Raises FileError, ModelError or UsageError, each one line that says what to do.
    """
    started = time.perf_counter()
    _check_positive(n_ctx=n_ctx, n_batch=n_batch)
    choices = profile(compat)
    files = _open(model, mmproj)
    usable = threads and min(threads, processors())
    where = place(backend, n_gpu_layers, lambda: estimate(*files, n_ctx), dtype=dtype, threads=usable)
    text = None if files[0] is None else _load_language(files[0], where.language)
    vision = None if files[1] is None else _load_vision(files[1], choices, where.vision)
    llava = LLaVA(where.language, choices, text=text, vision=vision, n_ctx=n_ctx, n_batch=n_batch)
    llava.placement = where
    llava.load_s = time.perf_counter() - started
    return llava


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(name, str(number), wanted="1 or more")


def _open(model: PathLike | None, mmproj: PathLike | None) -> tuple[GGUFFile | None, GGUFFile | None]:
    """The files of a pair, or one of them; without any, the embedded pair."""
    if model is None and mmproj is None:
        from tinyllava import demo

        model, mmproj = demo.MODEL, demo.MMPROJ
    return None if model is None else open_gguf(model), None if mmproj is None else open_gguf(mmproj)


def _load_language(file: GGUFFile, ops: Ops) -> LanguageModel:
    config = read_config(file)
    tokenizer = Tokenizer.from_gguf(file)
    if tokenizer.n_vocab > config.n_vocab:
        found = f"{tokenizer.n_vocab} tokens but {config.n_vocab} rows in token_embd.weight"
        raise ModelError(file.path, found, wanted="a row for each token")
    return LanguageModel(file.path, file.metadata, tokenizer, language.load_llama(file, config, ops))


def _load_vision(file: GGUFFile, choices: Profile, ops: Ops) -> VisionModel:
    config = VisionConfig.from_gguf(file, choices)
    weights, projector = load_vision(file, config, ops), load_projector(file, config, ops)
    return VisionModel(file.path, config, weights, projector, ops)


class LLaVA:
    """A loaded pair. Made by :func:`load`; a context manager, though closing is not needed."""

    def __init__(
        self,
        ops: Ops,
        choices: Profile,
        *,
        text: LanguageModel | None,
        vision: VisionModel | None,
        n_ctx: int | None = None,
        n_batch: int | None = None,
    ) -> None:
        _check_pair(text, vision)
        self.ops = ops
        self.profile = choices
        self.text = text
        self.vision = vision
        self.placement = Placement(ops, vision.ops if vision else ops)
        self.n_batch = n_batch or ops.batch
        self.n_ctx = n_ctx or (text.llama.config.n_ctx_train if text else 0)
        self.load_s = 0.0
        self._look_again = vision.ops.capture(self._look) if vision else self._look

    # ---- what the parts can do alone

    @property
    def tokenizer(self) -> Tokenizer:
        return self.language.tokenizer

    @property
    def language(self) -> LanguageModel:
        """The language model. UsageError if none was loaded."""
        if self.text is None:
            raise UsageError("model", "none given", wanted="a language model", hint="Give one with -m")
        return self.text

    @property
    def eye(self) -> VisionModel:
        """The image encoder. UsageError if none was loaded."""
        if self.vision is None:
            hint = "Give the image encoder's file with --mmproj"
            raise UsageError("mmproj", "none given", wanted="an image encoder, to read a picture", hint=hint)
        return self.vision

    def plan_image(self, rgb: Pixels) -> PicturePlan:
        """How a decoded picture will be tiled, and the tokens it will take."""
        return plan_picture(size_of(rgb), self.eye.config, self.profile)

    def encode_image(
        self, source: Source, *, tap: Tap = NULL, progress: Progress = no_progress
    ) -> npt.NDArray[np.float32]:
        """A picture (path, bytes, Pillow image) -> its embeddings, float32 (n_tokens, n_embd)."""
        rgb = decode(source, self.profile.exif)
        return np.asarray(self.ops.numpy(self.encode_pixels(rgb, tap, progress)), dtype=np.float32)

    def encode_pixels(self, rgb: Pixels, tap: Tap = NULL, progress: Progress = no_progress) -> Array:
        """Decoded pixels (h, w, 3) -> embeddings (n_tokens, n_embd), in the backend's array and dtype."""
        eye, ops = self.eye, self.eye.ops
        plan = self.plan_image(rgb)
        tiles = tap("pixels", make_tiles(rgb, plan, eye.config, self.profile))  # (n_tiles, 3, H, W)
        look = self._look_again if tap is NULL else partial(self._look, tap=tap)
        features = []
        for done, tile in enumerate(tiles):
            progress("picture", done, len(tiles))
            features.append(look(tile).copy())  # (n_patches, n_embd)
        progress("picture", len(tiles), len(tiles))
        (tokens,) = hand_over(ops, self.ops, merge(np.stack(features), plan, eye.projector.image_newline))
        return tap("image_tokens", tokens)

    def _look(self, tile: npt.NDArray[Any], tap: Tap = NULL) -> Array:
        """One tile (3, H, W) -> its patches' embeddings (n_patches, n_embd)."""
        eye = self.eye
        x = encode_tile(tile, eye.weights, eye.config, eye.ops, tap.at("vit"))  # (n_patches, n_embd of the tower)
        return project(x, eye.projector, eye.ops, tap.at("mm"))

    def logits(self, ids: Sequence[int], *, tap: Tap = NULL) -> npt.NDArray[np.float32]:
        """The logits after each of ``ids`` (n,), read as one text -> (n, n_vocab), in the backend's dtype."""
        llama = self.language.llama
        if len(ids) == 0:
            raise UsageError("ids", "no tokens", wanted="at least one")
        bad = [i for i in ids if not 0 <= i < llama.config.n_vocab]
        if bad:
            raise UsageError("ids", f"token {bad[0]}", wanted=f"0..{llama.config.n_vocab - 1}")
        cache = KVCache(llama.config, len(ids), self.ops)
        at = tap.at("llm")
        rows = []
        for piece in self.pieces(list(ids)):
            x = language.forward(piece, llama, cache, self.ops, at)  # (piece, n_embd)
            rows.append(self.ops.numpy(language.unembed(x, llama, self.ops, at)))  # (piece, n_vocab)
        return np.concatenate(rows)

    def pieces(self, *parts: list[int] | Array) -> Iterator[Array]:
        """A prompt's embeddings in pieces (at most n_batch, n_embd), of token ids and of pictures' embeddings.

        Tokens are embedded when it is their turn: a long prompt's embeddings are never all in memory.
        """
        starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        for first in range(0, starts[-1], self.n_batch):
            rows: list[Array] = []
            for part, start in zip(parts, starts[:-1], strict=True):
                here = part[max(0, first - start) : max(0, first + self.n_batch - start)]
                if isinstance(here, list):
                    rows += [language.embed(here, self.language.llama, self.ops)] if here else []
                elif len(here) > 0:
                    rows.append(here)
            yield rows[0] if len(rows) == 1 else np.concatenate(rows)

    # ---- the whole: generate.py

    def plan(
        self,
        prompt: str,
        images: Source | Sequence[Source] = (),
        *,
        max_tokens: int = 256,
        template: str = "auto",
    ) -> Plan:
        """What a prompt and its pictures will be and need, before any work. ContextError if it does not fit."""
        from tinyllava.generate import make_plan

        return make_plan(self, prompt, images, max_tokens=max_tokens, template=template)

    def stream(
        self,
        prompt: str,
        images: Source | Sequence[Source] = (),
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        *,
        template: str = "auto",
        progress: Progress = no_progress,
    ) -> Stream:
        """Iterate over the answer's text as it is made, never half a character; ``.result`` comes at the end.

        See :meth:`generate`.
        """
        from tinyllava.generate import Stream

        plan = self.plan(prompt, images, max_tokens=max_tokens, template=template)
        return Stream(self, plan, sampling, progress)

    def generate(
        self,
        prompt: str,
        images: Source | Sequence[Source] = (),
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        *,
        template: str = "auto",
        progress: Progress = no_progress,
    ) -> Result:
        """Answer ``prompt`` about ``images``.

        Without ``<image>`` in it, the prompt is a question that ``template`` wraps; with it, it is the whole text
        and each ``<image>`` stands for the next picture. Raises UsageError,
        PictureError or ContextError before any work.
        """
        answer = self.stream(prompt, images, max_tokens, sampling, template=template, progress=progress)
        for _ in answer:
            pass
        return answer.result

    def trace(
        self,
        prompt: str = "",
        images: Sequence[Source] = (),
        *,
        only: str | Sequence[str] | None = None,
        attention: bool = False,
        max_tokens: int = 1,
        template: str = "auto",
    ) -> Trace:
        """What passes every tap while ``prompt`` is answered greedily: a dict of arrays. See study/tracing.py."""
        from tinyllava.study.tracing import trace

        settings: dict[str, Any] = {"max_tokens": max_tokens, "template": template}
        return trace(self, prompt, images, only=only, attention=attention, **settings)

    def __enter__(self) -> LLaVA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def _check_pair(text: LanguageModel | None, vision: VisionModel | None) -> None:
    """ModelError unless the projector's width is the language model's."""
    if text is None or vision is None:
        return
    width, wanted = vision.config.n_embd_llm, text.llama.config.n_embd
    if width != wanted:
        raise ModelError(
            vision.path,
            f"projects to {width} features, but {text.path} reads {wanted}",
            wanted="two files of one model",
            hint="Take both files from the same conversion",
        )
