"""Reductions: a vector to one number, and sixteen vectors to one vector of sixteen numbers.

A vector alone takes four steps, each with half as many lanes at work as the one before. Sixteen together keep all
lanes at work: fifteen steps for all of them, where one by one they take 64.
"""

from __future__ import annotations

from typing import Any

from tinyllava.ops.cpu.simd import llvm
from tinyllava.ops.cpu.simd.llvm import instruction

# ---- what two lanes become: builder, a, b -> a vector


def emit_add(builder: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return builder.fadd(a, b)


def emit_larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each two; where either is NaN, b."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def emit_smaller(builder: Any, a: Any, b: Any) -> Any:
    """The smaller of each two; where either is NaN, b."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


# ---- one vector


def emit_reduce(builder: Any, v: Any, join: Any) -> Any:
    """All lanes joined: the lower half with the upper one, again and again."""
    width = v.type.count // 2
    while width:
        halves = range(width), range(width, 2 * width)
        v = join(builder, *(llvm.shuffle(builder, v, v, lanes) for lanes in halves))
        width //= 2
    return builder.extract_element(v, llvm.i32(0))


@instruction("f:v")
def sum_upper_lanes(builder: Any, v: Any) -> Any:
    """The sum of lanes 8 to 15."""
    return emit_reduce(builder, llvm.shuffle(builder, v, v, range(8, 16)), emit_add)


larger = instruction("v:vv")(emit_larger)  # lane by lane
sum_lanes = instruction("f:v")(lambda builder, v: emit_reduce(builder, v, emit_add))
largest_lane = instruction("f:v")(lambda builder, v: emit_reduce(builder, v, emit_larger))


# ---- sixteen vectors


def emit_load_16(builder: Any, address: Any) -> list[Any]:
    """16 vectors, one after the other at an address."""
    return [llvm.load(builder, address, llvm.F32X16, 64 * i) for i in range(16)]


def emit_reduce_each(builder: Any, vectors: list[Any], join: Any) -> Any:
    """16 vectors -> one, whose lane i is all lanes of vector i, joined as emit_reduce joins them.

    Neighbours meet four times: of each, the halves of its groups are joined, so that 16 lanes of one vector become
    8 of two, 4 of four, 2 of eight, 1 of sixteen.
    """
    for width in (8, 4, 2, 1):
        lower = [lane + i for lane in range(0, 16, 2 * width) for i in range(width)]
        halves = [[*lanes, *(16 + lane for lane in lanes)] for lanes in (lower, [i + width for i in lower])]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [join(builder, *(llvm.shuffle(builder, *pair, lanes) for lanes in halves)) for pair in pairs]
    return vectors[0]


@instruction("v:i")
def sum_each(builder: Any, address: Any) -> Any:
    """16 vectors at an address -> the sum of each."""
    return emit_reduce_each(builder, emit_load_16(builder, address), emit_add)
