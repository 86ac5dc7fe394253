"""GEMM: a matrix times many tokens, which reading a prompt is.

    y (n, d_out) = x (n, d_in) @ W^T, a task that shares out groups of panels of W:

    for PACK_COLUMNS columns of W at a time                                          (8192: mostly all of them)
        pack the group's panels of LANES rows                      pack_weights.py   they stay in the L2 cache
        for VECTORS panels, TOKEN_PANELS panels of NR tokens
            for KC columns                                                           W's part is about the L1 cache
                for each panel of NR tokens
                    sums (NR, MR) += tokens @ rows^T               microkernel.py    a block's sums are registers

The tokens have been quantized and packed before (quantize_activations.py). These are the loops of Goto and van de
Geijn 2008, "Anatomy of high-performance matrix multiplication". Each format has a copy of the task, so that a run
compiles those of its file only. Definition: ops/quantized.py.
"""

from __future__ import annotations

import numpy as np

from tinyllava.ops.cpu.compile import Task, kernel, placeholder, task
from tinyllava.ops.cpu.microkernel import LANES, LAYOUTS, MICROKERNELS, MR, NR, NR_F32, VECTORS, microkernel_f32
from tinyllava.ops.cpu.microkernel_k import MICROKERNELS_K
from tinyllava.ops.cpu.pack_weights import PACK, PACK_COLUMNS, PACK_SCRATCH, layout_of
from tinyllava.ops.cpu.quantize_activations import KC, packed_block
from tinyllava.ops.cpu.simd import intrinsics as simd
from tinyllava.ops.cpu.thread_pool import arguments_at, floats_at
from tinyllava.ops.cpu.unpack import FORMATS, Format

TOKEN_PANELS = 16  # panels of tokens that are multiplied by KC columns before the next KC are read
SUMS_STRIDE = 4 * MR  # bytes from one token's sums to the next one's
GEMM_SCRATCH = PACK_SCRATCH + TOKEN_PANELS * NR * SUMS_STRIDE  # of a thread, beside its packed panels

# Placeholders: each format's copies of gemm and multiply_panels have their own values (compile.specialize).
COLUMNS = W_SIZE = X_SIZE = 0  # of a packed block
PACK_PANEL = MICROKERNEL = MULTIPLY_PANELS = placeholder


def gemm(args: int, chunk: int, thread_id: int) -> None:
    """A group of panels of the matrix times all tokens -> columns of y.

    y is (n_panels * NR, d_out rounded up to MR). The scratch of a thread: the packed panels of a group, then
    GEMM_SCRATCH. The bias (d_out,) is 0 if there is none.
    """
    w, row_bytes, d_out, d_in, per_chunk, x, n_panels, y, y_stride, scratch, size, bias = arguments_at(args, 12)
    panels, first = scratch + thread_id * size, chunk * per_chunk
    panel_bytes = (min(PACK_COLUMNS, d_in) + COLUMNS - 1) // COLUMNS * W_SIZE
    count, workspace = min(per_chunk, (d_out + LANES - 1) // LANES - first), panels + per_chunk * panel_bytes
    for start in range(0, d_in, PACK_COLUMNS):
        for p in range(count):
            row = (first + p) * LANES
            n_rows = min(LANES, d_out - row)
            PACK_PANEL(w + row * row_bytes, row_bytes, n_rows, d_in, start, panels + p * panel_bytes, workspace)
        for p in range(0, count, VECTORS):
            row = (first + p) * LANES
            panel = panels + p * panel_bytes
            stride = panel_bytes if p + VECTORS <= count else 0  # the last panel may be alone
            panel_bias = bias + 4 * row if bias != 0 else 0
            sums, n_rows = workspace + PACK_SCRATCH, min(MR, d_out - row)
            MULTIPLY_PANELS(
                panel, stride, x, n_panels, start, d_in, y + 4 * row, y_stride, panel_bias, n_rows, sums
            )


def multiply_panels(
    w: int, w_stride: int, x: int, n_panels: int, start: int, d_in: int,
    y: int, y_stride: int, bias: int, n_rows: int, sums: int,
) -> None:  # fmt: skip
    """Columns ``start`` ... of MR rows, which are packed at w, times those of all tokens, added to y.

    The sums are accumulated in scratch and not in y: rows of y are often a multiple of 4096 bytes apart, and would
    share the same few sets of the L1 cache.
    """
    n_blocks = (d_in + COLUMNS - 1) // COLUMNS
    for first in range(0, n_panels, TOKEN_PANELS):
        last = min(first + TOKEN_PANELS, n_panels)
        for panel in range(first, last):
            panel_sums = sums + (panel - first) * NR * SUMS_STRIDE
            if start == 0:
                start_sums(panel_sums, bias, n_rows)
            else:
                copy_sums(y + panel * NR * y_stride, y_stride, panel_sums, SUMS_STRIDE)
        for at in range(start, min(start + PACK_COLUMNS, d_in), KC):
            n = (min(KC, d_in - at) + COLUMNS - 1) // COLUMNS
            w_at = w + (at - start) // COLUMNS * W_SIZE
            for panel in range(first, last):
                panel_sums = sums + (panel - first) * NR * SUMS_STRIDE
                block = packed_block(panel, at // COLUMNS, n_panels, n_blocks, KC // COLUMNS)
                MICROKERNEL(w_at, w_stride, x + block * X_SIZE, panel_sums, SUMS_STRIDE, n)
        for panel in range(first, last):
            copy_sums(sums + (panel - first) * NR * SUMS_STRIDE, SUMS_STRIDE, y + panel * NR * y_stride, y_stride)


@kernel
def start_sums(sums: int, bias: int, n: int) -> None:
    """NR rows of MR sums become the bias of n numbers, or zeros if it is 0."""
    for t in range(NR):
        row = sums + t * SUMS_STRIDE
        for i in range(0, MR, 16):
            is_there = bias != 0 and i + 16 <= n
            simd.store_f32x16(row + 4 * i, simd.load_f32x16(bias + 4 * i) if is_there else simd.zeros())
        if bias != 0:
            for i in range(n // 16 * 16, n):
                simd.store_f32(row + 4 * i, simd.load_f32(bias + 4 * i))


@kernel
def copy_sums(source: int, source_stride: int, to: int, stride: int) -> None:
    """NR rows of MR numbers."""
    for t in range(NR):
        for i in range(0, 4 * MR, 64):
            simd.store_f32x16(to + t * stride + i, simd.load_f32x16(source + t * source_stride + i))


@task
def gemm_f32(args: int, chunk: int, thread_id: int) -> None:
    """MR rows of a float32 matrix times all tokens, in float32 -> MR columns of y; tokens in panels of NR_F32."""
    w, d_out, d_in, x, n_panels, y, y_stride, scratch, size = arguments_at(args, 9)
    scratch, count = scratch + thread_id * size, min(MR, d_out - chunk * MR)
    rows, packed = floats_at(w + chunk * MR * d_in * 4, count, d_in), floats_at(scratch, d_in, MR)
    for r in range(count):
        for k in range(d_in):
            packed[k, r] = rows[r, k]
    for panel in range(n_panels):
        at = y + panel * NR_F32 * y_stride + chunk * MR * 4
        for t in range(NR_F32):
            for r in range(MR):
                simd.store_f32(at + t * y_stride + 4 * r, np.float32(0.0))
        tokens = x + panel * NR_F32 * d_in * 4
        microkernel_f32(scratch, MR * 4, LANES * 4, tokens, d_in * 4, at, y_stride, d_in)


# ---- each format's copy


def _task(form: Format) -> Task:
    which = layout_of(form)
    layout = LAYOUTS[which]
    sizes = {"COLUMNS": layout.columns, "W_SIZE": layout.w_size, "X_SIZE": layout.x_size}
    names = {**sizes, "MICROKERNEL": {**MICROKERNELS, **MICROKERNELS_K}[which]}
    multiply = kernel(form.specialize(multiply_panels, **names))
    return task(form.specialize(gemm, **sizes, PACK_PANEL=PACK[form.block.name], MULTIPLY_PANELS=multiply))


GEMM = {name: _task(form) for name, form in FORMATS.items() if name != "F32"}
