"""Ask a model questions about fresh scenes and count exactly right answers."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from batches import BEFORE, IMAGE, empty_spec, write_spec
from model import Cache, TinyLlava, dense_mask
from prompts import EOS, LAYOUTS, WordTokenizer
from questions import KIND_NAMES, ask
from scenes import Library, Scene, invent
from torch import Tensor
from vocabulary import read_nouns

QUESTION, ANSWER = 72, 64  # tokens, at most

# The wordings that people will try first.
PINNED = re.compile(
    r"What is this\?|What objects are in the picture\?|What is in the picture\?|Describe the picture\."
    r"|What color is the background\?|Is there an? .* in the picture\?|How many .* are there\?"
    r"|What is (to the left of|to the right of|above|below) the .*\?"
)


@dataclass
class Case:
    """One question about one picture, and how it is put."""

    picture: int
    kind: str
    question: str
    answer: str
    layout: str = "llava_v1"
    space: bool = True
    trailing: bool = False
    said: str = ""

    @property
    def right(self) -> bool:
        """Whether every character is as wanted."""
        return self.said == self.answer


def prompt_tokens(case: Case, tokenizer: WordTokenizer) -> tuple[list[int], list[int]]:
    """Tokens before and after the picture."""
    layout = LAYOUTS[case.layout]
    text = layout.after.replace("{}", case.question)
    return tokenizer.before(layout), tokenizer.turn(text, case.space, case.trailing)


@torch.no_grad()
def answer_batch(model: TinyLlava, pictures: Tensor, cases: list[Case], tokenizer: WordTokenizer) -> None:
    """Greedy answers to all cases at once; pictures are projected features (n, 144, D)."""
    device, start = pictures.device, BEFORE + IMAGE
    length = start + QUESTION + ANSWER
    tokens = torch.zeros(len(cases), length, dtype=torch.long)
    segments = torch.full((len(cases), length), -1)
    positions = torch.zeros(len(cases), length, dtype=torch.long)
    ends = torch.zeros(len(cases), dtype=torch.long)
    for i, case in enumerate(cases):
        before, after = prompt_tokens(case, tokenizer)
        tokens[i, BEFORE - len(before) : BEFORE] = torch.tensor(before)
        tokens[i, start : start + len(after)] = torch.tensor(after)
        segments[i, BEFORE - len(before) : start + len(after)] = 0
        positions[i] = (torch.arange(length) - (BEFORE - len(before))).clamp(min=0)
        ends[i] = start + len(after)
    tokens, segments, positions, ends = (t.to(device) for t in (tokens, segments, positions, ends))
    images = pictures[torch.tensor([case.picture for case in cases], device=device)]
    rows = torch.arange(len(cases), device=device)
    done = torch.zeros(len(cases), dtype=torch.bool, device=device)
    first, used = ends.clone(), int(ends.max())
    cache = Cache(used + ANSWER)
    x = model.embed(tokens[:, :used], images, BEFORE)
    hidden = model.language(x, positions[:, :used], dense_mask(segments[:, :used]), cache)[rows, ends - 1]
    for _ in range(ANSWER - 1):
        best = torch.where(done, EOS, model.output(hidden).argmax(-1))
        tokens[rows, ends], segments[rows, ends] = best, 0
        done |= best == EOS
        if bool(done.all()):
            break
        cache.at = ends.clone()
        seen = (segments[:, : used + ANSWER] == 0)[:, None, None]
        hidden = model.language(model.token_embd(best)[:, None], positions[rows, ends][:, None], seen, cache)[:, 0]
        ends += (~done).long()
    for i, case in enumerate(cases):
        case.said = tokenizer.spm.decode(tokens[i, first[i] : ends[i]].tolist()).removesuffix("</s>")


def run_cases(
    model: TinyLlava, pixels: Tensor, cases: list[Case], tokenizer: WordTokenizer, rows: int = 512
) -> None:
    """Look at all pictures, then answer all cases."""
    on_gpu = pixels.device.type == "cuda"
    with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=on_gpu):
        features = torch.cat([model.project(model.vision(part)) for part in pixels.split(256)])
        ordered = sorted(cases, key=lambda case: len(case.question))
        for i in range(0, len(cases), rows):
            answer_batch(model, features, ordered[i : i + rows], tokenizer)


def scene_cases(
    scenes: list[Scene], rng: random.Random, kinds: tuple[str, ...], pinned: bool = False
) -> list[Case]:
    """Each kind of question once about each scene that allows it."""
    cases = []
    for i, scene in enumerate(scenes):
        for kind in kinds:
            for _ in range(12 if pinned else 3):
                asked = ask(scene, rng, kind)
                if asked and (not pinned or PINNED.fullmatch(asked[1])):
                    cases.append(Case(i, *asked))
                    break
    return cases


def phrases(answer: str) -> Counter[str]:
    """The things that a caption or list names, with their counts in words."""
    text = re.sub(r"^(The picture shows|This is( a picture of)?) ", "", answer)
    text = re.sub(r" on an? \w+ \w+ background\.$|\.$", "", text)
    text = re.sub(r"fork(s?) and kni", r"fork\1 & kni", text)
    return Counter(part.lower() for part in re.split(r", | and ", text) if part)


def recall_precision(cases: list[Case]) -> tuple[float, float]:
    """Of the things in the captions: how many were named, how many of the named are there."""
    wanted = said = both = 0
    for case in cases:
        a, b = phrases(case.answer), phrases(case.said)
        wanted, said, both = wanted + a.total(), said + b.total(), both + (a & b).total()
    return both / max(wanted, 1), both / max(said, 1)


def summary(cases: list[Case]) -> dict[str, float]:
    """Share of exactly right answers, in percent, per kind and in all."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for case in cases:
        groups[case.kind].append(case.right)
        groups["all"].append(case.right)
    return {kind: round(100 * float(np.mean(right)), 2) for kind, right in sorted(groups.items())} | {
        "n": len(cases)
    }


class Examiner:
    """Runs suites of fresh scenes against one model."""

    def __init__(self, model: TinyLlava, painter, facts: list[dict], contrast: np.ndarray,
                 tokenizer: WordTokenizer, device: str) -> None:  # fmt: skip
        """painter: train.Painter."""
        self.model, self.painter, self.tokenizer, self.device = model, painter, tokenizer, device
        self.libraries = {role: Library(facts, read_nouns(), contrast, role)
                          for role in ("train", "held out style", "held out unknown")}  # fmt: skip

    def pixels(self, scenes: list[Scene], rng: random.Random, side_px: int) -> Tensor:
        """Draw scenes as the network sees them."""
        spec = empty_spec(len(scenes))
        for i, scene in enumerate(scenes):
            write_spec(spec, i, scene, rng)
        parts = []
        for i in range(0, len(scenes), 128):
            part = {k: torch.from_numpy(v[i : i + 128]).to(self.device) for k, v in spec.items()}
            parts.append(self.painter(part, side_px)[0])
        return torch.cat(parts)

    def suite(
        self,
        count: int,
        kinds: tuple[str, ...] = KIND_NAMES,
        role: str = "train",
        side_px: int = 168,
        seed: int = 9,
        pinned: bool = False,
        prompt: dict | None = None,
        **invention,
    ) -> list[Case]:
        """Answered cases of one suite."""
        rng = random.Random(1_000_003 * seed)
        scenes = [invent(rng, self.libraries[role], **invention) for _ in range(count)]
        cases = scene_cases(scenes, rng, kinds, pinned)
        for case in cases:
            for name, value in (prompt or {}).items():
                setattr(case, name, value)
        run_cases(self.model, self.pixels(scenes, rng, side_px), cases, self.tokenizer)
        return cases


def admitted(cases: list[Case]) -> float:
    """Percent of answers that say "I am not sure"."""
    return round(100 * float(np.mean(["not sure" in case.said for case in cases])), 2)


def mistakes(cases: list[Case], count: int = 12) -> list[str]:
    """Some wrong answers, for reading."""
    return [f"{case.kind}: {case.question} | {case.answer} | {case.said}" for case in cases if not case.right][
        :count
    ]


def prompt_variants() -> dict[str, dict]:
    """Every layout, with and without the extra piece and the trailing space."""
    variants = {f"{name}, {'with' if space else 'without'} space piece": {"layout": name, "space": space}
                for name in LAYOUTS for space in (True, False)}  # fmt: skip
    return variants | {
        "llava_v1, trailing space": {"trailing": True},
        "hf, trailing space": {"layout": "hf", "trailing": True},
    }


class Log(dict):
    """A dictionary that prints what is put in."""

    def __setitem__(self, name: str, value: object) -> None:
        """Store and print."""
        super().__setitem__(name, value)
        print(
            name,
            "\n  ".join(["", *value]) if isinstance(value, list) and isinstance(value[0], str) else value,
            flush=True,
        )


def admit_unknown(examiner: Examiner, results: Log, count: int) -> None:
    """What the model must not pretend to know, and that it still knows the rest."""
    known = {"unknown": 0.0, "empty": 0.0}
    naming = ("what", "list", "describe")
    for name, role in (
        ("held out unknown", "held out unknown"),
        ("openmoji unknown", "held out style"),
        ("trained unknown", "train"),
    ):
        if examiner.libraries[role].unknown:
            cases = examiner.suite(count, ("what", "list"), role=role, objects=1, unknown=1.0, seed=15)
            results[f"{name} admitted"] = admitted(cases)
    results["painted photos admitted"] = admitted(examiner.suite(count, naming, photo=True, seed=16))
    results["known admitted"] = admitted(examiner.suite(count, ("what",), objects=1, seed=17, **known))
    results["mixed with unknown"] = summary(
        examiner.suite(count, ("list", "describe", "total"), unknown=1.0, seed=18)
    )
    empty = examiner.suite(max(1, count // 4), ("what", "list", "background"), empty=1.0, seed=19)
    results["empty"] = summary(empty)


def evaluate_all(model: TinyLlava, painter, facts: list[dict], contrast: np.ndarray, tokenizer: WordTokenizer,
                 count: int, device: str) -> dict:  # fmt: skip
    """Every suite; percentages by name, and some mistakes."""
    model.eval()
    examiner = Examiner(model, painter, facts, contrast, tokenizer, device)
    results = Log()
    known = {"unknown": 0.0, "empty": 0.0}
    square = examiner.suite(2 * count, letterbox=0.0, **known)
    captions = [case for case in square if case.kind in ("describe", "list")]
    results["square"] = summary(square)
    results["captions recall, precision"] = [round(100 * v, 2) for v in recall_precision(captions)]
    boxed = examiner.suite(2 * count, side_px=336, letterbox=1.0, seed=10, **known)
    results["letterboxed"] = summary(boxed)
    results["letterboxed small"] = summary(examiner.suite(count, side_px=128, letterbox=1.0, seed=11, **known))
    results["pinned"] = summary(examiner.suite(count, seed=12, pinned=True, **known))
    style = {"role": "held out style", **known}
    single = examiner.suite(2 * count, ("what", "list"), objects=1, seed=13, **style)
    several = examiner.suite(count, ("what", "list", "is there", "how many", "side", "describe"), seed=14, **style)
    results["openmoji single"], results["openmoji"] = summary(single), summary(several)
    results["openmoji single admitted"] = admitted(single)
    results["openmoji captions"] = [
        round(100 * v, 2) for v in recall_precision([c for c in several if c.kind == "list"])
    ]
    admit_unknown(examiner, results, count)
    few = ("what", "list", "describe", "is there", "side")
    results["prompts"] = {
        name: summary(examiner.suite(max(1, count // 2), few, seed=20, prompt=prompt, **known))["all"]
        for name, prompt in prompt_variants().items()
    }
    results["mistakes"] = mistakes(square, 30) + mistakes(boxed, 20) + mistakes(single, 20)
    return dict(results)
