"""Native convolutions against NumPy's: sizes, strides, groups, orders in memory, threads, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim import nn
from brim.spec import Spec
from brim_cpu import native
from brim_cpu.overlay import conv
from native_kernels import both, dense_last, image, native_kernel, run_native, run_numpy

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.status()}")

CLOSE = 2e-5  # of the largest result: sums of some thousand float32 products in another order

Case = tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]


def _case(x: tuple[int, ...], w: tuple[int, ...], stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Case:
    two = [v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation)]
    return x, w, {"stride": two[0], "padding": two[1], "dilation": two[2], "groups": x[1] // w[1]}


CASES = {
    "3x3": _case((2, 16, 9, 11), (24, 16, 3, 3), padding=1),
    "one_channel": _case((3, 1, 12, 13), (32, 1, 3, 3), padding=1),
    "to_few_channels": _case((2, 6, 14, 19), (5, 6, 5, 3), padding=2),
    "to_one_channel": _case((2, 19, 6, 7), (1, 19, 3, 3), padding=1),
    "three_channels": _case((2, 3, 17, 15), (16, 3, 5, 5), stride=2, padding=2),
    "1x1": _case((2, 33, 5, 7), (70, 33, 1, 1)),
    "1x1_strided": _case((2, 8, 9, 9), (16, 8, 1, 1), stride=2),
    "groups": _case((2, 12, 8, 6), (18, 4, 3, 3), padding=1),
    "depthwise": _case((2, 20, 7, 9), (20, 1, 3, 3), padding=1),
    "depthwise_of_many": _case((9, 70, 12, 11), (70, 1, 3, 3), stride=(1, 2), padding=1, dilation=(2, 1)),
    "depthwise_5x5": _case((2, 48, 13, 21), (48, 1, 5, 5), stride=2, padding=2),
    "depthwise_of_large_images": _case((1, 37, 60, 61), (37, 1, 3, 3), padding=1),
    "depthwise_beyond_the_cache": _case((3, 290, 19, 30), (290, 1, 3, 3), padding=1),
    "depthwise_wide_window": _case((2, 17, 5, 20), (17, 1, 2, 9), padding=(0, 6)),
    "depthwise_stride_over_the_window": _case((2, 16, 9, 11), (16, 1, 1, 2), stride=(2, 3)),
    "depthwise_times_two": _case((1, 5, 7, 9), (10, 1, 3, 3), stride=(2, 1), padding=1),
    "dilated": _case((2, 6, 13, 12), (9, 6, 3, 2), padding=(2, 1), dilation=(2, 3)),
    "stride_over_the_window": _case((2, 5, 14, 11), (8, 5, 2, 2), stride=(3, 4)),
    "padding_over_the_window": _case((2, 4, 5, 6), (17, 4, 3, 3), padding=(4, 5)),
    "dilated_and_strided": _case((1, 4, 17, 19), (8, 4, 3, 3), stride=(2, 3), padding=2, dilation=(3, 2)),
    "oblong": _case((2, 7, 4, 40), (33, 7, 1, 7), padding=(0, 3)),
    "one_pixel": _case((5, 130, 1, 1), (65, 130, 1, 1)),
    "many_small_images": _case((40, 8, 4, 4), (16, 8, 3, 3), padding=1),
    "wide_rows": _case((1, 3, 5, 700), (4, 3, 3, 3), padding=1),
    "deep": _case((2, 300, 4, 3), (140, 300, 3, 3), padding=1),
    "beyond_the_image": _case((1, 2, 3, 3), (2, 2, 1, 1), stride=5),
}
ORDERS = [(False, False), (True, True), (False, True), (True, False)]


def _sizes(case: Case) -> tuple[int, int]:
    x, w, how = case
    height, width = (
        (x[2 + i] + 2 * how["padding"][i] - how["dilation"][i] * (w[2 + i] - 1) - 1) // how["stride"][i] + 1
        for i in (0, 1)
    )
    return height, width


def _spec(shape: tuple[int, ...], last: bool) -> Spec:
    return dense_last(shape) if last else Spec(shape)


def _three(
    case: Case, x_last: bool, out_last: bool, shift: int = 0
) -> list[tuple[str, list[Any], Spec, dict[str, Any]]]:
    """conv2d and its gradients: op, inputs, result, params."""
    shape, w_shape, how = case
    rng = np.random.default_rng(7)
    out_shape = (shape[0], w_shape[0], *_sizes(case))
    x, g = image(rng, shape, x_last, shift), image(rng, out_shape, out_last, shift)
    w = image(rng, w_shape, shift=shift)
    return [
        ("conv2d", [x, w], _spec(out_shape, out_last), how),
        ("conv2d_grad_input", [g, w], _spec(shape, x_last), {**how, "size": shape[2:]}),
        ("conv2d_grad_weight", [g, x], Spec(w_shape), {**how, "kernel": w_shape[2:]}),
    ]


def _assert_close(wanted: Any, got: Any) -> None:
    scale = max(1e-30, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got / scale, wanted / scale, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(("x_last", "out_last"), ORDERS, ids=["first", "last", "first_to_last", "last_to_first"])
@pytest.mark.parametrize("name", CASES)
def test_as_numpy(name: str, x_last: bool, out_last: bool) -> None:
    for op, ins, out, params in _three(CASES[name], x_last, out_last):
        wanted, got = both(op, ins, out, params)
        _assert_close(wanted, got)


@pytest.mark.parametrize("name", CASES)
def test_neither_threads_nor_order_nor_alignment_change_a_bit(name: str) -> None:
    """The order of additions follows from the sizes alone."""
    reference = [
        run_native(op, ins, [out], params, threads=1)[0] for op, ins, out, params in _three(CASES[name], False, False)
    ]
    for threads, x_last, out_last, shift in ((2, False, False, 4), (3, True, True, 0), (5, False, True, 12)):
        calls = _three(CASES[name], x_last, out_last, shift)
        for wanted, (op, ins, out, params) in zip(reference, calls, strict=True):
            (got,) = run_native(op, ins, [out], params, threads=threads, shift=shift)
            assert np.array_equal(got, wanted), (op, threads, x_last, out_last, shift)


def test_more_threads_than_at_binding() -> None:
    """Working memory was given for one thread; three run."""
    op, ins, out, params = _three(CASES["3x3"], False, False)[0]
    (wanted,) = run_native(op, ins, [out], params)
    before = native.get_threads()
    try:
        native.set_threads(1)
        kernel = native_kernel(op, ins, [out], params)
        assert kernel is not None
        native.set_threads(3)
        got, scratch = np.empty(out.shape, np.float32), np.empty(kernel.scratch_bytes, np.uint8)
        kernel.run(got, *ins, scratch=scratch, **params)
    finally:
        native.set_threads(before)
    assert np.array_equal(got, wanted)


def test_scratch_grows_with_threads_only_by_their_own() -> None:
    op, ins, out, params = _three(_case((64, 64, 32, 32), (64, 64, 3, 3), padding=1), False, False)[0]
    before, found = native.get_threads(), []
    try:
        for threads in (1, 2, 3):
            native.set_threads(threads)
            kernel = native_kernel(op, ins, [out], params)
            assert kernel is not None
            found.append(kernel.scratch_bytes)
    finally:
        native.set_threads(before)
    assert found[1] - found[0] == found[2] - found[1] > 0
    columns = 64 * 9 * 32 * 32 * 4  # the windows of one image as a matrix
    assert found[0] < columns


def test_random_sizes() -> None:
    rng = np.random.default_rng(11)
    ran = 0
    while ran < 60:
        groups = int(rng.choice([1, 1, 2, 3]))
        channels, outputs = groups * int(rng.integers(1, 20)), groups * int(rng.integers(1, 40))
        shape = (int(rng.integers(1, 6)), channels, *(int(v) for v in rng.integers(1, 16, 2)))
        kernel, stride, dilation = ([int(v) for v in rng.integers(1, top, 2)] for top in (5, 4, 3))
        padding = [int(v) for v in rng.integers(0, 4, 2)]
        case = _case(shape, (outputs, channels // groups, *kernel), tuple(stride), tuple(padding), tuple(dilation))
        if min(_sizes(case)) < 1:
            continue
        ran += 1
        x_last, out_last = bool(rng.integers(2)), bool(rng.integers(2))
        for op, ins, out, params in _three(case, x_last, out_last):
            _assert_close(*both(op, ins, out, params))


def test_nan_and_infinity_reach_what_sees_them() -> None:
    case = CASES["3x3"]
    for op, ins, out, params in _three(case, False, False):
        first = ins[0].copy()
        first[0, 3, 4, 5] = np.nan
        first[1, 0, 0, 0] = np.inf
        wanted, got = both(op, [first, ins[1]], out, params)
        assert np.isnan(got).any()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(wanted))


def test_an_infinite_filter_over_padding() -> None:
    """Padding counts as zeros: 0 * inf is NaN, with NumPy too."""
    x, w = np.ones((1, 1, 2, 2), np.float32), np.ones((1, 1, 3, 3), np.float32)
    w[0, 0, 0, 0] = np.inf
    how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    wanted, got = both("conv2d", [x, w], Spec((1, 1, 2, 2)), how)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "shapes",
    [((0, 3, 5, 5), (4, 3, 3, 3)), ((2, 0, 5, 5), (4, 0, 3, 3)), ((2, 3, 5, 5), (0, 3, 3, 3))],
    ids=["no_images", "no_channels", "no_outputs"],
)
def test_zero_sizes_are_left_to_numpy(shapes: Any) -> None:
    x, w = (brim.asarray(np.ones(shape, np.float32)) for shape in shapes)
    out = nn.functional.conv2d(x, w)
    assert out.shape == (shapes[0][0], shapes[1][0], 3, 3)
    assert not out.numpy().any()


def test_what_is_left_to_numpy() -> None:
    x, w = np.ones((1, 2, 40, 40)), np.ones((2, 2, 3, 3))
    how = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    single, out = [x.astype(np.float32), w.astype(np.float32)], Spec((1, 2, 38, 38))
    assert native_kernel("conv2d", single, [out], how) is not None
    assert native_kernel("conv2d", [x, w], [Spec(out.shape, np.dtype("f8"))], how) is None  # float64
    gaps = Spec(out.shape, np.dtype("f4"), (38 * 80 * 2, 38 * 80, 80, 2))
    assert native_kernel("conv2d", single, [gaps], how) is None  # a result with gaps
    large = [single[0], np.ones((2, 2, 33, 1), np.float32)]
    assert native_kernel("conv2d", large, [Spec((1, 2, 8, 40))], how) is None
    assert native_kernel("conv2d", single, [Spec((1, 2, 5, 5))], {**how, "stride": (9, 9)}) is None


def test_inputs_with_gaps_come_as_copies() -> None:
    rng = np.random.default_rng(3)
    wide = rng.standard_normal((2, 8, 9, 20)).astype(np.float32)
    x, w = wide[:, ::2, :, 1:15], rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
    how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    kernel = native_kernel("conv2d", [x, w], [Spec((2, 5, 9, 14))], how)
    assert kernel is not None
    assert kernel.contiguous == (True, True)
    _assert_close(run_numpy("conv2d", [x, w], [Spec((2, 5, 9, 14))], how)[0], nn.functional.conv2d(
        brim.asarray(wide)[:, ::2, :, 1:15], brim.asarray(w), padding=1
    ).numpy())  # fmt: skip


def test_gradients_agree_with_the_forward_pass() -> None:
    """<g, conv(x, w)> = <grad_input(g, w), x> = <grad_weight(g, x), w>, since each is linear in each."""
    for case in CASES.values():
        forward, grad_input, grad_weight = _three(case, False, True)
        (out,), (dx,), (dw,) = (
            run_native(op, ins, [spec], params) for op, ins, spec, params in (forward, grad_input, grad_weight)
        )
        x, w = forward[1]
        g = grad_input[1][0]
        values = [float((a.astype(np.float64) * b).sum()) for a, b in ((g, out), (dx, x), (dw, w))]
        scale = float(np.linalg.norm(g.astype(np.float64)) * np.linalg.norm(out.astype(np.float64)))
        np.testing.assert_allclose(np.array(values) / scale, values[0] / scale, rtol=0, atol=1e-5)


def test_eager_and_planned_steps_run_the_same_kernel() -> None:
    rng = np.random.default_rng(5)
    layer = nn.Conv2d(3, 16, 3, padding=1)
    x = rng.standard_normal((4, 3, 10, 10)).astype(np.float32)

    def step(images: Any) -> Any:
        loss = (layer(images) ** 2).sum()
        loss.backward()
        grads = layer.weight.grad, layer.bias.grad
        layer.weight.grad = layer.bias.grad = None
        return loss, *grads

    eager = [np.array(t.numpy()) for t in step(brim.asarray(x))]
    planned = [np.array(t.numpy()) for t in brim.compile(step)(x)]
    assert all(np.array_equal(a, b) for a, b in zip(eager, planned, strict=True))


FAST = {
    "whole_tiles": _case((2, 16, 8, 8), (16, 16, 3, 3), padding=1),
    "cut_tiles": _case((3, 20, 7, 9), (33, 20, 3, 3), padding=1),
    "small_images": _case((5, 17, 4, 4), (130, 17, 3, 3)),
    "one_pixel": _case((2, 16, 1, 1), (16, 16, 3, 3), padding=1),
    "few_channels": _case((2, 3, 6, 7), (5, 3, 3, 3), padding=1),
    "wide_padding": _case((1, 70, 13, 5), (16, 70, 3, 3), padding=(3, 2)),
    "no_padding": _case((2, 19, 12, 21), (40, 19, 3, 3)),
    "many_channels": _case((2, 300, 5, 6), (140, 300, 3, 3), padding=1),
    "many_images": _case((40, 16, 6, 5), (16, 16, 3, 3), padding=1),
    "wide_rows": _case((1, 16, 5, 430), (16, 16, 3, 3), padding=1),
}


@pytest.fixture(params=[2, 4])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The fast algorithm with tiles of this size, whatever takes least time."""
    monkeypatch.setattr(conv, "tile_of", lambda *sizes: request.param)
    return int(request.param)


def _fast(case: Case, x_last: bool, out_last: bool, **how: Any) -> list[tuple[str, list[Any], Spec, dict[str, Any]]]:
    return [(op, ins, out, {**params, "fast": True}) for op, ins, out, params in _three(case, x_last, out_last, **how)]


@pytest.mark.parametrize(("x_last", "out_last"), ORDERS, ids=["first", "last", "first_to_last", "last_to_first"])
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", FAST)
def test_fast_ones_are_close(name: str, x_last: bool, out_last: bool) -> None:
    exact = _three(FAST[name], x_last, out_last)
    for (op, ins, out, params), (*_, asked) in zip(exact, _fast(FAST[name], x_last, out_last), strict=True):
        (wanted,) = run_numpy(op, [x.astype(np.float64) for x in ins], [Spec(out.shape, np.dtype("f8"))], params)
        (got,) = run_native(op, ins, [out], asked)
        _assert_close(wanted, got)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", FAST)
def test_fast_ones_do_not_depend_on_threads_or_order(name: str) -> None:
    reference = [
        run_native(op, ins, [out], params, threads=1)[0] for op, ins, out, params in _fast(FAST[name], False, False)
    ]
    for threads, x_last, out_last, shift in ((2, False, False, 4), (3, True, True, 0), (5, False, True, 12)):
        calls = _fast(FAST[name], x_last, out_last, shift=shift)
        for wanted, (op, ins, out, params) in zip(reference, calls, strict=True):
            (got,) = run_native(op, ins, [out], params, threads=threads, shift=shift)
            assert np.array_equal(got, wanted), (op, threads, x_last, out_last, shift)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["3x3", "groups", "dilated", "1x1", "one_channel", "deep"])
def test_fast_changes_only_what_it_knows(name: str) -> None:
    _, weight, how = CASES[name]
    knows = weight[2:] == (3, 3) and how["groups"] == 1 and how["dilation"] == (1, 1)
    for exact, fast in zip(_three(CASES[name], False, False), _fast(CASES[name], False, False), strict=True):
        (a,), (b,) = (run_native(op, ins, [out], params) for op, ins, out, params in (exact, fast))
        assert np.array_equal(a, b) is not knows


def test_fast_ones_keep_nan_near(tiles: int) -> None:
    """A NaN reaches every result of the tiles that read it, and no others."""
    (op, (x, w), out, params), *_ = _fast(FAST["no_padding"], False, False)
    x[0, 3, 5, 9] = np.nan
    (got,) = run_native(op, [x, w], [out], params)
    bad = np.isnan(got)
    assert bad[0, :, 3:6, 7:10].all()
    assert not bad[1].any()
    assert not bad[0, :, :, 14:].any()


def test_tiles_are_chosen_by_what_they_take() -> None:
    """Large images of many channels: tiles of 4; small ones 2; few images of many filters, few channels: neither."""
    assert [conv.tile_of(64, C, C, H, H) for C, H in ((16, 32), (64, 32), (128, 16), (256, 8))] == [4, 4, 4, 4]
    assert conv.tile_of(64, 512, 512, 4, 4) == 2
    assert conv.tile_of(64, 32, 32, 6, 6) == 2
    assert conv.tile_of(1, 512, 512, 4, 4) == 0
    assert conv.tile_of(64, 3, 64, 32, 32) == conv.tile_of(64, 64, 3, 32, 32) == 0
    assert conv.tile_of(1, 16, 16, 1, 1) == 0


def test_the_exact_algorithm_runs_where_it_is_faster() -> None:
    case = _case((1, 64, 4, 4), (64, 64, 3, 3), padding=1)
    for exact, fast in zip(_three(case, True, True), _fast(case, True, True), strict=True):
        (a,), (b,) = (run_native(op, ins, [out], params) for op, ins, out, params in (exact, fast))
        assert np.array_equal(a, b)
