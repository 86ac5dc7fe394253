"""Comparing: two dumps of activations or two model files, and the known difference where they part."""
