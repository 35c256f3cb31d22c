"""How many float32 operations a second the processor makes at most, by a loop of the native library in registers."""

from __future__ import annotations

import time

import numpy as np

from brim_cpu import native

__all__ = ["register_rate"]

_ROUNDS = 32768  # of the loop in a piece: some 0.1 ms
_PIECES = 8  # for each thread, so that none waits long for another
_PEAK = native.Function("brim_peak_f32", "ppii")


def register_rate(seconds: float) -> float | None:
    """FLOP/s of multiplications and additions on the native kernels' threads, the best of about so many seconds.

    The vectors are as wide as those of the kernels. None where there is no native library.
    """
    if not native.available():
        return None
    pieces = _PIECES * native.get_threads()
    sums, flops = np.zeros(pieces, np.float32), np.zeros(pieces, np.int64)
    call = _PEAK.bind(sums, flops, pieces, _ROUNDS)
    call()
    best, start = 0.0, time.perf_counter()
    while best == 0.0 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        best = max(best, float(flops.sum()) / (time.perf_counter() - before))
    return best
