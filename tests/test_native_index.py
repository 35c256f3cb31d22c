"""Native kernels that read and write by index, against NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from brim.backend import ScalarCell
from brim.device import find_backend
from brim.spec import DTYPES
from brim_cpu.native import Function, chained
from brim_cpu.registry import KERNELS
from native_running import RNG, bound, needs_library, normal, run

Array = np.ndarray[Any, Any]

ALL_DTYPES = [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]


def probe(out: Array) -> Any:
    """A native call that adds one."""
    return Function("brim_team_probe", "pii").bind(out, 1, 1)


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


@needs_library
@pytest.mark.parametrize("wrong", [None, 5, -6])
def test_calls_after_indices_out_of_range_are_not_made(wrong: int | None) -> None:
    x, indices, total = np.ones((5, 4), np.float32), np.array([0, -5, 4]), np.zeros((5, 4), np.float32)
    rows = np.zeros((3, 4), np.float32)
    added = indices[None], rows[None]
    kernel, _ = bound("take", [x, indices], axis=0)
    back, _ = bound("index_add", [total, *added], axis=0, size=5)
    after = probe(count := np.zeros(1, np.int64))
    calls = [*kernel.prepare(rows, x, indices, axis=0)]
    calls += [*back.prepare(total, total, *added, axis=0, size=5), after]
    (chain,) = chained(calls)  # checked without Python in between
    if wrong is None:
        chain()
        assert count == [1]
        np.testing.assert_array_equal(total, [[2.0] * 4, *[[0.0] * 4] * 3, [1.0] * 4])
        return
    indices[1] = wrong
    for _ in range(2):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range for axis 0 of size 5"):
            chain()
    assert count == [0]
    assert not rows.any()
    indices[1] = 1
    chain()
    assert count == [1]


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


# ------------------------------------------------------------------------------------------------- index_add and put

PLACES = [
    ((65, 128), 0, 2048), ((7, 5), 1, 40), ((3, 4, 5), 1, 9), ((9,), 0, 30), ((5, 1), 0, 8), ((3000, 33), 0, 500),
    ((1, 1000), 1, 40000), ((20000,), 0, 30000), ((6, 50, 700), 1, 90), ((3, 40000), 0, 2), ((2, 3, 1, 17), 2, 5),
]  # fmt: skip


def _write_params(shape: tuple[int, ...], axis: int, count: int) -> tuple[Array, tuple[int, ...], dict[str, Any]]:
    indices = RNG.integers(-shape[axis], shape[axis], (1, count))
    return indices, (*shape[:axis], 1, count, *shape[axis + 1 :]), {"axis": axis, "size": shape[axis]}


def _numpy(name: str, out: Array, *ins: Any, **params: Any) -> Array:
    with np.errstate(all="ignore"):
        KERNELS[name].run(out, *ins, **params)
    return out


@needs_library
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_index_add(place: tuple[tuple[int, ...], int, int]) -> None:
    indices, given, params = _write_params(*place)
    x, values = normal(*place[0]), normal(*given)
    want = _numpy("index_add", np.empty_like(x), x, indices, values, **params)
    same_bits(run("index_add", x, indices, values, **params), want)
    turned = np.asfortranarray(x)
    same_bits(run("index_add", turned, indices, values, **params), want)
    want = _numpy("index_add", np.empty_like(x), 0.5, indices, values, **params)
    same_bits(run("index_add", 0.5, indices, values, **params), want)


@needs_library
@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16", "int8", "uint16", "int32", "int64", "complex64"])
def test_index_add_of_other_dtypes(name: str) -> None:
    dtype = DTYPES[name]
    indices, given, params = _write_params((40, 77), 0, 300)
    x, values = (RNG.integers(-100, 100, shape).astype(dtype) / dtype.type(3) for shape in ((40, 77), given))
    x, values = x.astype(dtype), values.astype(dtype)
    want = _numpy("index_add", np.empty_like(x), x, indices, values, **params)
    same_bits(run("index_add", x, indices, values, **params), want)
    assert bound("index_add", [x.astype(bool), indices, values.astype(bool)], **params)[0] is None


@needs_library
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_index_add_of_special_numbers(name: str) -> None:
    special = np.array([np.nan, np.inf, -np.inf, 65504, 3e38, 1e-40, 6e-8, -0.0], np.float32)
    with np.errstate(over="ignore"):
        values = special[RNG.integers(0, 8, (1, 64, 9))].astype(DTYPES[name])
    indices = RNG.integers(0, 30, (1, 64))
    params = {"axis": 0, "size": 30}
    want = _numpy("index_add", np.empty((30, 9), values.dtype), -0.0, indices, values, **params)
    got = run("index_add", -0.0, indices, values, **params)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    same_bits(np.where(np.isnan(got), 0, got), np.where(np.isnan(want), 0, want))


@needs_library
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bool", "bfloat16", "int64"])
def test_put(place: tuple[tuple[int, ...], int, int], dtype: str) -> None:
    indices, given, params = _write_params(*place)
    x, values = bits(*place[0], dtype=DTYPES[dtype]), bits(*given, dtype=DTYPES[dtype])
    want = x.copy()
    along, lined = np.moveaxis(want, place[1], 0), np.moveaxis(values.squeeze(place[1]), place[1], 0)
    for position, index in enumerate(indices[0]):
        along[index] = lined[position]
    same_bits(run("put", x, indices, values, **params), want)
    along[indices[0]] = 1
    same_bits(run("put", x, indices, 1, **params), want)
    want[...] = 0
    for position, index in enumerate(indices[0]):
        along[index] = lined[position]
    same_bits(run("put", 0, indices, values, **params), want)


@needs_library
@pytest.mark.parametrize("name", ["index_add", "put"])
def test_writes_in_place_and_large_ones(name: str) -> None:
    indices, given, params = _write_params((3000, 1000), 0, 700)  # more than the caches keep
    values = normal(*given)
    want = _numpy(name, np.empty((3000, 1000), np.float32), 0.0, indices, values, **params)
    same_bits(run(name, 0.0, indices, values, **params), want)
    same_bits(run(name, 0.0, indices, values, aligned=True, **params), want)
    x = normal(3000, 1000)
    want = _numpy(name, np.empty_like(x), x, indices, values, **params)
    same_bits(run(name, x, indices, values, **params), want)
    kernel, _ = bound(name, [x, indices, values], **params)
    assert kernel.aliasing
    for call in kernel.prepare(x, x, indices, values, **params):
        call()
    same_bits(x, want)


@needs_library
@pytest.mark.parametrize("name", ["index_add", "put"])
def test_a_number_that_changes_from_run_to_run(name: str) -> None:
    indices, values, cell = np.array([[1, 1]]), np.ones((1, 2, 3), np.float32), ScalarCell(2.5)
    kernel, (spec,) = bound(name, [0.0, indices, values], axis=0, size=2)
    out = np.zeros(spec.shape, spec.dtype)
    calls = kernel.prepare(out, cell, indices, values, axis=0, size=2)
    for number in (2.5, -1.0):
        cell.value = number
        for call in calls:
            call()
        np.testing.assert_array_equal(out, [[number] * 3, [number + 2 if name == "index_add" else 1] * 3])


@needs_library
@pytest.mark.parametrize("name", ["index_add", "put"])
@pytest.mark.parametrize("wrong", [-4, 3, 2**40])
def test_writes_out_of_range(name: str, wrong: int) -> None:
    x, indices, values = np.ones((2, 3), np.float32), np.array([[0, wrong]]), np.ones((2, 1, 2), np.float32)
    with pytest.raises(IndexError, match=f"index {wrong} is out of range for axis 1 of size 3"):
        run(name, x, indices, values, axis=1, size=3)
    kernel, _ = bound(name, [x, indices, values], axis=1, size=3)
    with pytest.raises(IndexError):
        for call in kernel.prepare(x, x, indices, values, axis=1, size=3):
            call()
    assert (x == 1).all()


@needs_library
@pytest.mark.parametrize("name", ["index_add", "put"])
def test_writes_of_nothing(name: str) -> None:
    for shape, axis, count in (((0, 4), 0, 0), ((4, 0), 0, 3), ((4, 5), 1, 0), ((0, 4), 1, 3)):
        indices, given = np.zeros((1, count), np.int64), (*shape[:axis], 1, count, *shape[axis + 1 :])
        params = {"axis": axis, "size": shape[axis]}
        x, values = np.ones(shape, np.float32), np.ones(given, np.float32)
        same_bits(run(name, x, indices, values, **params), x)
        same_bits(run(name, 2.0, indices, values, **params), np.full(shape, 2, np.float32))
