"""The batches of one epoch: rows copied out of a dataset's arrays, into memory that is used again.

A batch belongs to whoever asked for it. Its memory is written anew only when nobody refers to it any more, which
Python's reference counts tell: views, memoryviews and exports to other libraries all refer to the owner of the memory.
While a piece is in use another is taken, so that a list of all batches is as right as a loop over them.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from brim.data.dataset import ArrayDataset, Dataset, checked_field, gather
from brim.data.transforms import Array, Transform, is_own
from brim.device import Device, find_backend
from brim.memory.pool import Block
from brim.spec import Spec, as_dtype
from brim.tensor import Tensor, asarray, empty

__all__ = ["ArrayReader", "Reader", "in_memory", "of_own_rows", "reader"]

T = TypeVar("T")

# Fewer bytes are copied by NumPy before the native copy has bound its arguments (8 us).
_NATIVE_BYTES = 128 * 1024


def _count_of_unused() -> int:
    """What ``_Reused.take`` reads of an object that only its list refers to; -1 where counts do not tell."""
    has_lock: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    if hasattr(sys, "getrefcount") and has_lock():
        for one in [object()]:
            return sys.getrefcount(one)
    return -1


_UNUSED = _count_of_unused()


class _Reused(Generic[T]):
    """Objects that are handed out again once nobody else refers to them.

    Arguments:
        make: makes another one.
        most: how many are kept; where more are in use at a time, the others are made for one use.
    """

    def __init__(self, make: Callable[[], T], most: int) -> None:
        self._make, self._most = make, most
        self._kept: list[T] = []

    def take(self) -> T:
        """One that is not in use. Two threads never get the same: each counts the other's reference."""
        for one in self._kept:
            if sys.getrefcount(one) == _UNUSED:
                return one
        made = self._make()
        if len(self._kept) < self._most and _UNUSED > 0:
            self._kept.append(made)
        return made


def _in_use_is_seen() -> bool:
    pieces: _Reused[list[int]] = _Reused(list, 2)
    held = pieces.take()
    return pieces.take() is not held


if not _in_use_is_seen():  # another Python may count in another way: then nothing is used again
    _UNUSED = -1


class Reader:
    """Batches of any dataset by their position in an epoch.

    Arguments:
        dataset: what to read.
        order: the samples in the order of the epoch, int64 (N,).
        batch_size: samples in a batch.
    """

    def __init__(self, dataset: Dataset, order: Array, batch_size: int) -> None:
        self._dataset, self._order, self._batch_size = dataset, order, batch_size

    def batch(self, position: int, on_team: bool = False) -> tuple[Array, ...]:
        """Batch ``position`` as arrays. ``on_team``: brim's threads may help to copy, since no step is running."""
        try:
            return self._read(self._samples(position), on_team)
        except StopIteration as error:  # would end the consumer's loop as if the epoch were over
            raise RuntimeError("the dataset or its transform raised StopIteration") from error

    def _samples(self, position: int) -> Array:
        start = position * self._batch_size
        return self._order[start : start + self._batch_size]

    def _read(self, samples: Array, on_team: bool) -> tuple[Array, ...]:
        return gather(self._dataset, samples)


class ArrayReader(Reader):
    """Batches of an ArrayDataset.

    Arguments:
        dataset, order, batch_size: as of ``Reader``.
        most: how many batches are in the making or in use at a time, as a rule.

    Raises:
        IndexError: the order names a sample outside of the dataset.
    """

    def __init__(self, dataset: ArrayDataset, order: Array, batch_size: int, most: int) -> None:
        # Looked at once for the whole epoch, not in each batch.
        if len(order) and not (-len(dataset) <= order.min() and order.max() < len(dataset)):
            raise IndexError(f"samples {order.min()} to {order.max()} of a dataset with {len(dataset)} samples")
        rows = order if dataset.rows is None else np.take(dataset.rows, order)
        super().__init__(dataset, np.ascontiguousarray(rows, np.int64), batch_size)
        self._fields = [_Field(a, t, batch_size, most) for a, t in zip(dataset.arrays, dataset.transforms)]

    def _read(self, samples: Array, on_team: bool) -> tuple[Array, ...]:
        return tuple([field.read(samples, on_team) for field in self._fields])

    def tensors(self, position: int, device: Device) -> tuple[Tensor, ...]:
        """Batch ``position`` as tensors on a device whose memory is the host's: rows are copied straight into it.

        Raises:
            BudgetExceeded: it does not fit the device's budget.
        """
        samples = self._samples(position)
        try:
            return tuple([field.tensor(samples, device) for field in self._fields])
        except StopIteration as error:
            raise RuntimeError("a transform raised StopIteration") from error


class _Field:
    """Rows of one array, through its transform."""

    def __init__(self, array: Array, transform: Transform | None, batch_size: int, most: int) -> None:
        self._array, self._transform, self._batch_size, self._most = array, transform, batch_size, most
        self._spec = Spec((batch_size, *array.shape[1:]), as_dtype(array.dtype))
        # Of an array that is not row-major NumPy's ``take`` would make a copy as a whole, in each batch.
        self._plain = array.flags.c_contiguous and array.flags.aligned
        self._native: Any = getattr(find_backend("cpu"), "gather_rows", None) if self._plain else None
        self._arrays: _Reused[Array] = _Reused(partial(np.empty, self._spec.shape, array.dtype), most)
        self._blocks: dict[Device, _Reused[Block]] = {}

    def read(self, rows: Array, on_team: bool) -> Array:
        """The rows as an array that is the caller's."""
        array = self._array
        whole = len(rows) == self._batch_size
        out = self._arrays.take() if whole else np.empty((len(rows), *array.shape[1:]), array.dtype)
        self._copy(rows, out, on_team)
        return out if self._transform is None else checked_field(self._transform(out), len(rows), self._transform)

    def tensor(self, rows: Array, device: Device) -> Tensor:
        """The rows as a tensor that is the caller's."""
        if self._transform is not None:
            return asarray(self.read(rows, True), device=device)
        if len(rows) < self._batch_size:
            shape = (len(rows), *self._array.shape[1:])
            out = empty(shape, dtype=self._array.dtype, device=device, op="asarray").book_as("inputs")
        else:
            if device not in self._blocks:
                self._blocks[device] = _Reused(partial(_new_block, self._spec, device), self._most)
            out = Tensor(self._spec, device, self._blocks[device].take())
        self._copy(rows, out.array, True)
        return out

    def _copy(self, rows: Array, out: Array, on_team: bool) -> None:
        if self._native is not None and out.nbytes >= _NATIVE_BYTES:
            self._native(self._array, rows, out, on_team)
        elif self._plain:
            self._array.take(rows, 0, out, "wrap")  # indices were checked: "raise" would copy twice
        else:
            out[...] = self._array[rows]


def _new_block(spec: Spec, device: Device) -> Block:
    return device.memory.allocate(spec.nbytes, "inputs", "asarray", spec)


def reader(dataset: Dataset, order: Array, batch_size: int, most: int) -> Reader:
    """What reads a dataset's batches: row by row into reused memory, or as the dataset itself gives them."""
    if _gives_rows(dataset):
        assert isinstance(dataset, ArrayDataset)
        return ArrayReader(dataset, order, batch_size, most)
    return Reader(dataset, order, batch_size)


def in_memory(dataset: Dataset) -> bool:
    """Whether reading a batch is a copy in memory with brim's own transforms at most: no waiting, no slow Python."""
    return of_own_rows(dataset) and not any(map(_is_mapped, dataset.arrays))  # type: ignore[attr-defined]


def of_own_rows(dataset: Dataset) -> bool:
    """Whether batches are rows of arrays, with brim's own transforms at most: each sample is the same in any batch."""
    if not _gives_rows(dataset):
        return False
    assert isinstance(dataset, ArrayDataset)
    return all(transform is None or is_own(transform) for transform in dataset.transforms)


def _gives_rows(dataset: Dataset) -> bool:
    """An ArrayDataset, and not one whose ``batch`` a subclass defines."""
    return isinstance(dataset, ArrayDataset) and getattr(dataset.batch, "__func__", None) is ArrayDataset.batch


def _is_mapped(array: Any) -> bool:
    """Whether an array's memory is a file's, which reading may have to wait for."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)
