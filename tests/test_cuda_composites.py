"""CUDA kernels laid over composites, emulated, against the bodies: softmax, logsumexp, cross-entropy and the norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

import brim
from brim import op as op_module
from brim import ops
from brim.nn import functional as F
from brim.op import REGISTRY
from brim.program.compile import plan, spec
from brim.spec import DTYPES, Spec, is_float
from brim_cpu import native
from brim_cuda.emulation import EmulationLoader
from brim_cuda.registry import Work, bind, work_of
from emulated import device
from emulating import WHY_NOT, Recorded, emulated, kernels_of, same_bits

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

FLOATS = ("float32", "float64", "float16", "bfloat16")
# Of the largest number of a result: sums are in float32 for all but float64, and half-width results are rounded once.
TOLERANCE = {"float32": 3e-6, "float64": 1e-14, "float16": 6e-4, "bfloat16": 4.5e-3}
ROWS = ((3, 1), (300, 7), (9, 33), (3, 1000), (2, 5000))
AROUND = (((5, 40), 0), ((3, 70, 6), 1), ((2, 1, 9), 1), ((2, 300, 1), 1))
"""Shapes and an axis that is not the last (or whose rows are not the only ones)."""
IMAGES = ((6, 5), (300, 3), (2, 3, 4), (3, 40, 5, 7), (4, 2, 90, 61), (700, 33), (2, 1, 3, 3))
COMPOSITES = (
    "softmax", "log_softmax", "softmax_grad", "log_softmax_grad", "causal_softmax", "causal_softmax_grad",
    "logsumexp", "logsumexp_grad", "cross_entropy", "cross_entropy_grad",
    "layer_norm", "layer_norm_grad", "batch_norm", "batch_norm_grad",
)  # fmt: skip


def _spec(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    return Spec(x.shape, x.dtype, None if x.flags.c_contiguous else tuple(s // x.itemsize for s in x.strides))


def body_of(name: str, given: Sequence[Any], params: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """What the body gives on the CPU for float64 copies of the floats among the inputs."""
    wide = [x.astype(np.float64) if isinstance(x, np.ndarray) and is_float(x.dtype) else x for x in given]
    with brim.no_grad():
        made = REGISTRY[name](*(brim.asarray(x) if isinstance(x, np.ndarray) else x for x in wide), **params)
    return [np.array(out.numpy()) for out in (made if isinstance(made, tuple) else (made,))]  # free of the pool


def call_of(name: str, given: Sequence[Any], **params: Any) -> Recorded:
    """A call of a composite and, as what it should write, the values of its body in float64."""
    ins = tuple(map(_spec, given))
    wrote = tuple(body_of(name, given, params))
    return Recorded(REGISTRY[name], ins, REGISTRY[name].infer(ins, params), params, tuple(given), wrote)


class _Inputs:
    """Random operands in one dtype."""

    def __init__(self, dtype: str, seed: int = 0) -> None:
        self.rng, self.dtype = np.random.default_rng(seed), DTYPES[dtype]
        self.wide = DTYPES["float32"] if self.dtype.itemsize == 2 else self.dtype

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def softmax(self, shape: tuple[int, ...], axis: int) -> Iterator[Recorded]:
        x, g = self.normal(*shape, scale=3.0), self.normal(*shape)
        for name in ("softmax", "log_softmax"):
            yield (forward := call_of(name, [x], axis=axis))
            yield call_of(f"{name}_grad", [g, forward.wrote[0].astype(self.dtype)], axis=axis)
        yield from self.logsumexp(x, (axis,))

    def logsumexp(self, x: np.ndarray[Any, Any], axes: tuple[int, ...]) -> Iterator[Recorded]:
        yield (forward := call_of("logsumexp", [x], axes=axes, keepdims=False))
        total = forward.wrote[0].astype(self.dtype)
        yield call_of("logsumexp_grad", [self.normal(*total.shape), x, total], axes=axes)

    def causal(self, shape: tuple[int, ...]) -> Iterator[Recorded]:
        x = self.normal(*shape, scale=3.0)
        yield (forward := call_of("causal_softmax", [x], scale=0.25))
        yield call_of("causal_softmax_grad", [self.normal(*shape), forward.wrote[0].astype(self.dtype)], scale=0.25)

    def cross_entropy(self, rows: int, classes: int, smoothing: float, kind: Any = np.int64) -> Iterator[Recorded]:
        x, index = self.normal(rows, classes, scale=3.0), self.rng.integers(0, classes, rows).astype(kind)
        index[rows // 2] = -1
        how = {"ignore_index": -1, "smoothing": smoothing}
        yield (forward := call_of("cross_entropy", [x, index], **how))
        sums = [part.astype(self.wide) for part in forward.wrote[1:]]
        yield call_of("cross_entropy_grad", [self.normal(rows), x, index, *sums], **how)

    def norm(self, name: str, x: np.ndarray[Any, Any], shape: Any, **how: Any) -> Iterator[Recorded]:
        """Forward and gradient; ``shape`` of the weights, or None for numbers in their place."""
        vectors = [1.0, 0.0] if shape is None else [self.normal(*shape) + self.dtype.type(1), self.normal(*shape)]
        yield (forward := call_of(name, [x, *vectors], **how))
        g = np.empty_like(x)  # in the same order of memory
        g[...] = self.normal(*x.shape)
        statistics = [part.astype(self.wide) for part in forward.wrote[1:]]
        yield call_of(f"{name}_grad", [g, x, vectors[0], *statistics], **how)


def channels_last(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values, channels side by side in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def _of_dtype(dtype: str, *, all_shapes: bool) -> Iterator[Recorded]:
    make = _Inputs(dtype)
    for shape in ROWS if all_shapes else ROWS[1:4:2]:
        yield from make.softmax(shape, 1)
        yield from make.cross_entropy(*shape, smoothing=0.0)
        yield from make.cross_entropy(*shape, smoothing=0.1)
        for vectors in (shape[1:], None):
            yield from make.norm("layer_norm", make.normal(*shape) + make.dtype.type(2), vectors, ndim=1, eps=1e-3)
    for shape, axis in AROUND if all_shapes else AROUND[:2]:
        yield from make.softmax(shape, axis)
    for shape in ((2, 3, 9, 9), (33, 33), (1, 70, 40), (5, 6)) if all_shapes else ((2, 3, 9, 9),):
        yield from make.causal(shape)
    for shape in IMAGES if all_shapes else IMAGES[1::2]:
        x = make.normal(*shape, scale=2.0) + make.dtype.type(3)
        for order in (x, channels_last(x)) if len(shape) == 4 else (x,):
            yield from make.norm("batch_norm", order, shape[1:2], eps=1e-3)
    if all_shapes:
        yield from make.norm("batch_norm", make.normal(30, 4, 5), None, eps=1e-5)
        yield from make.norm("layer_norm", make.normal(700, 3, 11), (3, 11), ndim=2, eps=1e-5)
        yield from make.logsumexp(make.normal(4, 5, 6), (1, 2))
        yield from make.logsumexp(make.normal(4, 1, 6), (0, 1))
        yield from make.cross_entropy(5, 9, 0.0, np.int32)


@cache
def composite_calls() -> tuple[Recorded, ...]:
    """Calls of every composite that has a CUDA kernel and is laid over a body of the network's layers."""
    return tuple(one for dtype in FLOATS for one in _of_dtype(dtype, all_shapes=dtype == "float32"))


def works(calls: Sequence[Recorded]) -> list[Work]:
    """Their launches."""
    found = [one.work() for one in calls]
    assert None not in found
    return [work for work in found if work is not None]


def close(got: Sequence[np.ndarray[Any, Any]], one: Recorded, times: float = 1.0) -> None:
    """Every result is within the tolerance of its dtype of what the body gives in float64."""
    for result, (found, want) in enumerate(zip(got, one.wrote, strict=True)):
        assert found.shape == want.shape
        wide, tolerance = found.astype(np.float64), times * TOLERANCE[found.dtype.name]
        assert np.array_equal(np.isnan(wide), np.isnan(want)), f"{one} result {result}"
        finite = np.isfinite(want)
        assert np.array_equal(wide[~finite & ~np.isnan(want)], want[~finite & ~np.isnan(want)]), str(one)
        scale = np.max(np.abs(want), initial=0.0, where=finite)
        away = np.max(np.abs(np.subtract(wide, want, where=finite, out=np.zeros_like(want))), initial=0.0)
        assert away <= tolerance * scale, f"{one} result {result}: {away / max(scale, 1e-300):.2e} of the largest"


@cache
def loader_of(order: int) -> EmulationLoader:
    """A loader with all kernels, compiled together; ``order`` is that of the threads of a block."""
    made = EmulationLoader(order=order)
    made.functions(kernels_of(works(composite_calls())))
    return made


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 17], ids=["forward", "backward", "shuffled"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_kernels_equal_the_bodies(name: str, order: int) -> None:
    calls = [one for one in composite_calls() if one.op.name == name]
    assert len(calls) >= len(FLOATS)
    for one in calls:
        close(emulated(loader_of(order), one), one)


@needs_compiler
def test_results_have_the_same_bits_in_any_order_of_threads() -> None:
    calls = [one for one in composite_calls() if one.ins[0].dtype == DTYPES["float32"]][::5]
    assert len({one.op.name for one in calls}) > 8
    for one in calls:
        first, *others = ([array.tobytes() for array in emulated(loader_of(order), one)] for order in (0, 1, 17))
        assert all(other == first for other in others), str(one)


def views_of_rows(dtype: str) -> Iterator[Recorded]:
    """Norms of rows whose first is aligned for reads of 16 bytes, and whose others are not."""
    make = _Inputs(dtype)
    for rows, numbers in ((9, 19), (14, 33)):
        x = make.normal(rows, numbers)[:, :16]
        g = make.normal(rows, numbers)[:, :16]
        yield (forward := call_of("layer_norm", [x, make.normal(16), make.normal(16)], ndim=1, eps=1e-3))
        statistics = [part.astype(make.wide) for part in forward.wrote[1:]]
        yield call_of("layer_norm_grad", [g, x, make.normal(16), *statistics], ndim=1, eps=1e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_views_are_read_where_they_lie(dtype: str) -> None:
    loader = EmulationLoader()
    for one in views_of_rows(dtype):
        close(emulated(loader, one), one, times=2)


def test_long_channels_are_cut_into_pieces_and_short_ones_take_one_launch() -> None:
    def launches(name: str) -> set[int]:
        return {len(work.calls) for one in composite_calls() if one.op.name == name and (work := one.work())}

    assert launches("batch_norm") == launches("batch_norm_grad") == {1, 2}
    assert launches("layer_norm_grad") == {2, 3}
    rest = set(COMPOSITES) - {"batch_norm", "batch_norm_grad", "layer_norm_grad"}
    assert all(launches(name) == {1} for name in rest)


# -------------------------------------------------------------------------------------------------------- extreme input

INF, NAN = math.inf, math.nan
EXTREME = np.array(
    [[1e4, 1e4, -INF], [-INF, -INF, -INF], [-1e4, -2e4, 0], [INF, 0, 0], [INF, INF, 1], [NAN, 0, 0], [0, NAN, -INF],
     [INF, NAN, 1], [-INF, -INF, 3], [-INF, 5, INF]],
)  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_extremes_are_what_the_bodies_give(dtype: str) -> None:
    """One thread a line and several: in the long rows the numbers stand between -inf or finite ones."""
    loader = loader_of(17)
    index, how = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2]), {"ignore_index": -100, "smoothing": 0.0}
    for filler in (None, -INF, -3.0):
        x = EXTREME
        if filler is not None:
            x = np.full((len(EXTREME), 700), filler)
            x[:, [3, 300, 699]] = EXTREME
        x = x.astype(DTYPES[dtype])
        for name in ("softmax", "log_softmax"):
            close(emulated(loader, forward := call_of(name, [x], axis=1)), forward)
            g, out = np.sin(np.arange(x.size)).reshape(x.shape).astype(x.dtype), forward.wrote[0].astype(x.dtype)
            close(emulated(loader, one := call_of(f"{name}_grad", [g, out], axis=1)), one)
        close(emulated(loader, forward := call_of("logsumexp", [x], axes=(1,), keepdims=True)), forward)
        total = forward.wrote[0].astype(x.dtype)
        close(emulated(loader, one := call_of("logsumexp_grad", [total, x, total], axes=(1,))), one)
        losses, top, _ = emulated(loader, forward := call_of("cross_entropy", [x, index], **how))
        assert np.array_equal(np.isnan(losses), np.isnan(forward.wrote[0]))
        assert np.array_equal(top, np.max(np.where(np.isnan(x), -INF, x), axis=1))


@needs_compiler
def test_causal_softmax_looks_at_nothing_right_of_the_diagonal() -> None:
    x, loader = np.random.default_rng(0).standard_normal((3, 40, 40)).astype(np.float32), loader_of(17)
    seen = np.tril(np.ones((40, 40), bool))
    want = emulated(loader, call_of("causal_softmax", [x], scale=0.3))[0]
    hidden = np.where(seen, x, np.float32(NAN))
    assert same_bits(emulated(loader, call_of("causal_softmax", [hidden], scale=0.3))[0], want)
    assert not want[:, ~seen].any()
    clean = emulated(loader, call_of("causal_softmax_grad", [x, want], scale=0.3))[0]
    assert same_bits(emulated(loader, call_of("causal_softmax_grad", [hidden, want], scale=0.3))[0], clean)


@needs_compiler
def test_scores_far_from_zero_lose_nothing() -> None:
    """The gradient needs e^(x - largest - log of the sum): one number for the last two would be too coarse."""
    x = np.random.default_rng(1).standard_normal((4, 50)).astype(np.float32).round(2) + np.float32(2.0**15)
    index, how, loader = np.arange(4), {"ignore_index": -100, "smoothing": 0.0}, loader_of(0)
    forward = call_of("cross_entropy", [x, index], **how)
    close(emulated(loader, forward), forward)
    sums = emulated(loader, forward)[1:]
    gradient = call_of("cross_entropy_grad", [np.ones(4, np.float32), x, index, *sums], **how)
    close(emulated(loader, gradient), gradient)


@needs_compiler
def test_classes_that_do_not_exist_give_nan_and_no_gradient() -> None:
    x, index = np.ones((4, 3), np.float32), np.array([0, 3, -1, -100])
    how: dict[str, Any] = {"ignore_index": -100, "smoothing": 0.0}
    ins, loader = (_spec(x), _spec(index)), loader_of(0)
    one = Recorded(REGISTRY["cross_entropy"], ins, REGISTRY["cross_entropy"].infer(ins, how), how, (x, index), ())
    losses, top, total = emulated(loader, one)
    assert np.isnan(losses).tolist() == [False, True, True, False]
    assert losses[3] == 0
    given = (np.ones(4, np.float32), x, index, top, total)
    specs, op = tuple(map(_spec, given)), REGISTRY["cross_entropy_grad"]
    (gradient,) = emulated(loader, Recorded(op, specs, op.infer(specs, how), how, given, ()))
    assert gradient.any(axis=1).tolist() == [True, False, False, False]


@needs_compiler
def test_norms_of_constants_of_large_offsets_and_of_nan() -> None:
    rng, loader = np.random.default_rng(0), loader_of(1)
    x = rng.standard_normal((4, 3, 900)).astype(np.float32)
    x[1], x[:, 0] = x[1].round(1) + 3000, 7.0
    x[2, 1, 5] = NAN
    vectors = np.ones(3, np.float32), np.zeros(3, np.float32)
    found, mean, var = emulated(loader, call_of("batch_norm", [x, *vectors], eps=1e-5))
    assert not found[:, 0].any()
    assert mean.ravel()[0] == 7
    assert var.ravel()[0] == 0
    assert np.isnan(found).all(axis=(0, 2)).tolist() == [False, True, False]
    channel = x[:, 2].astype(np.float64)
    np.testing.assert_allclose(found[:, 2], (channel - channel.mean()) / channel.std(), atol=2e-5)
    rows = x.reshape(12, 900)
    weights = np.ones(900, np.float32), np.zeros(900, np.float32)
    found = emulated(loader, call_of("layer_norm", [rows, *weights], ndim=1, eps=1e-5))[0]
    assert np.isnan(found).all(axis=1).nonzero()[0].tolist() == [7]
    assert np.isnan(found).any(axis=1).nonzero()[0].tolist() == [7]


# ------------------------------------------------------------------------------------------------- orders of memory


@needs_compiler
def test_batch_norm_reads_images_in_any_order_without_a_copy() -> None:
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((3, 40, 5, 7)).astype(np.float32) for _ in range(2))
    w = rng.standard_normal(40).astype(np.float32)
    loader = loader_of(17)
    spread = np.broadcast_to(g[:, :, :1, :1], x.shape)
    statistics = [x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)]
    for given in (
        x,
        channels_last(x),
        x[:, ::2].repeat(2, 1)[:, :40],
        np.pad(x, ((0, 0), (2, 3), (0, 0), (0, 0)))[:, 2:42],
    ):
        forward = call_of("batch_norm", [given, w, w], eps=1e-5)
        work = forward.work()
        assert work is not None
        assert not work.contiguous[0]
        close(emulated(loader, forward), forward)
        for gradient in (g, channels_last(g), spread):
            backward = call_of("batch_norm_grad", [gradient, given, w, *statistics], eps=1e-5)
            close(emulated(loader, backward), backward, 4.0)
            last = backward.outs[0]
            steps = np.array(channels_last(x).strides) // 4
            outs = (Spec(last.shape, last.dtype, tuple(map(int, steps))), *backward.outs[1:])
            other = Recorded(backward.op, backward.ins, outs, backward.params, backward.given, backward.wrote)
            close(emulated(loader, other), other, 4.0)
    uneven = x[..., ::2]
    work = call_of("batch_norm", [uneven, w, w], eps=1e-5).work()
    assert work is not None
    assert work.contiguous[0], "pixels that lie unevenly are copied first"


@needs_compiler
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "causal_softmax"])
def test_results_may_be_written_over_the_input(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    how: dict[str, Any] = {"scale": 2.0} if name == "causal_softmax" else {"axis": 1}
    one, loader = call_of(name, [x], **how), loader_of(17)
    kernel = bind(loader, one.op, one.ins, one.outs, how)
    assert kernel.aliasing
    kernel.run(x, x, scratch=None, **how)
    close([x], one)


@pytest.mark.parametrize("shape", [(2**31, 3), (3, 2**31), (2**16, 2**16), (40, 2**28)], ids=str)
def test_grids_of_huge_arrays_stay_within_the_limits(shape: tuple[int, int]) -> None:
    """On shapes alone: a grid has at most 2**31 - 1 blocks along x and 65535 along y."""
    x, vector, channel = Spec(shape), Spec(shape[1:]), Spec((1, shape[1]))
    row = Spec((shape[0], 1))
    cases: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("softmax", [x], {"axis": 0}),
        ("softmax_grad", [x, x], {"axis": 1}),
        ("layer_norm_grad", [x, x, vector, row, row], {"ndim": 1, "eps": 1e-5}),
        ("batch_norm", [x, vector, vector], {"eps": 1e-5}),
        ("batch_norm_grad", [x, x, vector, channel, channel], {"eps": 1e-5}),
    ]
    for name, ins, params in cases:
        for one in work_of(REGISTRY[name], ins, REGISTRY[name].infer(ins, params), params).calls:
            assert one.blocks[0] < 2**31
            assert max(one.blocks[1:], default=1) <= 65535
            assert {p.dtype for p in one.kernel.params if p.name == "count"} == {DTYPES["int64"]}


def test_what_no_kernel_is_for_is_left_to_the_body() -> None:
    x, row = Spec((4, 6)), Spec((6,))
    refused: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("logsumexp", [Spec((2, 3, 4))], {"axes": (0, 2), "keepdims": False}),
        ("layer_norm", [x, Spec((6,), DTYPES["float64"]), row], {"ndim": 1, "eps": 1e-5}),
        ("batch_norm_grad", [Spec((4, 1)), x, row, Spec((1, 6)), Spec((1, 6))], {"eps": 1e-5}),
        ("softmax", [Spec((4, 6), DTYPES["complex64"])], {"axis": 1}),
    ]
    for name, ins, params in refused:
        with pytest.raises(KeyError, match=f"no kernel for {name}"):
            work_of(REGISTRY[name], ins, [Spec((4, 6), x.dtype)] * 3 if name != "logsumexp" else [Spec((3,))], params)


# ------------------------------------------------------------------------------------------- in steps, on the device


def _ops_of(fn: Any, place: Any, *specs: Any) -> list[str]:
    (program,) = plan(fn, *specs, device=place).programs
    return [instruction.op.name for instruction in program.prepared.program.instructions]


def _classify(x: Any, labels: Any) -> Any:
    x.requires_grad_()
    loss = F.cross_entropy(x, labels, label_smoothing=0.1)
    loss.backward()
    gradient, x.grad = x.grad, None
    return loss, gradient


@pytest.fixture
def _numpy_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU without native kernels: composites are their bodies there."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(op_module._eager, "_plans", {})  # kernels are looked up anew, and again afterwards


@pytest.mark.emulated
@pytest.mark.usefixtures("_numpy_on_the_cpu")
def test_cross_entropy_stores_no_log_probabilities_where_there_is_a_kernel() -> None:
    specs = spec((64, 1000)), spec((64,), "int64")
    here, there = _ops_of(_classify, "cpu", *specs), _ops_of(_classify, device(), *specs)
    assert there.count("cross_entropy_with_grad") == 1
    assert {"pick_classes", "cross_entropy", "cross_entropy_grad"}.isdisjoint(there)
    assert "cross_entropy" not in here
    assert here.count("pick_classes") == 1
    rows_bytes = 64 * 1000 * 4
    needs = [
        plan(_classify, *specs, device=place).programs[0].prepared.memory.arena_bytes for place in ("cpu", device())
    ]
    assert needs[0] > needs[1]
    assert needs[1] < 2 * rows_bytes + 4096, "the scores and their gradient, and nothing else of their size"


def _attend(q: Any, k: Any, v: Any) -> Any:
    q.requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    (out * out).sum().backward()
    gradient, q.grad = q.grad, None
    return out, gradient


@pytest.mark.emulated
@pytest.mark.usefixtures("_numpy_on_the_cpu")
def test_attention_takes_the_causal_kernel() -> None:
    """In float64, for which there is no kernel of attention as a whole."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 3, 7, 4)) for _ in range(3)]
    specs = [spec(array.shape, "float64") for array in arrays]
    there = _ops_of(_attend, device(), *specs)
    assert there.count("causal_softmax") == there.count("causal_softmax_grad") == 1
    assert not {"softmax", "iota", "exp"} & set(there)
    assert "causal_softmax" not in _ops_of(_attend, "cpu", *specs)
    found = [_attend(*(brim.asarray(a, device=place) for a in arrays)) for place in ("cpu", device())]
    for got, want in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want.detach().numpy(), rtol=1e-5, atol=1e-6)


DIFFERENTIATED_TWICE: dict[str, Any] = {
    "softmax": lambda x, w: ops.softmax(x, 1),
    "log_softmax": lambda x, w: ops.log_softmax(x, 0),
    "causal_softmax": lambda x, w: ops.causal_softmax(x, scale=0.7),
    "logsumexp": lambda x, w: ops.logsumexp(x, 1),
    "cross_entropy": lambda x, w: F.cross_entropy(
        x, brim.asarray(np.array([0, 2, 1]), device=x.device), reduction="none"
    ),
    "layer_norm": lambda x, w: ops.layer_norm(x, (4,), w, w),
    "batch_norm": lambda x, w: ops.batch_norm(x, w, w)[0],
}


@pytest.mark.emulated
@pytest.mark.parametrize("name", DIFFERENTIATED_TWICE)
def test_gradients_of_gradients_on_the_device(name: str) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 4)), rng.standard_normal(4)
    found = []
    for place in ("cpu", device()):
        a, b = (brim.asarray(v, device=place).requires_grad_() for v in (x, w))
        out = DIFFERENTIATED_TWICE[name](a, b)
        first = brim.grad((out * out * out).sum(), [a], create_graph=True)[0]
        (first * first).sum().backward()
        found.append([first.detach().numpy(), a.grad.numpy(), None if b.grad is None else b.grad.numpy()])
    for got, want in zip(found[1], found[0], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert np.abs(want).max() > 1e-3
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
