"""Measuring speed and memory: this package and other programs on the same work, each in a process of its own."""
