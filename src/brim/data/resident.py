"""A data set in the memory of a device: its arrays as a model reads them, uploaded once, and batches gathered there."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim.backend import BoundKernel
from brim.data.dataset import ArrayDataset, Dataset
from brim.data.rows import of_own_rows
from brim.data.transforms import Array
from brim.device import Device
from brim.gathered import Gathered, bind_take
from brim.spec import Spec
from brim.tensor import Tensor, asarray, empty

__all__ = ["Order", "ResidentSet", "check_resident", "resident_specs"]

_CHUNK_BYTES = 8 * 2**20
"""Rows are transformed and uploaded so many bytes at a time, so that the host never holds the set twice."""


def check_resident(dataset: Dataset) -> None:
    """Raises TypeError where a data set cannot be kept on a device: its batches are not rows of arrays."""
    if not of_own_rows(dataset):
        raise TypeError(
            "resident=True keeps the rows of an ArrayDataset on the device, transformed once: it needs an ArrayDataset "
            "without transforms, or with brim's own (Normalize, Flatten, Cast, Compose). Leave resident=True out, or "
            "read the data into an ArrayDataset first"
        )


def resident_specs(count: int, fields: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """What is held on the device while batches are read: each field as a whole, and the order of an epoch.

    Arguments:
        count: samples.
        fields: shape and dtype of each field of a batch.
    """
    held = [Spec((count, *field.shape[1:]), field.dtype) for field in fields]
    return (*held, Spec((count,), np.dtype("int64")))


class ResidentSet:
    """The samples of a data set on one device.

    Arguments:
        dataset: what is uploaded; later changes of its arrays are not seen.
        device: with memory of its own.

    Raises:
        BudgetExceeded: it does not fit; what was taken is given back.
    """

    def __init__(self, dataset: ArrayDataset, device: Device) -> None:
        self.dataset, self.device = dataset, device
        self.fields: list[Tensor] = []
        self._kernels: dict[tuple[int, int], BoundKernel] = {}
        N = len(dataset)
        sample = dataset.batch(np.zeros(1, np.int64))
        for field in sample:
            made = empty((N, *field.shape[1:]), dtype=field.dtype, device=device, op="dataset")
            self.fields.append(made.book_as("inputs"))
        row_bytes = max(1, sum(field.nbytes for field in sample))
        step = max(1, _CHUNK_BYTES // row_bytes)
        for begin in range(0, N, step):
            rows = dataset.batch(np.arange(begin, min(begin + step, N)))
            for whole, part in zip(self.fields, rows, strict=True):
                if part.size:
                    device.backend.upload(whole[begin : begin + len(part)].array, np.ascontiguousarray(part))

    def rows(self, field: int, indices: Tensor, samples: Array) -> Gathered:
        """A batch of one field.

        Arguments:
            field: its number.
            indices: which samples, int64 on the device.
            samples: the same on the host.
        """
        source, key = self.fields[field], (field, len(samples))
        if key not in self._kernels:
            self._kernels[key] = bind_take(source.spec, len(samples), self.device)
        return Gathered(source, indices, self._kernels[key], lambda: self.dataset.batch(samples)[field])


class Order:
    """The batches of one epoch of a resident set.

    Arguments:
        held: the set.
        order: the samples in the order of the epoch, int64 (N,); uploaded here, once.
        batch_size: samples in a batch.
    """

    def __init__(self, held: ResidentSet, order: Array, batch_size: int) -> None:
        self._held, self._order, self._batch_size = held, order, batch_size
        self._indices = asarray(order, device=held.device).book_as("inputs")

    def batch(self, position: int) -> tuple[Any, ...]:
        """Batch ``position``, not gathered yet."""
        start = position * self._batch_size
        samples = self._order[start : start + self._batch_size]
        indices = self._indices[start : start + len(samples)]
        return tuple([self._held.rows(field, indices, samples) for field in range(len(self._held.fields))])
