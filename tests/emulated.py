"""The device "emulated" of the test process: the CUDA backend on host memory, and its kernels compiled in one go.

Its kernels are the ones that a GPU runs, compiled by g++; its memory is counted as a card's. Tests of it carry the
marker ``emulated``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

import brim
from brim.check.ops import strided, tensors, tuple_of, weighted
from brim.check.table import Row, with_shapes
from brim.device import Device, _backends
from brim_cuda.device import CudaBackend
from brim_cuda.emulation import EmulatedMachine, EmulationLoader, find_compiler
from brim_cuda.launch import Kernel

__all__ = ["WHY_NOT", "compile_for", "device", "exercises_of", "machine", "settle"]

WHY_NOT = "" if find_compiler() else "needs g++, which was not found"
TOTAL_BYTES = 8 << 30


@cache
def machine() -> EmulatedMachine:
    """The card; made, and registered as device "emulated", at the first call."""
    made = EmulatedMachine(total_bytes=TOTAL_BYTES)
    _backends["emulated"] = CudaBackend(made, "emulated")
    return made


def device() -> Device:
    """The device. Raises DeviceError where g++ is missing."""
    machine()
    return brim.device("emulated")


def settle() -> None:
    """Give the arena and unused memory back, if the device was used at all."""
    if machine.cache_info().currsize and not WHY_NOT:
        device().memory.arena.release()
        device().memory.stage.release()
        device().memory.pool.release_cached()


class _Noting(EmulationLoader):
    """Runs nothing and notes which kernels would have run."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[Kernel, None] = {}

    def functions(self, kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
        self.noted.update(dict.fromkeys(kernels))
        return [lambda *_: None for _ in kernels]


def compile_for(exercises: Iterable[Callable[[Any], Any]]) -> int:
    """Compile what these need, all together: ten times quicker than each kernel at its first use.

    Arguments:
        exercises: called with a device on which no kernel runs; what they raise does not matter, since numbers are
            anything there.

    Returns:
        the number of kernels.
    """
    noting, loader = EmulatedMachine(total_bytes=TOTAL_BYTES), _Noting()
    noting.loader = loader
    _backends["noting"] = CudaBackend(noting, "noting")
    place = brim.device("noting")
    for exercise in exercises:
        with contextlib.suppress(Exception):
            exercise(place)
    place.memory.pool.release_cached()
    machine().loader.functions(list(loader.noted))
    return len(loader.noted)


def exercises_of(row: Row, sizes: Sequence[tuple[int, ...]]) -> list[Callable[[Any], Any]]:
    """What the tests of a row run: every dtype, gradients, another layout, other sizes."""
    found = [partial(_forward, row, dtype) for dtype in row.dtypes]
    found.append(partial(_strided, row))
    if row.differentiable():
        found.append(partial(_backward, row))
    if row.resizable:
        found += [partial(_forward, with_shapes(row, [size] * len(row.inputs)), row.dtypes[0]) for size in sizes]
    return found


def _forward(row: Row, dtype: str, place: Any) -> None:
    for output in tuple_of(row.run(*tensors(row.arrays(dtype), place))):
        output.numpy()


def _strided(row: Row, place: Any) -> None:
    inputs = [strided(array, place) for array in row.arrays(row.dtypes[0])]
    for x in inputs:
        x.numpy()
    row.run(*inputs)


def _backward(row: Row, place: Any) -> None:
    inputs = tensors(row.arrays("float64"), place)
    for x, made in zip(inputs, row.inputs, strict=True):
        x.requires_grad = x.dtype == np.float64 and made.grad
    outputs = tuple_of(row.run(*inputs))
    weighted(outputs, [np.ones(o.shape) if o.requires_grad else None for o in outputs]).backward()
    for x in inputs:
        if x.grad is not None:
            x.grad.numpy()
