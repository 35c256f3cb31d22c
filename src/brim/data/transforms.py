"""Transforms: small callables that turn a raw batch (uint8 pixels, table columns) into what a model reads.

A transform takes an array whose first axis counts samples and returns an array with the same first axis. It is
deterministic, picklable, and described by a plain dict, so that a saved model can name the transform it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from brim.errors import DataError, ShapeError
from brim.spec import as_dtype

__all__ = [
    "Cast",
    "Compose",
    "Flatten",
    "Normalize",
    "Transform",
    "is_own",
    "transform_config",
    "transform_from_config",
]

Array = np.ndarray[Any, Any]
Transform = Callable[[Array], Array]

_FIT_ROWS = 4096  # rows per step of Normalize.fit, so that uint8 images are never held in float64 as a whole


@dataclass(frozen=True)
class Normalize:
    """``(x * scale - mean) / std`` in float32.

    Arguments:
        mean: one number, or one per entry of ``axis``, in the units of ``x * scale``.
        std: like ``mean``; greater than zero.
        scale: applied first; ``1/255`` brings 8-bit pixels into [0, 1].
        axis: the axis that a sequence of means and deviations runs along (1: channels of ``(N, C, H, W)``, columns of
            ``(N, features)``).

    Raises:
        ValueError: a deviation that is not positive, a scale of zero, numbers that are not finite.
        ShapeError: when called, on a batch whose ``axis`` has another length.
    """

    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    scale: float = 1.0
    axis: int = 1

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = np.asarray(getattr(self, name), dtype=np.float64)
            if given.ndim > 1 or not np.isfinite(given).all():
                raise ValueError(f"Normalize: {name} is a finite number or a sequence of them, not {given.tolist()!r}")
            # Tuples and floats, not arrays: they compare, hash and go into JSON.
            object.__setattr__(self, name, tuple(given.tolist()) if given.ndim else float(given))
        if isinstance(self.mean, tuple) and isinstance(self.std, tuple) and len(self.mean) != len(self.std):
            raise ValueError(f"Normalize: {len(self.mean)} means, but {len(self.std)} standard deviations")
        if np.min(self.std) <= 0:
            raise ValueError(f"Normalize: std must be greater than 0, not {np.min(self.std)}")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"Normalize: scale is a finite number other than 0, not {self.scale}")
        object.__setattr__(self, "scale", float(self.scale))

    @classmethod
    def fit(cls, array: Array, *, scale: float = 1.0, axis: int | None = 1) -> Normalize:
        """The Normalize that gives ``array`` mean 0 and deviation 1 per entry of ``axis`` (over everything with None).

        Arguments:
            array: shape (N, ...), the training data; entries that never vary get deviation 1 and so become 0.
            scale: as in Normalize.
            axis: the axis whose entries are treated apart; None treats the whole array as one.
        """
        array = np.asarray(array)
        if array.size == 0:
            raise ShapeError(f"Normalize.fit needs data, not an array of shape {array.shape}")
        if axis is not None and not 0 < axis < array.ndim:
            raise ShapeError(f"Normalize.fit: axis {axis} is not an axis of a sample in shape {array.shape}")
        over = tuple(i for i in range(array.ndim) if i != axis)
        count = array.size // (1 if axis is None else array.shape[axis])
        steps = range(0, len(array), _FIT_ROWS)

        def rows(start: int) -> Array:
            return array[start : start + _FIT_ROWS].astype(np.float64)

        mean = sum(rows(start).sum(axis=over, keepdims=True) for start in steps) / count
        variance = sum(np.square(rows(start) - mean).sum(axis=over, keepdims=True) for start in steps) / count
        mean, std = np.squeeze(mean * scale, over), np.squeeze(np.sqrt(variance) * abs(scale), over)
        std = np.where(std > 1e-12 * np.maximum(np.abs(mean), 1.0), std, 1.0)
        return cls(mean.tolist(), std.tolist(), scale, 1 if axis is None else axis)

    @cached_property
    def _shift_and_gain(self) -> tuple[Array, Array]:
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return mean / self.scale, self.scale / std

    def __call__(self, batch: Array) -> Array:
        shift, gain = self._shift_and_gain
        if shift.ndim or gain.ndim:
            want = max(shift.size, gain.size)
            if batch.ndim <= self.axis or batch.shape[self.axis] != want:
                raise ShapeError(
                    f"Normalize has {want} means along axis {self.axis}, the batch has shape {batch.shape}"
                )
            aligned = (-1,) + (1,) * (batch.ndim - self.axis - 1)
            shift, gain = (part.reshape(aligned) if part.ndim else part for part in (shift, gain))
        # Subtracting first keeps the digits of data far from zero; wide inputs are subtracted in float64.
        working = np.result_type(batch.dtype, np.float32)
        out = np.subtract(batch, shift.astype(working), dtype=working)
        out *= gain.astype(working)
        return out.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Flatten:
    """``(N, ...)`` to ``(N, product of the rest)``."""

    def __call__(self, batch: Array) -> Array:
        return batch.reshape(len(batch), math.prod(batch.shape[1:]))


@dataclass(frozen=True)
class Cast:
    """The same values in another dtype.

    Arguments:
        dtype: a dtype or its name.
    """

    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", as_dtype(self.dtype).name)

    def __call__(self, batch: Array) -> Array:
        return batch.astype(as_dtype(self.dtype), copy=False)


@dataclass(frozen=True, init=False)
class Compose:
    """Transforms applied from left to right.

    Arguments:
        transforms: callables on a batch.
    """

    transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Transform) -> None:
        for transform in transforms:
            if not callable(transform):
                raise TypeError(f"Compose takes callables, not {type(transform).__name__}: {transform!r}")
        object.__setattr__(self, "transforms", transforms)

    def __call__(self, batch: Array) -> Array:
        for transform in self.transforms:
            batch = transform(batch)
        return batch


_KNOWN: dict[str, type[Any]] = {cls.__name__: cls for cls in (Normalize, Flatten, Cast)}


def is_own(transform: Transform) -> bool:
    """Whether a transform is brim's, all its parts included: a few array operations, and nothing else."""
    if type(transform) is Compose:
        return all(map(is_own, transform.transforms))
    return _KNOWN.get(type(transform).__name__) is type(transform)


def transform_config(transform: Transform | None) -> dict[str, Any] | None:
    """A transform as a dict for JSON; `transform_from_config` makes the same transform again.

    Raises:
        TypeError: a transform that is not one of brim's.
    """
    if transform is None:
        return None
    if isinstance(transform, Compose):
        return {"name": "Compose", "transforms": [transform_config(part) for part in transform.transforms]}
    name = type(transform).__name__
    if _KNOWN.get(name) is not type(transform):
        known = ", ".join((*_KNOWN, "Compose"))
        raise TypeError(f"only brim's own transforms ({known}) can be written to a file, not {transform!r}")
    return {"name": name, **asdict(cast(Any, transform))}


def transform_from_config(config: dict[str, Any] | None) -> Transform | None:
    """The transform that `transform_config` described.

    Raises:
        DataError: a name or a setting that no transform has.
    """
    if config is None:
        return None
    settings = dict(config)
    name = settings.pop("name", None)
    if name == "Compose":
        parts: Sequence[dict[str, Any]] = settings.get("transforms", ())
        return Compose(*(cast(Transform, transform_from_config(part)) for part in parts))
    if name not in _KNOWN:
        raise DataError(f"transform {name!r} is not known; known are {', '.join((*_KNOWN, 'Compose'))}")
    try:
        return cast(Transform, _KNOWN[name](**settings))
    except (TypeError, ValueError) as error:
        raise DataError(f"transform {name} cannot be made from {settings}: {error}") from error
