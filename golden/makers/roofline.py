"""Where the time of the CPU backend goes: each operation at a 7B model's shapes, beside what the machine allows.

    python -m golden.make roofline-cpu      writes roofline-cpu.json; nothing else may run meanwhile

A row: op, format, shape, bytes that must come from memory, operations, seconds (the best of REPEAT), GB/s and
GOP/s achieved. The limits of the same machine are measured, too: reading, over 512 MiB with each thread on a half
of its own; and products of bytes, and of floats, whose operands stay in registers.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from golden.manifest import record, save_json, versions
from tinyllava.ops.cpu.microkernel import loop
from tinyllava.ops.cpu.ops import NumbaOps
from tinyllava.ops.cpu.simd.llvm import (
    F32X16,
    I8X64,
    I32,
    I32X16,
    I64,
    broadcast,
    emit_dot4,
    emit_fma,
    instruction,
)
from tinyllava.ops.select import select
from tinyllava.quant.blocks import TYPES
from tinyllava.study.peers.bench import cpu_name

FORMATS = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
REPEAT = 9
CHAINS, TURNS = 16, 1_000_000  # registers that add up products; products of each
RNG = np.random.default_rng(0)
Work = Callable[[], object]


def best(work: Work) -> float:
    """Seconds of the fastest of REPEAT runs, after one that compiles."""
    work()
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def tensor(kind: str, d_out: int, d_in: int) -> Any:
    """Random blocks; scales are small numbers."""
    block = TYPES[kind]
    raw = RNG.integers(0, 256, (d_out, d_in // block.block_size, block.nbytes), dtype=np.uint8)
    for name, dtype, *_ in block.fields:
        if dtype == "<f2":
            at = block.offset(name)
            raw[:, :, at : at + 2] = np.array([0.001], np.float16).view(np.uint8)
    return SimpleNamespace(type=kind, shape=(d_out, d_in), raw=raw.reshape(d_out, -1))


def read_limit(threads: int) -> float:
    """Bytes a second."""
    halves = np.array_split(np.ones(1 << 26, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return float((1 << 29) / best(lambda: list(pool.map(np.sum, halves))))


def chains(kind: Any, step: Any) -> Any:
    """An instruction f(n): n times CHAINS products that do not wait for each other, in registers alone."""

    def emit(builder: Any, n: Any) -> Any:
        value = builder.bitcast(broadcast(builder, builder.trunc(n, I32)), kind)  # which one does not matter
        sums = loop(builder, n, [value] * CHAINS, lambda _, sums: [step(builder, total, value) for total in sums])
        last = builder.bitcast(sums[0], I32X16)
        for total in sums[1:]:  # so that none of them is left out
            last = builder.xor(last, builder.bitcast(total, I32X16))
        return builder.zext(builder.extract_element(last, ir.Constant(I32, 0)), I64)

    return instruction("i:i")(emit)


def dot_step(builder: Any, total: Any, value: Any) -> Any:
    return emit_dot4(builder, total, *[builder.bitcast(value, I8X64)] * 2)


bytes_in_registers = chains(I32X16, dot_step)
floats_in_registers = chains(F32X16, lambda builder, total, value: emit_fma(builder, value, value, total))


@njit(nogil=True)  # type: ignore[misc]
def many_bytes(n: int) -> int:
    return bytes_in_registers(n)


@njit(nogil=True)  # type: ignore[misc]
def many_floats(n: int) -> int:
    return floats_in_registers(n)


def product_limit(products: Any, operations: int, threads: int) -> float:
    """Operations a second, ``operations`` in each product of one vector."""
    with ThreadPoolExecutor(threads) as pool:
        seconds = best(lambda: list(pool.map(products, [TURNS] * threads)))
    return TURNS * CHAINS * threads * operations / seconds


def floats(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def linears(ops: Any, row: Callable[..., None]) -> None:
    """A prompt of 512 tokens, and one token."""
    for kind in FORMATS:
        for n, shape in ((512, (4096, 4096)), (1, (44032, 4096))):
            weight, x = tensor(kind, *shape), floats(n, shape[1])
            matrix = ops.matrix(weight)
            nbytes, operations = weight.raw.nbytes + 4 * n * sum(shape), 2 * n * shape[0] * shape[1]
            row("linear", kind, [n, *shape], nbytes, operations, lambda m=matrix, x=x: ops.linear(x, m))


def others(ops: Any, row: Callable[..., None]) -> None:
    """Attention of a prompt and of one token, and what treats one row or one number at a time."""
    for n, m in ((512, 512), (512, 2500), (1, 2500)):
        q = floats(n, 32, 128)
        k, v = (floats(32, m, 128).astype(np.float16).transpose(1, 0, 2) for _ in range(2))
        pairs = n * m - n * (n - 1) // 2
        row("attention", "f16", [n, m, 32, 128], 2 * 2 * m * 4096 + 8 * n * 4096, 4 * pairs * 4096,
            lambda q=q, k=k, v=v: ops.attention(q, k, v, causal=True))  # fmt: skip
    x, gate, up, w, turn = floats(512, 4096), floats(512, 11008), floats(512, 11008), floats(4096), floats(512, 64)
    row("rms_norm", "f32", [512, 4096], 8 * x.size, 4 * x.size, lambda: ops.rms_norm(x, w, 1e-5))
    row("swiglu", "f32", [512, 11008], 12 * up.size, 20 * up.size, lambda: ops.swiglu(gate, up))
    heads = x.reshape(512, 32, 128)
    row("rope", "f32", [512, 32, 128], 8 * x.size, 3 * x.size, lambda: ops.rope(heads, turn, turn, "norm"))


def rows(ops: NumbaOps) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def row(op: str, kind: str, shape: list[int], nbytes: int, operations: int, work: Work) -> None:
        seconds = best(work)
        found.append({
            "op": op, "format": kind, "shape": shape, "bytes": nbytes, "operations": operations,
            "seconds": round(seconds, 7), "GB_per_s": round(nbytes / seconds / 1e9, 1),
            "GOP_per_s": round(operations / seconds / 1e9, 1),
        })  # fmt: skip

    linears(ops, row)
    others(ops, row)
    return found


def make() -> None:
    """Measure, on two threads, and write."""
    threads = 2
    ops = select("numba", threads=threads)
    assert isinstance(ops, NumbaOps)
    table = {
        "machine": {"cpu": cpu_name(), "system": platform.system(), "threads": threads},
        "limits": {
            "read_GB_per_s": round(read_limit(threads) / 1e9, 1),
            "byte_GOP_per_s": round(product_limit(many_bytes, 128, threads) / 1e9),
            "float_GOP_per_s": round(product_limit(many_floats, 32, threads) / 1e9),
        },
        "rows": rows(ops),
    }
    path = save_json("roofline-cpu.json", table)
    record(path, "roofline-cpu", versions("numpy", "numba", "llvmlite"), "none: times of one machine, to be read")
