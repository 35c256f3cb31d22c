"""How many float32 operations a second the processor makes at most: products and sums in registers alone."""

from __future__ import annotations

import brim

__all__ = ["register_rates"]


def register_rates(threads: int, seconds: float) -> dict[int, float]:
    """FLOP/s with one thread, two, four ... and ``threads``, the best of about so many seconds each.

    Returns:
        the rates by number of threads; empty where brim has no native kernels.
    """
    rate = getattr(brim.device("cpu").backend, "register_rate", lambda seconds: None)
    before, found = brim.get_threads(), dict[int, float]()
    try:
        for count in sorted({*(2**n for n in range(threads.bit_length())), threads}):
            brim.set_threads(count)
            if (best := rate(seconds)) is not None:
                found[count] = best
    finally:
        brim.set_threads(before)
    return found
