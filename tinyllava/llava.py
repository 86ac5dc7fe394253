"""LLaVA: the join of an image encoder and a language model.

    picture --vision tower--> features --projector--> embeddings \
                                                                  > one row of embeddings --> LLaMA --> words
    text ----tokenizer------> ids ------embedding table---------/

A picture's embeddings stand in the prompt where the picture does; from there on they are tokens like others.
(Liu et al. 2023, "Visual Instruction Tuning"; in the original, prepare_inputs_labels_for_multimodal.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tinyllava import demo
from tinyllava.errors import ModelError, UsageError
from tinyllava.files.gguf import GGUFFile, open_gguf
from tinyllava.generate import Plan, Result, Stream, loaded, make_plan
from tinyllava.language.model import LanguageModel, load_language_model
from tinyllava.offload import Placement, estimate, place
from tinyllava.ops import Ops
from tinyllava.ops.threads import processors
from tinyllava.profile import Profile, profile
from tinyllava.progress import Progress, no_progress
from tinyllava.tap import NULL, Tap
from tinyllava.text.sampling import Sampling
from tinyllava.text.tokenizer import Tokenizer
from tinyllava.vision.encoder import VisionModel, load_vision_model
from tinyllava.vision.image import Source, decode

PathLike = str | Path

GREEDY = Sampling(temperature=0.0)  # always the most probable token


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
    where = place(backend, n_gpu_layers, partial(estimate, *files, n_ctx), dtype=dtype, threads=usable)
    n_batch = n_batch or where.language.batch
    text = None if files[0] is None else load_language_model(files[0], where.language, n_batch)
    vision = None if files[1] is None else load_vision_model(files[1], choices, where.vision)
    llava = LLaVA(where.language, choices, text=text, vision=vision, n_ctx=n_ctx)
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
        model, mmproj = demo.MODEL, demo.MMPROJ
    return None if model is None else open_gguf(model), None if mmproj is None else open_gguf(mmproj)


class LLaVA:
    """A loaded pair, or one of the two. Made by :func:`load`; a context manager, though closing is not needed."""

    def __init__(
        self,
        ops: Ops,
        choices: Profile,
        *,
        text: LanguageModel | None,
        vision: VisionModel | None,
        n_ctx: int | None = None,
    ) -> None:
        _check_pair(text, vision)
        self.ops = ops
        self.profile = choices
        self.text = text
        self.vision = vision
        self.placement = Placement(ops, vision.ops if vision else ops)
        self.n_ctx = n_ctx or (text.llama.config.n_ctx_train if text else 0)
        self.load_s = 0.0

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
    def vision_model(self) -> VisionModel:
        """The image encoder. UsageError if none was loaded."""
        return loaded(self.vision)

    @property
    def n_batch(self) -> int:
        """Tokens of a prompt that are read at once."""
        return self.text.n_batch if self.text else self.ops.batch

    def encode_image(
        self, source: Source, *, tap: Tap = NULL, progress: Progress = no_progress
    ) -> npt.NDArray[np.float32]:
        """A picture (path, bytes, Pillow image) -> its embeddings, float32 (n_tokens, n_embd)."""
        rgb, vision = decode(source, self.profile.exif), self.vision_model
        return np.asarray(vision.ops.numpy(vision.encode(rgb, tap, progress)), dtype=np.float32)

    def logits(self, ids: Sequence[int], *, tap: Tap = NULL) -> npt.NDArray[np.float32]:
        """The logits after each of ``ids`` (n,), read as one text -> (n, n_vocab), in the backend's dtype."""
        return self.language.logits(ids, tap=tap)

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
        return make_plan(
            self.language,
            self.vision,
            self.profile,
            prompt,
            images,
            n_ctx=self.n_ctx,
            max_tokens=max_tokens,
            template=template,
        )

    def answer(
        self, plan: Plan, sampling: Sampling = GREEDY, progress: Progress = no_progress, tap: Tap = NULL
    ) -> Stream:
        """The answer to a plan that was made before, as :meth:`stream` gives it; ``tap`` sees what is computed."""
        return Stream(self.language, self.vision, plan, sampling, progress, tap, load_s=self.load_s)

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
        plan = self.plan(prompt, images, max_tokens=max_tokens, template=template)
        return self.answer(plan, sampling, progress)

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
