"""Arrays between pages that must not be touched: a kernel that leaves its memory stops at once."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

__all__ = ["Guarded"]

ALIGNMENT = 16
_CANARY = 0xC5
_PROT_NONE = 0


class Guarded:
    """A copy of an array's memory that ends (up to 15 bytes) at a forbidden page and starts after one.

    The bytes between a page and the array are checked by ``check``.

    Attributes:
        array: the array over that memory, of the same shape, dtype and strides.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        low, high = np.lib.array_utils.byte_bounds(array)
        size = max(0, high - low)
        start = array.__array_interface__["data"][0] - low
        page = mmap.PAGESIZE
        room = -(-max(size, 1) // page) * page
        self._map = mmap.mmap(-1, room + 2 * page)
        whole = np.frombuffer(self._map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        for at in (0, page + room):
            if libc.mprotect(ctypes.c_void_p(whole.ctypes.data + at), ctypes.c_size_t(page), _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect failed")
        self._inner = whole[page : page + room]
        self._inner[:] = _CANARY
        self._first = room - (-(-size // ALIGNMENT) * ALIGNMENT)
        self._size = size
        memory = self._inner[self._first : self._first + size]
        self.array: np.ndarray[Any, Any] = np.ndarray(
            array.shape, array.dtype, memory if size else b"", start if size else 0, array.strides if size else None
        )
        if size:
            self.array[...] = array

    @property
    def bounds(self) -> tuple[int, int]:
        """Addresses of the first byte and of the byte after the last."""
        first = self._inner.ctypes.data + self._first
        return first, first + self._size

    def check(self) -> None:
        """Raises MemoryError when a byte beside the array was overwritten."""
        stop = self._first + self._size
        for side, bytes_ in (("before", self._inner[: self._first]), ("after", self._inner[stop:])):
            bad = np.flatnonzero(bytes_ != _CANARY)
            if bad.size:
                away = bytes_.size - int(bad[0]) if side == "before" else int(bad[-1]) + 1
                raise MemoryError(f"a kernel wrote up to {away} bytes {side} its array of {self._size} bytes")
