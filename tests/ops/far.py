"""A device that stands in for a GPU: NumPy's own numbers, in arrays that refuse to be mixed with the host's."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import numpy as np

from tinyllava.ops import Array
from tinyllava.ops.cpu.ops import NumbaOps
from tinyllava.ops.gpu import device
from tinyllava.ops.reference import NumpyOps


class FarArray(np.ndarray):
    """An array on the device. With a host's array beside it no operation works, as on a GPU."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **settings: Any) -> Any:
        mixed = any(type(x) is np.ndarray and x.ndim > 0 for x in (*inputs, *out))
        assert not mixed, "two memories in one operation"
        plain = [x.view(np.ndarray) if isinstance(x, FarArray) else x for x in inputs]
        if out:
            settings["out"] = tuple(x.view(np.ndarray) for x in out)
        found = getattr(ufunc, method)(*plain, **settings)
        return out[0] if out else far(found)

    def __array_function__(self, function: Any, _types: Any, inputs: Any, settings: Any) -> Any:
        return far(function(*(_near(x) for x in inputs), **settings))

    def __setitem__(self, key: Any, value: Any) -> None:
        assert isinstance(value, FarArray), "the host's values written into the device's memory"
        super().__setitem__(key, value)


def _near(x: Any) -> Any:
    """A function's argument, one array or a list of them, without the mark; it must have it."""
    if isinstance(x, list | tuple) and any(isinstance(chunk, np.ndarray) for chunk in x):
        return [_near(chunk) for chunk in x]
    assert type(x) is not np.ndarray, "two memories in one function"
    return x.view(np.ndarray) if isinstance(x, FarArray) else x


def far(x: Any) -> Any:
    """x on the device."""
    return np.asarray(x).view(FarArray)


class FarNumpy(NumpyOps):
    """The reference as a device, which has as much memory as CuPy says."""

    name = "far"
    memory = device

    def vector(self, tensor: Any) -> Array:
        return far(super().vector(tensor))

    def array(self, values: Any) -> Array:
        assert not isinstance(values, FarArray)
        return far(np.array(values, self.dtype))

    def numpy(self, values: Array) -> Array:
        assert isinstance(values, FarArray)
        return np.array(values)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return far(super().zeros(shape))

    def _far(self, op: str, *inputs: Any, **settings: Any) -> Any:
        """An operation of the reference, on the device's arrays alone."""
        assert not any(type(x) is np.ndarray for x in inputs), f"the host's memory in {op}"
        plain = [np.array(x) if isinstance(x, FarArray) else x for x in inputs]
        return far(getattr(NumpyOps(self.dtype.name), op)(*plain, **settings))


OPS = "embed linear add layer_norm rms_norm activation swiglu rope attention attention_weights"
for name in OPS.split():
    setattr(FarNumpy, name, partialmethod(FarNumpy._far, name))


class FarNumba(NumbaOps):
    """The Numba backend as a device that shares the host's memory."""

    name = "far"
