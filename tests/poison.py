"""Memory around arrays that a native kernel must not touch, for runs under AddressSanitizer; elsewhere nothing happens.

Arrays of tests are often views into larger ones (off alignment, between guards). AddressSanitizer knows only where the
larger one ends; here the rest of it is put off limits too while a kernel runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

__all__ = ["only"]

_PROCESS = ctypes.CDLL(None)
_POISON = getattr(_PROCESS, "__asan_poison_memory_region", None)
_UNPOISON = getattr(_PROCESS, "__asan_unpoison_memory_region", None)


@contextmanager
def only(*arrays: Any) -> Iterator[None]:
    """Within: of the memory that these arrays are views of, compiled code may touch them alone."""
    if _POISON is None or _UNPOISON is None:
        yield
        return
    views = [x for x in arrays if isinstance(x, np.ndarray)]
    owners = [byte_bounds(x) for x in map(_owner, views) if x.flags.owndata]
    for low, high in owners:
        _POISON(ctypes.c_void_p(low), ctypes.c_size_t(high - low))
    for low, high in map(byte_bounds, views):
        _UNPOISON(ctypes.c_void_p(low), ctypes.c_size_t(high - low))
    try:
        yield
    finally:
        for low, high in owners:
            _UNPOISON(ctypes.c_void_p(low), ctypes.c_size_t(high - low))


def _owner(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
