"""How exactly products are computed: TF32 is a param that only tensor cores heed, fast convolutions one of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn
from brim.op import REGISTRY
from brim.spec import Spec
from brim_cpu import native
from brim_cuda import backend
from brim_cuda.cublaslt import ComputeType
from brim_cuda.launch import Product
from brim_cuda.registry import work_of


@pytest.fixture(autouse=True)
def _full_again() -> Iterator[None]:
    yield
    brim.set_float32_precision("full")
    brim.set_conv_precision("fast")


def _params(step: Any, *shapes: tuple[int, ...], dtype: str = "float32") -> list[dict[str, Any]]:
    plan = brim.plan(step, *(brim.spec(shape, dtype) for shape in shapes))
    found = plan.programs[0].prepared.program.instructions
    return [i.params for i in found if i.op.name.startswith(("matmul", "conv2d"))]


def test_products_say_how_they_are_computed() -> None:
    def step(x: Any, w: Any, image: Any, window: Any) -> Any:
        return (x @ w).sum() + nn.functional.conv2d(image, window).sum()

    shapes = ((3, 4), (4, 5), (1, 2, 4, 4), (3, 2, 3, 3))
    assert [p.get("tf32") for p in _params(step, *shapes)] == [None, None]
    brim.set_float32_precision("tf32")
    assert brim.float32_precision() == "tf32"
    assert [p.get("tf32") for p in _params(step, *shapes)] == [True, True]
    assert [p.get("tf32") for p in _params(step, *shapes, dtype="float64")] == [None, None]


def test_gradients_are_computed_alike() -> None:
    brim.set_float32_precision("tf32")
    w = brim.asarray(np.ones((2, 2, 3, 3), np.float32)).requires_grad_()

    def step(x: Any) -> Any:
        loss = nn.functional.conv2d(x, w).sum()
        loss.backward()
        grad, w.grad = w.grad, None
        return grad

    assert [p.get("tf32") for p in _params(step, (1, 2, 5, 5))] == [True]
    assert brim.compile(step)(np.ones((1, 2, 5, 5), np.float32)).numpy().ravel()[0] == 9.0


def test_the_cpu_computes_in_full_either_way() -> None:
    x = brim.asarray(np.random.default_rng(0).standard_normal((5, 5), np.float32))
    full = (x @ x).numpy().tobytes()
    brim.set_float32_precision("tf32")
    assert (x @ x).numpy().tobytes() == full


def test_compiled_steps_are_made_anew() -> None:
    step = brim.compile(lambda x: x @ x)
    x = np.ones((2, 2), np.float32)
    step(x)
    brim.set_float32_precision("tf32")
    step(x)
    assert "'full' to 'tf32'" in step.explain()
    assert any(i.params.get("tf32") for i in step.program().instructions)
    step(x)
    assert step.explain().count("traced for") == 2


def test_cuda_asks_for_tf32_only_then() -> None:
    square = Spec((64, 64))
    for params, compute in (({}, ComputeType.FLOAT32), ({"tf32": True}, ComputeType.TF32)):
        (product,) = work_of(REGISTRY["matmul"], [square, square], [square], params).calls
        assert isinstance(product, Product)
        assert product.plan.compute == compute
        assert backend().bind(REGISTRY["matmul"], [square, square], [square], params).scratch_bytes > 0


def test_cuda_asks_for_it_in_convolutions_too() -> None:
    x, w = Spec((2, 3, 5, 5)), Spec((4, 3, 3, 3))
    how = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    conv = REGISTRY["conv2d"]
    for params, compute in ((how, ComputeType.FLOAT32), ({**how, "tf32": True}, ComputeType.TF32)):
        work = work_of(conv, [x, w], conv.infer([x, w], params), params)
        assert {one.plan.compute for one in work.calls if isinstance(one, Product)} == {compute}


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'full' or 'tf32', got 'half'"):
        brim.set_float32_precision("half")


def _convolution(images: Any, weight: Any) -> Any:
    loss = (nn.functional.conv2d(images, weight, padding=1) ** 2).sum()
    loss.backward()
    grad, weight.grad = weight.grad, None
    return loss, grad


def test_exact_convolutions_are_asked_for_by_name() -> None:
    shapes = ((2, 16, 8, 8), (16, 16, 3, 3))
    assert brim.conv_precision() == "fast"
    assert [p.get("fast") for p in _params(nn.functional.conv2d, *shapes)] == [True]
    assert [p.get("fast") for p in _params(nn.functional.conv2d, *shapes, dtype="float64")] == [None]
    brim.set_conv_precision("exact")
    assert brim.conv_precision() == "exact"
    assert [p.get("fast") for p in _params(nn.functional.conv2d, *shapes)] == [None]
    brim.set_conv_precision("fast")
    assert [p.get("fast") for p in _params(nn.functional.conv2d, *shapes)] == [True]


def test_gradients_of_fast_convolutions_are_fast() -> None:
    w = brim.asarray(np.ones((16, 16, 3, 3), np.float32)).requires_grad_()
    found = _params(lambda x: _convolution(x, w), (2, 16, 8, 8))
    assert len(found) == 2
    assert all(p["fast"] for p in found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stride", [1, 2])
def test_fast_convolutions_are_close(dtype: str, stride: int) -> None:
    """To the bit where the fast algorithm is not known: another stride, another dtype."""
    rng = np.random.default_rng(0)
    x = brim.asarray(rng.standard_normal((8, 24, 15, 14)).astype(dtype))
    w = brim.asarray(rng.standard_normal((20, 24, 3, 3)).astype(dtype))
    brim.set_conv_precision("exact")
    exact = nn.functional.conv2d(x, w, stride=stride, padding=1).numpy()
    brim.set_conv_precision("fast")
    fast = nn.functional.conv2d(x, w, stride=stride, padding=1).numpy()
    np.testing.assert_allclose(fast, exact, rtol=0, atol=2e-5 * np.abs(exact).max())
    assert np.array_equal(fast, exact) is not (native.available() and dtype == "float32" and stride == 1)


def test_fast_steps_are_made_anew_and_have_the_eager_bits() -> None:
    rng = np.random.default_rng(1)
    brim.set_conv_precision("exact")
    x = rng.standard_normal((8, 16, 16, 15)).astype(np.float32)
    w = brim.asarray(rng.standard_normal((17, 16, 3, 3)).astype(np.float32)).requires_grad_()
    step = brim.compile(lambda images: _convolution(images, w))
    exact = [np.array(t.numpy()) for t in step(x)]
    brim.set_conv_precision("fast")
    planned = [np.array(t.numpy()) for t in step(x)]
    assert "'exact' to 'fast'" in step.explain()
    eager = [np.array(t.numpy()) for t in _convolution(brim.asarray(x), w)]
    if native.available():
        assert not any(np.array_equal(a, c) for a, c in zip(planned, exact, strict=True))
    for a, b, c in zip(planned, eager, exact, strict=True):
        assert np.array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4 * np.abs(c).max())


def test_other_devices_are_not_asked() -> None:
    """CUDA's kernels have no such param."""
    assert not getattr(backend(), "knows_fast_convolutions", False)
    meta = nn.functional.conv2d(brim.empty((1, 16, 5, 5), device="meta"), brim.empty((16, 16, 3, 3), device="meta"))
    assert meta.shape == (1, 16, 3, 3)


def test_plans_heed_what_the_device_knows() -> None:
    """Models without memory are planned as those on the CPU are; a plan for a GPU has no fast convolutions."""
    for place in ("cpu", "meta"):
        w = brim.ones((16, 16, 3, 3), device=place)

        def step(images: Any, w: Any = w) -> Any:
            return nn.functional.conv2d(images, w)

        images = brim.spec((8, 16, 16, 16))
        for profile, fast in ((None, True), ("h100-80gb", None)):
            plan = brim.plan(step, images, device_profile=profile)
            (found,) = [i.params for i in plan.programs[0].prepared.program.instructions if i.op.name == "conv2d"]
            assert found.get("fast") is fast, (place, profile)


def test_another_precision_of_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="'exact' or 'fast', got 'full'"):
        brim.set_conv_precision("full")
