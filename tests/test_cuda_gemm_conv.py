"""Convolutions on CUDA as products over columns: run by the twin of cuBLASLt, unrolled by NumPy, against the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import brim
from brim.errors import ShapeError
from brim.op import REGISTRY
from brim.ops.conv import output_size
from brim.spec import DTYPES, Spec
from brim_cuda.cublaslt import Epilogue
from brim_cuda.gemm_conv import ConvPlan, plan_conv
from gemm_bench import Bench, close

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]

F32 = DTYPES["float32"]
CPU = brim.device("cpu").backend


def images(shape: tuple[int, ...], dtype: Any = F32, last: bool = False) -> Spec:
    c, h, w = shape[1:]
    return Spec(shape, dtype, (h * w * c, 1, w * c, c) if last else None)


class Unroller:
    """im2col and its adjoint, element by element: columns (n, C kH kW, L)."""

    def __init__(self, x: Spec, w: Spec, y: Spec, stride: Pair, padding: Pair, dilation: Pair) -> None:
        self.x, self.kernel, self.out = x, w.shape[2:], y.shape[2:]
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def _windows(self) -> Any:
        (s, t), (d, e) = self.stride, self.dilation
        for a, b in itertools.product(*map(range, self.kernel)):
            rows, right = np.arange(self.out[0]) * s + a * d, np.arange(self.out[1]) * t + b * e
            yield a, b, np.ix_(rows, right)

    def _padded(self, count: int) -> Array:
        _, c, h, w = self.x.shape
        (p, q) = self.padding
        return np.zeros((count, c, h + 2 * p, w + 2 * q), self.x.dtype)

    def _inside(self, padded: Array) -> Array:
        (p, q), (h, w) = self.padding, self.x.shape[2:]
        return padded[:, :, p : p + h, q : q + w]

    def columns(self, x: Array) -> Array:
        padded = self._padded(len(x))
        self._inside(padded)[...] = x
        made = np.empty((*x.shape[:2], *self.kernel, *self.out), x.dtype)
        for a, b, (rows, right) in self._windows():
            made[:, :, a, b] = padded[:, :, rows, right]
        return made.reshape(len(x), -1, self.out[0] * self.out[1])

    def fold(self, columns: Array, into: Array) -> None:
        padded = self._padded(len(into))
        parts = columns.reshape(*into.shape[:2], *self.kernel, *self.out)
        for a, b, (rows, right) in self._windows():
            padded[:, :, rows, right] += parts[:, :, a, b]
        into[...] = self._inside(padded)


def run(plan: ConvPlan, bench: Bench, unroller: Unroller, x: Array, y: Array, w: Array, bias: int = 0) -> None:
    scratch = bench.memory(plan.scratch_bytes)
    base = scratch.ctypes.data
    buffers = {"x": x.ctypes.data, "y": y.ctypes.data, "w": w.ctypes.data, "columns": base}
    buffers["sums"] = base + plan.sums_offset
    for chunk in plan.chunks:
        part = x[chunk.first : chunk.first + chunk.count]
        columns = None
        if plan.columns is not None:
            shape = (chunk.count, *plan.columns.shape[1:])
            size = int(np.prod(shape)) * plan.columns.dtype.itemsize
            columns = scratch[:size].view(plan.columns.dtype).reshape(shape)
            columns = columns.swapaxes(1, 2) if plan.channels_last else columns
        if plan.unroll == "before":
            assert columns is not None
            columns[...] = unroller.columns(part)
        for call in chunk.calls:
            at = call.at(buffers, base + plan.workspace_offset if plan.workspace_bytes else 0, bias)
            bench.runner.run(call.plan, at, 0)
        if plan.unroll == "after":
            assert columns is not None
            unroller.fold(columns, part)
    if plan.sums is not None:
        end = plan.sums_offset + plan.sums.nbytes
        w[...] = scratch[plan.sums_offset : end].view(F32).reshape(w.shape).astype(w.dtype)


def on_the_cpu(op: str, ins: list[Array], out: Spec, params: dict[str, Any]) -> Array:
    """The op's CPU kernel in float32 or float64."""
    wide = [np.ascontiguousarray(x, np.float64 if x.dtype.itemsize == 8 else np.float32) for x in ins]
    made = np.empty(out.shape, wide[0].dtype)
    kernel = CPU.bind(REGISTRY[op], [Spec(x.shape, x.dtype) for x in wide], [Spec(out.shape, made.dtype)], params)
    kernel.run(made, *wide, scratch=np.empty(kernel.scratch_bytes, np.uint8), **params)
    return made


CASES = [
    # N, C, O, (H, W), kernel, stride, padding, dilation, groups
    (3, 4, 6, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 4, 6, (9, 8), (3, 2), (2, 1), (0, 1), (1, 2), 1),
    (3, 6, 4, (6, 5), (3, 3), (1, 2), (1, 0), (1, 1), 2),
    (3, 4, 6, (5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 4, 6, (5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 2),
    (2, 4, 6, (5, 5), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (2, 4, 4, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    (1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
]
OPS = ["conv2d", "conv2d_grad_input", "conv2d_grad_weight"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("whole", [False, True], ids=["image by image", "at once"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_over_columns_are_the_convolution(op: str, last: bool, whole: bool, dtype: str, case: Any) -> None:
    n, c, o, size, kernel, stride, padding, dilation, groups = case
    kind, bench = DTYPES[dtype], Bench()
    x = images((n, c, *size), kind, last)
    w = Spec((o, c // groups, *kernel), kind)
    y = images((n, o, *output_size(size, kernel, stride, padding, dilation)), kind, last)
    ins, out = {
        "conv2d": ([x, w], y),
        "conv2d_grad_input": ([y, w], x),
        "conv2d_grad_weight": ([y, x], w),
    }[op]
    how: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups}
    plan = plan_conv(op, *ins, out, **how, columns_bytes=1 << 20 if whole else 1, workspace_bytes=1024)
    assert plan.copied == (False, False)
    arrays = {id(spec): bench.random(spec, seed) for seed, spec in enumerate(ins)}
    arrays[id(out)] = made = bench.array(out)
    run(plan, bench, Unroller(x, w, y, stride, padding, dilation), *(arrays[id(spec)] for spec in (x, y, w)))
    params = {**how, "dilation": dilation}
    params |= {"conv2d_grad_input": {"size": size}, "conv2d_grad_weight": {"kernel": kernel}}.get(op, {})
    terms = {"conv2d": w.size // o, "conv2d_grad_input": y.size // n, "conv2d_grad_weight": y.size // o}[op]
    close(made, on_the_cpu(op, [arrays[id(spec)] for spec in ins], out, params), terms, 4)


def test_one_product_where_layouts_allow() -> None:
    x, w, y = images((8, 4, 6, 6), last=True), Spec((6, 4, 3, 3)), images((8, 6, 6, 6), last=True)
    for op, ins, out in (("conv2d", (x, w), y), ("conv2d_grad_input", (y, w), x), ("conv2d_grad_weight", (y, x), w)):
        (chunk,) = plan_conv(op, *ins, out, padding=(1, 1)).chunks
        (call,) = chunk.calls
        assert len(call.plan.calls) == 1
        assert call.plan.out.batch == 1
    x, y = images((8, 4, 6, 6)), images((8, 6, 6, 6))
    (chunk,) = plan_conv("conv2d", x, w, y, padding=(1, 1)).chunks
    assert [(len(call.plan.calls), call.plan.out.batch) for call in chunk.calls] == [(1, 8)]
    (chunk,) = plan_conv("conv2d_grad_weight", y, x, w, padding=(1, 1)).chunks
    assert len(chunk.calls) == 8


def test_columns_stay_below_their_limit_and_scratch_is_the_sum() -> None:
    x, w, y = images((8, 4, 6, 6)), Spec((6, 4, 3, 3)), images((8, 6, 6, 6))
    one = 4 * 9 * 36 * 4
    plan = plan_conv("conv2d", x, w, y, padding=(1, 1), columns_bytes=3 * one + 5, workspace_bytes=4096)
    assert [(chunk.first, chunk.count) for chunk in plan.chunks] == [(0, 3), (3, 3), (6, 2)]
    assert plan.columns is not None
    assert plan.columns.nbytes == 3 * one
    assert plan.workspace_offset == -(-3 * one // 256) * 256
    assert plan.scratch_bytes == plan.workspace_offset + 4096
    half = DTYPES["float16"]
    x, w, y = images((8, 4, 6, 6), half), Spec((6, 4, 3, 3), half), images((8, 6, 6, 6), half)
    plan = plan_conv("conv2d_grad_weight", y, x, w, padding=(1, 1), workspace_bytes=0)
    assert plan.sums == Spec(w.shape)
    assert plan.scratch_bytes == plan.workspace_offset == plan.sums_offset + -(-plan.sums.nbytes // 256) * 256
    assert plan_conv("conv2d_grad_weight", images((1, 6, 6, 6), half), images((1, 4, 6, 6), half), w).sums is None


def test_one_by_one_windows_need_no_columns() -> None:
    x, w, y = images((8, 4, 6, 6)), Spec((6, 4, 1, 1)), images((8, 6, 6, 6))
    plan = plan_conv("conv2d", x, w, y, workspace_bytes=0)
    assert (plan.unroll, plan.columns, plan.scratch_bytes, len(plan.chunks)) == ("", None, 0, 1)
    # the image is not in the order of the result: it is unrolled after all
    other = plan_conv("conv2d", images((8, 4, 6, 6), last=True), w, y)
    assert other.unroll == "before"
    assert not other.channels_last


def test_bias_and_activation_of_channels_last_images(bench: Bench) -> None:
    x, w, y = images((2, 4, 5, 5), last=True), Spec((6, 4, 3, 3)), images((2, 6, 3, 3), last=True)
    plan = plan_conv("conv2d", x, w, y, epilogue=Epilogue.RELU_BIAS)
    arrays = bench.random(x, 1), bench.array(y), bench.random(w, 2)
    bias = bench.random(Spec((6,)), 3)
    run(plan, bench, Unroller(x, w, y, (1, 1), (0, 0), (1, 1)), *arrays, bias=bias.ctypes.data)
    how = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    want = on_the_cpu("conv2d", [arrays[0], arrays[2]], y, how) + bias[:, None, None]
    close(arrays[1], np.maximum(want, 0), 36)
    with pytest.raises(ValueError, match="channels-last images and one group"):
        plan_conv("conv2d", images((2, 4, 5, 5)), w, images((2, 6, 3, 3)), epilogue=Epilogue.RELU_BIAS)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("last", [False, True])
def test_no_images(bench: Bench, last: bool) -> None:
    x, w, y = images((0, 4, 5, 5), last=last), Spec((6, 4, 3, 3)), images((0, 6, 3, 3), last=last)
    assert plan_conv("conv2d", x, w, y).chunks == ()
    plan = plan_conv("conv2d_grad_weight", y, x, w)
    made = bench.array(w)
    run(plan, bench, Unroller(x, w, y, (1, 1), (0, 0), (1, 1)), bench.array(x), bench.array(y), made)
    assert not made.any()


def test_what_must_be_copied_or_refused() -> None:
    x, w, y = images((2, 4, 5, 5)), Spec((6, 4, 3, 3)), images((2, 6, 3, 3))
    odd_w, odd_y = Spec(w.shape, F32, (1, 6, 24, 72)), Spec(y.shape, F32, (200, 18, 6, 2))
    odd_x = Spec(x.shape, F32, (200, 50, 10, 2))
    assert plan_conv("conv2d", odd_x, odd_w, y).copied == (False, True)  # any image can be unrolled
    assert plan_conv("conv2d_grad_input", odd_y, w, x).copied == (True, False)
    assert plan_conv("conv2d_grad_weight", odd_y, odd_x, w).copied == (True, False)
    with pytest.raises(ValueError, match="row-major or channels last"):
        plan_conv("conv2d", x, w, odd_y)
    with pytest.raises(ValueError, match="must be row-major"):
        plan_conv("conv2d_grad_weight", y, x, odd_w)
    with pytest.raises(ShapeError, match="groups=3"):
        plan_conv("conv2d", x, w, y, groups=3)
