"""-t N means N for NumPy's matrix products, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tinyllava.ops import threads as blas
from tinyllava.ops.select import select


@pytest.fixture
def usual() -> Iterator[None]:
    """Sets the number of threads of before again."""
    threads = blas.blas_threads()
    if threads is None:
        pytest.skip("this NumPy's BLAS does not say how many threads it uses")
    yield
    blas.limit_blas(threads)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_backend_limits_blas_to_its_threads(backend: str, threads: int) -> None:
    blas.limit_blas(3 - threads)
    assert select(backend, threads=threads).threads == threads
    assert blas.blas_threads() == threads


def test_the_library_of_numpys_wheels_is_found() -> None:
    import numpy as np

    library = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if "openblas" not in library:
        pytest.skip(f"NumPy with {library}")
    assert blas.blas_threads()
