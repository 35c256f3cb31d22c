"""Native kernels that read and write by index, against NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from brim.device import find_backend
from brim.spec import DTYPES
from native_running import RNG, needs_library, run

Array = np.ndarray[Any, Any]

ALL_DTYPES = [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]


def bits(*shape: int, dtype: Any) -> Array:
    """Any bit patterns, one element off alignment."""
    dtype = np.dtype(dtype)
    high = 2 if dtype.kind == "b" else 256
    count = int(np.prod(shape)) * dtype.itemsize
    return RNG.integers(0, high, count + dtype.itemsize).astype(np.uint8)[dtype.itemsize :].view(dtype).reshape(shape)


def same_bits(got: Array, want: Array) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert got.tobytes() == np.ascontiguousarray(want).tobytes()


# ---------------------------------------------------------------------------------------------------------- take


@needs_library
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_take_of_every_dtype(dtype: Any) -> None:
    for shape, axis in (((7, 5), 0), ((7, 5), 1), ((3, 4, 5), 1), ((9,), 0)):
        x = bits(*shape, dtype=dtype)
        for at in ((4,), (2, 3), ()):
            indices = RNG.integers(-shape[axis], shape[axis], at)
            same_bits(run("take", x, np.asarray(indices), axis=axis), np.take(x, indices, axis))


@needs_library
@pytest.mark.parametrize(
    ("shape", "axis", "count"),
    [((300, 129), 0, 2048), ((5, 40000), 1, 30000), ((40, 3, 1, 700), 2, 3), ((2, 3000, 17), 1, 5000), ((2, 1), 0, 99)],
    ids=str,
)
def test_take_in_pieces(shape: tuple[int, ...], axis: int, count: int) -> None:
    x, indices = bits(*shape, dtype=np.float32), RNG.integers(-shape[axis], shape[axis], count)
    same_bits(run("take", x, indices, axis=axis), np.take(x, indices, axis))
    spread = np.repeat(indices, 3)[::3]
    same_bits(run("take", np.asfortranarray(x), spread, axis=axis), np.take(x, indices, axis))


@needs_library
def test_take_of_nothing() -> None:
    for shape, axis, count in (((0, 4), 1, 3), ((4, 0), 0, 3), ((4, 5), 0, 0), ((0,), 0, 0)):
        x, indices = np.zeros(shape, np.float32), np.zeros(count, np.int64)
        same_bits(run("take", x, indices, axis=axis), np.take(x, indices, axis))


@needs_library
@pytest.mark.parametrize("wrong", [-6, 5, 2**40, -(2**63)])
@pytest.mark.parametrize("count", [3, 70000])
def test_take_out_of_range(wrong: int, count: int) -> None:
    indices = np.zeros(count, np.int64)
    indices[count // 2] = wrong
    with pytest.raises(IndexError, match=f"index {wrong} is out of range for axis 1 of size 5"):
        run("take", np.zeros((2, 5), np.float32), indices, axis=1)
    if wrong != 5:
        return
    with pytest.raises(IndexError, match="index 0 is out of range for axis 0 of size 0"):
        run("take", np.zeros((0, 5), np.float32), indices[:1], axis=0)


# --------------------------------------------------------------------------------------------------- rows for batches


@pytest.mark.parametrize("on_team", [True, False], ids=["team", "alone"])
@pytest.mark.parametrize("shape", [(50,), (50, 784), (50, 3, 5), (50, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64", "bfloat16"])
def test_gather_rows(dtype: str, shape: tuple[int, ...], on_team: bool) -> None:
    backend: Any = find_backend("cpu")
    source = bits(*shape, dtype=DTYPES[dtype])
    for count in (0, 1, 5, 333):
        indices = RNG.integers(-50, 50, count)
        out = np.empty((count, *shape[1:]), source.dtype)
        backend.gather_rows(source, indices, out, on_team)
        same_bits(out, source[indices])
        backend.gather_rows(source[::-1], indices[::-1], out, on_team)  # any strides
        same_bits(out, source[::-1][indices[::-1]])
        backend.gather_rows(source, indices.astype(np.int32), out, on_team)
        same_bits(out, source[indices])


@pytest.mark.parametrize("on_team", [True, False], ids=["team", "alone"])
@pytest.mark.parametrize("wrong", [-51, 50, 2**62])
def test_gather_rows_out_of_range(wrong: int, on_team: bool) -> None:
    backend: Any = find_backend("cpu")
    source, out = np.ones((50, 8), np.float32), np.zeros((3, 8), np.float32)
    for given in (source, source[::-1]):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range for axis 0 of size 50"):
            backend.gather_rows(given, np.array([0, wrong, 3]), out, on_team)
    assert not out.any()


def test_gather_rows_that_do_not_fit() -> None:
    backend: Any = find_backend("cpu")
    source, indices = np.ones((5, 8), np.float32), np.array([1, 2])
    for out in (np.zeros((2, 8)), np.zeros((3, 8), np.float32), np.zeros((2, 7), np.float32)):
        with pytest.raises(ValueError, match="cannot be written into"):
            backend.gather_rows(source, indices, out)
    with pytest.raises(ValueError, match="cannot be written into"):
        backend.gather_rows(source, indices[None], np.zeros((1, 2, 8), np.float32))
