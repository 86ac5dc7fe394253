"""Ask the exported pair about pictures, on the CPU in float32.

    python golden/demo/evaluate.py tinyllava/demo tokenizer.model golden/demo/scenes [PHOTO ...]
    python golden/demo/evaluate.py tinyllava/demo tokenizer.model --fresh sprites.npz OUT.json [CHECKPOINT ...]

First form: the committed pictures, through PIL and the original LLaVA's preprocessing; photographs named
after them must be answered with "I am not sure ...".
Second form: fresh random scenes, drawn as in training.  With the checkpoints that the pair was averaged
from, some of the questions are also put to their average without quantisation.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from batches import BEFORE, IMAGE, empty_spec, write_spec
from compose import FIRST_NOUN_CLASS, contrast_table, load_sprites
from loader import load_pair, network_input
from model import Cache, Config, TinyLlava, dense_mask
from PIL import Image
from prompts import EOS, WordTokenizer
from questions import KIND_NAMES, ask
from scenes import Library, Scene, invent
from score import (
    ANSWER,
    PINNED,
    Case,
    Log,
    admitted,
    mistakes,
    prompt_tokens,
    prompt_variants,
    recall_precision,
    run_cases,
    summary,
)
from torch import nn
from train import Painter
from vocabulary import read_nouns

KNOWN = {"unknown": 0.0, "empty": 0.0}
NAMING = ("what", "list", "describe")
FEW = ("what", "list", "describe", "is there", "side")


@dataclass(frozen=True)
class Suite:
    """Which scenes are invented, and what is asked about them: up to `count` questions of every kind."""

    name: str
    kinds: tuple[str, ...]
    count: int
    invention: dict = field(default_factory=dict)
    side_px: int = 168
    role: str = "train"
    pinned: bool = False
    prompt: dict = field(default_factory=dict)
    seed: int = 31


STRANGERS = "held out unknown"
PINNED_KINDS = ("what", "list", "describe", "background", "is there", "how many", "side")
STYLE, ONE, STRANGE = "held out style", {"objects": 1}, {"objects": 1, "unknown": 1.0}
SUITES = (
    Suite("square", KIND_NAMES, 300, {"letterbox": 0.0} | KNOWN, seed=31),
    Suite("openmoji single", ("what",), 1000, ONE | KNOWN, role=STYLE, seed=32),
    Suite("openmoji lists", ("list",), 100, KNOWN, role=STYLE, seed=33),
    Suite("held out unknown", ("what", "list"), 100, STRANGE, role=STRANGERS, seed=34),
    Suite("openmoji unknown", ("what", "list"), 100, STRANGE, role=STYLE, seed=35),
    Suite("painted photos", NAMING, 50, {"photo": True}, seed=36),
    Suite("known things", ("what",), 300, ONE | KNOWN, seed=37),
    Suite("empty", ("what", "list", "background"), 50, {"empty": 1.0}, seed=38),
    Suite("letterboxed", KIND_NAMES, 150, {"letterbox": 1.0} | KNOWN, side_px=336, seed=39),
    Suite("letterboxed small", KIND_NAMES, 150, {"letterbox": 1.0} | KNOWN, side_px=128, seed=40),
    Suite("pinned", PINNED_KINDS, 80, KNOWN, pinned=True, seed=41),
    *(Suite(f"prompt: {name}", FEW, 24, KNOWN, prompt=put, seed=42) for name, put in prompt_variants().items()),
    Suite("mixed with unknown", ("list", "describe", "total"), 60, {"unknown": 1.0}, seed=43),
)
ADMITTED = ("held out unknown", "openmoji unknown", "painted photos", "known things")


def scene_cases(folder: Path) -> tuple[torch.Tensor, list[Case]]:
    """Network inputs and cases of scenes.json (or demo.json)."""
    entries = json.loads(next(folder.glob("*.json")).read_text(encoding="utf8"))
    entries = entries if isinstance(entries, list) else [entries]
    pictures, cases = [], []
    for i, entry in enumerate(entries):
        with Image.open(folder / (entry.get("file") or entry["picture"])) as image:
            pictures.append(network_input(image))
        cases += [Case(i, q["kind"], q["question"], q["answer"]) for q in entry["questions"]]
    return torch.stack(pictures), cases


def photo_cases(paths: list[str]) -> tuple[torch.Tensor, list[Case]]:
    """Three naming questions about each photograph."""
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(network_input(image))
    questions = ("What is this?", "What is in the picture?", "Describe the picture.")
    return torch.stack(pictures), [Case(i, "photo", q, "") for i in range(len(paths)) for q in questions]


def invent_cases(library: Library, suite: Suite, rng: random.Random) -> tuple[list[Scene], list[Case]]:
    """Scenes, and the suite's questions about them; a scene that adds no question is left out."""
    left = dict.fromkeys(suite.kinds, suite.count)
    scenes: list[Scene] = []
    cases: list[Case] = []
    for _ in range(12 * suite.count):
        scene = invent(rng, library, **suite.invention)
        before = len(cases)
        for kind in (kind for kind in suite.kinds if left[kind]):
            for _ in range(12 if suite.pinned else 3):
                asked = ask(scene, rng, kind)
                if asked and (not suite.pinned or PINNED.fullmatch(asked[1])):
                    cases.append(Case(len(scenes), *asked, **suite.prompt))
                    left[kind] -= 1
                    break
        scenes += [scene] if len(cases) > before else []
        if not any(left.values()):
            break
    return scenes, cases


def draw_scenes(sprites: np.ndarray, scenes: list[Scene], rng: random.Random, side_px: int) -> torch.Tensor:
    """(n, 3, 168, 168) as the network sees them; on a CPU, a few pictures at a time are faster than many."""
    torch.manual_seed(rng.randrange(1 << 30))
    used = sorted({item.sprite for scene in scenes for item in scene.items} | set(range(0, len(sprites), 250)))
    painter = Painter(sprites[used], "cpu", 64 if any(scene.photo for scene in scenes) else 1)
    row = {sprite: i for i, sprite in enumerate(used)}
    parts = []
    for i in range(0, len(scenes), 4):
        spec = empty_spec(len(scenes[i : i + 4]))
        for k, scene in enumerate(scenes[i : i + 4]):
            write_spec(spec, k, scene, rng)
        spec["sprite"] = np.vectorize(lambda sprite: row.get(sprite, 0))(spec["sprite"])
        parts.append(painter({name: torch.from_numpy(value) for name, value in spec.items()}, side_px)[0])
    return torch.cat(parts)


class LongCache(Cache):
    """A cache that also takes several new tokens at once, all rows at the same place `start`."""

    start: int | None = None

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows only; a row may be kept several times."""
        self.kept = {block: [store[rows] for store in kept] for block, kept in self.kept.items()}

    def extend(self, block: nn.Module, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values (B, H, T, E); all that the new tokens may look at."""
        if self.start is None:
            return super().extend(block, k, v)
        for store, new in zip(self.kept[block], (k, v), strict=True):
            store[:, :, self.start : self.start + new.shape[2]] = new
        return self.kept[block][0], self.kept[block][1]


class Talk:
    """Several questions about projected pictures (n, 144, D), each picture read once: faster than score's way."""

    def __init__(
        self, model: TinyLlava, pictures: torch.Tensor, cases: list[Case], tokenizer: WordTokenizer
    ) -> None:
        """Reads the prompts' first part and the pictures; all cases have the same layout."""
        prompts = [prompt_tokens(case, tokenizer) for case in cases]
        self.model, self.cases, self.after = model, cases, [after for _, after in prompts]
        self.before, self.longest = prompts[0][0], max(len(after) for after in self.after)
        self.start, self.first = BEFORE + IMAGE, BEFORE - len(self.before)
        self.keys = torch.arange(self.start + self.longest + ANSWER)
        self.places = (self.keys - self.first).clamp(min=0)
        self.cache = LongCache(len(self.keys))
        numbers = sorted({case.picture for case in cases})
        tokens = torch.zeros(len(numbers), self.start, dtype=torch.long)
        tokens[:, self.first : BEFORE] = torch.tensor(self.before)
        segments = torch.where(self.keys[None, : self.start] < self.first, -1, 0)
        places = self.places[None, : self.start].expand(len(numbers), -1)
        model.language(model.embed(tokens, pictures[numbers], BEFORE), places, dense_mask(segments), self.cache)
        self.cache.select(torch.tensor([numbers.index(case.picture) for case in cases]))

    def ask(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads all questions at once: hidden states (B, D) at their ends, and where those are, (B,)."""
        asked = torch.tensor([after + [0] * (self.longest - len(after)) for after in self.after])
        visible = (self.keys >= self.first) & (self.keys < self.start + 1 + torch.arange(self.longest)[:, None])
        places = self.places[None, self.start : self.start + self.longest].expand(len(asked), -1)
        lengths = torch.tensor([len(after) for after in self.after])
        self.cache.start = self.start
        hidden = self.model.language(self.model.token_embd(asked), places, visible[None, None], self.cache)
        self.cache.start = None
        return hidden[torch.arange(len(asked)), lengths - 1], self.start + lengths

    def answer(self) -> list[list[int]]:
        """Greedy answers' tokens; a row whose answer has ended is dropped."""
        hidden, ends = self.ask()
        said: list[list[int]] = [[] for _ in self.after]
        live = torch.arange(len(said))
        for _ in range(ANSWER - 1):
            best = self.model.output(hidden).argmax(-1)
            going = (best != EOS).nonzero()[:, 0]
            if len(going) < len(live):
                live, best, ends = live[going], best[going], ends[going]
                self.cache.select(going)
            if not len(live):
                break
            for i, token in zip(live.tolist(), best.tolist(), strict=True):
                said[i].append(token)
            self.cache.at = ends
            visible = ((self.keys >= self.first) & (self.keys <= ends[:, None]))[:, None, None]
            x = self.model.token_embd(best)[:, None]
            hidden = self.model.language(x, self.places[ends][:, None], visible, self.cache)[:, 0]
            ends = ends + 1
        return said


@torch.no_grad()
def run_shared(model: TinyLlava, pixels: torch.Tensor, cases: list[Case], tokenizer: WordTokenizer) -> None:
    """As score.run_cases, eight pictures at a time."""
    for i in range(0, len(pixels), 8):
        part = [case for case in cases if i <= case.picture < i + 8]
        if part:
            features = model.project(model.vision(pixels[i : i + 8]))
            moved = [replace(case, picture=case.picture - i) for case in part]
            for case, said in zip(part, Talk(model, features, moved, tokenizer).answer(), strict=True):
                case.said = tokenizer.spm.decode(said)


def answered(
    model: TinyLlava, libraries: dict[str, Library], sprites: np.ndarray, suite: Suite, tokenizer: WordTokenizer
) -> tuple[torch.Tensor, list[Case]]:
    """A suite's pictures and answered questions."""
    rng = random.Random(1_000_003 * suite.seed)
    scenes, cases = invent_cases(libraries[suite.role], suite, rng)
    pictures = draw_scenes(sprites, scenes, rng, suite.side_px)
    run_shared(model, pictures, cases, tokenizer)
    return pictures, cases


def mean_model(folders: list[Path]) -> TinyLlava:
    """The checkpoints' average in float32, not quantised."""
    from export import average

    model = TinyLlava(Config(), FIRST_NOUN_CLASS + len(read_nouns()))
    model.load_state_dict({name: torch.from_numpy(array).float() for name, array in average(folders).items()})
    return model.eval()


def compare(exact: TinyLlava, pictures: torch.Tensor, cases: list[Case], tokenizer: WordTokenizer) -> dict:
    """How many answers are others without quantisation, of 40 questions of a kind, or of all if of one kind."""
    most = 40 if len({case.kind for case in cases}) > 1 else len(cases)
    chosen = [c for kind in {c.kind: 0 for c in cases} for c in [c for c in cases if c.kind == kind][:most]]
    again = [replace(case, said="") for case in chosen]
    run_shared(exact, pictures, again, tokenizer)
    other = [(a, b) for a, b in zip(chosen, again, strict=True) if a.said != b.said]
    return {
        "n": len(chosen),
        "answers that differ": len(other),
        "right, Q8_0": sum(case.right for case in chosen),
        "right, float32": sum(case.right for case in again),
        "Q8_0 | float32 | wanted": [f"{a.question} | {a.said} | {b.said} | {a.answer}" for a, b in other],
    }


def evaluate_fresh(pair: Path, tokenizer: WordTokenizer, sprites: Path, out: Path, floats: list[Path]) -> None:
    """Every suite; the file is written again after each."""
    torch.set_num_threads(1)
    pixels, facts = load_sprites(sprites)
    contrast = contrast_table(pixels)
    libraries = {role: Library(facts, read_nouns(), contrast, role) for role in ("train", STYLE, STRANGERS)}
    model = load_pair(pair)
    exact = mean_model(floats) if floats else None
    results = Log()
    for suite in SUITES:
        pictures, cases = answered(model, libraries, pixels, suite, tokenizer)
        results[suite.name] = summary(cases)
        if suite.name == "square":
            captions = [case for case in cases if case.kind in ("list", "describe")]
            results["captions recall, precision"] = [round(100 * v, 2) for v in recall_precision(captions)]
        if suite.name in ADMITTED:
            results[f"{suite.name}, admitted"] = admitted(cases)
        if mistakes(cases) and not suite.name.startswith("prompt"):
            results[f"{suite.name}, mistakes"] = mistakes(cases, 30)
        if exact and suite.name in ("square", "openmoji single"):
            results[f"{suite.name}, Q8_0 against float32"] = compare(exact, pictures, cases, tokenizer)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


def evaluate_stored(pair: Path, tokenizer: WordTokenizer, scenes: Path, photos: list[str]) -> None:
    """The committed pictures, and photographs."""
    model = load_pair(pair)
    for folder in (pair, scenes):
        pictures, cases = scene_cases(folder)
        run_cases(model, pictures, cases, tokenizer, 32)
        print(folder, json.dumps(summary(cases)))
        print("  " + "\n  ".join(mistakes(cases, 40)))
    if photos:
        pictures, cases = photo_cases(photos)
        run_cases(model, pictures, cases, tokenizer, 32)
        print("photographs admitted", admitted(cases))


def main() -> None:
    """Print accuracies and mistakes."""
    pair, tokenizer = Path(sys.argv[1]), WordTokenizer(Path(sys.argv[2]))
    if sys.argv[3] == "--fresh":
        evaluate_fresh(pair, tokenizer, Path(sys.argv[4]), Path(sys.argv[5]), [Path(p) for p in sys.argv[6:]])
    else:
        evaluate_stored(pair, tokenizer, Path(sys.argv[3]), sys.argv[4:])


if __name__ == "__main__":
    main()
