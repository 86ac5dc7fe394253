"""The micro-kernels of GEMM: LLVM code, unrolled by Python loops, that multiplies one packed block by another.

A micro-kernel multiplies MR = VECTORS * LANES rows of weights by NR tokens. Its MR x NR sums stay in registers, a
lane of a vector for each row of weights, while the loop walks along the columns. With two vectors of rows, what is
loaded is used more than once: a processor that multiplies twice a cycle (Zen 5) can load no more than twice,
either.

Both operands are packed: a panel is a sequence of blocks, each of 32 columns (64 of int16), that the loop reads
from front to back:

    weights      LANES rows   for j in 0..7:  | row 0: q[4j..4j+3] | row 1: q[4j..4j+3] | ... | row 15 |
                              then the scales d: 16 float32, one for each row; then the minima m alike
    activations  NR tokens    | token 0: 32 x int8 | ... | token NR-1 |, then scales: NR float32, then sums: NR

Step j broadcasts four bytes of each token to all lanes and multiplies them by each vector of weights with one
``dot4``. After the last step the integer sums become float32 and are multiplied by both scales. By how a format's
weights follow from its q, sums differ:

    "offset"   w = d * (q - c)   sums are -c * sum(p) as int32, where the accumulation starts
    "minimum"  w = d * q + m     sums are s * sum(p) as float32, to be multiplied by m
    "int16"    w = d * q         none; weights and activations are int16, dot2 multiplies two at a time

Formats with super-blocks have longer blocks: microkernel_k.py. ``microkernel_f32`` is the same over float32, for
float32 weights and for attention. Definition of the products: ops/quantized.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from tinyllava.ops.cpu.simd import llvm

# A vector of 512 bits has 16 lanes. VECTORS x NR integer sums and as many float sums stay in registers: 24 of 32
# with AVX-512; without, where one of our vectors takes two registers, 8 of 16.
WIDE = "avx512f" in llvm.FEATURES
LANES = 16
VECTORS = 2 if WIDE else 1
MR = VECTORS * LANES  # rows of weights that a micro-kernel multiplies at once
NR = 6 if WIDE else 2  # tokens
NR_F32 = 12 if WIDE else 2  # float32 products need one kind of sums only
BLOCK = 32  # columns of a file's small block, and of a packed block of these


@dataclass(frozen=True)
class Layout:
    """The packed blocks of one kind of product: offsets and sizes in bytes, w_ of weights and x_ of activations.

    A block of weights has LANES rows, one of activations NR tokens.
    """

    kind: str  # "offset", "minimum", "minima", "signed" or "int16"
    groups: int = 1  # scales of a row of weights in a block

    @property
    def q_bytes(self) -> int:
        """Bytes of a quantized number."""
        return 2 if self.kind == "int16" else 1

    @property
    def columns(self) -> int:
        """Columns of a block. Scaling its sums takes as long as three dot products, so it should not be short."""
        return {"minima": 4 * BLOCK, "signed": 4 * BLOCK, "int16": 2 * BLOCK}.get(self.kind, BLOCK)

    @property
    def steps(self) -> int:
        """Dot products of a block: each takes four bytes of a row."""
        return self.columns * self.q_bytes // 4

    @property
    def w_scales(self) -> int:
        return self.steps * 64

    @property
    def w_minima(self) -> int:
        """What comes after the scales: minima, or what microkernel_k.py says."""
        return self.w_scales + 64 * self.groups

    @property
    def w_size(self) -> int:
        return self.w_minima + {"minimum": 64, "minima": 32 * self.groups + 64, "signed": 64}.get(self.kind, 0)

    @property
    def x_scales(self) -> int:
        return NR * self.columns * self.q_bytes

    @property
    def x_sums(self) -> int:
        return self.x_scales + 4 * NR

    @property
    def x_size(self) -> int:
        return self.x_sums + NR * {"offset": 4, "minimum": 4, "minima": 2 * self.groups}.get(self.kind, 0)


OFFSET, MINIMUM, MINIMA_4, MINIMA_8, SIGNED, INT16 = range(6)  # in this order, as kernels know them
LAYOUTS = (
    Layout("offset"), Layout("minimum"), Layout("minima", 4), Layout("minima", 8), Layout("signed", 8),
    Layout("int16"),
)  # fmt: skip


def loop(builder: Any, count: Any, start: list[Any], body: Any) -> list[Any]:
    """for i in range(count): values = body(i, values). Count is at least 1."""
    before, inside = builder.block, builder.append_basic_block("loop")
    after = builder.append_basic_block("done")
    builder.branch(inside)
    builder.position_at_end(inside)
    i = builder.phi(llvm.I64)
    values = [builder.phi(v.type) for v in start]
    found = body(i, list(values))
    following = builder.add(i, llvm.i64(1))
    i.add_incoming(llvm.i64(0), before)
    i.add_incoming(following, builder.block)
    for phi, first, again in zip(values, start, found, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return list(found)


def _block(builder: Any, layout: Layout, ws: list[Any], x: Any, accumulators: list[Any]) -> list[Any]:
    """One block of weights at each of the addresses ws times one of activations at x."""
    start = [_start(builder, layout, x, t) for t in range(NR) for _ in ws]
    sums = emit_dots(builder, layout, ws, x, start, layout.steps)
    return [
        _scale(builder, layout, (ws[i % VECTORS], x, i // VECTORS), integers, accumulator)
        for i, (integers, accumulator) in enumerate(zip(sums, accumulators, strict=True))
    ]


def _scale(builder: Any, layout: Layout, at: tuple[Any, Any, int], sums: Any, accumulator: Any) -> Any:
    """accumulator + the integer sums of a block, scaled; ``at``: weights, activations, token."""
    w, x, t = at
    scaled = builder.fmul(llvm.load(builder, w, llvm.F32X16, layout.w_scales), builder.sitofp(sums, llvm.F32X16))
    scale = llvm.broadcast(builder, llvm.load(builder, x, llvm.F32, layout.x_scales + 4 * t))
    accumulator = llvm.emit_fma(builder, scaled, scale, accumulator)
    if layout.kind == "minimum":
        total = llvm.broadcast(builder, llvm.load(builder, x, llvm.F32, layout.x_sums + 4 * t))
        return llvm.emit_fma(builder, llvm.load(builder, w, llvm.F32X16, layout.w_minima), total, accumulator)
    return accumulator


def _start(builder: Any, layout: Layout, x: Any, t: int) -> Any:
    """Where the integer sums of token t begin."""
    if layout.kind != "offset":
        return llvm.i32x16(0)
    return llvm.broadcast(builder, llvm.load(builder, x, llvm.I32, layout.x_sums + 4 * t))


def emit_dots(builder: Any, layout: Layout, ws: list[Any], x: Any, start: list[Any], steps: int) -> list[Any]:
    """start + the dot products of the next 4 * ``steps`` bytes: of rows at each of ws, of NR tokens at x."""
    sums = list(start)
    for j in range(steps):
        weights = [llvm.load(builder, w, llvm.I32X16, 64 * j) for w in ws]
        for t in range(NR):
            activations = llvm.broadcast(builder, llvm.load(builder, x, llvm.I32, 4 * (t * layout.steps + j)))
            for i, vector in enumerate(weights, t * VECTORS):
                sums[i] = _dot(builder, layout, sums[i], vector, activations)
    return sums


def _dot(builder: Any, layout: Layout, sums: Any, weights: Any, activations: Any) -> Any:
    """One step. dot4's first factor is unsigned: the weights, unless these are the signed ones."""
    kind, emit = (llvm.I8X64, llvm.emit_dot4) if layout.q_bytes == 1 else (llvm.I16X32, llvm.emit_dot2)
    factors = [builder.bitcast(v, kind) for v in (weights, activations)]
    return emit(builder, sums, *(factors[::-1] if layout.kind == "signed" else factors))


def vectors_at(builder: Any, start: Any, stride: Any) -> list[Any]:
    """The addresses of VECTORS vectors, ``stride`` bytes apart."""
    return [builder.add(start, builder.mul(stride, llvm.i64(i))) for i in range(VECTORS)]


def sums_at(builder: Any, y: Any, y_stride: Any, tokens: int) -> list[Any]:
    """The addresses of the sums, token by token, a token's vectors side by side."""
    rows = [builder.add(y, builder.mul(y_stride, llvm.i64(t))) for t in range(tokens)]
    return [builder.add(row, llvm.i64(64 * i)) for row in rows for i in range(VECTORS)]


def _microkernel(layout: Layout) -> Any:
    """An intrinsic f(w, w_stride, x, y, y_stride, n_blocks): y[t] += MR sums for each of NR tokens.

    ``w_stride`` bytes lie between the panels of LANES rows, ``y_stride`` between tokens. Where the last vector has
    no panel of its own it may take the one before once more (w_stride = 0), if y has space for its sums.
    """

    def emit(builder: Any, w: Any, w_stride: Any, x: Any, y: Any, y_stride: Any, n_blocks: Any) -> None:
        panels, places = vectors_at(builder, w, w_stride), sums_at(builder, y, y_stride, NR)

        def body(i: Any, accumulators: list[Any]) -> list[Any]:
            w_at = builder.mul(i, llvm.i64(layout.w_size))
            x_at = builder.add(x, builder.mul(i, llvm.i64(layout.x_size)))
            return _block(builder, layout, [builder.add(w, w_at) for w in panels], x_at, accumulators)

        sums = loop(builder, n_blocks, [llvm.load(builder, place, llvm.F32X16) for place in places], body)
        for place, value in zip(places, sums, strict=True):
            llvm.store(builder, value, place)

    return llvm.instruction("-:iiiiii")(emit)


MICROKERNELS = {i: _microkernel(LAYOUTS[i]) for i in (OFFSET, MINIMUM, INT16)}


@llvm.instruction("-:iiiiiiii")
def microkernel_f32(
    builder: Any, w: Any, w_stride: Any, w_vector: Any, x: Any, x_stride: Any, y: Any, y_stride: Any, n: Any
) -> None:
    """y[t, r] += sum over k < n of x[t, k] * w[k, r], for NR_F32 rows t, MR columns r; float32.

    Strides are bytes from one row of x, w or y to the next; ``w_vector`` bytes lie between the first 16 columns of
    w and the others.
    """
    columns, places = vectors_at(builder, w, w_vector), sums_at(builder, y, y_stride, NR_F32)
    xs = [builder.add(x, builder.mul(x_stride, llvm.i64(t))) for t in range(NR_F32)]

    def body(k: Any, accumulators: list[Any]) -> list[Any]:
        down = builder.mul(k, w_stride)
        weights = [llvm.load(builder, builder.add(column, down), llvm.F32X16) for column in columns]
        at = builder.shl(k, llvm.i64(2))
        for t in range(NR_F32):
            value = llvm.broadcast(builder, llvm.load(builder, builder.add(xs[t], at), llvm.F32))
            for i, vector in enumerate(weights, t * VECTORS):
                accumulators[i] = llvm.emit_fma(builder, value, vector, accumulators[i])
        return accumulators

    sums = loop(builder, n, [llvm.load(builder, place, llvm.F32X16) for place in places], body)
    for place, value in zip(places, sums, strict=True):
        llvm.store(builder, value, place)


# ---- packing


@llvm.instruction("-:iii")
def interleave(builder: Any, rows: Any, stride: Any, to: Any) -> None:
    """16 rows of 32 bytes, ``stride`` bytes apart -> 8 x 64 bytes: the q of a packed block.

    That is a transposition of 16 x 8 dwords. Seen as one array of 128, whose index has the bits rrrrccc, it is
    four perfect shuffles (first half and second half, one from each in turn): each rotates the index by one bit.
    """
    half = ir.VectorType(llvm.I32, 8)
    at = [llvm.load(builder, builder.add(rows, builder.mul(stride, llvm.i64(r))), half) for r in range(16)]
    array = [llvm.shuffle(builder, *at[r : r + 2], range(16)) for r in range(0, 16, 2)]
    first = [i // 2 + 16 * (i % 2) for i in range(16)]
    for _ in range(4):
        pairs = [(array[i], array[i + 4]) for i in range(4)]
        array = [llvm.shuffle(builder, *pair, [lane + at for lane in first]) for pair in pairs for at in (0, 8)]
    for j, vector in enumerate(array):
        llvm.store(builder, vector, to, 64 * j)
