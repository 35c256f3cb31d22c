"""Randomness from counters: the same seed gives the same numbers on every device, and the whole state is two integers.

Every draw takes one number of a global counter. Draw ``c`` under seed ``s`` is the stream of NumPy's Philox4x64-10 with
key (s, stream) and a counter whose words are (block, 0, c, 0); a device kernel reproduces it block by block. So a
dropout mask is a function of (seed, counter): the backward pass draws it again instead of storing it.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from brim.context import context, host_scalars
from brim.errors import TraceError

__all__ = ["get_state", "host_generator", "manual_seed", "next_counter", "permutation", "set_state"]

_MASK = 2**64 - 1
_STREAM_DRAWS, _STREAM_SHUFFLE = 0, 1

_lock = threading.Lock()
_seed = 0
_counter = 0


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= int(seed) <= _MASK:
        raise ValueError(f"a seed is an integer from 0 to 2**64 - 1, got {seed!r}")
    return int(seed)


def manual_seed(seed: int) -> None:
    """Start the global stream anew. Without a call the seed is 0: a run is repeatable unless told otherwise."""
    global _seed, _counter
    with _lock:
        _seed, _counter = _checked_seed(seed), 0


def next_counter() -> tuple[int, int]:
    """(seed, counter) of a new draw; in a planned step, of a new draw each time it runs."""
    seed, counter = host_scalars(_draw, (int, int))
    return seed, counter


def _draw() -> tuple[int, int]:
    global _counter
    with _lock:
        _counter += 1
        return _seed, _counter - 1


def get_state() -> dict[str, int]:
    """The whole state: ``{"seed": ..., "counter": ...}``."""
    with _lock:
        return {"seed": _seed, "counter": _counter}


def set_state(state: dict[str, int]) -> None:
    """Continue exactly where ``get_state`` was called."""
    global _seed, _counter
    with _lock:
        _seed, _counter = _checked_seed(state["seed"]), _checked_seed(state["counter"])


def philox(seed: int, counter: int, stream: int = _STREAM_DRAWS) -> np.random.Philox:
    """The bit generator of one draw."""
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(counter=np.array([0, 0, counter, 0], np.uint64), key=key)


def host_generator() -> np.random.Generator:
    """A NumPy generator for one new draw: initial weights are drawn on the host, then copied to the device.

    Raises:
        TraceError: called in a planned step, where the numbers would be the same in every run.
    """
    if context.interpreter is not None:
        raise TraceError(
            "random numbers drawn on the host are constants in a planned step: every run would use the same ones; "
            "use brim.nn.functional.dropout, or draw before the step and pass the numbers in as an argument"
        )
    return np.random.Generator(philox(*_draw()))


def permutation(n: int, *, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """The order of ``n`` samples in one epoch: a pure function of its arguments, the same in every NumPy version.

    Arguments:
        n: number of samples.
        seed: seed of the shuffle.
        epoch: number of the epoch, from 0.

    Returns:
        int64 array of shape (n,): each of 0..n-1 once.
    """
    keys = philox(_checked_seed(seed), epoch, _STREAM_SHUFFLE).random_raw(n)
    # NumPy's fastest sort takes a sixth of the time of its stable one. Without equal keys there is one order only, and
    # among 64-bit keys equal ones practically never occur.
    order = np.argsort(keys)
    keys = keys[order]
    if (keys[1:] == keys[:-1]).any():
        order = np.argsort(philox(seed, epoch, _STREAM_SHUFFLE).random_raw(n), kind="stable")
    return order.astype(np.int64, copy=False)
