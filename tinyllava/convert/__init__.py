"""Checkpoints to GGUF, and GGUF to smaller GGUF: reads and writes files, and never runs a model."""
