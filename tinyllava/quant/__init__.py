"""Block formats of GGUF weights: declared as data, turned into floats by short formulas."""

from tinyllava.quant.blocks import TYPES, BlockType, by_id, dequantize

__all__ = ["TYPES", "BlockType", "by_id", "dequantize"]
