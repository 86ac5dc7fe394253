"""What four implementations make of 217 picture sizes: tiles, tokens, pixels, embeddings."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from golden.compat import (
    COLUMN_STEP,
    DIGEST_BYTES,
    EMBEDDINGS_EVERY,
    PIXELS_EVERY,
    SPECS,
    Tiles,
    digest,
    sizes,
    wanted,
)
from golden.manifest import record, save_arrays
from golden.pictures import Picture, picture


class Peer(Protocol):
    """One implementation with one vision model loaded."""

    def tiles(self, rgb: Picture) -> Tiles:
        """The pixels that its vision tower sees, each tile (px, px, 3) uint8."""

    def embed(self, rgb: Picture) -> np.ndarray[Any, Any]:
        """The embeddings that stand for the picture, (n_tokens, n_llm)."""


def pixels_of(values: Any, mean: Any, std: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Normalised values (..., 3) back to bytes; an error if they are not bytes' values."""
    bytes_ = (np.asarray(values, np.float64) * np.asarray(std) + np.asarray(mean)) * 255
    rounded = np.round(bytes_)
    if np.abs(bytes_ - rounded).max() > 1e-3:
        raise SystemExit("pixels were not 8 bits before they were normalised")
    return rounded.astype(np.uint8)


def make(name: str, open_peer: Callable[[Path, Any], Peer], packages: dict[str, str], command: str) -> None:
    """compat-<name>.npz: <spec>.n_tiles, .n_tokens, .digest, and .<width>x<height> with columns 0, 32, ...

    Where the implementation fails on a size, n_tiles and n_tokens are 0.
    """
    arrays: dict[str, Any] = {"size": np.array(sizes(), np.int16)}
    for spec_name, spec in SPECS.items():
        with tempfile.TemporaryDirectory() as folder:
            peer = open_peer(Path(folder), spec)
            counts, digests = [], []
            start = time.time()
            for index, (width, height) in enumerate(sizes()):
                rgb = picture(width, height)
                try:
                    tiles, embedding = peer.tiles(rgb), peer.embed(rgb)
                except (ValueError, TypeError) as error:
                    print(f"{name} {spec_name} {width}x{height}: {error}")
                    counts.append((0, 0))
                    digests.append(bytes(DIGEST_BYTES))
                    continue
                counts.append((len(tiles), len(embedding)))
                seen = wanted(PIXELS_EVERY, spec_name, index)
                digests.append(digest(tiles) if seen else bytes(DIGEST_BYTES))
                if wanted(EMBEDDINGS_EVERY, spec_name, index):
                    key = f"{spec_name}.{width}x{height}"
                    arrays[key] = np.ascontiguousarray(embedding[:, ::COLUMN_STEP], np.float32)
            print(f"{name} {spec_name}: {time.time() - start:.0f} s")
        arrays[f"{spec_name}.n_tiles"], arrays[f"{spec_name}.n_tokens"] = np.array(counts, np.int16).T
        arrays[f"{spec_name}.digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    path = save_arrays(f"compat-{name}.npz", arrays)
    tolerance = "exact: counts, and the digests of the 8-bit pixels; embeddings " + (
        "2e-5" if name in ("llava", "hf") else "2e-3 (it rounds patches and activations to F16)"
    )
    record(path, command, packages, tolerance + " of the 2-norm")
