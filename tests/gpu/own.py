"""tinyllava on the card: models whose layers are copied there once uploaded, their answers, times and memory.

Times are medians after a warm-up, in seconds, from the card's first to its last piece of work; what the host does
meanwhile counts when the card waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import embed, forward, load_llama, unembed
from tinyllava.ops.gpu.ops import CupyOps
from tinyllava.ops.gpu.weights import DeviceMatrix
from tinyllava.profile import LLAVA
from tinyllava.vision.clip import VisionConfig, load_vision, tile_features
from tinyllava.vision.projector import load_projector, project

WARM_UP, REPEAT = 3, 10


class CopyingOps(CupyOps):
    """The backend, which uploads tensors of one seed once, and gives each a copy of its own on the card."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[Any, DeviceMatrix] = {}

    def matrix(self, tensor: Any) -> Any:
        key = tensor.type, tensor.shape, tensor.seed
        if key not in self._first:
            self._first[key] = super().matrix(tensor)
            return self._first[key]
        first = self._first[key]
        return DeviceMatrix(first.type, first.shape, first.data.copy())


class Language:
    """A language model of a file, opened or random, and a cache."""

    def __init__(self, file: Any, n_ctx: int = 4096) -> None:
        self.ops = CopyingOps()
        self.config = read_config(file)
        self.llama = load_llama(file, self.config, self.ops)
        self.cache = KVCache(self.config, n_ctx, self.ops)
        self.step = self.ops.capture(self.read)

    def read(self, ids: Any) -> Any:
        """One token -> the logits after it (1, n_vocab)."""
        x = forward(embed(ids, self.llama, self.ops), self.llama, self.cache, self.ops)
        return unembed(x, self.llama, self.ops)

    def prefill(self, x: Any, last: bool = True) -> Any:
        """Embeddings (n, n_embd) into the empty cache -> the logits after the last of them, or after each."""
        self.cache.truncate(0)
        rows = []
        for start in range(0, len(x), self.ops.batch):
            hidden = forward(x[start : start + self.ops.batch], self.llama, self.cache, self.ops)
            rows.append(hidden)
        if last:
            return unembed(rows[-1][-1:], self.llama, self.ops)
        return unembed(cupy.concatenate(rows), self.llama, self.ops)

    def logits(self, ids: list[int], n_prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """The logits after each of ``ids``: those read at once (n_prompt, n_vocab), and those read one by one."""
        x = embed(ids[:n_prompt], self.llama, self.ops)
        self.prefill(x)
        eager = [self.ops.numpy(self.read([i])).copy() for i in ids[n_prompt:]]
        prompt = self.ops.numpy(self.prefill(x, last=False))
        answer = [self.ops.numpy(self.step([i])).copy() for i in ids[n_prompt:]]
        np.testing.assert_array_equal(answer, eager)  # replayed, a step gives the same numbers
        return prompt.astype(np.float64), np.concatenate(answer).astype(np.float64)

    def time_prefill(self, embeds: np.ndarray) -> float:
        x = self.ops.array(embeds)
        return median(lambda: self.prefill(x))

    def time_decode(self, context: np.ndarray, steps: int = 64, repeat: int = 5) -> tuple[float, float]:
        """One token after ``context``: the graph alone, and a loop that chooses each token on the host."""
        x = self.ops.array(context)

        def decode(n: int, wait: bool) -> float:
            token = int(self.ops.numpy(self.prefill(x))[0].argmax())
            start = time.perf_counter()
            for _ in range(n):
                logits = self.step([token])
                if wait:
                    token = int(self.ops.numpy(logits)[0].argmax())
            cupy.cuda.Device().synchronize()
            return (time.perf_counter() - start) / n

        decode(WARM_UP, True)
        graph, answer = (statistics.median(decode(steps, wait) for _ in range(repeat)) for wait in (False, True))
        return graph, answer


class Vision:
    """An image encoder and projector of a file."""

    def __init__(self, file: Any) -> None:
        self.ops = CopyingOps()
        self.config = VisionConfig.from_gguf(file, LLAVA)
        self.weights = load_vision(file, self.config, self.ops)
        self.projector = load_projector(file, self.config, self.ops)
        self.captured_encode = self.ops.capture(self.encode)

    def encode(self, pixels: Any) -> Any:
        x = tile_features(pixels, self.weights, self.config, self.ops)
        return project(x, self.projector, self.ops)

    def embeddings(self, pixels: np.ndarray) -> np.ndarray:
        """A tile (3, H, W) -> (n_patches, n_embd), run, captured and replayed: the same numbers."""
        once, *again = (self.ops.numpy(self.captured_encode(pixels)).copy() for _ in range(3))
        for other in again:
            np.testing.assert_array_equal(once, other)
        return once.astype(np.float64)

    def time_encode(self, pixels: np.ndarray) -> float:
        """With the tile's way from the host to the card."""
        return median(lambda: self.captured_encode(pixels))


def median(call: Callable[[], Any], repeat: int = REPEAT) -> float:
    """Seconds of a call."""
    for _ in range(WARM_UP):
        call()
    return statistics.median(_seconds(call) for _ in range(repeat))


def _seconds(call: Callable[[], Any]) -> float:
    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.Device().synchronize()
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(cupy.cuda.get_elapsed_time(first, last)) / 1000


def ceilings() -> dict[str, float]:
    """What the card itself reaches: bytes of a large copy, read and written, and operations of a large product."""
    rng = np.random.default_rng(0)
    a = cupy.zeros(1 << 31, cupy.uint8)
    b = cupy.empty_like(a)
    copy = median(lambda: cupy.copyto(b, a))
    n = 8192
    x = cupy.asarray(rng.standard_normal((n, n), np.float32).astype(np.float16))  # zeros would be faster
    y, blas = cupy.empty((n, n), cupy.float32), CupyOps().blas
    product = median(lambda: blas.multiply(x, x, y, 0, n))
    return {"bytes_per_s": 2 * a.nbytes / copy, "flop_per_s": 2 * n**3 / product}


def device_bytes(*, peak: bool = False) -> int:
    """What CuPy holds of the card's memory: now, or with all that its pool keeps because it was once needed."""
    pool = cupy.get_default_memory_pool()
    if not peak:
        pool.free_all_blocks()
    return int(pool.total_bytes())


def about() -> dict[str, str]:
    """The card and the software."""
    card = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    version = cupy.cuda.runtime.driverGetVersion()
    return {
        "card": card["name"].decode(),
        "cuda": f"{version // 1000}.{version % 1000 // 10}",
        "cupy": cupy.__version__,
        "numpy": np.__version__,
    }
