"""Vectors for kernels."""
