"""ArrayDataset: samples held as rows of NumPy arrays, with views, splits and a description; and batches of any dataset.

A dataset is anything with ``len(dataset)`` and ``dataset[i]``. An ArrayDataset also gathers a whole batch at once, in
one vectorised read per array: raw data (uint8 pixels) stay as they are in memory and are converted batch by batch.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from brim.data.transforms import Array, Transform
from brim.errors import DTypeError, ShapeError
from brim.random import permutation
from brim.spec import Spec, as_dtype
from brim.units import format_bytes

__all__ = ["ArrayDataset", "Dataset", "checked_field", "collate", "count_classes", "gather", "train_validation_split"]


class Dataset(Protocol):
    """What a DataLoader needs: a length, and sample ``i`` as an array or a tuple of arrays.

    A dataset may also have ``batch(indices)``, a tuple of arrays with one row per index; it is used instead.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ArrayDataset:
    """Arrays that share their first axis: row ``i`` of each makes sample ``i``.

    Arguments:
        arrays: shapes (N, ...); by convention the inputs first and the targets last. They are kept, not copied.
        transform: a callable on a batch of the first array, or a sequence with one callable or None per array. It is
            applied when samples are read.
        num_classes: how many classes the targets (integers from 0) have, where they are classes.
        class_names: their names, in order.

    Raises:
        ShapeError: arrays without a first axis, or of different lengths.
        DTypeError: an array of objects, strings or another dtype that no tensor has.
        ValueError: more classes among the targets than ``num_classes``.
    """

    def __init__(
        self,
        *arrays: Any,
        transform: Transform | Sequence[Transform | None] | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if not arrays:
            raise ValueError("ArrayDataset needs at least one array, such as ArrayDataset(inputs, targets)")
        self._arrays = tuple(_native(array, position) for position, array in enumerate(arrays))
        lengths = [len(array) for array in self._arrays]
        if len(set(lengths)) > 1:
            raise ShapeError(
                f"the arrays of a dataset share their first axis, but it has lengths {', '.join(map(str, lengths))}"
            )
        self._rows: Array | None = None
        self._transforms = _per_field(transform, len(self._arrays))
        if class_names is not None:
            class_names = tuple(map(str, class_names))
            if num_classes is not None and num_classes != len(class_names):
                raise ValueError(f"num_classes is {num_classes}, but there are {len(class_names)} class names")
            num_classes = len(class_names)
        targets = self._arrays[-1]
        if num_classes is not None and targets.dtype.kind in "iu" and targets.size and targets.max() >= num_classes:
            raise ValueError(f"there are {num_classes} classes, but a target of {targets.max()}; targets count from 0")
        self._class_names: tuple[str, ...] | None = class_names
        self._num_classes = num_classes

    # What it holds

    def __len__(self) -> int:
        return len(self._arrays[0]) if self._rows is None else len(self._rows)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays behind this dataset as they were given: all rows, untransformed, shared by every view."""
        return self._arrays

    @property
    def indices(self) -> Array:
        """The rows of `arrays` that are this dataset's samples, in order."""
        return np.arange(len(self)) if self._rows is None else self._rows

    @property
    def rows(self) -> Array | None:
        """As `indices`; None where they are simply all rows in their order."""
        return self._rows

    @property
    def transforms(self) -> tuple[Transform | None, ...]:
        """One transform, or None, per array."""
        return self._transforms

    @property
    def spec(self) -> tuple[Spec, ...]:
        """Shape and dtype of each field of one sample, after the transforms and without the first axis."""
        one = self.batch(np.arange(min(len(self), 1)))
        return tuple(Spec(field.shape[1:], as_dtype(field.dtype)) for field in one)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample's first field, as a model receives it."""
        return self.spec[0].shape

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None where the targets are not known to be classes."""
        return self._num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in order; None where they are not known."""
        return self._class_names

    classes = class_names

    @property
    def nbytes(self) -> int:
        """Host memory of the arrays and of this view's indices; views of one dataset share the arrays."""
        return sum(array.nbytes for array in self._arrays) + (0 if self._rows is None else self._rows.nbytes)

    def field(self, position: int) -> Array:
        """This dataset's rows of one array, untransformed; not a copy where the dataset holds all rows."""
        array = self._arrays[position]
        return array if self._rows is None else np.take(array, self._rows, axis=0)

    def __repr__(self) -> str:
        fields = ", ".join(f"{array.dtype}{list(array.shape[1:])}" for array in self._arrays)
        classes = "" if self._num_classes is None else f", {self._num_classes} classes"
        return f"ArrayDataset({len(self):,} samples of {fields}{classes}; {format_bytes(self.nbytes)})"

    # Reading

    def batch(self, indices: Any) -> tuple[Array, ...]:
        """The samples at ``indices``, one new array per field with one row per index.

        Arguments:
            indices: integers (negative ones count from the end), or booleans, one per sample.

        Raises:
            IndexError: an index outside the dataset.
            ShapeError: a transform that changed the number of rows.
        """
        rows = _as_indices(indices, len(self))
        if self._rows is not None:
            rows = np.take(self._rows, rows)
        out = []
        for array, transform in zip(self._arrays, self._transforms):
            # Of an array that is not row-major ``take`` would make a copy as a whole first.
            field = np.take(array, rows, axis=0) if array.flags.c_contiguous else array[rows]
            out.append(field if transform is None else checked_field(transform(field), len(rows), transform))
        return tuple(out)

    def __getitem__(self, index: Any) -> tuple[Array, ...]:
        """One sample as a tuple of arrays for an integer; a batch for a slice or an array of indices."""
        if isinstance(index, slice):
            return self.batch(np.arange(*index.indices(len(self))))
        if np.ndim(index):
            return self.batch(index)
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} of a dataset with {len(self)} samples")
        return tuple(field[0] for field in self.batch([position]))

    # Views: the arrays are shared, only the indices are new

    def subset(self, indices: Any) -> ArrayDataset:
        """The samples at ``indices`` (integers, booleans or a slice) as a dataset on the same arrays."""
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        rows = _as_indices(indices, len(self))
        if len(rows) and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"indices from {rows.min()} to {rows.max()} for a dataset with {len(self)} samples")
        view = copy.copy(self)
        view._rows = np.take(self.indices, rows)
        return view

    def with_transform(self, transform: Transform | Sequence[Transform | None] | None) -> ArrayDataset:
        """The same samples read through another transform (instead of the present one)."""
        view = copy.copy(self)
        view._transforms = _per_field(transform, len(self._arrays))
        return view

    def split(self, fraction: float, seed: int = 0, *, stratify: bool = False) -> tuple[ArrayDataset, ArrayDataset]:
        """Two datasets on the same arrays: ``round(fraction * N)`` samples drawn at random, and the rest.

        Both keep the samples in their order. The same dataset length, fraction and seed give the same split.

        Arguments:
            fraction: the first part's share, between 0 and 1.
            seed: of the draw.
            stratify: draw the same share of every class, to within one sample; the targets are the last array.

        Raises:
            ValueError: a fraction that leaves one part empty.
            ShapeError, DTypeError: ``stratify`` where the last array is not one integer per sample.
        """
        size = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise ValueError(f"a split at {fraction} of {len(self)} samples leaves one part empty")
        order = permutation(len(self), seed=seed, epoch=0)
        if stratify:
            order = _stratified(order, self.field(-1), size)
        return self.subset(np.sort(order[:size])), self.subset(np.sort(order[size:]))


def train_validation_split(
    dataset: ArrayDataset, fraction: float = 0.1, seed: int = 0, *, stratify: bool | None = None
) -> tuple[ArrayDataset, ArrayDataset]:
    """Training and validation parts of a dataset, which share its arrays.

    Arguments:
        dataset: what to split.
        fraction: the validation part's share.
        seed: of the draw.
        stratify: keep the shares of the classes; by default where the dataset knows its classes.

    Returns:
        ``(train, validation)``.
    """
    by_class = dataset.num_classes is not None if stratify is None else stratify
    validation, train = dataset.split(fraction, seed, stratify=by_class)
    return train, validation


def gather(dataset: Dataset, indices: Array) -> tuple[Array, ...]:
    """A batch of any dataset: its own ``batch(indices)``, or its samples one by one, stacked."""
    batch = getattr(dataset, "batch", None)
    return batch(indices) if batch is not None else collate([dataset[int(index)] for index in indices])


def collate(samples: Sequence[Any]) -> tuple[Array, ...]:
    """Samples (arrays, numbers, or tuples of them) stacked field by field.

    Raises:
        ShapeError: samples with different numbers of fields, or fields with different shapes.
    """
    rows = [sample if isinstance(sample, (tuple, list)) else (sample,) for sample in samples]
    counts = sorted({len(row) for row in rows})
    if len(counts) != 1:
        raise ShapeError(f"the samples of one batch have the same number of fields, but these have {counts}")
    fields = []
    for position in range(counts[0]):
        # A Python float becomes brim's default float, not NumPy's.
        parts = [np.asarray(row[position], np.float32 if type(row[position]) is float else None) for row in rows]
        shapes = sorted({part.shape for part in parts})
        if len(shapes) > 1:
            raise ShapeError(f"field {position} has different shapes within one batch: {', '.join(map(str, shapes))}")
        fields.append(np.stack(parts))
    return tuple(fields)


def count_classes(targets: Array) -> int | None:
    """The number of classes, if an array of targets looks like class indices; None otherwise.

    It does if it is one-dimensional, integer, and holds every number from 0 to some K - 1 > 0, not all just once.
    """
    if targets.ndim != 1 or targets.dtype.kind not in "iu" or targets.size == 0:
        return None
    if targets.min() != 0 or not 1 <= targets.max() < targets.size - 1:
        return None
    return int(targets.max()) + 1 if np.bincount(targets.astype(np.int64)).all() else None


def _native(array: Any, position: int) -> Array:
    out = np.asarray(array)
    try:
        dtype = as_dtype(out.dtype)
    except DTypeError as error:
        raise DTypeError(f"array {position} of the dataset: {error}") from error
    if out.ndim == 0:
        raise ShapeError(f"array {position} of the dataset is a single number; its first axis should count samples")
    return out if out.dtype.isnative else out.astype(dtype)


def _per_field(transform: Transform | Sequence[Transform | None] | None, count: int) -> tuple[Transform | None, ...]:
    given = tuple(transform) if isinstance(transform, Sequence) else (transform,)
    if len(given) > count:
        raise ValueError(f"{len(given)} transforms for {count} arrays")
    for part in given:
        if part is not None and not callable(part):
            raise TypeError(f"a transform is a callable on a batch, not {part!r}")
    return given + (None,) * (count - len(given))


def _as_indices(indices: Any, length: int) -> Array:
    out = np.asarray(indices)
    if out.ndim != 1:
        raise ShapeError(f"indices are a sequence of integers, not an array of shape {out.shape}")
    if out.dtype == np.bool_:
        if len(out) != length:
            raise ShapeError(f"a mask has one boolean per sample: {len(out)} for {length} samples")
        return np.flatnonzero(out)
    if out.size == 0:
        return np.zeros(0, np.int64)
    if out.dtype.kind not in "iu":
        raise TypeError(f"indices are integers, not {out.dtype}")
    return out


def checked_field(field: Any, rows: int, transform: Transform) -> Array:
    """What a transform made of so many rows. Raises TypeError and ShapeError where it is not an array of them."""
    if not isinstance(field, np.ndarray):
        raise TypeError(f"transform {transform!r} returned {type(field).__name__}, not a NumPy array")
    if field.ndim == 0 or len(field) != rows:
        raise ShapeError(f"transform {transform!r} got {rows} rows and returned an array of shape {field.shape}")
    return field


def _stratified(order: Array, labels: Array, size: int) -> Array:
    """``order`` rearranged: first ``size`` samples with each class's share (largest remainders), then the others."""
    if labels.ndim != 1:
        raise ShapeError(f"stratify needs one label per sample; the last array holds {labels.shape[1:]} per sample")
    if labels.dtype.kind not in "iub":
        raise DTypeError(f"stratify needs integer labels in the last array, not {labels.dtype}")
    _, classes, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    share = counts * size  # in units of 1/len(order) samples
    quota = share // len(order)
    left = size - int(quota.sum())
    quota[np.argsort(-(share % len(order)), kind="stable")[:left]] += 1
    by_class = np.argsort(classes, kind="stable")  # positions in `order`, class by class, each class in drawn order
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    drawn = np.empty(len(order), bool)
    drawn[by_class] = rank < np.repeat(quota, counts)
    return np.concatenate([order[drawn], order[~drawn]])
