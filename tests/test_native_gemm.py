"""Native matrix products against float64: odd shapes, stored either way, batches, special values; the same bits with
any number of threads; NumPy's OpenBLAS keeps its own."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
from brim.spec import Spec
from brim_cpu import native, openblas
from brim_cpu.overlay import matmul as overlay

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

Array = np.ndarray[Any, Any]
TOLERANCE = {"float32": 4e-6, "float64": 1e-14}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = brim.get_threads()
    brim.set_threads(2)
    yield
    brim.set_threads(before)


def spec_of(x: Array) -> Spec:
    return Spec(x.shape, x.dtype, None if x.flags.c_contiguous else tuple(s // x.itemsize for s in x.strides))


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """The product by the native kernel; asserts that there is one."""
    if out is None:
        shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        out = np.full(shape, np.nan, a.dtype)
    kernel = overlay.matmul([spec_of(a), spec_of(b)], [spec_of(out)])
    assert kernel is not None
    for call in kernel.calls(out, a, b):
        call()
    return out


def assert_product(found: Array, a: Array, b: Array) -> None:
    exact = a.astype(float) @ b.astype(float)
    scale = np.abs(a).astype(float) @ np.abs(b).astype(float) + 1e-30
    assert np.max(np.abs(found - exact) / scale) <= TOLERANCE[found.dtype.name]


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, transposed: bool) -> Array:
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    made = rng.standard_normal(stored).astype(dtype)
    return np.swapaxes(made, -1, -2) if transposed else made


SIZES = [(1, 1, 1), (1, 300, 7), (7, 1, 65), (13, 33, 5), (12, 32, 256), (25, 97, 257), (130, 67, 300), (33, 10, 1024)]
SIZES += [(1, 9, 784), (1, 129, 37), (2, 131, 50), (3, 77, 31), (4, 70, 16), (5, 6, 4000), (30, 19, 300), (64, 45, 600)]
SIZES += [(600, 1, 90), (1, 3000, 70), (2, 1, 8), (47, 700, 19)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "n", "k"), SIZES, ids=str)
def test_odd_shapes_stored_either_way(m: int, n: int, k: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for ta, tb in itertools.product((False, True), repeat=2):
        a, b = numbers(rng, (m, k), dtype, ta), numbers(rng, (k, n), dtype, tb)
        before = a.copy(), b.copy()
        assert_product(product(a, b), a, b)
        assert (a == before[0]).all()
        assert (b == before[1]).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "lead", [((3,), (3,)), ((2, 3), ()), ((), (4,)), ((2, 1), (1, 3)), ((2, 3, 2), (3, 1))], ids=str
)
def test_batches(lead: tuple[tuple[int, ...], tuple[int, ...]], dtype: str) -> None:
    rng = np.random.default_rng(1)
    for (m, n, k), ta, tb in itertools.product(((5, 9, 17), (40, 64, 32)), (False, True), (False, True)):
        a, b = numbers(rng, (*lead[0], m, k), dtype, ta), numbers(rng, (*lead[1], k, n), dtype, tb)
        assert_product(product(a, b), a, b)


def test_parts_of_larger_arrays() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((70, 90), np.float32)[3:61, 5:77], rng.standard_normal((99, 81), np.float32)[2:74, 1:50]
    whole = np.full((80, 60), 7, np.float32)
    assert_product(product(a, b, whole[10:68, 3:52]), a, b)
    outside = np.ones(whole.shape, bool)
    outside[10:68, 3:52] = False
    assert (whole[outside] == 7).all()
    heads = rng.standard_normal((4, 10, 3, 16)).astype("f4").transpose(0, 2, 1, 3)  # (batch, head, place, width)
    assert_product(product(heads, np.swapaxes(heads, -1, -2)), heads, np.swapaxes(heads, -1, -2))


def test_a_result_stored_by_columns() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((37, 20), np.float32), rng.standard_normal((20, 50), np.float32)
    assert_product(product(a, b, np.empty((50, 37), np.float32).T), a, b)


def test_unaligned_memory() -> None:
    rng = np.random.default_rng(4)
    a, b, c = (np.zeros(r * q + 1, np.float32)[1:].reshape(r, q) for r, q in ((31, 40), (40, 53), (31, 53)))
    a[...], b[...] = rng.standard_normal((31, 40)), rng.standard_normal((40, 53))
    assert_product(product(a, b, c), a, b)


def test_what_no_blas_can_read_is_left_to_numpy() -> None:
    a, b = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    out = spec_of(a)
    assert overlay.matmul([spec_of(a[:, ::2]), spec_of(b[:4])], [out]) is None
    assert overlay.matmul([spec_of(a[::-1]), spec_of(b)], [out]) is None
    assert overlay.matmul([Spec((8, 0), a.dtype), Spec((0, 8), a.dtype)], [out]) is None
    assert overlay.matmul([Spec((8, 8), np.dtype("int32"))] * 2, [Spec((8, 8), np.dtype("int32"))]) is None
    x = brim.asarray(np.arange(64, dtype=np.float32).reshape(8, 8))
    assert ((x[:, ::2] @ x[::2]).numpy() == x.numpy()[:, ::2] @ x.numpy()[::2]).all()
    assert ((x[:, :0] @ x[:0]).numpy() == 0).all()


def test_nan_and_infinity_spread_as_they_must() -> None:
    a, b = np.ones((30, 40), np.float32), np.ones((40, 50), np.float32)
    a[3, 7], b[5, 9], b[6, 11] = np.nan, np.inf, -np.inf
    b[5, 11] = np.inf  # with -inf: NaN
    with np.errstate(all="ignore"):
        expected = a @ b
    found = product(a, b)
    assert (np.isnan(found) == np.isnan(expected)).all()
    assert (found[~np.isnan(found)] == expected[~np.isnan(found)]).all()


def test_a_sum_does_not_depend_on_where_its_tile_ends() -> None:
    rng = np.random.default_rng(7)
    own = np.zeros(1, np.int64)
    native.Function("brim_gemm_is_own", "p").bind(own)()
    for m in (1, 3, 4, 20, 70) if own[0] else (1, 3, 4):  # few rows are never OpenBLAS's
        a, b = rng.standard_normal((m, 333), np.float32), rng.standard_normal((150, 333), np.float32).T
        whole = product(a, b)
        for columns in (2, 7, 33, 149):
            assert product(a, b[:, :columns]).tobytes() == whole[:, :columns].tobytes()


THREADED = [(128, 256, 784), (700, 300, 500), (40, 1000, 200), (1, 2000, 700), (32, 256, 784), (3000, 1, 800)]


@pytest.mark.parametrize(("m", "n", "k"), THREADED, ids=str)
def test_the_bits_do_not_depend_on_threads(m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32).T
    found = []
    for threads in (1, 2, 3, 4):
        brim.set_threads(threads)
        found.append(product(a, b).tobytes())
    assert len(set(found)) == 1


def test_openblas_keeps_its_threads() -> None:
    addresses = openblas.find()
    if addresses is None:
        pytest.skip("NumPy has another BLAS")
    set_threads = ctypes.CFUNCTYPE(None, ctypes.c_int)(addresses[2])
    get_threads = ctypes.CFUNCTYPE(ctypes.c_int)(addresses[3])
    before = get_threads()
    try:
        set_threads(2)
        rng = np.random.default_rng(6)
        a, b = rng.standard_normal((200, 300)), rng.standard_normal((300, 100))
        assert_product(product(a, b), a, b)
        assert get_threads() == 2
    finally:
        set_threads(before)


def test_without_openblas_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblas, "_candidates", lambda: iter([Path("/nowhere/libscipy_openblas64_.so")]))
    assert openblas.find() is None
