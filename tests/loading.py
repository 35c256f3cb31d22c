"""Small data sets and loaders for the tests of both, and what they gave."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim.data import (
    ArrayDataset,
    DataLoader,
)


def numbers(count: int, **settings: Any) -> ArrayDataset:
    """Sample ``i`` is (i, -i)."""
    return ArrayDataset(np.arange(count), -np.arange(count), **settings)


def loader_of(dataset: Any, batch_size: int = 1, **settings: Any) -> DataLoader:
    """A loader that gives NumPy arrays."""
    return DataLoader(dataset, batch_size, to_tensor=False, **settings)


def seen(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [number for batch in seen(batches) for number in batch]
