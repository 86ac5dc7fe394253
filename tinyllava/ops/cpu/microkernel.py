"""The inner loops of matrix products, written as LLVM code by Python loops that do the unrolling.

A tile is ROWS rows of weights. SIDES of them, side by side, meet TOKENS rows of activations: SIDES x TOKENS
accumulators of 16 lanes, one lane for each row of weights, that stay in registers while the loop walks along the
rows. With two sides, what is loaded is used more than once: a processor that multiplies twice a cycle (Zen 5) can
load no more than twice, either.

Operands are records, one for each 32 columns (64 of 16-bit numbers), that the loop reads from front to back:

    weights      for j in 0..7:  | row 0: q[4j..4j+3] | row 1: q[4j..4j+3] | ... | row 15 |     8 x 64 bytes
                 scales d: 16 floats, one for each row, then the minima m alike
    activations  | token 0: 32 x s8 | ... | token 5: 32 x s8 |, scales d: 6 floats, sums: 6     (TOKENS of each)

In step j every token's four bytes are sent to all 16 lanes and meet each side's weights in one ``dot4``. After
the last the integers become floats and are multiplied by both scales. Three ways to treat w = d * (q - c),
w = d * q + m or w = d * q:

    "offset"  the constant c is the format's; sums hold -c * sum(x) as int32, where accumulation starts
    "minimum" m differs from block to block; sums hold d * sum(x) as float32, to be multiplied by m
    ""        weights are signed 16-bit numbers without either; records hold words, and dot2 takes two at a time

Formats with super-blocks have longer records: super_tile.py.
``outer`` is the same over float32, for float weights and for attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd.llvm import (
    BYTES,
    F32,
    FEATURES,
    FLOATS,
    I32,
    I64,
    INTS,
    constant,
    emit_dot2,
    emit_dot4,
    emit_fused,
    instruction,
    load,
    splat,
    store,
)
from tinyllava.ops.cpu.simd.llvm import WORDS as SHORTS

# SIDES x TOKENS integer sums and as many float sums stay in registers: 24 of 32; without AVX-512, where one of our
# vectors takes two registers, 8 of 16.
WIDE = "avx512f" in FEATURES
ROWS = 16
SIDES = 2 if WIDE else 1
TOKENS = 6 if WIDE else 2
FLOAT_TOKENS = 12 if WIDE else 2  # float32 needs but one kind
BLOCK = 32  # columns of a block, and of a record of bytes


@dataclass(frozen=True)
class Layout:
    """Where things stand in the records of one kind of product; offsets and sizes in bytes."""

    sums: str  # "offset", "minimum", "minima", "signed" or ""
    groups: int = 1  # scales of weights in each record

    @property
    def word_bytes(self) -> int:
        """Bytes of a quantized number."""
        return 1 if self.sums else 2

    @property
    def columns(self) -> int:
        """Columns of a record. Scaling its sums takes as long as three steps, so it should not be short."""
        return {"minima": 4 * BLOCK, "signed": 4 * BLOCK, "": 2 * BLOCK}.get(self.sums, BLOCK)

    @property
    def steps(self) -> int:
        """Dot products of a record: each takes four bytes of a row."""
        return self.columns * self.word_bytes // 4

    @property
    def w_scales(self) -> int:
        return self.steps * 64

    @property
    def w_minima(self) -> int:
        """What comes after the scales: minima, or in super_tile.py what it says there."""
        return self.w_scales + 64 * self.groups

    @property
    def w_size(self) -> int:
        return self.w_minima + {"minimum": 64, "minima": 32 * self.groups + 64, "signed": 64}.get(self.sums, 0)

    @property
    def x_scales(self) -> int:
        return TOKENS * self.columns * self.word_bytes

    @property
    def x_sums(self) -> int:
        return self.x_scales + 4 * TOKENS

    @property
    def x_size(self) -> int:
        return self.x_sums + TOKENS * {"offset": 4, "minimum": 4, "minima": 2 * self.groups}.get(self.sums, 0)


OFFSET, MINIMUM, MINIMA_4, MINIMA_8, SIGNED, WORDS = range(6)  # in this order, as kernels know them
LAYOUTS = (
    Layout("offset"), Layout("minimum"), Layout("minima", 4), Layout("minima", 8), Layout("signed", 8), Layout(""),
)  # fmt: skip


def loop(builder: Any, count: Any, start: list[Any], body: Any) -> list[Any]:
    """for i in range(count): values = body(i, values). Count is at least 1."""
    before, inside = builder.block, builder.append_basic_block("records")
    after = builder.append_basic_block("done")
    builder.branch(inside)
    builder.position_at_end(inside)
    i = builder.phi(I64)
    values = [builder.phi(v.type) for v in start]
    found = body(i, list(values))
    following = builder.add(i, ir.Constant(I64, 1))
    i.add_incoming(ir.Constant(I64, 0), before)
    i.add_incoming(following, builder.block)
    for phi, first, again in zip(values, start, found, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return list(found)


def _capture_step(builder: Any, layout: Layout, ws: list[Any], x: Any, accumulators: list[Any]) -> list[Any]:
    """One record of weights at each of the addresses ws against one of activations at x."""
    sums = [_start(builder, layout, x, t) for t in range(TOKENS) for _ in ws]
    for j in range(layout.steps):
        weights = [load(builder, w, INTS, 64 * j) for w in ws]
        for t in range(TOKENS):
            activations = splat(builder, load(builder, x, I32, 4 * (t * layout.steps + j)))
            for i, side in enumerate(weights, t * SIDES):
                sums[i] = _dot(builder, layout, sums[i], side, activations)
    return [
        _scaled(builder, layout, (ws[i % SIDES], x, i // SIDES), integers, accumulator)
        for i, (integers, accumulator) in enumerate(zip(sums, accumulators, strict=True))
    ]


def _scaled(builder: Any, layout: Layout, at: tuple[Any, Any, int], sums: Any, accumulator: Any) -> Any:
    """accumulator + the integer sums of a record, scaled; ``at``: weights, activations, token."""
    w, x, t = at
    scaled = builder.fmul(load(builder, w, FLOATS, layout.w_scales), builder.sitofp(sums, FLOATS))
    scale = splat(builder, load(builder, x, F32, layout.x_scales + 4 * t))
    accumulator = emit_fused(builder, scaled, scale, accumulator)
    if layout.sums == "minimum":
        total = splat(builder, load(builder, x, F32, layout.x_sums + 4 * t))
        return emit_fused(builder, load(builder, w, FLOATS, layout.w_minima), total, accumulator)
    return accumulator


def _start(builder: Any, layout: Layout, x: Any, t: int) -> Any:
    """Where the integer sums of token t begin."""
    if layout.sums != "offset":
        return constant(INTS, 0)
    return splat(builder, load(builder, x, I32, layout.x_sums + 4 * t))


def _dot(builder: Any, layout: Layout, sums: Any, weights: Any, activations: Any) -> Any:
    kind, emit = (BYTES, emit_dot4) if layout.word_bytes == 1 else (SHORTS, emit_dot2)
    return emit(builder, sums, builder.bitcast(weights, kind), builder.bitcast(activations, kind))


def sides_of(builder: Any, start: Any, step: Any) -> list[Any]:
    """Where each side's weights begin."""
    return [builder.add(start, builder.mul(step, ir.Constant(I64, side))) for side in range(SIDES)]


def places_of(builder: Any, y: Any, y_step: Any, tokens: int) -> list[Any]:
    """Where each accumulator belongs: token by token, a side's 16 columns beside the other's."""
    rows = [builder.add(y, builder.mul(y_step, ir.Constant(I64, t))) for t in range(tokens)]
    return [builder.add(row, ir.Constant(I64, 64 * side)) for row in rows for side in range(SIDES)]


def _tile(layout: Layout) -> Any:
    """An intrinsic tile(w, w_side, x, y, y_step, n_records): y[t] += SIDES * 16 sums for each token.

    ``w_side`` bytes lie between the sides' weights, ``y_step`` between tokens. A last side that has no tile of its
    own may meet the one before again (w_side = 0) if there is room for the sums.
    """

    def emit(builder: Any, w: Any, w_side: Any, x: Any, y: Any, y_step: Any, n_records: Any) -> None:
        sides, places = sides_of(builder, w, w_side), places_of(builder, y, y_step, TOKENS)

        def body(i: Any, accumulators: list[Any]) -> list[Any]:
            w_at = builder.mul(i, ir.Constant(I64, layout.w_size))
            x_at = builder.add(x, builder.mul(i, ir.Constant(I64, layout.x_size)))
            return _capture_step(builder, layout, [builder.add(w, w_at) for w in sides], x_at, accumulators)

        sums = loop(builder, n_records, [load(builder, place, FLOATS) for place in places], body)
        for place, value in zip(places, sums, strict=True):
            store(builder, value, place)

    return instruction("-:iiiiii")(emit)


tile_offset, tile_minimum, tile_words = (_tile(LAYOUTS[i]) for i in (OFFSET, MINIMUM, WORDS))


@instruction("-:iiiiiiii")
def outer(
    builder: Any, w: Any, w_step: Any, w_side: Any, x: Any, x_step: Any, y: Any, y_step: Any, n: Any
) -> None:
    """y[t, r] += sum over k < n of x[t, k] * w[k, r], for FLOAT_TOKENS rows t, SIDES * 16 columns r; float32.

    Steps are bytes from one row of x, w or y to the next; ``w_side`` bytes lie between the first 16 columns of w
    and the others.
    """
    sides, places = sides_of(builder, w, w_side), places_of(builder, y, y_step, FLOAT_TOKENS)
    xs = [builder.add(x, builder.mul(x_step, ir.Constant(I64, t))) for t in range(FLOAT_TOKENS)]

    def body(k: Any, accumulators: list[Any]) -> list[Any]:
        down = builder.mul(k, w_step)
        weights = [load(builder, builder.add(side, down), FLOATS) for side in sides]
        at = builder.shl(k, ir.Constant(I64, 2))
        for t in range(FLOAT_TOKENS):
            value = splat(builder, load(builder, builder.add(xs[t], at), F32))
            for i, side in enumerate(weights, t * SIDES):
                accumulators[i] = emit_fused(builder, value, side, accumulators[i])
        return accumulators

    sums = loop(builder, n, [load(builder, place, FLOATS) for place in places], body)
    for place, value in zip(places, sums, strict=True):
        store(builder, value, place)


# ---- bringing weights into records


@instruction("-:iii")
def interleave(builder: Any, rows: Any, step: Any, to: Any) -> None:
    """16 rows of 32 bytes, ``step`` bytes apart -> 8 x 64 bytes, as in the picture at the top.

    That is a transposition of 16 x 8 dwords. Seen as one array of 128, whose index has the bits rrrrccc, it is
    four perfect shuffles (first half and second half, one from each in turn): each turns the index by one bit.
    """
    half = ir.VectorType(I32, 8)
    at = [load(builder, builder.add(rows, builder.mul(step, ir.Constant(I64, r))), half) for r in range(16)]
    array = [builder.shuffle_vector(at[r], at[r + 1], _lanes(range(16))) for r in range(0, 16, 2)]
    first = _lanes([i // 2 + 16 * (i % 2) for i in range(16)])
    second = _lanes([8 + i // 2 + 16 * (i % 2) for i in range(16)])
    for _ in range(4):
        pairs = [(array[i], array[i + 4]) for i in range(4)]
        array = [builder.shuffle_vector(a, b, lanes) for a, b in pairs for lanes in (first, second)]
    for j, vector in enumerate(array):
        store(builder, vector, to, 64 * j)


def _lanes(values: Any) -> Any:
    return ir.Constant(ir.VectorType(I32, 16), list(values))
