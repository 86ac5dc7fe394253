"""Programs that do the same work, each in a process of its own: this package, llama.cpp, ik_llama.cpp, PyTorch.

So each has its own memory, whose peaks can be compared, its own threads, and if need be its own Python. A worker
reads a request a line and answers a line; it measures the seconds itself, so the pipe costs nothing:

    {"program": "ik", "work": {...}}             {"load_s": 0.8, "versions": {...}}
    {"do": "prefill", "n": 512}                  {"s": 4.1, "cpu_s": 8.1, "waited_cpu_s": 0.01}
    {"do": "decode", "n": 32, "depth": 512}      {"s": 1.2, ...}
    {"do": "encode", "picture": 0}               {"s": 1.9, "tokens": 576, ...}
    {"do": "memory"}                             {"bytes": 812345678, ...}
    {"do": "rest"}                               {...}, when its threads have gone to sleep

A worker that waits must leave the processor to the others: waited_cpu_s is what it used since its last answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tinyllava.errors import TinyLLaVAError, UsageError

OWN = "tinyllava"
REST_S, REST_STEPS = 0.02, 100  # a worker is at rest when it used next to nothing for REST_S


@dataclass(frozen=True)
class Kind:
    """A program: the module and class that drive it, and the package that must be there."""

    module: str
    driver: str
    package: str
    pip: str


KINDS = {
    OWN: Kind("tinyllava.study.peers.own", "Own", "tinyllava", "tinyllava"),
    "llama.cpp": Kind("tinyllava.study.peers.llama_cpp", "LlamaCpp", "llama_cpp", "llama-cpp-python"),
    "ik": Kind("tinyllava.study.peers.llama_cpp", "Ik", "ik_llama_cpp", "ik-llama-cpp-python"),
    "torch": Kind("tinyllava.study.peers.torch", "Torch", "transformers", "torch and transformers"),
}
PEERS = [name for name in KINDS if name != OWN]


@dataclass(frozen=True)
class Work:
    """What is timed."""

    model: Path
    mmproj: Path | None = None
    n_prompt: int = 512
    n_answer: int = 32
    threads: int | None = None
    repeat: int = 3
    backend: str = "auto"
    compat: str = "llava"
    pictures: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels

    @property
    def n_ctx(self) -> int:
        """Tokens that the cache must hold: prompt, answer, and one more that some programs want."""
        return self.n_prompt + self.n_answer + 1

    def to_json(self) -> dict[str, Any]:
        """Itself as JSON can hold it, for the pipe."""
        files = {"model": str(self.model), "mmproj": str(self.mmproj) if self.mmproj else None}
        return {**asdict(self), **files}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Work:
        """The other end of :meth:`to_json`."""
        work = cls(**found)
        pictures = tuple((width, height) for width, height in work.pictures)
        return replace(work, model=Path(work.model), mmproj=work.mmproj and Path(work.mmproj), pictures=pictures)


def tokens(n: int) -> list[int]:
    """A text of n tokens that every vocabulary has; which they are does not matter for speed."""
    return [3 + 7 * i % 200 for i in range(n)]


class Program(Protocol):
    """What drives a program. Its constructor takes the Work and loads the files."""

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache; the logits after its last token."""

    def decode(self, ids: list[int], depth: int) -> None:
        """Forget all after the first ``depth`` tokens, then read ids one by one, the logits after each."""

    def encode(self, picture: int) -> int:
        """From the pixels of one of the work's pictures to its embeddings. Returns how many."""

    def about(self) -> dict[str, Any]:
        """Versions and settings, for the report."""


# ---- the worker's end


def serve() -> None:
    """A worker's life: open a program, then answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like an answer

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        first = json.loads(sys.stdin.readline())
        driver = find_driver(first["program"])
        start = time.perf_counter()
        program = driver(Work.from_json(first["work"]))
        answer({"load_s": time.perf_counter() - start, **program.about()})
        used = time.process_time()
        for line in sys.stdin:
            waited = time.process_time() - used
            answer({**do(program, json.loads(line)), "waited_cpu_s": waited})
            used = time.process_time()
    except TinyLLaVAError as error:
        answer({"error": [error.where, error.found, error.wanted, error.hint]})
    except KeyboardInterrupt:
        return


def find_driver(name: str) -> Callable[[Work], Program]:
    """What loads the work's files into a program. UsageError if its package is not installed."""
    kind = KINDS[name]
    try:
        import_module(kind.package)
        driver: Callable[[Work], Program] = getattr(import_module(kind.module), kind.driver)
    except (ImportError, FileNotFoundError) as error:  # the second: a package without its library
        hint = f"Install {kind.pip}, or name the Python that has it: --peer {name}=PYTHON"
        raise UsageError("--peer", f"{name}: {error}", wanted=f"the package {kind.package}", hint=hint) from None
    return driver


def do(program: Program, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    kind = request["do"]
    if kind == "rest":
        return rest()
    if kind == "memory":
        return {"bytes": peak_rss_bytes()}
    ids = tokens(request.get("n", 0))
    found: dict[str, Any] = {}
    start, used = time.perf_counter(), time.process_time()
    if kind == "prefill":
        program.prefill(ids)
    elif kind == "decode":
        program.decode(ids, request["depth"])
    else:
        found["tokens"] = program.encode(request["picture"])
    return {"s": time.perf_counter() - start, "cpu_s": time.process_time() - used, **found}


def rest() -> dict[str, Any]:
    """Wait until this process uses no processor: threads that share work spin for a while before they sleep."""
    for _ in range(REST_STEPS):
        used = time.process_time()
        time.sleep(REST_S)
        if time.process_time() - used < REST_S / 20:
            break
    return {}


def peak_rss_bytes() -> int | None:
    """The most memory that this process has held, the file's mapped pages included; None where nobody says.

    Linux's ru_maxrss starts with what the process that started this one held, VmHWM does not.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = [line.split()[1] for line in file if line.startswith("VmHWM")]
        return int(found[0]) * 1024 if found else None
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# ---- the other end


class Worker:
    """A program in a process of its own, started by this one with ``python`` (default: the same)."""

    def __init__(self, name: str, work: Work, python: str | None = None) -> None:
        self.name = name
        self.waited_cpu_s = 0.0
        self._log = None if name == OWN else tempfile.TemporaryFile()
        root = str(Path(__file__).parents[3])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        words = [python or sys.executable, "-c", "from tinyllava.study.peers.worker import serve; serve()"]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "PYTHONPATH": paths},
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            if self._log is not None:
                self._log.close()
            raise UsageError("--peer", f"{name}: {words[0]}: {error.strerror}", wanted="a Python") from None
        try:
            self.about = self.ask({"program": name, "work": work.to_json()})
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. TinyLLaVAError if there is none."""
        try:
            assert self._process.stdin and self._process.stdout
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UsageError("--peer", f"{self.name} ended: {self._last_words()}", wanted="an answer")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            where, what, wanted, hint = found["error"]
            raise UsageError(where, what, wanted=wanted, hint=hint)
        self.waited_cpu_s += found.get("waited_cpu_s", 0.0)
        return found

    def seconds(self, request: dict[str, Any]) -> float:
        """How long a request took."""
        return float(self.ask(request)["s"])

    def _last_words(self) -> str:
        """The last line that a program printed before it ended, and its exit code."""
        code = f"exit code {self._process.wait()}"
        if self._log is None:
            return code
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        return ", ".join([*[line.strip() for line in lines if line.strip()][-1:], code])

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
