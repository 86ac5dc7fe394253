"""The micro-kernels of formats with super-blocks (Q2_K to Q6_K), which have a scale for each 16 or 32 columns.

As in microkernel.py, but a packed block has 128 columns, for all of which activations share a scale: a group's
sums are multiplied by the weights' scale only, and the block's by the activations' once. Two layouts:

    "minima"  w = d * q + m, q unsigned    after the scales d: the minima as int16, those of two groups side by
              side for each row, and the float32 unit in which they are counted. Activations have the sums of their
              groups as int16, too: dot2 multiplies two groups' minima by two groups' sums
    "signed"  w = d * (q - c), as int8     activations are x + 128, unsigned; after the scales: -128 * sum(w),
    where
              the accumulation starts, so that the 128 cancel out

Definition: ops/quantized.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.microkernel import (
    LAYOUTS,
    MINIMA_4,
    MINIMA_8,
    NR,
    SIGNED,
    VECTORS,
    Layout,
    loop,
    sums_at,
    vectors_at,
)
from tinyllava.ops.cpu.simd.llvm import (
    BYTES,
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    WORDS,
    call,
    constant,
    emit_dot2,
    emit_dot4,
    emit_fused,
    instruction,
    load,
    plus,
    splat,
    store,
)
from tinyllava.ops.cpu.simd.reduce import larger_lanes
from tinyllava.ops.cpu.simd.rounding import inverse_lanes

LARGEST = 32767.0  # of int16


def _groups(builder: Any, layout: Layout, ws: list[Any], x: Any, start: list[Any]) -> list[Any]:
    """start + each group's integer sums times the weights' scales."""
    steps = layout.steps // layout.groups

    def body(g: Any, accumulators: list[Any]) -> list[Any]:
        at = [builder.add(w, builder.mul(g, ir.Constant(I64, 64 * steps))) for w in ws]
        scales = [plus(builder, builder.add(w, builder.shl(g, ir.Constant(I64, 6))), layout.w_scales) for w in ws]
        bytes_ = builder.add(x, builder.mul(g, ir.Constant(I64, 4 * steps)))
        sums = [constant(INTS, 0)] * (NR * VECTORS)
        for j in range(steps):
            weights = [builder.bitcast(load(builder, w, INTS, 64 * j), BYTES) for w in at]
            for t in range(NR):
                four = splat(builder, load(builder, bytes_, I32, 4 * (t * layout.steps + j)))
                for i, vector in enumerate(weights, t * VECTORS):
                    pair = vector, builder.bitcast(four, BYTES)
                    sums[i] = emit_dot4(builder, sums[i], *(pair[::-1] if layout.sums == "signed" else pair))
        d = [load(builder, scale, FLOATS) for scale in scales]
        return [
            emit_fused(builder, d[i % VECTORS], builder.sitofp(sums[i], FLOATS), accumulator)
            for i, accumulator in enumerate(accumulators)
        ]

    return loop(builder, ir.Constant(I64, layout.groups), start, body)


def _add_minima(builder: Any, layout: Layout, ws: list[Any], x: Any, accumulators: list[Any]) -> list[Any]:
    """accumulators + minima times the sums of the activations' groups."""
    sums, pairs = [constant(INTS, 0)] * (NR * VECTORS), layout.groups // 2
    for k in range(pairs):
        minima = [builder.bitcast(load(builder, w, INTS, layout.w_minima + 64 * k), WORDS) for w in ws]
        for t in range(NR):
            two = splat(builder, load(builder, x, I32, layout.x_sums + 4 * (t * pairs + k)))
            for i, vector in enumerate(minima, t * VECTORS):
                sums[i] = emit_dot2(builder, sums[i], vector, builder.bitcast(two, WORDS))
    units = [load(builder, w, FLOATS, layout.w_minima + 64 * pairs) for w in ws]
    return [
        emit_fused(builder, units[i % VECTORS], builder.sitofp(sums[i], FLOATS), accumulator)
        for i, accumulator in enumerate(accumulators)
    ]


def _microkernel(layout: Layout) -> Any:
    """As in microkernel.py."""

    def emit(builder: Any, w: Any, w_stride: Any, x: Any, y: Any, y_stride: Any, n_blocks: Any) -> None:
        panels, places = vectors_at(builder, w, w_stride), sums_at(builder, y, y_stride, NR)

        def body(i: Any, _: list[Any]) -> list[Any]:
            w_at = builder.mul(i, ir.Constant(I64, layout.w_size))
            x_at = builder.add(x, builder.mul(i, ir.Constant(I64, layout.x_size)))
            ws = [builder.add(panel, w_at) for panel in panels]
            start = [constant(FLOATS, 0.0)] * VECTORS
            if layout.sums == "signed":
                start = [load(builder, w, FLOATS, layout.w_minima) for w in ws]
            found = _groups(builder, layout, ws, x_at, start * NR)
            if layout.sums == "minima":
                found = _add_minima(builder, layout, ws, x_at, found)
            for i, (value, place) in enumerate(zip(found, places, strict=True)):
                scale = splat(builder, load(builder, x_at, F32, layout.x_scales + 4 * (i // VECTORS)))
                store(builder, emit_fused(builder, value, scale, load(builder, place, FLOATS)), place)
            return []

        loop(builder, n_blocks, [], body)

    return instruction("-:iiiiii")(emit)


MICROKERNELS_K = {i: _microkernel(LAYOUTS[i]) for i in (MINIMA_4, MINIMA_8, SIGNED)}


# ---- finishing a packed block of weights: q and the scales d are there, what follows them is computed


def _finish_minima(layout: Layout) -> Any:
    """f(block, minima, c): minima, a vector for each group, become int16 and their unit."""
    groups = layout.groups

    def emit(builder: Any, block: Any, minima: Any, _c: Any) -> None:
        values = [load(builder, minima, FLOATS, 64 * g) for g in range(groups)]
        most = constant(FLOATS, 0.0)
        for v in values:
            most = larger_lanes(builder, most, call(builder, "llvm.fabs.v16f32", FLOATS, v))
        unit = builder.fmul(most, constant(FLOATS, 1.0 / LARGEST))
        inverse = inverse_lanes(builder, unit)
        whole = [call(builder, "llvm.rint.v16f32", FLOATS, builder.fmul(v, inverse)) for v in values]
        numbers = [builder.fptosi(v, INTS) for v in whole]
        for k in range(groups // 2):
            low = builder.and_(numbers[2 * k], constant(INTS, 0xFFFF))
            both = builder.or_(low, builder.shl(numbers[2 * k + 1], constant(INTS, 16)))
            store(builder, both, block, layout.w_minima + 64 * k)
        store(builder, unit, block, layout.w_minima + 32 * groups)

    return instruction("-:iii")(emit)


@instruction("-:iii")
def finish_signed(builder: Any, block: Any, _minima: Any, c: Any) -> None:
    """q becomes q - c, and after the scales comes -128 * sum(d * (q - c))."""
    layout = LAYOUTS[SIGNED]
    steps, offset = layout.steps // layout.groups, splat(builder, builder.trunc(c, I8), 64)
    total = constant(FLOATS, 0.0)
    for g in range(layout.groups):
        sums = constant(INTS, 0)
        for j in range(g * steps, (g + 1) * steps):
            q = builder.sub(load(builder, block, BYTES, 64 * j), offset)
            store(builder, q, block, 64 * j)
            sums = emit_dot4(builder, sums, constant(BYTES, 1), q)
        d = load(builder, block, FLOATS, layout.w_scales + 64 * g)
        total = emit_fused(builder, d, builder.sitofp(sums, FLOATS), total)
    store(builder, builder.fmul(total, constant(FLOATS, -128.0)), block, layout.w_minima)


FINISH = {
    MINIMA_4: _finish_minima(LAYOUTS[MINIMA_4]),
    MINIMA_8: _finish_minima(LAYOUTS[MINIMA_8]),
    SIGNED: finish_signed,
}
