"""Hand-written CUDA kernels, emulated, against the CPU backend's: the whole table of ops, and larger cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from brim.check.table import TOLERANCE
from brim.op import REGISTRY
from brim.spec import DTYPES, Spec, is_float
from brim_cpu.device import CpuBackend
from brim_cuda.emulation import EmulationLoader
from brim_cuda.registry import KERNELS, Work, bind, work_of
from emulating import WHY_NOT, Recorded, emulated, kernels_of, recorded, recorded_in_networks, same_bits, ulps

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

work_of(REGISTRY["fill"], [0], [Spec(())], {})  # registers all kernels
TESTED_ELSEWHERE = {
    "conv2d", "conv2d_grad_input", "conv2d_grad_weight",  # sums of products: test_cuda_conv.py
    "matmul_epilogue", "fused_many",  # only in programs: test_cuda_gemm_epilogue.py, test_cuda_many.py
    "conv2d_epilogue",  # only in programs: test_cuda_conv_epilogue.py
    "layer_norm_fused", "layer_norm_grad_fused", "batch_norm_fused", "batch_norm_grad_fused",  # ..._fused_norms.py
    "cross_entropy_with_grad",  # test_program_loss_gradient.py
}  # fmt: skip
COMPOSITES = {name for name in KERNELS if REGISTRY[name].kind == "composite"}  # the CPU runs their bodies
NAMES = sorted(set(KERNELS) - TESTED_ELSEWHERE - COMPOSITES)
CPU = CpuBackend()
# Additions in another order than the CPU's; everything else is exact.
ROUNDED = {"sum": 64, "prod": 64, "cumulative_sum": 64, "matmul": 64}


def primitives() -> list[tuple[Recorded, Work]]:
    return [(one, work) for one in recorded() if one.op.name in NAMES and (work := one.work()) is not None]


@pytest.fixture(scope="module", params=[0, 1, 17], ids=["forward", "backward", "shuffled"])
def loader(request: pytest.FixtureRequest) -> EmulationLoader:
    """All kernels, compiled together; threads run in one of three orders."""
    made = EmulationLoader(order=request.param)
    made.functions(kernels_of([work for _, work in primitives()]))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_table(name: str, loader: EmulationLoader) -> None:
    calls = [one for one, _ in primitives() if one.op.name == name]
    assert calls, "the table of ops has no row that leads to this kernel"
    for one in calls:
        for got, want in zip(emulated(loader, one), one.wrote, strict=True):
            if name in ROUNDED and is_float(want.dtype):
                assert ulps(got, want) <= ROUNDED[name], str(one)
            else:
                assert same_bits(got, want), str(one)


def test_kernels_in_the_networks() -> None:
    """All but elementwise groups of the planned test networks, on the numbers of a real step."""
    loader = EmulationLoader(order=2)
    products = {"matmul"}  # sums of products: test_cuda_gemm.py
    calls = [one for one in recorded_in_networks() if one.op.name in {*NAMES} - products and one.work() is not None]
    assert {"sum", "max", "dropout", "index_add", "take", "pick_classes"} <= {one.op.name for one in calls}
    loader.functions(kernels_of([work for one in calls if (work := one.work())]))
    for one in calls:
        found, want = emulated(loader, one), one.wrote[0]
        got = found[0]
        if one.op.name == "sum" and is_float(want.dtype):
            size = np.sum(np.abs(one.given[0].astype(np.float64)), axis=one.params["axes"]).reshape(want.shape)
            away = np.abs(got.astype(np.float64) - want.astype(np.float64))
            assert np.all(away <= TOLERANCE[want.dtype.name][0] / 4 * size), str(one)
        else:
            assert all(same_bits(g, w) for g, w in zip(found, one.wrote, strict=True)), str(one)


def call_of(name: str, given: list[Any], **params: Any) -> Recorded:
    op = REGISTRY[name]
    ins = tuple(
        Spec(x.shape, x.dtype, None if x.flags.c_contiguous else tuple(s // x.itemsize for s in x.strides))
        if isinstance(x, np.ndarray)
        else x
        for x in given
    )
    return Recorded(op, ins, op.infer(ins, params), params, tuple(given), ())


# Shapes and axes that take every way through the reductions: few and many outputs, short and long, several pieces.
REDUCTIONS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((70_001,), (0,)),
    ((3, 9000), (1,)),
    ((9000, 3), (0,)),
    ((700, 130), (0,)),
    ((130, 300), (1,)),
    ((11, 900, 7), (0, 2)),
    ((11, 30, 40), (1,)),
    ((5, 1, 300), (0, 1, 2)),
    ((300, 5), ()),
]


@pytest.mark.parametrize("name", ["sum", "max", "argmin"])
def test_larger_reductions(name: str) -> None:
    loader, rng = EmulationLoader(order=5), np.random.default_rng(0)
    calls = []
    for shape, axes in REDUCTIONS:
        for dtype in ("float32", "bfloat16") if name != "max" else ("float64", "int16"):
            x = (rng.standard_normal(shape) * 100).astype(DTYPES[dtype])
            turned = x.swapaxes(0, -1).copy().swapaxes(0, -1)
            for array in (x, turned) if x.ndim > 1 else (x,):
                if name != "argmin":
                    calls.append(call_of(name, [array], axes=axes, keepdims=False))
                elif len(axes) in (1, len(shape)):
                    axis = axes[0] if len(axes) == 1 else None
                    calls.append(call_of(name, [array], axis=axis, keepdims=True))
    loader.functions(kernels_of([work for one in calls if (work := one.work())]))
    pieces = set()
    for one in calls:
        (got,), x = emulated(loader, one), one.given[0]
        work = one.work()
        assert work is not None
        pieces.add(len(work.calls))
        if name == "argmin":
            want: Any = np.argmin(x, axis=one.params["axis"], keepdims=True)
            np.testing.assert_array_equal(got, want)
        elif name == "max":
            np.testing.assert_array_equal(got, np.max(x, axis=one.params["axes"]))
        else:
            want = np.sum(x.astype(np.float64), axis=one.params["axes"])
            size = np.sum(np.abs(x.astype(np.float64)), axis=one.params["axes"])
            last = {"float32": 2.0**-23, "bfloat16": 2.0**-8}[x.dtype.name]  # one rounding; additions are in float32
            assert np.all(np.abs(got.astype(np.float64) - want) <= last * np.abs(want) + 2.0**-22 * size), str(one)
    assert pieces == {1, 2}, "one launch, and two for what is cut into pieces"


def test_a_sum_has_the_same_bits_in_any_order_of_threads() -> None:
    x = np.random.default_rng(2).standard_normal((2, 40_000)).astype(np.float32)
    one = call_of("sum", [x], axes=(1,), keepdims=False)
    results = {emulated(EmulationLoader(order), one)[0].tobytes() for order in (0, 1, 2, 3)}
    assert len(results) == 1


def test_extremes_and_positions_prefer_nan() -> None:
    x = np.array([[1, np.nan, 5, np.nan], [-np.inf, 2, 2, 1]], np.float32)
    loader = EmulationLoader()
    for name, want in (("max", [np.nan, 2]), ("min", [np.nan, -np.inf])):
        np.testing.assert_array_equal(emulated(loader, call_of(name, [x], axes=(1,), keepdims=False))[0], want)
    for name, positions in (("argmax", [1, 1]), ("argmin", [1, 0])):
        np.testing.assert_array_equal(emulated(loader, call_of(name, [x], axis=1, keepdims=False))[0], positions)


def test_wide_sums_and_infinities_of_half_floats() -> None:
    x = np.full((3, 300), 300, np.float16)
    narrow = emulated(EmulationLoader(), call_of("sum", [x], axes=(1,), keepdims=False))[0]
    wide = emulated(EmulationLoader(), call_of("sum", [x], axes=(1,), keepdims=False, wide=True))[0]
    assert np.isinf(narrow).all()
    assert wide.tolist() == [90_000.0] * 3


def test_equal_indices_are_added_in_their_order() -> None:
    """More positions than a block has threads, most of them repeated: the bits of a loop over them."""
    rng = np.random.default_rng(4)
    indices = rng.integers(-9, 9, (1, 700))
    x, values = rng.standard_normal((2, 9, 3)), rng.standard_normal((2, 1, 700, 3))
    for dtype in (np.float32, np.float64):
        want, given = x.astype(dtype), values.astype(dtype)
        for position, index in enumerate(indices[0]):
            want[:, index] += given[:, 0, position]
        one = call_of("index_add", [x.astype(dtype), indices, given], axis=1, size=9)
        for order in (0, 3):
            assert same_bits(emulated(EmulationLoader(order), one)[0], want)
    again = call_of("put", [x, indices, values], axis=1, size=9)
    placed = x.copy()
    for position, index in enumerate(indices[0]):
        placed[:, index] = values[:, 0, position]
    assert same_bits(emulated(EmulationLoader(3), again)[0], placed)


def test_indices_out_of_range_touch_no_memory() -> None:
    x, bad = np.ones((3, 4), np.float32), np.array([[0, 3, -4, 2]])
    taken = emulated(EmulationLoader(), call_of("take", [x, bad[0]], axis=0))[0]
    assert np.isnan(taken).all(axis=1).tolist() == [False, True, True, False]
    added = emulated(EmulationLoader(), call_of("index_add", [x, bad, np.ones((1, 4, 4), np.float32)], axis=0, size=3))
    assert added[0][:, 0].tolist() == [2, 1, 2]


def test_what_is_written_over_its_input_is_not_copied_first() -> None:
    loader = EmulationLoader()
    x = np.zeros((4, 4), np.float32)
    one = call_of("set_slice", [x, np.ones((1, 2, 2), np.float32)], index=((1, 1, 2), (0, 2, 2)), shape=(4, 4))
    kernel = bind(loader, one.op, one.ins, one.outs, one.params)
    kernel.run(x, x, one.given[1], **one.params)
    assert loader.launches == 1
    assert x.sum() == 4
    kernel.run(np.empty_like(x), x, one.given[1], **one.params)
    assert loader.launches == 3


def test_long_running_sums() -> None:
    rng = np.random.default_rng(6)
    calls = [
        call_of("cumulative_sum", [rng.standard_normal(shape).astype(dtype)], axis=axis, reverse=r, include_initial=i)
        for shape, axis in (((1000,), 0), ((2, 700, 3), 1), ((5, 300), 0))
        for dtype in (np.float64, np.int32)
        for r, i in ((False, False), (True, False), (True, True))
    ]
    loader = EmulationLoader(order=9)
    loader.functions(kernels_of([work for one in calls if (work := one.work())]))
    for one in calls:
        x, axis = one.given[0], one.params["axis"]
        want = np.cumsum(np.flip(x, axis) if one.params["reverse"] else x, axis)
        if one.params["include_initial"]:
            want = np.concatenate([np.zeros_like(x.take([0], axis)), want], axis)
        want = np.flip(want, axis) if one.params["reverse"] else want
        np.testing.assert_allclose(emulated(loader, one)[0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_largest_of_windows_with_nans_padding_and_dilation(last: bool) -> None:
    rng = np.random.default_rng(8)
    x = np.round(rng.standard_normal((2, 3, 9, 8)).astype(np.float32))  # many ties
    x[rng.random(x.shape) < 0.05] = np.nan
    x[0, 0] = -np.inf
    if last:
        x = x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    for kernel, stride, padding, dilation in (((3, 2), (2, 1), (1, 1), (1, 2)), ((2, 2), (2, 2), (0, 0), (1, 1))):
        how = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        one = call_of("max_pool2d", [x], **how)
        largest, index = emulated(EmulationLoader(), one)
        cpu = CPU.bind(one.op, one.ins, one.outs, how)
        want = tuple(np.zeros(spec.shape, spec.dtype) for spec in one.outs)
        given = np.ascontiguousarray(x) if any(cpu.contiguous) else x
        with CPU.running(0):
            cpu.run(want, given, scratch=CPU.allocate(0, cpu.scratch_bytes), **how)
        np.testing.assert_array_equal(largest, want[0])
        np.testing.assert_array_equal(index, want[1])
        (picked,) = emulated(EmulationLoader(), call_of("max_pool2d_pick", [x, index]))
        np.testing.assert_array_equal(picked, want[0])


def test_grids_of_huge_arrays_stay_within_the_limits() -> None:
    """On shapes alone: a grid has at most 2**31 - 1 blocks along x and 65535 along y and z."""
    for shape, axes in (
        ((2**31,), (0,)),
        ((2**28, 40), (0,)),
        ((40, 2**28), (0,)),
        ((2**27, 3), (1,)),
        ((2**33, 1), ()),
    ):
        out = REGISTRY["sum"].infer([Spec(shape)], {"axes": axes, "keepdims": False})
        for one in work_of(REGISTRY["sum"], [Spec(shape)], out, {"axes": axes, "keepdims": False}).calls:
            assert one.blocks[0] < 2**31
            assert max(one.blocks[1:]) <= 65535
            counts = {param.dtype for param in one.kernel.params if param.name == "count"}
            assert counts == {DTYPES["int32" if math.prod(shape) < 2**30 else "int64"]}
