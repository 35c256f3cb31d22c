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
from brim_cuda.gemm_conv import Columns, ConvPlan, plan_conv
from gemm_bench import Bench, close

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]

F32 = DTYPES["float32"]
CPU = brim.device("cpu").backend


def images(shape: tuple[int, ...], dtype: Any = F32, last: bool = False) -> Spec:
    c, h, w = shape[1:]
    return Spec(shape, dtype, (h * w * c, 1, w * c, c) if last else None)


class Unroller:
    """im2col and its adjoint, element by element: columns (n, C, kH, kW, L)."""

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
        return made.reshape(*made.shape[:4], -1)

    def fold(self, columns: Array, into: Array) -> None:
        padded = self._padded(len(into))
        parts = columns.reshape(*columns.shape[:4], *self.out)
        for a, b, (rows, right) in self._windows():
            padded[:, :, rows, right] += parts[:, :, a, b]
        into[...] = self._inside(padded)


def filters_of(w: Array, plan: ConvPlan) -> Array:
    """The weight as (rows, channels, kH, kW), with the channels that columns have."""
    if plan.filters != "flipped":
        return w
    assert plan.columns is not None
    groups = plan.columns.groups
    parts = w.reshape(groups, -1, *w.shape[1:])[..., ::-1, ::-1]
    return parts.swapaxes(1, 2).reshape(-1, *(parts.shape[n] for n in (1, 3, 4)))


def as_rows(filters: Array, columns: Columns) -> Array:
    """(rows, channels, kH, kW) in the order of columns, filled up: (rows, length)."""
    flat = (filters.transpose(0, 2, 3, 1) if columns.by_element else filters).reshape(len(filters), -1)
    return np.pad(flat, ((0, 0), (0, columns.length - flat.shape[1])))


def as_columns(unrolled: Array, columns: Columns) -> Array:
    """(n, C, kH, kW, L) in the order of columns."""
    n, _, kh, kw, positions = unrolled.shape
    parts = unrolled.reshape(n, columns.groups, columns.channels, kh, kw, positions)
    if columns.by_element:
        parts = parts.transpose(0, 1, 3, 4, 2, 5)
    groups = parts.reshape(n, columns.groups, -1, positions)
    filled = np.pad(groups, ((0, 0), (0, 0), (0, columns.length - groups.shape[2]), (0, 0)))
    flat = filled.reshape(n, -1, positions)
    return flat.swapaxes(1, 2) if columns.last else flat


def from_columns(made: Array, columns: Columns, kernel: tuple[int, ...]) -> Array:
    """The inverse."""
    n = len(made)
    flat = (made.swapaxes(1, 2) if columns.last else made).reshape(n, columns.groups, columns.length, -1)
    flat = flat[:, :, : columns.channels * columns.window]
    if columns.by_element:
        flat = flat.reshape(n, columns.groups, *kernel, columns.channels, -1).transpose(0, 1, 4, 2, 3, 5)
    return flat.reshape(n, columns.groups * columns.channels, *kernel, -1)


def run(plan: ConvPlan, bench: Bench, unroller: Unroller, x: Array, y: Array, w: Array, bias: int = 0) -> None:
    scratch = bench.memory(plan.scratch_bytes)
    base = scratch.ctypes.data
    buffers = {"x": x.ctypes.data, "y": y.ctypes.data, "w": w.ctypes.data}
    buffers |= {name: base + at for name, at in plan.parts.items()}
    columns = plan.columns

    def part(name: str, shape: tuple[int, ...], dtype: Any = x.dtype) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return scratch[plan.parts[name] :][:size].view(dtype).reshape(shape)

    if plan.filters:
        assert columns is not None
        rows = as_rows(filters_of(w, plan), columns)
        part("filters", rows.shape)[...] = rows
    for chunk in plan.chunks:
        here = slice(chunk.first, chunk.first + chunk.count)
        for name in plan.turned:
            images = {"x": x, "y": y}[name][here].transpose(0, 2, 3, 1)
            part(f"{name}_turned", images.shape)[...] = images
        unrolled = part("columns", columns.shape(chunk.count)) if columns is not None else None
        if plan.unroll:
            assert columns is not None
            assert unrolled is not None
            unrolled[...] = as_columns(unroller.columns({"x": x, "y": y}[plan.unroll][here]), columns)
        at = chunk.call.at(buffers, buffers["workspace"] if plan.workspace_bytes else 0, bias)
        bench.runner.run(chunk.call.plan, at, 0)
        if plan.fold:
            assert columns is not None
            assert unrolled is not None
            unroller.fold(from_columns(unrolled, columns, unroller.kernel), x[here])
    if plan.sums is not None:
        made = part("sums", plan.sums.shape, plan.sums.dtype)
        if columns is None:
            w[...] = made.reshape(w.shape).astype(w.dtype)
        else:
            made = made[:, : columns.channels * columns.window]
            if columns.by_element:
                made = made.reshape(len(w), *w.shape[2:], -1).transpose(0, 3, 1, 2)
            w[...] = made.reshape(w.shape).astype(w.dtype)


def unroller_of(plan: ConvPlan, x: Spec, w: Spec, y: Spec, stride: Pair, padding: Pair, dilation: Pair) -> Unroller:
    """Of the images that a plan unrolls or folds."""
    if plan.unroll != "y":
        return Unroller(x, w, y, stride, padding, dilation)
    around = tuple(d * (k - 1) - p for d, k, p in zip(dilation, w.shape[2:], padding, strict=True))
    return Unroller(y, w, x, (1, 1), around, dilation)  # type: ignore[arg-type]


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
    (2, 8, 16, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 16, 8, (5, 6), (3, 2), (2, 1), (1, 1), (1, 1), 1),
    (2, 16, 32, (5, 6), (3, 3), (1, 1), (0, 1), (1, 2), 2),
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
    unroller = unroller_of(plan, x, w, y, stride, padding, dilation)
    run(plan, bench, unroller, arrays[id(x)], arrays[id(y)], arrays[id(w)])
    params = {**how, "dilation": dilation}
    params |= {"conv2d_grad_input": {"size": size}, "conv2d_grad_weight": {"kernel": kernel}}.get(op, {})
    terms = {"conv2d": w.size // o, "conv2d_grad_input": y.size // n, "conv2d_grad_weight": y.size // o}[op]
    close(made, on_the_cpu(op, [arrays[id(spec)] for spec in ins], out, params), terms, 4)


def calls_of(plan: ConvPlan) -> list[tuple[int, int]]:
    """(calls of the library, matrices in each) of each chunk's product."""
    return [(len(chunk.call.plan.calls), chunk.call.plan.out.batch) for chunk in plan.chunks]


def three(x: Spec, w: Spec, y: Spec) -> list[tuple[str, tuple[Spec, Spec], Spec]]:
    """A convolution and its two gradients."""
    return [("conv2d", (x, w), y), ("conv2d_grad_input", (y, w), x), ("conv2d_grad_weight", (y, x), w)]


def test_one_product_for_all_images_of_a_chunk() -> None:
    x, w, y = images((8, 4, 6, 6), last=True), Spec((6, 4, 3, 3)), images((8, 6, 6, 6), last=True)
    for op, ins, out in three(x, w, y):
        assert calls_of(plan_conv(op, *ins, out, padding=(1, 1))) == [(1, 1)]
        pieces = plan_conv(op, *ins, out, padding=(1, 1), columns_bytes=3 * 36 * 36 * 4)
        assert calls_of(pieces) == [(1, 1)] * (8 if pieces.unroll == "y" else 3)
    x, y = images((8, 4, 6, 6)), images((8, 6, 6, 6))
    assert calls_of(plan_conv("conv2d", x, w, y, padding=(1, 1))) == [(1, 8)]
    plan = plan_conv("conv2d_grad_weight", y, x, w, padding=(1, 1))
    assert (calls_of(plan), plan.turned) == ([(1, 1)], ("y",))
    x, w, y = images((8, 4, 6, 6), last=True), Spec((6, 4, 1, 1)), images((8, 6, 6, 6), last=True)
    for op, ins, out in three(x, w, y):
        plan = plan_conv(op, *ins, out, workspace_bytes=0, columns_bytes=1)
        assert (calls_of(plan), plan.scratch_bytes) == ([(1, 1)], 0), "no columns, whatever the limit"


def test_gradients_of_images_are_convolutions_where_windows_move_by_one() -> None:
    half = DTYPES["bfloat16"]
    for kind, c, o, stride, flipped in (
        (F32, 8, 8, (1, 1), True),
        (F32, 4, 8, (1, 1), False),  # more channels of y: columns of x are fewer bytes
        (half, 4, 8, (1, 1), True),  # ... but would be rounded before they are added
        (F32, 8, 8, (2, 1), False),
    ):
        size = output_size((6, 6), (3, 3), stride, (1, 1), (1, 1))
        x, w, y = images((2, c, 6, 6), kind), Spec((o, c, 3, 3), kind), images((2, o, *size), kind)
        plan = plan_conv("conv2d_grad_input", y, w, x, stride=stride, padding=(1, 1))
        assert (plan.unroll, plan.fold) == (("y", False) if flipped else ("", True))


def test_columns_stay_below_their_limit_and_scratch_is_the_sum() -> None:
    x, w, y = images((8, 4, 6, 6)), Spec((6, 4, 3, 3)), images((8, 6, 6, 6))
    one = 4 * 9 * 36 * 4
    plan = plan_conv("conv2d", x, w, y, padding=(1, 1), columns_bytes=3 * one + 5, workspace_bytes=4096)
    assert [(chunk.first, chunk.count) for chunk in plan.chunks] == [(0, 3), (3, 3), (6, 2)]
    assert plan.parts["workspace"] == -(-3 * one // 256) * 256
    assert plan.scratch_bytes == plan.parts["workspace"] + 4096
    even = plan_conv("conv2d", x, w, y, padding=(1, 1), columns_bytes=6 * one + 5)
    assert [(chunk.first, chunk.count) for chunk in even.chunks] == [(0, 4), (4, 4)], "of equal size"
    turned = plan_conv("conv2d_grad_weight", y, x, w, padding=(1, 1), columns_bytes=3 * one + 5)
    assert [chunk.count for chunk in turned.chunks] == [2] * 4, "what is turned counts, too"


def test_halves_are_added_up_in_float32_over_chunks() -> None:
    half = DTYPES["float16"]
    x, w, y = images((8, 4, 6, 6), half), Spec((6, 4, 3, 3), half), images((8, 6, 6, 6), half)
    several = plan_conv("conv2d_grad_weight", y, x, w, padding=(1, 1), workspace_bytes=0, columns_bytes=1)
    assert several.sums == Spec((6, 40)), "a row is filled up to 16 bytes"
    once = plan_conv("conv2d_grad_weight", y, x, w, padding=(1, 1), workspace_bytes=0)
    assert once.sums == Spec((6, 40), half)
    pointwise = plan_conv("conv2d_grad_weight", y, x, Spec((6, 4, 1, 1), half))
    assert pointwise.sums is None
    assert several.scratch_bytes == several.parts["sums"] + 1024


def test_filters_are_packed_for_pieces_and_tensor_cores_alone() -> None:
    def found(c: int, kind: str, last: bool, tf32: bool = False) -> tuple[bool, int, str]:
        x, w = images((2, c, 6, 6), DTYPES[kind], last), Spec((6, c, 3, 3), DTYPES[kind])
        plan = plan_conv("conv2d", x, w, images((2, 6, 4, 4), DTYPES[kind], last), tf32=tf32)
        assert plan.columns is not None
        return plan.columns.by_element, plan.columns.length, plan.filters

    assert found(3, "float32", True) == (False, 27, "")
    assert found(3, "float32", True, tf32=True) == (False, 28, "packed")
    assert found(3, "bfloat16", True) == (False, 32, "packed")
    assert found(4, "float32", True) == (True, 36, "packed")
    assert found(4, "bfloat16", True) == (False, 40, "packed")
    assert found(8, "bfloat16", True) == (True, 72, "packed")
    assert found(8, "bfloat16", False) == (False, 72, "")


def test_images_in_the_other_order_are_unrolled() -> None:
    x, w, y = images((8, 4, 6, 6)), Spec((6, 4, 1, 1)), images((8, 6, 6, 6))
    plan = plan_conv("conv2d", x, w, y, workspace_bytes=0)
    assert (plan.unroll, plan.columns, plan.scratch_bytes, len(plan.chunks)) == ("", None, 0, 1)
    # the image is not in the order of the result: it is unrolled after all
    other = plan_conv("conv2d", images((8, 4, 6, 6), last=True), w, y)
    assert other.unroll == "x"
    assert other.columns is not None
    assert not other.columns.last


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
    assert plan_conv("conv2d_grad_weight", odd_y, odd_x, w).copied == (False, False)  # turned, unrolled
    with pytest.raises(ValueError, match="row-major or channels last"):
        plan_conv("conv2d", x, w, odd_y)
    with pytest.raises(ValueError, match="must be row-major"):
        plan_conv("conv2d_grad_weight", y, x, odd_w)
    with pytest.raises(ShapeError, match="groups=3"):
        plan_conv("conv2d", x, w, y, groups=3)
