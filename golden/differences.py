"""Known differences between implementations: measure each, and show all as a table.

    python -m golden.differences measure [--no-answers] [ID ...]    writes figures into known_differences.toml
    python -m golden.differences table                              prints the table of golden/differences.md

An ID is a difference's, a profile's (what the demo answers right with all its choices), or "drawn".
"""

import argparse
import atexit
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from golden.clip_models import VISION, write_mmproj
from golden.pictures import picture
from tinyllava import demo, load
from tinyllava.files.gguf import open_gguf
from tinyllava.files.gguf_write import NewTensor, copy_metadata, write_gguf
from tinyllava.llava import GREEDY, LLaVA
from tinyllava.profile import LLAVA, PROFILES, Profile
from tinyllava.study.compare.differences import read_table
from tinyllava.text.sampling import Sampling
from tinyllava.vision.clip import load_vision
from tinyllava.vision.config import VisionConfig
from tinyllava.vision.projector import load_projector

FOLDER = Path(__file__).parent
FILE = FOLDER / "known_differences.toml"
SCENES = FOLDER / "demo" / "scenes"
SIZES = [(56, 56), (40, 30), (30, 40), (100, 60), (113, 57), (200, 150), (333, 77), (77, 333), (640, 480)]
QUESTIONS_A_SCENE = 2
N_DRAWS = 5  # answers drawn for each question, with seeds 0, 1, ...
MAX_TOKENS = 32
TEXT = ("wording", "templates", "space_prefix", "stop_texts")  # choices that do not reach the embeddings
ROTATED = 6  # EXIF's mark of a picture to be turned by 90 degrees


@dataclass(frozen=True)
class Figures:
    """What flipping one choice changes."""

    effect: float | None = None
    tokens: tuple[int, int] | None = None
    answers: float | None = None
    right: float | None = None


def read() -> dict[str, Any]:
    """The whole file: "demo", and "difference", a list."""
    return read_table(FILE.read_text())


def flipped(difference: dict[str, Any]) -> Profile:
    """The original's profile with one choice changed."""
    value = difference["flip"]
    return replace(LLAVA, **{difference["choice"]: tuple(value) if isinstance(value, list) else value})


# ---- models and pictures


@lru_cache(None)
def files(model: str) -> tuple[Path | None, Path]:
    """(language model, image encoder). Of the demo float32 copies: on its own Q8_0, the fast backend rounds
    activations to 8 bits. Random towers come without a language model."""
    folder = Path(tempfile.mkdtemp(prefix="differences-"))
    atexit.register(shutil.rmtree, folder)
    if model != "demo":
        write_mmproj(folder / "mmproj.gguf", VISION[model])
        return None, folder / "mmproj.gguf"
    for path in (demo.MODEL, demo.MMPROJ):
        with open_gguf(path) as file:
            new = [NewTensor(t.name, t.shape, "F32", lambda t=t: [t.dequantize()]) for t in file.tensors.values()]
            write_gguf(folder / path.name, copy_metadata(file), new)
    return folder / demo.MODEL.name, folder / demo.MMPROJ.name


@lru_cache(None)
def original(model: str) -> LLaVA:
    """A model with all of the original's choices."""
    return load(*files(model), backend="numba" if model == "demo" else "numpy")


def with_choices(model: str, profile: Profile) -> LLaVA:
    """The same model by another profile."""
    base, file = original(model), open_gguf(files(model)[1])
    config = VisionConfig.from_gguf(file, profile)
    tower, projector = load_vision(file, config, base.ops), load_projector(file, config, base.ops)
    changes = {"config": config, "weights": tower, "projector": projector, "profile": profile}
    return LLaVA(base.ops, profile, text=base.text, vision=replace(base.vision_model, **changes))


def pictures(model: str, marked: bool) -> Iterator[Any]:
    """The pictures on which a model's embeddings are measured; ``marked``: as a camera held upright saves them."""
    if model == "demo":
        images = [Image.open(SCENES / scene["file"]).convert("RGB") for scene in scenes()]
    else:
        images = [Image.fromarray(picture(*size)) for size in SIZES]
    for image in images:
        buffer = io.BytesIO()
        exif = Image.Exif()
        if marked:
            exif[0x0112] = ROTATED
        image.save(buffer, "PNG", exif=exif)
        yield buffer.getvalue()


@lru_cache(None)
def scenes() -> list[dict[str, Any]]:
    """The demo's test pictures, with questions and answers."""
    return json.loads(next(SCENES.glob("*.json")).read_text())


# ---- measuring


def embeddings(model: str, profile: Profile, marked: bool = False) -> tuple[float | None, Any]:
    """(relative change, None), or (None, numbers of tokens before and after)."""
    after = with_choices(model, profile)
    changes, counts = [], []
    for source, x in zip(pictures(model, marked), originals(model, marked), strict=True):
        y = after.encode_image(source)
        counts.append((len(x), len(y)))
        if x.shape == y.shape:
            changes.append(float(np.linalg.norm(y - x) / np.linalg.norm(x)))
    if any(x != y for x, y in counts):
        return None, [int(n) for n in np.sum(counts, axis=0)]
    return float(np.mean(changes)), None


@lru_cache(None)
def originals(model: str, marked: bool) -> list[Any]:
    """The embeddings of all pictures by the original's choices."""
    return [original(model).encode_image(source) for source in pictures(model, marked)]


def asked() -> Iterator[tuple[Path, str, str]]:
    """(picture, question, right answer): some questions of each scene, of all its kinds in turn."""
    for i, scene in enumerate(scenes()):
        questions = scene["questions"]
        step = max(1, len(questions) // QUESTIONS_A_SCENE)
        for question in questions[i % step :: step][:QUESTIONS_A_SCENE]:
            yield SCENES / scene["file"], question["question"], question["answer"]


def answers(profile: Profile, marked: bool = False, sampling: Sampling = GREEDY) -> list[str]:
    """The demo's answers to all questions; ``marked``: about pictures as a camera held upright saves them."""
    llava = with_choices("demo", profile)
    sources = dict(zip((scene["file"] for scene in scenes()), pictures("demo", marked), strict=True))
    encode, seen = llava.vision_model.encode, {}

    def encode_once(rgb: Any, *rest: Any) -> Any:
        key = rgb.tobytes()
        if key not in seen:
            seen[key] = encode(rgb, *rest)
        return seen[key]

    llava.vision_model.encode = encode_once  # type: ignore[method-assign]
    return [
        llava.generate(question, [sources[path.name]], MAX_TOKENS, sampling).text.strip()
        for path, question, _ in asked()
    ]


def drawn(profile: Profile, greedy: list[str]) -> float:
    """How many answers drawn as the profile draws them are not the greedy one; all else is the original's."""
    p, differ = profile, []
    for seed in range(N_DRAWS if p.temperature > 0 else 0):
        sampling = Sampling(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, seed=seed)
        differ.append(1 - share(answers(LLAVA, sampling=sampling), greedy))
    return float(np.mean(differ)) if differ else 0.0


def share(found: list[str], wanted: list[str]) -> float:
    """How many of them are equal, 0..1."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def measure(with_answers: bool, only: list[str]) -> None:
    """Fill in every figure of the file, or of the differences in ``only``."""
    usual = answers(LLAVA) if with_answers else []
    text = FILE.read_text()
    for key, value in demo_figures(usual, only).items() if with_answers else ():
        print(key, value, flush=True)
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    FILE.write_text(text)
    for difference in read()["difference"]:
        if "flip" not in difference or (only and difference["id"] not in only):
            continue
        lines = figures_of(difference, usual)
        print(difference["id"], *lines, flush=True)
        text = with_lines(text, difference["id"], lines, keep=() if with_answers else ("answers", "right"))
        FILE.write_text(text)


def right_answers() -> list[str]:
    """The right answers to all questions."""
    return [answer for _, _, answer in asked()]


def demo_figures(usual: list[str], only: list[str]) -> dict[str, str]:
    """The lines of the table [demo]."""
    found = {"questions": str(len(usual))}
    for name, profile in PROFILES.items():
        if not only or name in only:
            said = usual if profile is LLAVA else answers(profile)
            found[f"right-{name}"] = f"{share(said, right_answers()):.3f}"
        if not only or "drawn" in only:
            found[f"drawn-{name}"] = f"{drawn(profile, usual):.3f}"
    return found


def figures_of(difference: dict[str, Any], usual: list[str]) -> list[str]:
    """The lines of one difference; those about answers only if ``usual``, the original's answers, are given."""
    profile, marked = flipped(difference), difference["choice"] == "exif"
    effect, tokens = 0.0, None
    if difference["choice"] not in TEXT:
        effect, tokens = embeddings(difference["model"], profile, marked)
    lines = [f"effect = {effect:.3g}" if tokens is None else f"tokens = {tokens}"]
    if difference["model"] == "demo" and usual:
        unseen = effect == 0 and difference["choice"] not in TEXT
        before = answers(LLAVA, marked) if marked else usual
        found = usual if unseen else answers(profile, marked)
        lines.append(f"answers = {1 - share(found, before):.3f}")
        lines += [] if marked else [f"right = {share(found, right_answers()):.3f}"]
    return lines


def with_lines(text: str, id: str, lines: list[str], keep: tuple[str, ...]) -> str:
    """The file's text with the figures of one difference replaced."""
    start = text.index(f'id = "{id}"\n')
    end = text.find("\n[[difference]]", start)
    end = len(text) if end < 0 else end
    names = [name for name in ("effect", "tokens", "answers", "right") if name not in keep]
    entry = re.sub(rf"(?m)^({'|'.join(names)}) = .*\n", "", text[start:end])
    place = entry.index("what = ")
    return text[:start] + entry[:place] + "".join(f"{line}\n" for line in lines) + entry[place:] + text[end:]


# ---- golden/differences.md's table, and README.md's sentence

HEADER = ("difference", *PROFILES, "embeddings", "answers")


def table() -> str:
    """All differences as Markdown."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for difference in read()["difference"]:
        cells = [difference["what"], *(difference[name] for name in PROFILES)]
        rows.append((*cells, embeddings_cell(difference), answers_cell(difference)))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def sentence() -> str:
    """The result for README.md: the largest changes by one choice, and how much each profile answers right."""
    found = read()
    entries, figures = found["difference"], found["demo"]
    effect, changed = (max(entry.get(key, 0) for entry in entries) for key in ("effect", "answers"))
    right = ", ".join(f"{percent(figures[f'right-{name}'])} as {name}" for name in PROFILES)
    return (
        f"Of [{len(entries)} known differences](golden/differences.md) one alone changes a picture's embeddings "
        f"by up to {percent(effect)} and the demo's answers by up to {percent(changed)}; of "
        f"{figures['questions']} questions about drawn scenes it answers exactly right {right}."
    )


def embeddings_cell(difference: dict[str, Any]) -> str:
    """What the embeddings' column says."""
    if "tokens" in difference:
        before, after = difference["tokens"]
        return f"{before} → {after} tokens"
    if "effect" in difference:
        return percent(difference["effect"]) if difference["effect"] else "0"
    return difference.get("note", "")


def answers_cell(difference: dict[str, Any]) -> str:
    """What the answers' column says."""
    if difference["id"] == "sampling":
        demo_figures = read()["demo"]
        shares = (f"{name} {percent(demo_figures[f'drawn-{name}'])}" for name in PROFILES)
        return "drawn ones that are not the greedy one: " + ", ".join(shares)
    if "answers" in difference:
        return percent(difference["answers"]) if difference["answers"] else "0"
    return difference.get("answers-note", "not reproduced")


def percent(x: float) -> str:
    """Two digits: 53 %, 1.7 %, 0.0093 %."""
    return f"{float(f'{100 * x:.2g}'):g} %"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m golden.differences", description=__doc__)
    parser.add_argument("action", choices=["measure", "table"])
    parser.add_argument("ids", nargs="*", help="what to measure (default: everything)")
    parser.add_argument("--no-answers", action="store_true", help="measure embeddings only")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
    else:
        measure(not arguments.no_answers, arguments.ids)


if __name__ == "__main__":
    main()
