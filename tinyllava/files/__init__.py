"""Files that hold models: reading them, bounds-checked, without trusting a byte."""

from tinyllava.files.gguf import GGUFFile, Tensor, n_parameters, open_gguf

__all__ = ["GGUFFile", "Tensor", "n_parameters", "open_gguf"]
