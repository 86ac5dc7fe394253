"""Traces: what passed every tap during one run, with the run's settings, as a dict or an .npz file.

One array a tap, all its firings joined: what fires once a tile is stacked (n_tiles, ...), what fires once for
each piece of the prompt and each token of the answer is one row after the other (n_positions, ...). So a trace
does not depend on how the prompt was cut. Attention's rows are filled up with zeros to the longest.

The language model is not run on the answer's last token, and the head (``llm.result_output``) only where a
token is chosen: on the prompt's last position and on each of the answer's but the last.

Beside the taps: ``ids`` (n_prompt,) holds the prompt's token ids, -1 where the first picture's tokens are, -2 for
the second; ``answer_ids`` the answer's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from tinyllava.errors import UsageError
from tinyllava.files.gguf_write import replacing
from tinyllava.generate import Plan, Result
from tinyllava.llava import GREEDY, LLaVA
from tinyllava.progress import Progress, no_progress
from tinyllava.study import tap_names
from tinyllava.tap import Array, Recorder
from tinyllava.text.prompt import ImageSlot
from tinyllava.version import __version__
from tinyllava.vision.image import Source, decode

SETTINGS = "settings"  # the name of the settings, as JSON, among a file's arrays
WHOLE_RUN = ("ids", "answer_ids")  # no taps: what the tokenizer and the sampler said


class Trace(dict[str, Array]):
    """Arrays by tap, in the order in which the taps fired first, and the run's settings (JSON values)."""

    def __init__(self, arrays: Mapping[str, Array], settings: dict[str, Any]) -> None:
        super().__init__(arrays)
        self.settings = settings

    def save(self, path: str | Path) -> None:
        """Write an .npz file that np.load opens. FileError if that cannot be."""
        text = json.dumps(self.settings, ensure_ascii=True)
        needed = sum(array.nbytes for array in self.values()) + 1000 * (len(self) + 1) + len(text)
        with replacing(path, needed) as out:
            np.savez(out, **{SETTINGS: np.frombuffer(text.encode(), np.uint8)}, **self)  # type: ignore[arg-type]


def trace(
    llava: LLaVA,
    prompt: str = "",
    images: Sequence[Source] = (),
    *,
    only: str | Iterable[str] | None = None,
    attention: bool = False,
    max_tokens: int = 1,
    template: str = "auto",
    progress: Progress = no_progress,
) -> Trace:
    """Run once, greedily, and keep what passes the taps that ``only`` names.

    only        shell patterns on names ("llm.blk.0.*"; "blk.0.*" is every stage's block 0); None: everything
                but attention's probabilities
    attention   keep those, too: n_head * n * n numbers a layer
    max_tokens  of the answer; 1 reads the prompt and chooses one token

    An image encoder alone is run on the pictures. Raises UsageError for a name that no tap of this model has, and
    what LLaVA.generate raises.
    """
    recorder = Chosen(choose(taps_of(llava), only, attention=attention), llava.ops.numpy)
    if llava.text is None:
        return _trace_pictures(llava, images, recorder, progress)
    plan = llava.plan(prompt, images, max_tokens=max_tokens, template=template)
    stream = llava.answer(plan, GREEDY, progress, recorder)
    for _ in stream:
        pass
    answer = {"answer_ids": np.array(stream.result.tokens, np.int32)}
    settings = _settings(llava, prompt=prompt, **_plan_settings(plan, stream.result))
    return Trace({"ids": prompt_ids(plan)} | _joined(recorder) | answer, settings)


def _trace_pictures(llava: LLaVA, images: Sequence[Source], recorder: Chosen, progress: Progress) -> Trace:
    """The trace of an image encoder without a language model."""
    pixels = [decode(source, llava.profile.exif) for source in images]
    if not pixels:
        raise UsageError("images", "none", wanted="a picture: there is no language model to read a prompt")
    for rgb in pixels:
        llava.vision_model.encode(rgb, recorder, progress)
    plans = [asdict(llava.vision_model.plan(rgb)) for rgb in pixels]
    return Trace(_joined(recorder), _settings(llava, pictures=plans))


# ---- which taps


class Chosen(Recorder):
    """A recorder of a set of full names, quick to ask however many there are."""

    def __init__(self, names: Collection[str], numpy: Any, _prefix: str = "", _values: Any = None) -> None:
        super().__init__(None, copy=lambda value: np.array(numpy(value)), _prefix=_prefix, _values=_values)
        self.names = names
        self.numpy = numpy

    def at(self, prefix: str) -> Chosen:
        return Chosen(self.names, self.numpy, f"{self.prefix}{prefix}.", self.values)

    def wants(self, name: str) -> bool:
        return self.prefix + name in self.names


def taps_of(llava: LLaVA) -> dict[str, tuple[str, ...]]:
    """Every tap of this model with the shape of one firing, in letters, in the order of the walk."""
    names: dict[str, tuple[str, ...]] = {}
    if llava.vision is not None:
        names |= llava.vision.taps()
    if llava.text is not None:
        names |= llava.text.taps()
    return dict(sorted(names.items(), key=lambda item: tap_names.walk(item[0])))


def choose(names: Collection[str], only: str | Iterable[str] | None, *, attention: bool) -> frozenset[str]:
    """The names that the patterns match, with or without their stage's prefix. UsageError if one matches none."""
    if only is None:
        return frozenset(name for name in names if attention or not name.endswith(".attn_weights"))
    chosen: set[str] = set()
    for pattern in [only] if isinstance(only, str) else only:
        ours = tap_names.from_transformers(pattern) or pattern  # theirs will do as well
        found = {name for name in names if fnmatchcase(name, ours) or fnmatchcase(name.partition(".")[2], ours)}
        if not found:
            raise unknown_tap(pattern, names)
        chosen |= found
    if attention:
        chosen |= {name for name in names if name.endswith(".attn_weights")}
    return frozenset(chosen)


def unknown_tap(pattern: str, names: Collection[str]) -> UsageError:
    """The error for a pattern that no tap matches, with the nearest names."""
    short = {name.partition(".")[2]: name for name in names if "." in name}
    near = get_close_matches(pattern, list(names), n=4, cutoff=0.5)
    near += [short[name] for name in get_close_matches(pattern, list(short), n=4, cutoff=0.5)]
    wanted = ", ".join(dict.fromkeys(near)) or "one of " + ", ".join(list(names)[:3]) + ", ..."
    hint = "`tinyllava trace --list` lists all"
    return UsageError(f"tap {pattern}", "no tap of this model", wanted=wanted, hint=hint)


# ---- from firings to arrays


def _joined(recorder: Recorder) -> dict[str, Array]:
    """Every tap's firings as one array; the recorder is emptied on the way, so that memory holds them once."""
    return {name: join(name, recorder.values.pop(name)) for name in list(recorder.values)}


def join(name: str, values: list[Array]) -> Array:
    """All firings of one tap as one array: see the module's docstring."""
    entry = tap_names.entry(name)
    if entry is not None and entry.stage in ("vit", "mm"):
        return np.stack(values)  # (n_tiles, ...)
    if len(values) == 1:
        return values[0]
    if entry is None or entry.stage != "llm":
        return np.concatenate(values)  # (n_tiles | n_image_tokens, ...)
    if "m" in entry.shape:
        longest = max(value.shape[-1] for value in values)
        values = [np.pad(value, [(0, 0), (0, 0), (0, longest - value.shape[-1])]) for value in values]
    return np.concatenate(values, axis=entry.shape.index("n"))


def prompt_ids(plan: Plan) -> Array:
    """The prompt's tokens (n_prompt,), int32: ids of text, -1 - k for those of picture k."""
    parts: list[Array] = []
    for part in plan.parts:
        if isinstance(part, ImageSlot):
            parts.append(np.full(plan.pictures[part.index].n_tokens, -1 - part.index, np.int32))
        else:
            parts.append(np.array(part, np.int32))
    return np.concatenate(parts)


# ---- settings


def _settings(llava: LLaVA, **more: Any) -> dict[str, Any]:
    """What the run was: the models, the profile with each of its choices, the backend."""
    settings: dict[str, Any] = {
        "program": "tinyllava",
        "version": __version__,
        "compat": llava.profile.name,
        "profile": asdict(llava.profile),
        "backend": llava.ops.name,
        "dtype": llava.ops.dtype.name,
        "n_batch": llava.n_batch,
    }
    if llava.text is not None:
        settings |= {"model": llava.text.path.name, "llm": asdict(llava.text.llama.config)}
    if llava.vision is not None:
        settings |= {"mmproj": llava.vision.path.name, "vit": asdict(llava.vision.config)}
    return json.loads(json.dumps(settings | more, default=str))  # type: ignore[no-any-return]


def _plan_settings(plan: Plan, result: Result) -> dict[str, Any]:
    return {
        "family": plan.family,
        "template": plan.template,
        "prompt_tokens": plan.prompt_tokens,
        "text_tokens": len(plan.text_ids),
        "max_tokens": plan.max_tokens,
        "pictures": [asdict(picture) for picture in plan.pictures],
        "answer": result.text,
        "finish_reason": result.finish_reason,
    }
