"""Two checkouts of this project side by side: do they compute the same bits, and how long does each take?

    python -m tests.two_checkouts BEFORE AFTER --folder F          same bits? (--bits, the default)
    python -m tests.two_checkouts BEFORE AFTER --formats           the demo pair alone: no models, F is not needed
    python -m tests.two_checkouts BEFORE AFTER --backend cupy --tolerance 1e-6 --folder F      as a GPU needs it
    python -m tests.two_checkouts BEFORE --cache --folder F        the run that compiles against the one after it
    python -m tests.two_checkouts BEFORE AFTER --time --folder F   within 2 % and the spread of BEFORE with itself?

BEFORE and AFTER are folders. Each checkout works in a process of its own (checkout_worker.py) with a kernel cache
of its own. F holds random models at true shapes, 0.7 to 2.4 GB each; those that are missing are written.

--bits compares the demo pair for all profiles: embeddings, logits, the greedy answer and the logits of its steps;
and models of 1.26 billion weights in each of --formats: logits of a prompt of 300 tokens, of 20 tokens read one by
one, and of an answer's 8 steps. Both checkouts fill their cache first. The numpy backend reads the demo pair only.
--time takes turns, BEFORE, AFTER, BEFORE again, and compares the best ones. Nothing else should run meanwhile.
Exit code 1 if anything differs, or is slower.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from golden.clip_models import VISION, write_mmproj
from tests.true_shapes import LLAMA_1B, VIT_L_15, Shape, write_llama

WORKER = Path(__file__).with_name("checkout_worker.py")
PROFILES = ("llava", "hf", "llava-cli", "mtmd")
FORMATS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
TINY = Shape(256, 2, 4, 2, 512, 512)
MANY = {"n_prompt": 512, "n_answer": 32}
FEW = {"n_prompt": 300, "n_answer": 4}  # Vicuna's template alone is some 200 bytes, each a token here
SIDES = ("before", "after", "before again")
ALLOWED = 0.02  # the share of time that AFTER may take more, beside the spread
WARM_TURNS = 2  # before the clock runs: pages are there then, and the encoder is captured
FIRST_TURNS = 2  # a first run compiles: it takes long, and varies less than what comes after it
Times = dict[str, list[float]]  # side -> seconds of each turn


class Worker:
    """A checkout in a process of its own, with its kernel cache in the folder ``cache``."""

    def __init__(self, checkout: Path, cache: Path) -> None:
        run = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
        self._process = subprocess.Popen(  # with -c, modules are looked up in the working directory first
            [sys.executable, "-c", run],
            cwd=checkout,
            env=environment(cache),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request. RuntimeError if there is none; what went wrong is on stderr then."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{do}: the worker ended with exit code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # its requests end, so it does


def environment(cache: Path) -> dict[str, str]:
    """The environment of a process whose compiled kernels go to ``cache``."""
    return {**os.environ, "NUMBA_CACHE_DIR": str(cache), "CUPY_CACHE_DIR": str(cache)}


@contextmanager
def empty_cache() -> Iterator[Path]:
    """A folder for kernels that holds none yet."""
    with tempfile.TemporaryDirectory(prefix="kernels-") as name:
        yield Path(name)


# ---- files


@dataclass(frozen=True)
class Files:
    """The folder of the models, each written when it is first needed; at tiny shapes to try this script out."""

    folder: Path
    tiny: bool

    def model(self, ftype: str, tiny: bool = False) -> str:
        """A language model's file."""
        name, shape = ("tiny", TINY) if tiny or self.tiny else ("1b", LLAMA_1B)
        return self._written(f"{name}-{ftype}.gguf", lambda path: write_llama(path, shape, ftype))

    def encoder(self) -> str:
        """An image encoder's file."""
        spec = VISION["clip_15"] if self.tiny else VIT_L_15
        return self._written(f"{spec.name}.gguf", lambda path: write_mmproj(path, spec, "F16"))

    def _written(self, name: str, write: Callable[[Path], None]) -> str:
        path = self.folder.resolve() / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            write(part)
            part.rename(path)
        return str(path)


# ---- the same bits?


@dataclass(frozen=True)
class Job:
    """What one process computes."""

    name: str
    request: dict[str, Any]

    def run(self, checkout: Path, cache: Path, out: Path) -> Path:
        """Its arrays, in the file ``out`` (.npz)."""
        with Worker(checkout, cache) as worker:
            worker.ask(**self.request, out=str(out))
        return out


def jobs(asked: argparse.Namespace) -> Iterator[Job]:
    """The demo pair for each backend, then each format's model."""
    files = Files(asked.folder, asked.tiny)
    for backend in asked.backend:
        settings = {"backend": backend, "threads": asked.threads}
        yield Job(f"{backend} demo", {"do": "demo", "profiles": asked.profiles, **settings})
        for ftype in asked.formats if backend != "numpy" else ():  # it would take minutes
            yield Job(f"{backend} {ftype}", {"do": "model", "model": files.model(ftype), **settings})


def compare_bits(asked: argparse.Namespace) -> bool:
    """Whether both checkouts compute the same, each with a filled cache."""
    same = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for job in jobs(asked):
            found = []
            for side, checkout in (("before", asked.before), ("after", asked.after)):
                cache, out = folder / f"kernels {side}", folder / f"{side}.npz"
                if job.request["backend"] != "numpy":
                    job.run(checkout, cache, out)  # fills the cache
                found.append(job.run(checkout, cache, out))
            same &= report(job.name, *found, asked.tolerance)
    return same


def compare_cache(asked: argparse.Namespace) -> bool:
    """Whether each checkout computes the same in the run that compiles its kernels and in the next."""
    same = True
    for checkout in dict.fromkeys((asked.before, asked.after)):
        print(f"{checkout}: empty and filled kernel cache")
        for job in jobs(asked):
            with tempfile.TemporaryDirectory() as name, empty_cache() as cache:
                found = [job.run(checkout, cache, Path(name) / f"{turn}.npz") for turn in ("empty", "filled")]
                same &= report(job.name, *found, asked.tolerance)
    return same


def report(name: str, first: Path, second: Path, tolerance: float) -> bool:
    """A line for each array of two files, and whether all are equal or within the tolerance."""
    same = True
    with np.load(first) as a, np.load(second) as b:
        for key in dict.fromkeys((*a.files, *b.files)):
            verdict = "missing" if key not in a or key not in b else compare(a[key], b[key], tolerance)
            print(f"{name:<14}{key:<28}{verdict}", flush=True)
            same &= verdict.startswith("same")
    return same


def compare(a: np.ndarray, b: np.ndarray, tolerance: float) -> str:
    """What to say of two arrays: it begins with "same" if they are equal, or floats within the tolerance."""
    if not np.isfinite(a).all():
        return "NOT FINITE: nothing can be said"
    if digest(a) == digest(b):
        return f"same bits      {digest(a)[:12]}  {'x'.join(map(str, a.shape))}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"DIFFERENT      {a.dtype} {a.shape} and {b.dtype} {b.shape}"
    if not np.issubdtype(a.dtype, np.floating):
        return f"DIFFERENT      {np.count_nonzero(a != b)} of {a.size}"
    error = difference(a, b)
    verdict = "same to" if error <= tolerance else "DIFFERENT by"
    return f"{verdict:<14} {error:.1e} of the range, {np.count_nonzero(a != b)} of {a.size} numbers"


def digest(values: np.ndarray) -> str:
    """The sha256 of an array's bytes, shape and dtype."""
    about = f"{values.dtype.str} {values.shape}".encode()
    return hashlib.sha256(about + np.ascontiguousarray(values).tobytes()).hexdigest()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to the range of a. NaN in b gives NaN, which no tolerance allows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a - b).max() / max(np.ptp(a), np.finfo(np.float64).tiny))


# ---- how fast?


def compare_times(asked: argparse.Namespace) -> bool:
    """Whether AFTER is as fast as BEFORE, with compiled kernels and in a first run."""
    files, fast = Files(asked.folder, asked.tiny), True
    print(f"{'':<30}{'before, s':>10}{'after, s':>10}{'ratio':>8}{'spread':>8}")
    for backend in (name for name in asked.backend if name != "numpy"):
        settings = {"backend": backend, "threads": asked.threads}
        talks = FEW if asked.tiny else MANY
        for ftype in asked.formats:
            loaded = {"model": files.model(ftype), "mmproj": None, **settings}
            fast &= tell(f"{backend} {ftype}", turns(asked, loaded, "talk", **talks))
        loaded = {"model": None, "mmproj": files.encoder(), **settings}
        fast &= tell(f"{backend} one tile", turns(asked, loaded, "encode", size_px=336))
        for ftype in asked.formats[:1]:
            loaded = {"model": files.model(ftype, tiny=True), "mmproj": None, **settings}
            times = first_runs(asked, lambda checkout, cache, loaded=loaded: first_answer(checkout, cache, loaded))
            fast &= tell(f"{backend} {ftype}, tiny", {"first run": times})
    return fast & tell("tinyllava demo", {"first run": first_runs(asked, first_demo)})


def turns(asked: argparse.Namespace, loaded: dict[str, Any], do: str, **request: Any) -> dict[str, Times]:
    """Seconds by what was done, of workers that stay loaded and take turns. All find their kernels in a cache."""
    found: dict[str, Times] = {}
    with ExitStack() as stack:
        caches = {side: stack.enter_context(empty_cache()) for side in SIDES[:2]}
        caches["before again"] = caches["before"]
        for side in SIDES[:2]:
            with Worker(checkout_of(asked, side), caches[side]) as worker:
                worker.ask("open", **loaded)
                worker.ask(do, **request)  # fills the cache
        workers = {side: stack.enter_context(Worker(checkout_of(asked, side), caches[side])) for side in SIDES}
        for worker in workers.values():
            worker.ask("open", **loaded)
            for _ in range(WARM_TURNS):
                worker.ask(do, **request)
        for turn in range(asked.repeat):
            for side in in_turn(turn):
                for what, seconds in workers[side].ask(do, **request).items():
                    found.setdefault(what, {}).setdefault(side, []).append(seconds)
    return found


def in_turn(turn: int) -> Sequence[str]:
    """The sides in the order of this turn: each begins as often as the others."""
    first = turn % len(SIDES)
    return SIDES[first:] + SIDES[:first]


def checkout_of(asked: argparse.Namespace, side: str) -> Path:
    """The folder of a side."""
    return Path(asked.after if side == "after" else asked.before)


def first_runs(asked: argparse.Namespace, run: Callable[[Path, Path], None]) -> Times:
    """Seconds from the start of a process to its end, with an empty kernel cache each time."""
    found: Times = {side: [] for side in SIDES}
    for turn in range(min(FIRST_TURNS, asked.repeat)):
        for side in in_turn(turn):
            with empty_cache() as cache:
                start = time.perf_counter()
                run(checkout_of(asked, side), cache)
                found[side].append(time.perf_counter() - start)
    return found


def first_demo(checkout: Path, cache: Path) -> None:
    """The demo as a user starts it."""
    words = [sys.executable, "-m", "tinyllava", "demo"]
    subprocess.run(words, cwd=checkout, env=environment(cache), stdout=subprocess.DEVNULL, check=True)


def first_answer(checkout: Path, cache: Path, loaded: dict[str, Any]) -> None:
    """A prompt and an answer."""
    with Worker(checkout, cache) as worker:
        worker.ask("open", **loaded)
        worker.ask("talk", **FEW)


def tell(name: str, found: dict[str, Times]) -> bool:
    """A line for each of the times, and whether AFTER is slower in none by more than is allowed and the spread."""
    fast = True
    for what, times in found.items():
        before, after, again = (min(times[side]) for side in SIDES)
        ratio, spread = after / before, abs(again / before - 1)
        ok = ratio <= 1 + ALLOWED + spread
        fast &= ok
        line = f"{f'{name}: {what}':<30}{before:>10.4f}{after:>10.4f}{ratio:>8.3f}{spread:>8.3f}"
        print(f"{line}  {'ok' if ok else 'SLOWER'}", flush=True)
    return fast


def main(words: Sequence[str] | None = None) -> int:
    """Compare what is asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare two checkouts", allow_abbrev=False)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", help="default: BEFORE again")
    what = parser.add_mutually_exclusive_group()
    for name, compare_ in (("bits", compare_bits), ("cache", compare_cache), ("time", compare_times)):
        what.add_argument(f"--{name}", dest="compare", action="store_const", const=compare_, help=compare_.__doc__)
    parser.add_argument("--folder", type=Path, help="of the models; needed for --formats and --time")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=FORMATS, help="none: the demo pair alone")
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=PROFILES, help="of the demo pair")
    parser.add_argument("--backend", nargs="+", default=("numpy", "numba"), metavar="NAME")
    parser.add_argument("--threads", type=int, help="default: the backend's own")
    parser.add_argument("--tolerance", type=float, default=0.0, help="for floats, relative to their range")
    parser.add_argument("--repeat", type=int, default=5, help="turns of --time")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try it out")
    asked = parser.parse_args(words)
    asked.before, asked.after = asked.before.resolve(), (asked.after or asked.before).resolve()
    compare_ = asked.compare or compare_bits
    if asked.folder is None and (asked.formats or compare_ is compare_times):
        parser.error("--folder is needed for the models (or --formats without any: the demo pair alone)")
    good = compare_(asked)
    bad = "SLOWER" if compare_ is compare_times else "DIFFERENT"
    print("verdict:", ("as fast" if compare_ is compare_times else "same") if good else bad)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
