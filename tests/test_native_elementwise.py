"""The native interpreter against NumPy's kernels: dtypes, layouts, sizes, shared memory, random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import brim
from brim.backend import ScalarCell
from brim.check.table import Row, all_rows
from brim.expr import FormulaBuilder, FusedFormula
from brim.op import REGISTRY, formula_of
from brim.random import philox
from brim.spec import DTYPES, Spec
from brim_cpu import fused, native
from brim_cpu.device import CpuBackend
from brim_cpu.overlay import elementwise, program

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

Array = np.ndarray[Any, Any]
CPU = CpuBackend()
F32, F64, I32, BOOL = (DTYPES[name] for name in ("float32", "float64", "int32", "bool"))


def spec_of(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x.value if isinstance(x, ScalarCell) else x
    strides = tuple(s // x.itemsize for s in x.strides)
    return Spec(x.shape, x.dtype, None if x.flags.c_contiguous else strides)


def evaluate(bind: Callable[..., Any], formula: FusedFormula, ins: Sequence[Any], outs: Sequence[Array]) -> None:
    kernel = bind(formula, [spec_of(x) for x in ins], [spec_of(x) for x in outs])
    assert kernel is not None
    scratch = CPU.allocate(0, kernel.scratch_bytes)
    with CPU.running(0):
        kernel.run(outs[0] if len(outs) == 1 else tuple(outs), *ins, scratch=scratch)


def both(formula: FusedFormula, ins: Sequence[Any], outs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """What the native interpreter and NumPy's evaluator give; the inputs stay as they are."""
    before = [x.copy() if isinstance(x, np.ndarray) else x for x in ins]
    found = [np.empty_like(x) for x in outs]
    evaluate(elementwise.bind_formula, formula, ins, found)
    for x, kept in zip(ins, before, strict=True):
        if isinstance(x, np.ndarray):
            assert x.tobytes() == kept.tobytes()
    expected = [np.empty_like(x) for x in outs]
    evaluate(fused.bind_fused, formula, ins, expected)
    return found, expected


def assert_same(found: Sequence[Array], expected: Sequence[Array]) -> None:
    """Equal values; NaN is NaN. Zeros may differ in sign where NumPy itself is not of one mind (maximum)."""
    for one, other in zip(found, expected, strict=True):
        if one.dtype.itemsize == 2:
            one, other = one.astype(F32), other.astype(F32)
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def example() -> FusedFormula:
    """(tanh(x) * y + 2, x < y) of two float32 inputs."""
    builder = FormulaBuilder([F32, F32])
    product = builder.call("mul", [builder.call("tanh", [("in", 0)], F32), ("in", 1)], F32)
    total = builder.call("add", [product, ("const", 2.0)], F32)
    return builder.formula([total[1], builder.call("lt", [("in", 0), ("in", 1)], F32)[1]])


# ---- every elementwise op of the table

ROWS = [row for row in all_rows() if row.op is not None and row.op.kind == "elementwise"]
CASES = [(row, dtype) for row in ROWS for dtype in row.dtypes]


def as_group(row: Row, dtype: str) -> tuple[FusedFormula, list[Any], Array]:
    """An op's formula, inputs, and an output."""
    op, ins = row.op, row.arrays(dtype)
    assert op is not None
    specs = [spec_of(x) for x in ins]
    (out,) = op.infer(specs, row.params)
    return formula_of(op, specs, out, row.params), ins, np.empty(out.shape, out.dtype)


@pytest.mark.parametrize(("row", "dtype"), CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
def test_ops_give_numpys_values(row: Row, dtype: str) -> None:
    formula, ins, out = as_group(row, dtype)
    if elementwise.bind_formula(formula, [spec_of(x) for x in ins], [spec_of(out)]) is not None:
        assert_same(*both(formula, ins, [out]))


def test_most_ops_of_float32_are_native() -> None:
    numpys = set()
    for row in ROWS:
        if "float32" in row.dtypes:
            formula, ins, out = as_group(row, "float32")
            if elementwise.bind_formula(formula, [spec_of(x) for x in ins], [spec_of(out)]) is None:
                numpys.add(row.op.name if row.op is not None else "")
    assert numpys <= {"floor_divide", "remainder", "nextafter", "astype"}


# ---- shapes and layouts


@pytest.mark.parametrize("size", [0, 1, 2, 15, 17, 1023, 1024, 1025, 16_385, 70_001])
def test_sizes(size: int) -> None:
    rng = np.random.default_rng(size)
    ins = [rng.standard_normal(size).astype(F32) for _ in range(2)]
    assert_same(*both(example(), ins, [np.empty(size, F32), np.empty(size, BOOL)]))


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "rows": lambda x: x,
    "columns": lambda x: np.asfortranarray(x),
    "every second": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "a row": lambda x: np.broadcast_to(x[:1], x.shape)[:1],
    "a column": lambda x: x[:, :1].copy(),
    "one number": lambda x: x[:1, :1].copy(),
    "repeated row": lambda x: np.broadcast_to(x[0], x.shape),
    "unaligned": lambda x: _unaligned(x),
}


def _unaligned(x: Array) -> Array:
    """Aligned to its elements, and to nothing more."""
    out = np.zeros(x.size + 1, x.dtype)[1:].reshape(x.shape)
    out[...] = x
    return out


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("shape", [(300, 7), (7, 3000), (129, 130)], ids=str)
def test_layouts(first: str, second: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, y = (LAYOUTS[name](rng.standard_normal(shape).astype(F32)) for name in (first, second))
    whole = np.broadcast_shapes(x.shape, y.shape)
    assert_same(*both(example(), [x, y], [np.empty(whole, F32), np.empty(whole, BOOL)]))


@pytest.mark.parametrize("first", ["rows", "columns", "every second", "backwards", "unaligned"])
def test_outputs_of_any_layout(first: str) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((130, 70)).astype(F32), rng.standard_normal((70,)).astype(F32)
    out, flags = LAYOUTS[first](np.zeros((130, 70), F32)), np.empty((130, 70), BOOL)
    evaluate(elementwise.bind_formula, example(), [x, y], [out, flags])
    expected = [np.empty((130, 70), F32), np.empty((130, 70), BOOL)]
    evaluate(fused.bind_fused, example(), [x, y], expected)
    assert_same([out, flags], expected)


def test_many_axes_that_cannot_be_merged() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 4, 2, 5, 3, 2)).astype(F32).transpose(5, 1, 3, 0, 2, 4)
    y = rng.standard_normal((1, 4, 1, 3, 1, 3)).astype(F32)
    assert_same(*both(example(), [x, y], [np.empty(x.shape, F32), np.empty(x.shape, BOOL)]))


def test_more_axes_than_the_interpreter_has() -> None:
    x = np.random.default_rng(2).standard_normal((2,) * 10).astype(F32)
    assert elementwise.bind_formula(example(), [spec_of(x)] * 2, [spec_of(x), Spec(x.shape, BOOL)]) is None
    assert (brim.tanh(brim.asarray(x)).numpy().reshape(-1) == brim.tanh(brim.asarray(x.reshape(-1))).numpy()).all()


def test_large_results_are_written_past_the_caches() -> None:
    size = program.STREAM_BYTES // 4 + 777
    memory = np.empty(size + 3, F32)
    x, y = np.random.default_rng(3).standard_normal((2, size)).astype(F32)
    for start in range(3):  # the processor's stores want aligned places
        out, flags = memory[start : start + size], np.empty(size, BOOL)
        evaluate(elementwise.bind_formula, example(), [x, y], [out, flags])
        assert (flags == (x < y)).all()
        expected = np.empty(1000, F32)
        for at in (0, size // 2, size - 1000):
            evaluate(
                elementwise.bind_formula, example(), [x[at : at + 1000], y[at : at + 1000]], [expected, flags[:1000]]
            )
            assert (out[at : at + 1000] == expected).all()


# ---- memory that is shared


def test_an_output_may_be_an_input() -> None:
    """In any pairing, also where an input is read after an output in its place could have been written."""
    builder = FormulaBuilder([F32, F32])
    total = builder.call("add", [("in", 0), ("in", 1)], F32)
    apart = builder.call("sub", [("in", 0), ("in", 1)], F32)
    formula = builder.formula([total[1], builder.call("mul", [apart, total], F32)[1]])
    for n in (10, 5000):
        x, y = np.random.default_rng(4).standard_normal((2, n)).astype(F32)
        wanted = [x + y, (x - y) * (x + y)]
        for first, second in ((0, 1), (1, 0), (0, None), (None, 0), (1, None), (None, 1)):
            ins = [x.copy(), y.copy()]
            outs = [np.empty(n, F32) if which is None else ins[which] for which in (first, second)]
            evaluate(elementwise.bind_formula, formula, ins, outs)
            assert_same(outs, wanted)


# ---- numbers


def test_scalars_are_read_at_each_run() -> None:
    builder = FormulaBuilder([F32, None])
    formula = builder.formula([builder.call("mul", [("in", 0), ("in", 1)], F32)[1]])
    x, out, cell = np.arange(5, dtype=F32), np.empty(5, F32), ScalarCell(2.0)
    kernel = elementwise.bind_formula(formula, [spec_of(x), 2.0], [spec_of(out)])
    assert kernel is not None
    assert kernel.prepare is not None
    (call,) = kernel.prepare(out, x, cell) or ()
    for value in (2.0, -0.5, math.inf):
        cell.value = value
        out[...] = 99
        with np.errstate(all="ignore"):
            call()
            assert np.array_equal(out, x * F32.type(value), equal_nan=True)


def test_an_integer_that_does_not_fit_is_refused() -> None:
    builder = FormulaBuilder([I32, None])
    formula = builder.formula([builder.call("add", [("in", 0), ("in", 1)], I32)[1]])
    with pytest.raises(OverflowError):
        evaluate(elementwise.bind_formula, formula, [np.zeros(3, I32), 2**40], [np.empty(3, I32)])


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (1000,), (33, 77), (5, 40_000)], ids=str)
@pytest.mark.parametrize(("seed", "counter"), [(0, 0), (7, 12345), (2**64 - 1, 2**63 + 5)])
def test_uniform_numbers_are_numpys(seed: int, counter: int, shape: tuple[int, ...]) -> None:
    builder = FormulaBuilder([F32, None, None])
    drawn = builder.step("uniform", [("in", 1), ("in", 2)], F32, F32)
    formula = builder.formula([builder.call("add", [drawn, ("in", 0)], F32)[1]])
    out = np.empty(shape, F32)
    evaluate(elementwise.bind_formula, formula, [np.zeros(shape, F32), seed, counter], [out])
    assert (out == np.random.Generator(philox(seed, counter)).random(shape, F32)).all()
    across = np.empty(shape[::-1], F32).T  # elements are numbered by their place in the shape, not in memory
    evaluate(elementwise.bind_formula, formula, [np.zeros(shape, F32), seed, counter], [across])
    assert (across == out).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_width_floats_are_converted_exactly(name: str) -> None:
    half = DTYPES[name]
    every = np.arange(2**16, dtype=np.uint16).view(half)
    with np.errstate(invalid="ignore"):  # NumPy tells of signalling NaN on ARM
        wide = every.astype(F32)
    builder = FormulaBuilder([half])
    widen = builder.formula([builder.step("cast", [("in", 0)], half, F32)[1]])
    assert_same(*both(widen, [every], [np.empty(2**16, F32)]))
    rng = np.random.default_rng(5)
    with np.errstate(all="ignore"):
        between = [wide, np.nextafter(wide, F32.type(np.inf)), np.nextafter(wide, F32.type(-np.inf))]
        middle = (wide.astype(F64) + np.roll(wide, 1).astype(F64)) / 2
        bits = rng.integers(0, 2**32, 100_000, np.uint64).astype(np.uint32).view(F32)
        values = np.concatenate([*between, middle.astype(F32), bits])
    builder = FormulaBuilder([F32])
    narrow = builder.formula([builder.step("cast", [("in", 0)], F32, half)[1]])
    with np.errstate(all="ignore"):
        found, expected = both(narrow, [values], [np.empty(values.size, half)])
    assert_same(found, expected)
    number = ~np.isnan(values)
    assert (found[0].view(np.uint16)[number] == expected[0].view(np.uint16)[number]).all()


# ---- what stays with NumPy


def test_a_group_that_numpy_runs_has_the_native_bits() -> None:
    """int8 is unknown to the interpreter; the tanh beside it is the one that runs alone."""
    builder = FormulaBuilder([F32, DTYPES["int8"]])
    squashed = builder.call("tanh", [("in", 0)], F32)
    formula = builder.formula([builder.call("add", [squashed, ("in", 1)], F32)[1]])
    x, y = np.random.default_rng(6).standard_normal(3000).astype(F32), np.ones(3000, "i1")
    out = np.empty(3000, F32)
    assert elementwise.bind_formula(formula, [spec_of(x), spec_of(y)], [spec_of(out)]) is None
    evaluate(fused.bind_fused, formula, [x, y], [out])
    assert (out == brim.tanh(brim.asarray(x)).numpy() + F32.type(1)).all()


def test_too_large_a_formula_is_numpys() -> None:
    builder = FormulaBuilder([F32])
    last = ("in", 0)
    for n in range(600):
        last = builder.call("add", [last, ("const", float(n))], F32)
    formula = builder.formula([last[1]])
    x = np.zeros(3, F32)
    assert elementwise.bind_formula(formula, [spec_of(x)], [spec_of(x)]) is None
    out = brim.asarray(x)
    kernel = CPU.bind(REGISTRY["fused"], [spec_of(x)], [spec_of(x)], {"formula": formula})
    target = np.empty(3, F32)
    kernel.run(target, out.numpy(), scratch=CPU.allocate(0, kernel.scratch_bytes), formula=formula)
    assert (target == sum(range(600))).all()


def test_arrays_whose_elements_lie_across_words_are_copied() -> None:
    memory = np.arange(4 * 10 + 1, dtype=np.uint8)
    apart = memory[1:].view(F32)
    assert not apart.flags.aligned
    x = brim.asarray(apart)
    assert x.numpy().flags.aligned
    assert (x.numpy().view(np.uint8) == memory[1:]).all()
