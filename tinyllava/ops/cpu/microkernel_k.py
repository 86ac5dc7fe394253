"""The micro-kernels of formats with super-blocks (Q2_K to Q6_K), which have a scale for each 16 or 32 columns.

As in microkernel.py, but a packed block has 128 columns, for all of which activations share a scale: a group's
sums are multiplied by the weights' scale only, and the block's by the activations' once. Registers hold the sums
of one block; y is read and written once a block, since a group's integers, a block's sums and y's together would
need 36 of 32 registers. Two kinds of layout, in bytes for 16 rows of weights (Q4_K has 4 groups in a block):

    "minima"  w = d * q + m      q 2048 | d 64 a group | m as int16, 64 for each two groups | their unit 64
              q is unsigned. A row's minima are int16, counted in one float32 unit; the sums of the activations'
              groups are int16, too, so that dot2 multiplies two groups' minima by two groups' sums
    "signed"  w = d * (q - c)    q - c 2048 | d 64 a group | -128 * sum(w) 64
              with 16 groups in a super-block, -c * sum(p) of each would cost as many products again. So weights
              are int8, and the activations unsigned, p + 128; the accumulation starts at -128 * sum(w)

Definition: ops/quantized.py.
"""

from __future__ import annotations

from typing import Any

from tinyllava.ops.cpu.microkernel import (
    LAYOUTS,
    MINIMA_4,
    MINIMA_8,
    NR,
    SIGNED,
    VECTORS,
    Layout,
    emit_dots,
    loop,
    sums_at,
    vectors_at,
)
from tinyllava.ops.cpu.simd import llvm, reduce, rounding

LARGEST = 32767.0  # of int16


def _groups(builder: Any, layout: Layout, ws: list[Any], x: Any, start: list[Any]) -> list[Any]:
    """start + each group's integer sums times the weights' scales."""
    steps = layout.steps // layout.groups

    def body(g: Any, accumulators: list[Any]) -> list[Any]:
        at = [builder.add(w, builder.mul(g, llvm.i64(64 * steps))) for w in ws]
        scales = [builder.add(w, builder.shl(g, llvm.i64(6))) for w in ws]
        x_at = builder.add(x, builder.mul(g, llvm.i64(4 * steps)))
        sums = emit_dots(builder, layout, at, x_at, [llvm.i32x16(0)] * (NR * VECTORS), steps)
        d = [llvm.load(builder, scale, llvm.F32X16, layout.w_scales) for scale in scales]
        return [
            llvm.emit_fma(builder, d[i % VECTORS], builder.sitofp(sums[i], llvm.F32X16), accumulator)
            for i, accumulator in enumerate(accumulators)
        ]

    return loop(builder, llvm.i64(layout.groups), start, body)


def _add_minima(builder: Any, layout: Layout, ws: list[Any], x: Any, accumulators: list[Any]) -> list[Any]:
    """accumulators + minima times the sums of the activations' groups: at most 8 * 32767 * 4096 < 2^31."""
    sums, pairs = [llvm.i32x16(0)] * (NR * VECTORS), layout.groups // 2
    for k in range(pairs):
        minima = [llvm.load(builder, w, llvm.I16X32, layout.w_minima + 64 * k) for w in ws]
        for t in range(NR):
            two = llvm.broadcast(builder, llvm.load(builder, x, llvm.I32, layout.x_sums + 4 * (t * pairs + k)))
            for i, vector in enumerate(minima, t * VECTORS):
                sums[i] = llvm.emit_dot2(builder, sums[i], vector, builder.bitcast(two, llvm.I16X32))
    units = [llvm.load(builder, w, llvm.F32X16, layout.w_minima + 64 * pairs) for w in ws]
    return [
        llvm.emit_fma(builder, units[i % VECTORS], builder.sitofp(sums[i], llvm.F32X16), accumulator)
        for i, accumulator in enumerate(accumulators)
    ]


def _microkernel(layout: Layout) -> Any:
    """As in microkernel.py."""

    def emit(builder: Any, w: Any, w_stride: Any, x: Any, y: Any, y_stride: Any, n_blocks: Any) -> None:
        panels, places = vectors_at(builder, w, w_stride), sums_at(builder, y, y_stride, NR)

        def body(i: Any, _: list[Any]) -> list[Any]:
            w_at = builder.mul(i, llvm.i64(layout.w_size))
            x_at = builder.add(x, builder.mul(i, llvm.i64(layout.x_size)))
            ws = [builder.add(panel, w_at) for panel in panels]
            start = [llvm.f32x16(0.0)] * VECTORS
            if layout.kind == "signed":
                start = [llvm.load(builder, w, llvm.F32X16, layout.w_minima) for w in ws]
            found = _groups(builder, layout, ws, x_at, start * NR)
            if layout.kind == "minima":
                found = _add_minima(builder, layout, ws, x_at, found)
            for i, (value, place) in enumerate(zip(found, places, strict=True)):
                scale = llvm.load(builder, x_at, llvm.F32, layout.x_scales + 4 * (i // VECTORS))
                before, scales = llvm.load(builder, place, llvm.F32X16), llvm.broadcast(builder, scale)
                llvm.store(builder, llvm.emit_fma(builder, value, scales, before), place)
            return []

        loop(builder, n_blocks, [], body)

    return llvm.instruction("-:iiiiii")(emit)


MICROKERNELS_K = {i: _microkernel(LAYOUTS[i]) for i in (MINIMA_4, MINIMA_8, SIGNED)}


# ---- finishing a packed block of weights: q and the scales d are there, what follows them is computed


def _finish_minima(layout: Layout) -> Any:
    """f(block, minima, c): minima, a vector for each group, become int16 and their unit."""
    groups = layout.groups

    def emit(builder: Any, block: Any, minima: Any, _c: Any) -> None:
        values = [llvm.load(builder, minima, llvm.F32X16, 64 * g) for g in range(groups)]
        most = llvm.f32x16(0.0)
        for v in values:
            most = reduce.emit_larger(builder, most, llvm.call(builder, "llvm.fabs.v16f32", llvm.F32X16, v))
        unit = builder.fmul(most, llvm.f32x16(1.0 / LARGEST))
        inverse = rounding.emit_inverse(builder, unit)
        whole = [llvm.call(builder, "llvm.rint.v16f32", llvm.F32X16, builder.fmul(v, inverse)) for v in values]
        numbers = [builder.fptosi(v, llvm.I32X16) for v in whole]
        for k in range(groups // 2):
            low = builder.and_(numbers[2 * k], llvm.i32x16(0xFFFF))
            both = builder.or_(low, builder.shl(numbers[2 * k + 1], llvm.i32x16(16)))
            llvm.store(builder, both, block, layout.w_minima + 64 * k)
        llvm.store(builder, unit, block, layout.w_minima + 32 * groups)

    return llvm.instruction("-:iii")(emit)


@llvm.instruction("-:iii")
def finish_signed(builder: Any, block: Any, _minima: Any, c: Any) -> None:
    """q becomes q - c, and after the scales comes -128 * sum(d * (q - c))."""
    layout = LAYOUTS[SIGNED]
    steps, offset = layout.steps // layout.groups, llvm.broadcast(builder, builder.trunc(c, llvm.I8), 64)
    total = llvm.f32x16(0.0)
    for g in range(layout.groups):
        sums = llvm.i32x16(0)
        for j in range(g * steps, (g + 1) * steps):
            q = builder.sub(llvm.load(builder, block, llvm.I8X64, 64 * j), offset)
            llvm.store(builder, q, block, 64 * j)
            sums = llvm.emit_dot4(builder, sums, llvm.i8x64(1), q)
        d = llvm.load(builder, block, llvm.F32X16, layout.w_scales + 64 * g)
        total = llvm.emit_fma(builder, d, builder.sitofp(sums, llvm.F32X16), total)
    llvm.store(builder, builder.fmul(total, llvm.f32x16(-128.0)), block, layout.w_minima)


FINISH = {
    MINIMA_4: _finish_minima(LAYOUTS[MINIMA_4]),
    MINIMA_8: _finish_minima(LAYOUTS[MINIMA_8]),
    SIGNED: finish_signed,
}
