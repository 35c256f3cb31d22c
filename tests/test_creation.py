"""Tensors from shapes and ranges against NumPy, and their errors."""

from __future__ import annotations

import numpy as np
import pytest

from brim import creation
from brim.errors import DTypeError, ShapeError
from brim.tensor import asarray


@pytest.mark.parametrize(
    "bounds", [(5,), (0,), (-3,), (2, 7), (7, 2), (7, 2, -2), (1, 8, 3), (0, 1, 0.1), (1.0, 2, 0.25), (2.5,), (3, 3)]
)
def test_arange_is_numpys(bounds: tuple[float, ...]) -> None:
    want = np.arange(*bounds)
    got = creation.arange(*bounds)
    assert got.dtype == (np.int64 if want.dtype.kind == "i" else np.float32)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


def test_long_arange_crosses_blocks() -> None:
    np.testing.assert_array_equal(creation.arange(100_003).numpy(), np.arange(100_003))


@pytest.mark.parametrize(("num", "endpoint"), [(0, True), (1, True), (2, True), (7, True), (7, False)])
def test_linspace_is_numpys(num: int, endpoint: bool) -> None:
    got = creation.linspace(-1, 2, num, endpoint=endpoint, dtype="float64").numpy()
    np.testing.assert_allclose(got, np.linspace(-1, 2, num, endpoint=endpoint), rtol=1e-15)
    if num > 1 and endpoint:
        assert got[-1] == 2


@pytest.mark.parametrize(("n", "m", "k"), [(3, None, 0), (3, 5, 1), (5, 3, -2), (2, 2, 5), (2, 2, -5), (0, 3, 0)])
def test_eye_and_tri_are_numpys(n: int, m: int | None, k: int) -> None:
    np.testing.assert_array_equal(creation.eye(n, m, k).numpy(), np.eye(n, m, k))
    np.testing.assert_array_equal(creation.tri(n, m, k).numpy(), np.tri(n, m, k))


def test_fills_and_likes() -> None:
    assert creation.zeros(3).tolist() == [0, 0, 0]
    assert creation.ones((2, 1), dtype="int8").numpy().dtype == np.int8
    assert creation.full((2,), 7).dtype == np.int64
    assert creation.full((2,), 7.5).dtype == np.float32
    assert creation.full((2,), True).dtype == np.bool_
    assert creation.full((), 2.0, dtype="bfloat16").item() == 2.0
    x = creation.ones((2, 3), dtype="float64", requires_grad=True)
    assert x.requires_grad
    for like in (creation.zeros_like(x), creation.ones_like(x), creation.empty_like(x), creation.full_like(x, 3)):
        assert (like.shape, like.dtype, like.requires_grad) == (x.shape, x.dtype, False)
    assert creation.zeros((2, 3), device="meta").device.is_meta


def test_meshgrid_is_numpys() -> None:
    axes = [np.arange(2.0), np.arange(3.0), np.arange(4.0)]
    for indexing in ("xy", "ij"):
        want = np.meshgrid(*axes, indexing=indexing)
        got = creation.meshgrid(*map(asarray, axes), indexing=indexing)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a.numpy(), b)


def test_bad_requests_name_what_is_wrong() -> None:
    with pytest.raises(ShapeError, match="negative"):
        creation.zeros((2, -1))
    with pytest.raises(DTypeError, match="float33"):
        creation.zeros(2, dtype="float33")
    with pytest.raises(ShapeError, match="step"):
        creation.arange(1, 2, 0)
    with pytest.raises(DTypeError, match="complex64"):
        creation.full(2, 1j, dtype="float32")
    with pytest.raises(DTypeError, match="require gradients"):
        creation.zeros(2, dtype="int64", requires_grad=True)
    with pytest.raises(ShapeError, match="num"):
        creation.linspace(0, 1, -1)
    with pytest.raises(ShapeError, match="indexing"):
        creation.meshgrid(asarray([1.0]), indexing="yx")
    with pytest.raises(DTypeError, match="-128 to 127"):
        creation.full(2, 300, dtype="int8")
    with pytest.raises(DTypeError, match="nan"):
        creation.full(2, float("nan"), dtype="int64")
