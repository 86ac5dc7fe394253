"""The text of the CUDA kernels, and the constants that they share with Python: header() generates them as C++.

Block formats are declared in quant/. One that the kernels shall read needs its name in FORMATS here and its
``Quant<...>``, which unpacks it, in cuda/blocks.cu.
"""

from __future__ import annotations

from pathlib import Path

from tinyllava.quant.blocks import TYPES, BlockType

FOLDER = Path(__file__).parent / "cuda"
FILES = ("common.cu", "blocks.cu", "matvec.cu", "rows.cu", "attention_token.cu", "attention.cu")

# The formats with kernels. Any other is converted to F16.
FORMATS = ("F32", "F16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
ACTIVATIONS = ("gelu_erf", "gelu_tanh", "gelu_quick", "silu")  # enum Activation in the kernels

# How the kernels are launched. A warp has 32 threads.
ROW_THREADS = 256  # of a block in rows.cu and blocks.cu
MATVEC_WARPS = 16  # of a block in matvec.cu: all that a multiprocessor holds, so that x is quantized once for all
MATVEC_ROWS = 2  # outputs that a warp computes at a time, so that x is read from shared memory once for both
DECODE_KEYS = 64  # that a block of attention_token.cu reads at a time
DECODE_THREADS = 128
MAX_HEAD_DIM = 256  # of attend_any in attention_token.cu
FLASH_WARPS = 4  # of a block in attention.cu
FLASH_KEYS = 64  # of a tile in attention.cu
FLASH_PADDING = 16  # bytes after each row of a tile in shared memory

_NUMBERS = {name: value for name, value in globals().items() if type(value) is int}


def source(*files: str) -> str:
    """The header and all kernels, or those of ``files``, as one text: a file uses what those before it define."""
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in files or FILES]
    return "\n".join([header(), *texts])


def header() -> str:
    """C++ declarations: the numbers above, the activations, the formats' ids and where their fields lie."""
    numbers = [f"constexpr int {name} = {value};" for name, value in _NUMBERS.items()]
    formats = [TYPES[name] for name in FORMATS]
    quantized = [kind for kind in formats if not kind.is_scalar]
    return "\n".join([
        *numbers,
        f"enum Activation {{ {', '.join(ACTIVATIONS).upper()} }};",
        f"enum Format {{ {', '.join(f'{kind.name} = {kind.id}' for kind in formats)} }};",
        f"#define FOR_EACH_QUANTIZED_FORMAT(F) {' '.join(f'F({kind.name})' for kind in quantized)}",
        "template <int PLANE, int FIELD_OFFSET, int STRIDE> struct Field;",
        "template <int FORMAT> struct Layout;",
        *map(_layout, quantized),
    ])  # fmt: skip


def _layout(kind: BlockType) -> str:
    fields = [f"typedef Field<{p}, {o}, {s}> {name};" for name, (p, o, s) in field_places(kind).items()]
    size = f"static const int SIZE = {kind.block_size};"
    return f"template <> struct Layout<{kind.name}> {{ {size} {' '.join(fields)} }};"


def is_split(kind: BlockType) -> bool:
    """Whether the fields of a matrix are split into one array each (a structure of arrays) on the device.

    They are where blocks are no multiple of 16 bytes, so that a thread can load 16 aligned bytes of a field.
    """
    return not kind.is_scalar and kind.nbytes % 16 != 0


def field_places(kind: BlockType) -> dict[str, tuple[int, int, int]]:
    """Where each field of a matrix of ``n_blocks`` blocks lies on the device, as (plane, offset, stride).

    Block b has it at byte n_blocks * plane + b * stride + offset. The arrays of split fields come in the order
    of their width: for Q6_K first all blocks' ql, 128 bytes each, and all blocks' d last.
    """
    names = kind.dtype.names or ()
    if not is_split(kind):
        return {name: (0, kind.offset(name), kind.nbytes) for name in names}
    places, plane = {}, 0
    for name in sorted(names, key=lambda name: -kind.dtype[name].itemsize):
        size = kind.dtype[name].itemsize
        places[name] = (plane, 0, size)
        plane += size
    return places
