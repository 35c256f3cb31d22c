"""Native copies of elements: between any strides, into slices, one after another."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import brim
from brim.backend import ScalarCell
from brim.spec import DTYPES, Spec
from brim_cpu import native
from brim_cpu.overlay import SMALL_BYTES
from brim_cpu.overlay.copies import copy_calls
from brim_cpu.registry import KERNELS
from native_running import RNG, bound, needs_library, normal, numpy_only, run

pytestmark = needs_library

Array = np.ndarray[Any, Any]

ITEMS = ["uint8", "float16", "float32", "int64", "complex128"]  # of 1, 2, 4, 8 and 16 bytes


def numbers(*shape: int, dtype: Any = "float32") -> Array:
    return RNG.integers(0, 250, shape).astype(DTYPES[dtype])


def copied(to: Array, source: Array) -> None:
    """Copies on 1 and 3 threads; only the elements of ``to`` change."""
    base = to
    while isinstance(base.base, np.ndarray):
        base = base.base
    untouched, before, read = base.copy(), native.get_threads(), source.copy()
    want = base.copy()
    into = np.lib.stride_tricks.as_strided(want.reshape(-1)[(_address(to) - _address(base)) // to.itemsize :],
                                           to.shape, to.strides) if to.size else want[:0]  # fmt: skip
    if to.size:
        np.copyto(into, source)
    try:
        for threads in (1, 3):
            native.set_threads(threads)
            base[...] = untouched
            for call in copy_calls(to, source):
                call()
            assert base.tobytes() == want.tobytes()
    finally:
        native.set_threads(before)
    assert source.tobytes() == read.tobytes()


def _address(x: Array) -> int:
    return int(x.__array_interface__["data"][0])


@pytest.mark.parametrize("dtype", ITEMS)
@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_axes(dtype: str, axes: tuple[int, ...]) -> None:
    for shape in ((5, 17, 33), (1, 64, 130), (40, 3, 50), (2, 200, 70)):
        source = numbers(*shape, dtype=dtype).transpose(axes)
        room = np.zeros((*source.shape[:2], source.shape[2] + 5), source.dtype)
        copied(room[..., 2 : 2 + source.shape[2]], source)
        copied(np.zeros(source.shape, source.dtype), source)
        order = np.argsort(axes)
        copied(np.zeros([source.shape[a] for a in order], source.dtype).transpose(np.argsort(order)), source)


@pytest.mark.parametrize("dtype", ITEMS)
@pytest.mark.parametrize(
    "shape", [(256, 256), (1024, 130), (3, 5000), (5000, 3), (15, 16), (31, 8), (129, 257)], ids=str
)
def test_transposed_matrices(dtype: str, shape: tuple[int, int]) -> None:
    source = numbers(*shape, dtype=dtype)
    copied(np.zeros(shape[::-1], source.dtype), source.T)
    copied(np.zeros((shape[1], shape[0] + 1), source.dtype)[:, 1:], source.T)
    copied(np.zeros(shape[::-1], source.dtype), np.repeat(source, 2, axis=0)[::2].T)


@pytest.mark.parametrize("dtype", ITEMS)
def test_gaps_backwards_and_broadcast(dtype: str) -> None:
    source = numbers(60, 90, dtype=dtype)
    for at in (
        (slice(None, None, 2), slice(None)),
        (slice(None), slice(None, None, -1)),
        (slice(50, 3, -7), slice(3, 80, 5)),
    ):
        part = source[at]
        copied(np.zeros(part.shape, part.dtype), part)
        copied(np.zeros((60, 90), part.dtype)[at], part.copy())
        copied(np.zeros((60, 90), part.dtype)[at], part)
    for spread in (source[:, :1], source[:1], source[0, 0]):
        copied(np.zeros((60, 90), source.dtype), np.broadcast_to(spread, (60, 90)))
    copied(np.zeros((4, 60, 90), source.dtype), source)
    copied(np.zeros((), source.dtype), source[3, 4])
    copied(np.zeros((0, 4), source.dtype), source[:0, :4])
    assert copy_calls(source[2:], source[2:]) == []  # the same elements


def test_large_copies_past_the_caches() -> None:
    source = normal(2100, 1001)  # 8.4 MB
    copied(np.zeros_like(source), source)
    copied(np.zeros((2100, 1011), np.float32)[:, 3:-7], source)
    copied(np.zeros((1001, 2100), np.float32), source.T)
    copied(np.zeros(2_200_000, np.float32), np.float32(1.5)[...])
    copied(np.zeros((2100, 1011), np.float32)[:, 3:-7], np.asarray(np.float32(-2.5)))


# -------------------------------------------------------------------------------------------------------------- ops


def test_copy() -> None:
    x = normal(3, 64, 130)
    for source in (x.transpose(0, 2, 1), x[:, ::2], x[::-1], np.broadcast_to(x[:1], x.shape)):
        np.testing.assert_array_equal(run("copy", source), source)
    assert bound("copy", [x])[0] is None  # the interpreter's
    assert bound("copy", [normal(4, 5).T])[0] is None  # not worth a call
    assert bound("astype", [x.transpose(0, 2, 1)], dtype=np.dtype("float64"))[0] is None


INDICES = [
    ((8, 9, 10), ((0, 1, 8), (0, 1, 9), (3, 1, 4))),
    ((8, 9, 10), ((0, 1, 8), (0, 1, 9), (0, 1, 10))),
    ((8, 9, 10), ((2, 1, 3), (0, 1, 9), (0, 1, 10))),
    ((8, 9, 10), ((0, 1, 8), (7, -1, 5), (0, 1, 10))),
    ((8, 9, 10), ((1, 2, 3), (8, -3, 3), (0, 1, 10))),
    ((8, 9, 10), ((0, 1, 8), (0, 3, 3), (0, 1, 10))),
    ((8, 9, 10), ((0, 1, 8), (4, 1, 0), (0, 1, 10))),
    ((40, 50, 60), ((0, 1, 40), (0, 1, 50), (20, 1, 20))),
    ((300,), ((299, -1, 300),)),
    ((), ()),
    ((0, 4), ((0, 1, 0), (1, 1, 2))),
]


@pytest.mark.parametrize(("shape", "index"), INDICES, ids=str)
def test_set_slice(shape: tuple[int, ...], index: Any) -> None:
    x, values = normal(*shape), normal(1, *(count for _, _, count in index))
    for base, given in ((x, values), (x, 2.5), (1.5, values), (-0.5, 7.0), (x, _turned(values))):
        want = np.empty(shape, np.float32)
        KERNELS["set_slice"].run(want, base, given, index=index, shape=shape)
        got = run("set_slice", base, given, outs=[Spec(shape, want.dtype)], index=index, shape=shape)
        assert got.tobytes() == want.tobytes()
        kernel, _ = bound("set_slice", [base, given], outs=[Spec(shape, want.dtype)], index=index, shape=shape)
        assert kernel.aliasing
        if isinstance(base, np.ndarray):
            into = x.copy()
            for call in kernel.prepare(into, into, given, index=index, shape=shape):
                call()
            assert into.tobytes() == want.tobytes()


def _turned(x: Array) -> Array:
    return np.asfortranarray(x)


def test_set_slice_reads_numbers_that_change() -> None:
    index, shape = ((1, 1, 2), (0, 1, 4)), (5, 4)
    base, given = ScalarCell(0.0), ScalarCell(0.0)
    kernel, _ = bound("set_slice", [0.0, 0.0], outs=[Spec(shape, np.dtype("float64"))], index=index, shape=shape)
    out = np.zeros(shape)
    calls = kernel.prepare(out, base, given, index=index, shape=shape)
    for base.value, given.value in ((1.0, 2.0), (3.0, -4.0)):
        for call in calls:
            call()
        np.testing.assert_array_equal(out[1:3], given.value)
        np.testing.assert_array_equal(out[[0, 3, 4]], base.value)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", ITEMS)
def test_concat(axis: int, dtype: str) -> None:
    parts = []
    for size in (1, 30, 0, 17):
        shape = [20, 21, 22]
        shape[axis] = size
        parts.append(numbers(*shape, dtype=dtype))
    parts[1] = _turned(parts[1])
    got = run("concat", *parts, axis=axis)
    assert got.tobytes() == np.concatenate(parts, axis).tobytes()


def test_eager_ops_give_the_same_as_numpy_s() -> None:
    for size in (4, 200):
        assert (size * size * 4 <= SMALL_BYTES) == (size == 4)
        x = brim.asarray(normal(size, size))

        def results(x: brim.Tensor = x) -> list[Array]:
            out = x.copy()
            out[1:3] = x[:2] * 2
            out[:, 1] = 5
            padded = brim.pad(x.T, 3, value=-1.0)
            view = brim.zeros((x.shape[0], 2 * x.shape[0]))
            view[:, ::2] = x.T
            return [y.numpy() for y in (out, padded, view, brim.concat([x, x.T], 1), brim.roll(x, 1, 0))]

        got = results()
        with numpy_only():
            want = results()
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
