"""Convolutions, the gradient of max pooling and integer products on CUDA, emulated, against the CPU and NumPy."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

import brim
from brim.errors import DeviceError
from brim.op import REGISTRY
from brim.ops.conv import output_size
from brim.spec import DTYPES, Spec
from brim_cuda.emulation import EmulationError, EmulationLoader, Guarded
from brim_cuda.kernels import conv, grouped
from brim_cuda.kernels.int_matmul import integer_matmul
from brim_cuda.launch import Call, Product
from brim_cuda.nvrtc import compile_cubin
from brim_cuda.registry import Work, bind, work_of
from brim_cuda.source import translation_unit
from brim_cuda.steps import bound
from cuda_kernels import MAX_REGISTERS
from emulating import WHY_NOT, Recorded, emulated, kernels_of, laid_out, recorded, recorded_in_networks, same_bits
from test_cuda_nvrtc import MAX_SPILL_BYTES, needs_nvrtc

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

Array = np.ndarray[Any, Any]
Layout = tuple[int, ...] | None
CPU = brim.device("cpu").backend
CONVS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")
ORDERS = pytest.mark.parametrize("order", [0, 1, 17], ids=["forward", "backward", "shuffled"])
# Relative to the sum of the absolute terms: float32 additions, and the rounding of columns and results.
CLOSE = {"float64": 2.0**-49, "float32": 2.0**-20, "float16": 2.0**-9, "bfloat16": 2.0**-7}

CASES = {
    # N, C, O, (H, W), kernel, stride, padding, dilation, groups
    "3x3": (3, 4, 6, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided, dilated": (2, 4, 6, (9, 8), (3, 2), (2, 1), (0, 1), (1, 2), 1),
    "groups": (3, 6, 4, (6, 5), (3, 3), (1, 2), (1, 0), (1, 1), 2),
    "depthwise": (2, 6, 6, (5, 6), (3, 3), (1, 1), (1, 1), (2, 1), 6),
    "1x1": (3, 4, 6, (5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, groups": (2, 4, 6, (5, 4), (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "1x1, strided": (2, 4, 6, (5, 5), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "wide padding": (2, 3, 4, (3, 4), (2, 3), (1, 2), (3, 2), (1, 1), 1),
    "many elements": (3, 20, 8, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "whole pieces": (3, 16, 8, (5, 6), (3, 2), (1, 1), (1, 0), (1, 2), 1),
    "whole pieces, strided": (2, 16, 32, (5, 6), (3, 3), (2, 1), (1, 1), (1, 1), 1),
    "whole pieces, groups": (2, 32, 16, (4, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "whole pieces, 1x1, strided": (2, 8, 16, (5, 4), (1, 1), (2, 1), (0, 0), (1, 1), 1),
    "depthwise, whole pieces": (2, 8, 8, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "depthwise, strided": (2, 8, 8, (9, 7), (3, 3), (2, 2), (1, 1), (1, 1), 8),
    "depthwise, 5x5": (2, 12, 12, (6, 9), (5, 5), (1, 1), (2, 2), (1, 1), 12),
    "depthwise, 7x7": (1, 4, 4, (8, 7), (7, 7), (1, 1), (3, 2), (1, 1), 4),
    "depthwise, multiplied": (2, 4, 12, (6, 5), (3, 3), (2, 1), (1, 0), (1, 1), 4),
    "small groups": (2, 8, 4, (6, 5), (3, 2), (1, 1), (1, 1), (2, 1), 4),
    "one element": (1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "no images": (0, 4, 6, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no outputs": (2, 4, 0, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no channels": (2, 0, 4, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of channels-last images."""
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c)


def spec_of(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> Spec:
    return Spec(shape, dtype, last(shape) if channels_last else None)


def on_the_cpu(name: str, given: list[Array], out: Spec, params: dict[str, Any], dtype: Any) -> Array:
    """An op's CPU kernel on row-major arrays of a dtype."""
    arrays = [np.array(x, dtype, order="C") for x in given]
    made = np.empty(out.shape, dtype)
    kernel = CPU.bind(REGISTRY[name], [Spec(x.shape, x.dtype) for x in arrays], [Spec(out.shape, made.dtype)], params)
    scratch = np.empty(kernel.scratch_bytes, np.uint8)
    with CPU.running(0):
        kernel.run(made, *arrays, scratch=scratch, **params)
    return made


def calls_of(case: str, dtype: str, x_last: bool, y_last: bool, draw: Any) -> list[Recorded]:
    """A convolution and its gradients on numbers that ``draw`` makes of a shape; what they write is row-major."""
    n, c, o, size, kernel, stride, padding, dilation, groups = CASES[case]
    kind = DTYPES[dtype]
    x = spec_of((n, c, *size), kind, x_last)
    w = Spec((o, c // groups, *kernel), kind)
    y = spec_of((n, o, *output_size(size, kernel, stride, padding, dilation)), kind, y_last)
    arrays = [draw(spec.shape).astype(kind) for spec in (x, w, y)]
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    made = []
    for name, (a, b, out), more in (
        ("conv2d", (0, 1, 2), {}),
        ("conv2d_grad_input", (2, 1, 0), {"size": size}),
        ("conv2d_grad_weight", (2, 0, 1), {"kernel": kernel}),
    ):
        specs, given, params = (x, w, y), (arrays[a], arrays[b]), {**how, **more}
        want = on_the_cpu(name, list(given), specs[out], params, kind)
        made.append(Recorded(REGISTRY[name], (specs[a], specs[b]), (specs[out],), params, given, (want,)))
    return made


def small_integers(seed: int) -> Any:
    """Their sums and products are exact in every dtype, so that results are equal to the bit."""
    rng = np.random.default_rng(seed)
    return lambda shape: rng.integers(-2, 3, shape)


def load(loader: EmulationLoader, calls: list[Recorded]) -> list[Work]:
    """Compile what the calls need, together."""
    works = [work for one in calls if (work := one.work()) is not None]
    assert len(works) == len(calls)
    loader.functions(kernels_of(works))
    return works


def assert_close(one: Recorded, got: Array) -> None:
    """Within the rounding of a sum over its terms."""
    out, dtype = one.outs[0], one.outs[0].dtype
    want = on_the_cpu(one.op.name, list(one.given), out, one.params, np.float64)
    terms = [np.abs(x.astype(np.float64)) for x in one.given]
    size = on_the_cpu(one.op.name, terms, out, one.params, np.float64)
    away = np.abs(got.astype(np.float64) - want)
    assert got.dtype == dtype
    assert np.all(away <= CLOSE[dtype.name] * size), str(one)


@ORDERS
def test_rows_of_the_table_and_networks(order: int) -> None:
    calls = [one for one in recorded() if one.op.name in CONVS]
    if order == 0:
        calls += [one for one in recorded_in_networks() if one.op.name in CONVS]
    loader = EmulationLoader(order)
    load(loader, calls)
    assert {(one.op.name, one.outs[0].dtype.name) for one in calls} >= set(itertools.product(CONVS, CLOSE))
    for one in calls:
        (got,) = emulated(loader, one)
        assert_close(one, got)
        assert same_bits(emulated(loader, one, prepared=True)[0], got)
        with pytest.raises(AssertionError):
            assert_close(one, got + got.dtype.type(1 + np.max(np.abs(got), initial=0)))


@pytest.mark.parametrize(
    ("order", "dtype"),
    [(0, "float32"), (1, "float32"), (17, "bfloat16")],
    ids=["forward float32", "backward float32", "shuffled bfloat16"],
)
def test_both_orders_of_channels_and_any_size_of_chunks(
    order: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Recorded] = []
    for n, (case, x_last, y_last) in enumerate(itertools.product(CASES, (False, True), (False, True))):
        calls += calls_of(case, dtype, x_last, y_last, small_integers(n))
    loader = EmulationLoader(order)
    chunks = set()
    for columns_bytes in (1, 64 << 20):
        monkeypatch.setattr(conv, "COLUMNS_BYTES", columns_bytes)
        for one, work in zip(calls, load(loader, calls), strict=True):
            (got,) = emulated(loader, one)
            assert same_bits(got, one.wrote[0]), f"{one} with columns of at most {columns_bytes} bytes"
            chunks.add(sum(isinstance(call, Product) for call in work.calls))
    assert chunks >= {0, 1, 2, 3}


@pytest.mark.parametrize("columns_bytes", [1, 3000, 64 << 20])
def test_sums_of_half_width_weights_are_in_float32(columns_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images: added up in float16, 2049 would have stayed 2048."""
    monkeypatch.setattr(conv, "COLUMNS_BYTES", columns_bytes)
    g, x = np.ones((12, 1, 16, 16), np.float16), np.ones((12, 1, 16, 16), np.float16)
    x[:, :, ::3] = -0.5
    x[0] = 9
    how: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "kernel": (3, 3)}
    specs = (Spec(g.shape, g.dtype), Spec(x.shape, x.dtype))
    op = REGISTRY["conv2d_grad_weight"]
    for layouts in ((None, None), (last(g.shape), last(x.shape))):
        ins = tuple(Spec(spec.shape, spec.dtype, layout) for spec, layout in zip(specs, layouts, strict=True))
        one = Recorded(op, ins, op.infer(specs, how), how, (g, x), ())
        (got,) = emulated(EmulationLoader(), one)
        want = on_the_cpu(op.name, [g, x], one.outs[0], how, np.float64)
        assert np.abs(want).max() > 2048
        assert same_bits(got, want.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_any_strides(dtype: str) -> None:
    """Turned, spread and reversed arrays, as inputs and as outputs; inputs of one element that is read everywhere."""
    loader, checked = EmulationLoader(order=3), 0
    for one in calls_of("groups", dtype, False, False, small_integers(5)):
        shapes = [spec.shape for spec in (*one.ins, *one.outs)]
        for which, shape in enumerate(shapes):
            a, b, c, d = shape
            layouts: list[Layout] = [
                (1, a, a * b, a * b * c),
                (b * c * d * 2, c * d * 2, d * 2, 2),
                (b * c * d, c * d, -d, -1),
            ]
            for layout in layouts:
                chosen = [Spec(s, DTYPES[dtype], layout if n == which else None) for n, s in enumerate(shapes)]
                other = Recorded(one.op, tuple(chosen[:2]), (chosen[2],), one.params, one.given, one.wrote)
                assert same_bits(emulated(loader, other)[0], one.wrote[0]), str(other)
                checked += 1
        for which in (0, 1):
            given = [np.full_like(x, 2) if n == which else x for n, x in enumerate(one.given)]
            want = on_the_cpu(one.op.name, given, one.outs[0], one.params, DTYPES[dtype])
            chosen = [Spec(spec.shape, spec.dtype, (0,) * 4 if n == which else None) for n, spec in enumerate(one.ins)]
            other = Recorded(one.op, tuple(chosen), one.outs, one.params, tuple(given), (want,))
            assert same_bits(emulated(loader, other)[0], want), str(other)
            checked += 1
    assert checked == 33


@ORDERS
def test_gradients_of_depthwise_weights_in_pieces(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_LEAST_POSITIONS", 1)
    loader, pieces = EmulationLoader(order), set()
    monkeypatch.setitem(CASES, "large", (3, 8, 8, (20, 21), (3, 3), (1, 1), (1, 1), (1, 1), 8))
    for dtype, order_of_channels in itertools.product(("float32", "float16"), (False, True)):
        one = calls_of("large", dtype, order_of_channels, order_of_channels, small_integers(3))[2]
        work = one.work()
        assert work is not None
        assert [type(call) for call in work.calls] == [Call, Call]
        (got,) = emulated(loader, one)
        assert same_bits(got, one.wrote[0])
        pieces.add(work.calls[0].blocks[1])  # type: ignore[union-attr]
    assert min(pieces) > 1


def test_which_groups_are_small() -> None:
    """Few channels in and out: own kernels, whose launches do not depend on the number of images."""
    how: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    for groups, channels, products in ((1, 8, True), (8, 8, False), (2, 16, False), (2, 32, True)):
        x, w = Spec((4, channels, 6, 6)), Spec((channels, channels // groups, 3, 3))
        for name, ins, out, more in (
            ("conv2d", (x, w), x, {}),
            ("conv2d_grad_input", (x, w), x, {"size": (6, 6)}),
            ("conv2d_grad_weight", (x, x), w, {"kernel": (3, 3)}),
        ):
            calls = work_of(REGISTRY[name], ins, [out], {**how, **more, "groups": groups}).calls
            assert any(isinstance(call, Product) for call in calls) == products
            if not products:
                assert len(calls) == (2 if name == "conv2d_grad_weight" else 1)


def test_pieces_of_images_that_do_not_start_at_one() -> None:
    """Channels-last images one element further on: read and written element by element."""
    for case, dtype in itertools.product(("whole pieces", "depthwise, whole pieces"), ("float32", "bfloat16")):
        for one in calls_of(case, dtype, True, True, small_integers(7)):
            loader = EmulationLoader()
            kernel = bind(loader, one.op, one.ins, one.outs, one.params)

            def shifted(array: Array, spec: Spec) -> Array:
                memory = np.zeros(spec.size + 65, spec.dtype)
                start = -memory.ctypes.data % 64 // spec.dtype.itemsize + 1
                view = np.lib.stride_tricks.as_strided(
                    memory[start:], spec.shape, [step * spec.dtype.itemsize for step in spec.strides]
                )
                view[...] = array
                return view

            given = [shifted(array, spec) for array, spec in zip(one.given, one.ins, strict=True)]
            made = shifted(np.ones(one.outs[0].shape, one.outs[0].dtype), one.outs[0])
            scratch = np.zeros(kernel.scratch_bytes + 256, np.uint8)
            start = -scratch.ctypes.data % 256
            kernel.run(made, *given, scratch=scratch[start : start + kernel.scratch_bytes], **one.params)
            assert same_bits(made, one.wrote[0]), str(one)


def test_random_numbers_have_the_same_bits_in_every_order_of_threads() -> None:
    rng = np.random.default_rng(0)
    for x_last in (False, True):
        for dtype in ("float32", "float16"):
            for one in calls_of("many elements", dtype, x_last, x_last, rng.standard_normal):
                results = [emulated(EmulationLoader(order), one)[0] for order in (0, 1, 2)]
                assert_close(one, results[0])
                assert all(same_bits(results[0], other) for other in results[1:])


def test_a_plan_depends_on_specs_alone() -> None:
    for one in calls_of("3x3", "float16", True, True, small_integers(0)):
        first, second = one.work(), one.work()
        assert first is not None
        assert second is not None
        assert [repr(call) for call in first.calls] == [repr(call) for call in second.calls]
        assert first.scratch_bytes == second.scratch_bytes > 0


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_what_no_row_of_the_table_leads_to_compiles(arch: str) -> None:
    """Channels-last images, larger windows, depthwise ones, positions of 64 bits, products of more integer dtypes."""
    how: dict[str, Any] = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    works = []
    for n, kind, size in ((2, DTYPES["float32"], 5), (2**24, DTYPES["bfloat16"], 3)):
        shape, weight = (n, 32, 16, 16), (16, 32, size, size)
        windows = (n, 16, *output_size(shape[2:], weight[2:], (2, 2), (1, 1), (1, 1)))
        for channels_last in (False, True):
            x, y = spec_of(shape, kind, channels_last), spec_of(windows, kind, channels_last)
            works.append(work_of(REGISTRY["conv2d"], (x, Spec(weight, kind)), [y], how))
            works.append(
                work_of(REGISTRY["conv2d_grad_input"], (y, Spec(weight, kind)), [x], {**how, "size": shape[2:]})
            )
    for n, kind, size in ((2, DTYPES["float32"], 3), (2**24, DTYPES["bfloat16"], 7), (2, DTYPES["float64"], 5)):
        around = (size // 2, size // 2)
        x = spec_of((n, 64, 16, 16), kind, True)
        y = spec_of((n, 64, 8, 8), kind, True)
        w, small = Spec((64, 1, size, size), kind), {**how, "padding": around, "groups": 64}
        works.append(work_of(REGISTRY["conv2d"], (x, w), [y], small))
        works.append(work_of(REGISTRY["conv2d_grad_input"], (y, w), [x], {**small, "size": (16, 16)}))
        works.append(work_of(REGISTRY["conv2d_grad_weight"], (y, x), [w], {**small, "kernel": (size, size)}))
    few = ("bool", "int8", "uint16", "int64")
    for dtype in few:
        a = Spec((2, 5, 6), DTYPES[dtype]), Spec((6, 5), DTYPES[dtype])
        works.append(integer_matmul(a, [Spec((2, 5, 5), DTYPES[dtype])]))
    kernels = kernels_of(works)
    assert {param.dtype.name for kernel in kernels for param in kernel.params if param.name == "n"} == {
        "int32",
        "int64",
    }
    done = compile_cubin(translation_unit(kernels), arch, ["--ptxas-options=-v"])
    registers = list(map(int, re.findall(r"Used (\d+) registers", done.log)))
    assert len(registers) == len(kernels) == 11 + 12 + len(few)
    assert max(registers) <= MAX_REGISTERS
    assert max(map(int, re.findall(r"(\d+) bytes spill stores", done.log))) <= MAX_SPILL_BYTES


def test_dtypes_without_products_are_refused() -> None:
    how: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    x, w, y = (Spec(shape, DTYPES["int32"]) for shape in ((1, 1, 3, 3), (1, 1, 2, 2), (1, 1, 2, 2)))
    with pytest.raises(KeyError, match="conv2d in int32"):
        bind(EmulationLoader(), REGISTRY["conv2d"], [x, w], [y], how)


def test_smaller_arrays_than_planned_are_caught() -> None:
    """What the kernels and the products are told decides, and the memory that they get is guarded."""
    how: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}

    def run(kernel: int, *, x: int = 600, w: int = 600, y: int = 600) -> None:
        """A 2x2 or 1x1 convolution of two images of 3x5x10, on so many elements of guarded memory."""
        specs = Spec((2, 3, 5, 10)), Spec((2, 3, kernel, kernel)), Spec((2, 2, 6 - kernel, 11 - kernel))
        loader = EmulationLoader()
        made = bind(loader, REGISTRY["conv2d"], specs[:2], specs[2:], how)
        arrays = [Guarded(np.ones(n, np.float32)) for n in (x, w, y)]
        scratch = Guarded(np.zeros(made.scratch_bytes, np.uint8))
        loader.library.memory = [(m.bounds[0], m.bounds[1] - m.bounds[0]) for m in (*arrays, scratch)]
        made.run(arrays[2].array, arrays[0].array, arrays[1].array, scratch=scratch.array, **how)
        for memory in (*arrays, scratch):
            memory.check()

    for kernel in (1, 2):
        run(kernel, x=300, w=6 * kernel * kernel, y=4 * (6 - kernel) * (11 - kernel))
        for less in ({"w": 6 * kernel * kernel - 1}, {"y": 10}):
            with pytest.raises(DeviceError, match="outside of the given memory"):
                run(kernel, **less)
    with pytest.raises(EmulationError, match="bytes from the start of x"):
        run(2, x=280)
    with pytest.raises(DeviceError, match="outside of the given memory"):
        run(1, x=299)


def test_folding_stays_within_the_image() -> None:
    (_, one, _) = calls_of("3x3", "float32", False, False, small_integers(1))
    loader = EmulationLoader()
    kernel = bind(loader, one.op, one.ins, one.outs, one.params)
    small = Guarded(np.zeros(20, np.float32))
    with pytest.raises(EmulationError, match="bytes from the start of x"):
        kernel.run(small.array, *one.given, scratch=np.zeros(kernel.scratch_bytes, np.uint8), **one.params)


# ---------------------------------------------------------------------------------------------------- max_pool2d_grad

POOLS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "2x2": ((8, 6), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}),
    "overlapping": ((9, 8), {"kernel": (3, 3), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 1)}),
    "dilated": ((9, 8), {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 2)}),
    "gaps between windows": ((9, 8), {"kernel": (1, 2), "stride": (3, 4), "padding": (0, 0), "dilation": (1, 1)}),
    "rows that step over the image": (
        (2, 9),
        {"kernel": (2, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (3, 1)},
    ),
    "columns that do": ((9, 3), {"kernel": (3, 2), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 4)}),
}


@ORDERS
def test_gradient_of_max_pooling(order: int) -> None:
    rng, loader = np.random.default_rng(order), EmulationLoader(order)
    calls, some_empty = [], False
    for (size, how), x_last, dtype in itertools.product(POOLS.values(), (False, True), ("float32", "bfloat16")):
        kind = DTYPES[dtype]
        x = np.round(rng.standard_normal((2, 5, *size))).astype(np.float32)  # many ties
        x[0, 0, 0, 0], x[1, 1] = np.nan, -np.inf
        out, places = REGISTRY["max_pool2d"].infer([Spec(x.shape)], how)
        index = np.empty(places.shape, places.dtype)
        pooled = (np.empty(out.shape, np.float32), index)
        kernel = CPU.bind(REGISTRY["max_pool2d"], [Spec(x.shape)], [out, places], how)
        with CPU.running(0):
            kernel.run(pooled, x, scratch=np.empty(kernel.scratch_bytes, np.uint8), **how)
        some_empty |= bool((np.isneginf(pooled[0]) & (index == 0))[0, 2:].any())
        g, params = rng.standard_normal(out.shape).astype(kind), {**how, "size": size}
        flat = np.zeros((2, 5, size[0] * size[1]), np.float32)
        for n, c in np.ndindex(2, 5):
            np.add.at(flat[n, c], index[n, c].ravel(), g[n, c].ravel().astype(np.float32))
        want = flat.reshape(x.shape).astype(kind)
        ins = (spec_of(g.shape, kind, x_last), spec_of(index.shape, index.dtype, x_last))
        outs = (spec_of(x.shape, kind, x_last),)
        calls.append(Recorded(REGISTRY["max_pool2d_grad"], ins, outs, params, (g, index), (want,)))
    load(loader, calls)
    assert some_empty, "a window with nothing inside gives its value to position 0"
    for one in calls:
        assert same_bits(emulated(loader, one)[0], one.wrote[0]), str(one)


# ---------------------------------------------------------------------------------------------------- integer products

INTEGERS = ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
SHAPES = {
    "matrices": ((5, 7), (7, 3)),
    "several tiles": ((70, 45), (45, 66)),
    "rows and columns": ((1, 100), (100, 1)),
    "batched": ((3, 4, 33, 5), (3, 4, 5, 34)),
    "broadcast": ((4, 1, 6, 5), (3, 5, 2)),
    "one for all": ((2, 3, 6, 5), (5, 2)),
    "nothing to add up": ((3, 0), (0, 4)),
    "nothing": ((0, 3), (3, 4)),
    "empty batch": ((0, 2, 3), (3, 4)),
}


def product_of(loader: EmulationLoader, a: Array, b: Array, specs: tuple[Spec, Spec], out: Spec) -> Array:
    """``integer_matmul`` on guarded arrays with these layouts."""
    work = integer_matmul(specs, [out])
    kernel = bound(loader, work.calls, scratch_bytes=work.scratch_bytes, contiguous=(False, False))
    ins = [Guarded(laid_out(x, spec)) for x, spec in zip((a, b), specs, strict=True)]
    made = Guarded(laid_out(np.ones(out.shape, out.dtype), out))
    kernel.run(made.array, *(x.array for x in ins))
    for memory in (*ins, made):
        memory.check()
    return made.array


@ORDERS
@pytest.mark.parametrize("dtype", INTEGERS)
def test_products_of_integers_are_numpys(dtype: str, order: int) -> None:
    loader, kind = EmulationLoader(order), DTYPES[dtype]
    rng = np.random.default_rng(order)
    specs, arrays = [], []
    for left, right in SHAPES.values():
        if kind.kind == "b":
            a, b = (rng.random(shape) < 0.2 for shape in (left, right))
        else:
            info = np.iinfo(kind)
            a, b = (rng.integers(info.min, info.max, shape, kind, endpoint=True) for shape in (left, right))
        arrays.append((a, b))
        specs.append(((Spec(left, kind), Spec(right, kind)), Spec((a @ b).shape, kind)))
    loader.functions(kernels_of([integer_matmul(ins, [out]) for ins, out in specs]))
    for (a, b), (ins, out) in zip(arrays, specs, strict=True):
        assert same_bits(product_of(loader, a, b, ins, out), a @ b), f"{ins}"


def test_products_of_integers_in_any_strides() -> None:
    loader, kind = EmulationLoader(order=4), DTYPES["int32"]
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (3, 40, 34), np.int32), rng.integers(-9, 9, (3, 34, 37), np.int32)
    shapes = (a.shape, b.shape, (a @ b).shape)
    for which in range(3):
        n, rows, columns = shapes[which]
        layouts: list[Layout] = [
            (rows * columns, 1, rows),
            (1, n, rows * n),
            (rows * columns * 2, columns * 2, 2),
            (-rows * columns, -columns, -1),
        ]
        if which < 2:
            layouts.append((0, columns, 1))
        for layout in layouts:
            x, y = ((m[:1] + np.zeros_like(m) if layout and layout[0] == 0 else m) for m in (a, b))
            specs = [Spec(shape, kind, layout if k == which else None) for k, shape in enumerate(shapes)]
            got = product_of(loader, x, y, (specs[0], specs[1]), specs[2])
            np.testing.assert_array_equal(got, x @ y)


def test_integer_products_say_what_they_are_not_for_and_stay_within_grids() -> None:
    with pytest.raises(KeyError, match="float32"):
        integer_matmul([Spec((2, 2)), Spec((2, 2))], [Spec((2, 2))])
    kind = DTYPES["int8"]
    huge = [Spec((2**20, 64, 64), kind), Spec((64, 64), kind)]
    (call,) = integer_matmul(huge, huge[:1]).calls
    assert isinstance(call, Call)
    assert call.blocks[0] < 2**31
    assert call.shared_bytes <= 48 << 10
    assert {param.dtype for param in call.kernel.params if param.name == "tiles"} == {DTYPES["int64"]}


def test_smaller_matrices_than_planned_are_caught() -> None:
    loader, kind = EmulationLoader(), DTYPES["int32"]
    work = integer_matmul([Spec((33, 40), kind), Spec((40, 5), kind)], [Spec((33, 5), kind)])
    kernel = bound(loader, work.calls, contiguous=(False, False))
    arrays = [Guarded(np.ones(n, np.int32)) for n in (33 * 40, 40 * 5, 33 * 5)]
    kernel.run(arrays[2].array, arrays[0].array, arrays[1].array)
    assert (arrays[2].array == 40).all()
    small = Guarded(np.ones(8, np.int32))
    for name, out, a, b in (("a", 2, small, 1), ("b", 2, 0, small), ("y", small, 0, 1)):
        out_array, *ins = (m.array if isinstance(m, Guarded) else arrays[m].array for m in (out, a, b))
        with pytest.raises(EmulationError, match=f"bytes from the start of {name}"):
            kernel.run(out_array, *ins)
