"""Native products of float16 and bfloat16 against float64 and against NumPy's kernel: shapes around the tiles, either
order in memory, batches, special values; the same bits with any number of threads, in the scratch asked for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from brim.spec import DTYPES, Spec
from brim_cpu import native
from brim_cpu.overlay import half
from native_kernels import run_native, run_numpy

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

Array = np.ndarray[Any, Any]
HALVES = {name: DTYPES[name] for name in ("bfloat16", "float16")}
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a result; sums are float32
over_halves = pytest.mark.parametrize("name", HALVES)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, transposed: bool = False) -> Array:
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    made = rng.standard_normal(stored).astype(np.float32).astype(dtype)
    return np.swapaxes(made, -1, -2) if transposed else made


def product(a: Array, b: Array, threads: int = 2) -> Array:
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    (out,) = run_native("matmul", [a, b], [Spec(shape, a.dtype)], {}, threads=threads)
    return out


def assert_product(found: Array, a: Array, b: Array, rounding: float) -> None:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    exact, scale = wide_a @ wide_b, np.abs(wide_a) @ np.abs(wide_b)
    assert (np.abs(found.astype(np.float64) - exact) <= rounding * np.abs(exact) + 4e-6 * scale + 1e-7).all()


SIZES = [(1, 1, 1), (1, 300, 7), (13, 33, 5), (530, 40, 3), (5, 600, 20), (1100, 520, 17), (2050, 6, 8), (2, 3, 700)]


@over_halves
@pytest.mark.parametrize(("m", "n", "k"), SIZES, ids=str)
def test_shapes_around_the_tiles_stored_either_way(m: int, n: int, k: int, name: str) -> None:
    rng = np.random.default_rng(0)
    for ta, tb in itertools.product((False, True), repeat=2):
        a, b = numbers(rng, (m, k), HALVES[name], ta), numbers(rng, (k, n), HALVES[name], tb)
        assert_product(product(a, b), a, b, ROUNDING[name])


@over_halves
@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 4, 5), (3, 5, 6)), ((2, 3, 4, 5), (2, 3, 5, 6)), ((3, 4, 5), (5, 6)), ((4, 5), (3, 5, 6)),
     ((2, 1, 4, 5), (1, 3, 5, 6)), ((700, 20, 30), (700, 30, 10)), ((2, 600, 4), (2, 4, 3))],
    ids=str,
)  # fmt: skip
def test_batches(a: tuple[int, ...], b: tuple[int, ...], name: str) -> None:
    rng = np.random.default_rng(1)
    for tb in (False, True):
        x, y = numbers(rng, a, HALVES[name]), numbers(rng, b, HALVES[name], tb)
        assert_product(product(x, y), x, y, ROUNDING[name])


@over_halves
def test_the_same_bits_with_any_number_of_threads_and_what_numpy_gives(name: str) -> None:
    rng = np.random.default_rng(2)
    a, b = numbers(rng, (700, 90), HALVES[name]), numbers(rng, (90, 1030), HALVES[name])
    assert product(a, b, threads=1).tobytes() == product(a, b).tobytes()
    (want,) = run_numpy("matmul", [a, b], [Spec((700, 1030), a.dtype)], {})
    wide = want.astype(np.float32)
    close = np.abs(product(a, b).astype(np.float32) - wide) <= 2 * ROUNDING[name] * np.abs(wide) + 1e-5
    assert close.all(), "at most the next number, where float32 sums differ"


@over_halves
def test_infinities_and_nan_go_through_and_overflow_is_infinite(name: str) -> None:
    with np.errstate(all="ignore"):
        a = np.array([[np.inf, 1.0], [np.nan, 1.0], [3e38, 3e38]], np.float32).astype(HALVES[name])
        b = np.array([[1.0], [4.0]], np.float32).astype(HALVES[name])
        assert product(a, b).astype(np.float32)[:, 0] == pytest.approx([np.inf, np.nan, np.inf], nan_ok=True)


def test_what_it_is_not_for() -> None:
    specs = {name: Spec((4, 4), dtype) for name, dtype in HALVES.items()}
    low = specs["bfloat16"]
    assert half.matmul([low, low], [low]) is not None
    assert half.matmul([low, specs["float16"]], [low]) is None
    assert half.matmul([Spec((4, 0), low.dtype), Spec((0, 4), low.dtype)], [low]) is None
    assert half.matmul([Spec((0, 4), low.dtype), low], [Spec((0, 4), low.dtype)]) is None


def test_little_is_converted_at_a_time() -> None:
    low = HALVES["bfloat16"]
    a, b, out = Spec((8192, 256), low), Spec((256, 50_000), low), Spec((8192, 50_000), low)
    found = half.matmul([a, b], [out])
    assert found is not None
    assert found.scratch_bytes <= 4 * (half.TILE * 256 * 2 + half.TILE**2) + 256 < out.nbytes / 200
