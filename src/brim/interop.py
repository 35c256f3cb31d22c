"""Handing memory to and from other libraries: NumPy's array interface and DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim.errors import DeviceError

__all__ = ["Export", "from_dlpack_array"]


class Export:
    """Owner of an array that left brim: as long as the array lives, so does the block under it."""

    __slots__ = ("__array_interface__", "block")

    def __init__(self, array: np.ndarray[Any, Any], block: Any) -> None:
        self.block = block
        plain = array if array.dtype.kind in "biufc" else array.view(f"u{array.dtype.itemsize}")
        self.__array_interface__ = dict(plain.__array_interface__, strides=plain.strides)

    def asarray(self, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """A NumPy array over the memory whose base is this owner."""
        out = np.asarray(self)
        return out if out.dtype == dtype else out.view(dtype)


def from_dlpack_array(obj: Any) -> np.ndarray[Any, Any]:
    """A NumPy array over the memory of a DLPack exporter on the CPU. Raises DeviceError for one elsewhere."""
    if not hasattr(obj, "__dlpack__"):
        raise DeviceError(f"{type(obj).__name__} has no __dlpack__ method; convert it with numpy first")
    kind = obj.__dlpack_device__()[0]
    if int(kind) not in (1, 3):  # kDLCPU, kDLCUDAHost
        raise DeviceError(f"this array lives on DLPack device type {int(kind)}; copy it to the host first")
    try:
        return np.from_dlpack(obj)
    except (BufferError, RuntimeError) as error:
        raise DeviceError(f"DLPack import failed: {error}; pass a detached, contiguous CPU array") from error
