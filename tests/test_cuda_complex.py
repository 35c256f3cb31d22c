"""Complex numbers on CUDA, emulated: functions against NumPy, special values, casts, scalars, reductions, movement."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim_cuda.elementwise as elementwise
from brim.backend import ScalarCell
from brim.expr import FormulaBuilder, FusedFormula
from brim.op import REGISTRY
from brim.program.ir import FUSED
from brim.spec import DTYPES, Spec
from brim_cuda.cuda_c import literal, slot_places
from brim_cuda.elementwise import fused_calls, slot_values
from brim_cuda.emulation import EmulationLoader, Guarded
from brim_cuda.launch import Param, pack
from brim_cuda.nvrtc import compile_cubin, find_nvrtc
from brim_cuda.registry import bind, work_of
from brim_cuda.source import translation_unit
from brim_cuda.steps import bound
from cuda_kernels import MAX_REGISTERS
from emulating import WHY_NOT, Recorded, emulated, is_complex_call, kernels_of, recorded
from test_cuda_kernels import call_of
from test_cuda_nvrtc import MAX_SPILL_BYTES
from test_cuda_sort import on_cpu

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

Array = np.ndarray[Any, Any]
C64, C128, F32, F64, BOOL = (DTYPES[name] for name in ("complex64", "complex128", "float32", "float64", "bool"))
COMPLEX = [C64, C128]
NAMES = ["complex64", "complex128"]
MAX_ULPS = 4
"""Distance from NumPy's result, in units of the last place of the result's size."""

UNARY: dict[str, Callable[..., Any]] = {
    "negative": np.negative, "positive": np.positive, "abs": np.abs, "sign": np.sign, "square": np.square,
    "sqrt": np.sqrt, "exp": np.exp, "expm1": np.expm1, "log": np.log, "log2": np.log2, "log10": np.log10,
    "log1p": np.log1p, "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh,
    "atanh": np.arctanh,
}  # fmt: skip
BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide, "pow": np.power,
}  # fmt: skip
TRUTH: dict[str, Callable[..., Any]] = {"isnan": np.isnan, "isinf": np.isinf, "isfinite": np.isfinite}
EXACT = ("negative", "positive", "copy", "add", "subtract")


def ulps(got: Array, want: Array) -> float:
    """The largest distance in units of the last place of the number's size; what is not finite has to be equal."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    a, b = (x[finite].astype(np.complex128) for x in (got, want))
    last = np.finfo(want.dtype)
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(b) * last.eps, float(last.tiny) * last.eps), initial=0.0))


def regions(dtype: np.dtype[Any], count: int = 300) -> dict[str, Array]:
    """Numbers of every kind of size: common, around the unit circle, with parts of very different size, huge."""
    rng = np.random.default_rng(0)

    def signs() -> Array:
        return rng.choice([-1.0, 1.0], count)

    wide = [signs() * np.exp(rng.uniform(-20, 20, count)) for _ in "ab"]
    most = np.log(float(np.finfo(dtype).max))
    huge = [signs() * np.exp(rng.uniform(most - 9, most - 1, count)) for _ in "ab"]
    made = {
        "common": rng.standard_normal(count) + 1j * rng.standard_normal(count),
        "circle": np.exp(1j * rng.uniform(-np.pi, np.pi, count)) * (1 + 1e-3 * rng.standard_normal(count)),
        "wide": wide[0] + 1j * wide[1],
        "huge": huge[0] + 1j * huge[1],
        "exponents": rng.uniform(1 - most, most - 1, count) + 1j * rng.uniform(-9, 9, count),
    }
    return {name: z.astype(dtype) for name, z in made.items()}


@pytest.mark.parametrize("order", [0, 1, 17], ids=["forward", "backward", "shuffled"])
def test_rows_of_the_table(order: int) -> None:
    """Every complex call that the table leads to is what the CPU gives."""
    calls = [one for one in recorded() if is_complex_call(one) and one.op.kind == "elementwise"]
    assert {one.op.name for one in calls} >= {"add", "log", "abs", "copy", "reciprocal", "tan", "acosh"}
    loader = EmulationLoader(order)
    loader.functions(kernels_of([work for one in calls if (work := one.work())]))
    for one in calls:
        (got,), (want,) = emulated(loader, one), one.wrote
        assert ulps(got, want) <= (0 if one.op.name in EXACT else MAX_ULPS), str(one)
        (again,) = emulated(loader, one, prepared=True)
        assert again.tobytes() == got.tobytes()


@pytest.fixture(scope="module")
def loader() -> EmulationLoader:
    """Every function in both dtypes, compiled together."""
    made, calls = EmulationLoader(), []
    for dtype in COMPLEX:
        z = np.ones(3, dtype)
        calls += [call_of(name, [z]) for name in (*UNARY, *TRUTH)] + [call_of(name, [z, z]) for name in BINARY]
    made.functions(kernels_of([work for one in calls if (work := one.work())]))
    return made


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_functions_in_every_region(name: str, loader: EmulationLoader) -> None:
    """complex64 against NumPy in complex128, rounded; complex128 against NumPy, which has an error of its own."""
    for dtype, where in itertools.product(COMPLEX, regions(C64)):
        if name == "log1p" and where == "wide":
            continue  # NumPy's is log(1 + z), which loses small numbers: test_small_numbers_are_not_lost
        numbers = [regions(dtype)[where]]
        if name in BINARY:
            numbers.append(regions(dtype)["common"][::-1].copy())
        (got,) = emulated(loader, call_of(name, numbers))
        with np.errstate(all="ignore"):
            wide = [x.astype(C128) for x in numbers]
            want = (UNARY | BINARY)[name](*wide).astype(got.dtype)
            few = MAX_ULPS
            if name == "log1p" and dtype == C128:  # NumPy's is log(1 + z)
                few = 64
            if name == "pow" and dtype == C128:  # an error of the size of the exponent, in NumPy too
                few += 4 * int(np.max(np.abs(wide[1] * np.log(wide[0]))))
        if name in EXACT:
            assert got.tobytes() == want.tobytes()
        finite = np.isfinite(want) & np.isfinite(got)
        assert finite.mean() > 0.3 or where == "huge", (name, dtype, where)
        assert ulps(got[finite], want[finite]) <= few, (name, dtype, where)


def test_small_numbers_are_not_lost(loader: EmulationLoader) -> None:
    for dtype in COMPLEX:
        z = (regions(C128)["common"] * 1e-9).astype(dtype)
        (grown,), (shrunk,) = (emulated(loader, call_of(name, [z])) for name in ("expm1", "log1p"))
        wide = z.astype(C128)
        assert ulps(grown, (wide + wide * wide / 2).astype(dtype)) <= 2
        assert ulps(shrunk, (wide - wide * wide / 2).astype(dtype)) <= 2


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-30, 1e30, np.inf, -np.inf, np.nan])


def grid(parts: Array, dtype: np.dtype[Any]) -> Array:
    """Every pair of these as a complex number."""
    z = np.empty((len(parts), len(parts)), dtype)
    z.real, z.imag = parts[:, None], parts
    return z.reshape(-1)


@pytest.mark.parametrize("name", sorted({*UNARY, *TRUTH} - {"expm1", "log1p"}))
@pytest.mark.parametrize("dtype", COMPLEX, ids=NAMES)
def test_special_values(name: str, dtype: np.dtype[Any], loader: EmulationLoader) -> None:
    """Infinities, NaN and zeros of both signs; signs of what C99 leaves open are not compared.

    NumPy composes expm1 and log1p of other functions, so that they give NaN where exp and log do not.
    """
    z = grid(SPECIAL, dtype)
    (got,) = emulated(loader, call_of(name, [z]))
    with np.errstate(all="ignore"):
        want = (UNARY | TRUTH)[name](z)
        size = np.where(np.isfinite(want), np.abs(want), 1).astype(np.float64)
    if got.dtype.kind != "c":
        np.testing.assert_allclose(got, want, rtol=1e-6)
        return
    for mine, its in ((np.abs(got.real), np.abs(want.real)), (np.abs(got.imag), np.abs(want.imag))):
        near = np.isclose(mine, its, 0, MAX_ULPS * np.finfo(dtype).eps * size, equal_nan=True)
        if name == "square":  # NumPy's fused multiply-add may keep what overflows here
            near |= ~np.isfinite(mine) & ~np.isfinite(its)
        assert near.all(), list(zip(z[~near], got[~near], want[~near], strict=True))


def test_branch_cuts_are_continuous_from_the_side_that_the_sign_of_zero_tells(loader: EmulationLoader) -> None:
    for dtype in COMPLEX:
        for name, at in (
            ("sqrt", -4), ("log", -4), ("asin", 2), ("asin", -2), ("acos", 2), ("acos", -2), ("acosh", 0.5),
            ("acosh", -2), ("atanh", 2), ("atanh", -2), ("asinh", 2j), ("asinh", -2j), ("atan", 2j), ("atan", -2j),
        ):  # fmt: skip
            turned = isinstance(at, complex)
            sides = [complex(zero, at.imag) if turned else complex(at, zero) for zero in (0.0, -0.0)]
            (got,) = emulated(loader, call_of(name, [np.array(sides, dtype)]))
            want = UNARY[name](np.array(sides, dtype))
            assert ulps(got, want) <= MAX_ULPS, (name, sides, got, want)
            assert got[0] != got[1]


def test_powers(loader: EmulationLoader) -> None:
    for dtype in COMPLEX:
        bases = np.array([0, 0, 0, 2 + 1j, 2 + 1j, 2 + 1j, 1j, -2, complex(-0.0, -np.inf)], dtype)
        exponents = np.array([0, 1, -1, 0, 3, -2, 99, 0.5, 1], dtype)
        (got,) = emulated(loader, call_of("pow", [bases, exponents]))
        with np.errstate(all="ignore"):
            want = np.power(bases, exponents)
        np.testing.assert_allclose(got[:-1], want[:-1], rtol=20 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)
        assert got[-1].imag == -np.inf


def test_quotients_are_numpys(loader: EmulationLoader) -> None:
    """By zero, by what is small or large, of infinities."""
    for dtype in COMPLEX:
        z = grid(np.array([0.0, 1.0, -3.0, 1e-30, 1e30, np.inf]), dtype)
        x, y = (each.reshape(-1) for each in np.meshgrid(z, z))
        (got,) = emulated(loader, call_of("divide", [x, y]))
        with np.errstate(all="ignore"):
            want = np.divide(x, y)
        np.testing.assert_array_equal(
            np.isnan(got.real) + 2 * np.isnan(got.imag), np.isnan(want.real) + 2 * np.isnan(want.imag)
        )
        assert ulps(got[np.isfinite(want)], want[np.isfinite(want)]) <= MAX_ULPS


# --------------------------------------------------------------------------------------- formulas, layouts, scalars


def run(loader: EmulationLoader, formula: FusedFormula, ins: list[Any], outs: list[Array]) -> list[Array]:
    """A fused formula in guarded memory."""
    specs = [
        Spec(x.shape, x.dtype, tuple(s // x.itemsize for s in x.strides)) if isinstance(x, np.ndarray) else x
        for x in ins
    ]
    out_specs = [Spec(x.shape, x.dtype, tuple(s // x.itemsize for s in x.strides)) for x in outs]
    one = Recorded(FUSED, tuple(specs), tuple(out_specs), {"formula": formula}, tuple(ins), ())
    held = [Guarded(x) if isinstance(x, np.ndarray) else x for x in ins]
    results = [Guarded(x) for x in outs]
    kernel = bind(loader, one.op, one.ins, one.outs, one.params)
    kernel.run(tuple(x.array for x in results), *(x.array if isinstance(x, Guarded) else x for x in held), **one.params)
    for memory in (*results, *(x for x in held if isinstance(x, Guarded))):
        memory.check()
    return [x.array for x in results]


def mixed_formula(dtype: np.dtype[Any]) -> FusedFormula:
    """x + y * s; |x|; x == y; where(x == y, s, conj x)."""
    builder = FormulaBuilder([dtype, dtype, None])
    total = builder.call("add", [("in", 0), builder.call("mul", [("in", 1), ("in", 2)], dtype)], dtype)
    size = builder.call("abs", [("in", 0)], dtype)
    equal = builder.call("eq", [("in", 0), ("in", 1)], dtype)
    chosen = builder.call("where", [equal, ("in", 2), builder.call("conj", [("in", 0)], dtype)], dtype)
    return builder.formula([total[1], size[1], equal[1], chosen[1]])


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", COMPLEX, ids=NAMES)
def test_layouts(dtype: np.dtype[Any], wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(elementwise, "index_dtype", lambda arrays: DTYPES["int64"])
    rng, formula, loader = np.random.default_rng(2), mixed_formula(dtype), EmulationLoader(3)
    big = (rng.integers(-9, 9, (30, 41)) + 1j * rng.integers(-9, 9, (30, 41))).astype(dtype)
    other = np.where(rng.random(big.shape) < 0.3, big, big[::-1])
    flat = big.reshape(-1)
    for x, y in (
        (big, other), (flat[1:1000], flat[3:1002]), (big, other[:, :1]), (big, other[3]), (big.T, other.T),
        (big[::-1, ::-1], other), (big[::2, 1::3], other[1::2, ::3]), (big[0, 0].reshape(()), other[1, 1].reshape(())),
    ):  # fmt: skip
        shape = np.broadcast_shapes(x.shape, y.shape)
        outs = [
            np.zeros(shape, kind) for kind in (dtype, DTYPES["float32" if dtype == C64 else "float64"], BOOL, dtype)
        ]
        got = run(loader, formula, [x, y, 2 - 1j], outs)
        x, y = np.broadcast_arrays(x, y)
        want = [x + y * dtype.type(2 - 1j), np.abs(x), x == y, np.where(x == y, dtype.type(2 - 1j), np.conj(x))]
        for n, (g, w) in enumerate(zip(got, want, strict=True)):
            if n == 1:
                np.testing.assert_allclose(g, w, rtol=4 * np.finfo(dtype).eps)
            else:  # small whole numbers: exact
                np.testing.assert_array_equal(g, w)


def test_casts() -> None:
    """Real to complex, complex to complex, to bool; to a real number the imaginary part is dropped."""
    loader, z = EmulationLoader(), np.array([0, -0.0, 1.5 - 2j, 3j, 1e-40j, 1 / 3 - 1j / 3, 7])
    real = [DTYPES[name] for name in ("float64", "float32", "float16", "bfloat16", "int32")]
    cases = []
    for source, target in (*itertools.product(DTYPES.values(), COMPLEX), *itertools.product(COMPLEX, (BOOL, *real))):
        x = z.astype(source) if source.kind == "c" else np.array([0, 1, 2, 100]).astype(source)
        builder = FormulaBuilder([source])
        formula = builder.formula([builder.step("cast", [("in", 0)], source, target)[1]])
        want = (x.real if target in real else x).astype(target)
        specs = [Spec(x.shape, source)], [Spec(x.shape, target)]
        cases.append((x, formula, want, work_of(FUSED, *specs, {"formula": formula})))
    loader.functions(kernels_of([work for *_, work in cases]))
    for x, formula, want, _ in cases:
        (got,) = run(loader, formula, [x], [np.zeros_like(want)])
        np.testing.assert_array_equal(got, want, f"{x.dtype} to {want.dtype}")


def test_literals() -> None:
    assert literal(1 - 2j, C64) == "c64((1.0f), (-2.0f))"
    assert literal(0.1, C128) == "c128((0.1), (0.0))"
    assert "__int_as_float" in literal(complex(0, float("nan")), C64)
    with pytest.raises(TypeError):
        literal(1j, F32)


def test_scalars_by_value_from_cells_and_from_device_memory() -> None:
    """One scalar as complex64, complex128 (two places of eight bytes) and float64's neighbour."""
    builder = FormulaBuilder([C64, None, None])
    narrow = builder.call("mul", [("in", 0), ("in", 1)], C64)
    wide = builder.call("add", [builder.cast(("in", 0), C128), ("in", 1)], C128)
    real = builder.call("add", [("in", 2), ("const", 0.5)], F64)
    formula = builder.formula([narrow[1], wide[1], builder.result(real, F64, F64)])
    assert slot_places([(1, C64), (1, C128), (2, F64)]) == [0, 1, 3, 4]
    z = regions(C64, 37)["common"]
    outs = (np.zeros(37, C64), np.zeros(37, C128), np.zeros(37))
    specs, out_specs = [Spec((37,), C64), 1j, 2.0], [Spec((37,), out.dtype) for out in outs]
    loader, cell = EmulationLoader(), ScalarCell(1j)
    kernel = bind(loader, FUSED, specs, out_specs, {"formula": formula})
    slots = Guarded(slot_values(formula, [specs[0], None, None], [None, 0, 0]))
    assert slots.array.size == 4
    from_slots = bound(loader, fused_calls(formula, specs, out_specs, slots.array))
    assert kernel.prepare is not None
    assert from_slots.prepare is not None
    launches = [*(kernel.prepare(outs, z, cell, 2.0) or ())], [*(from_slots.prepare(outs, z, None, None) or ())]
    for value in (1j, 2.5 - 1e-3j, 3):
        cell.value = value
        slots.array[:] = slot_values(formula, [specs[0], None, None], [None, value, 2.0])
        for way in launches:
            for out in outs:
                out[:] = 0
            for launch in way:
                launch()
            assert ulps(outs[0], z * np.complex64(value)) <= 1
            np.testing.assert_array_equal(outs[1], z.astype(C128) + value)
            np.testing.assert_array_equal(outs[2], 2.5)
    with pytest.raises(TypeError, match="float32"):
        pack(Param("s", F32), 1j)


def test_what_has_no_order_is_refused() -> None:
    for fn in ("lt", "max", "floor", "atan2", "bitand", "erf"):
        builder = FormulaBuilder([C64, C64])
        args = [("in", n) for n in range(1 if fn in ("floor", "erf") else 2)]
        formula = builder.formula([builder.step(fn, args, C64, BOOL if fn == "lt" else C64)[1]])
        outs = [Spec((3,), BOOL if fn == "lt" else C64)]
        with pytest.raises(KeyError, match=f"no kernel for {fn} in complex64"):
            fused_calls(formula, [Spec((3,), C64)] * 2, outs)
    for name, params in (("max", {"axes": (0,), "keepdims": False}), ("argmin", {"axis": 0, "keepdims": False})):
        out = Spec((), C64 if name == "max" else DTYPES["int64"])
        with pytest.raises(KeyError, match=f"no kernel for {name} in complex64"):
            work_of(REGISTRY[name], [Spec((3,), C64)], [out], params)


# -------------------------------------------------------------------------------------------- reductions and movement


def moved_calls(dtype: np.dtype[Any]) -> list[Recorded]:
    """Everything else that takes complex numbers on the CPU."""
    rng = np.random.default_rng(7)
    z = (rng.integers(-5, 6, (6, 40)) + 1j * rng.integers(-5, 6, (6, 40))).astype(dtype)
    units, sparse = np.array([1, -1, 1j, -1j])[rng.integers(0, 4, (6, 40))].astype(dtype), np.where(z.real > 3, z, 0)
    long = np.tile(z.reshape(-1), 150)
    index, values = np.array([[5, 0, -1, 0]]), z[None, :4]
    calls = [call_of("sum", [z], axes=axes, keepdims=False) for axes in ((0,), (1,), (0, 1), ())]
    calls += [call_of("sum", [z.T], axes=(1,), keepdims=True), call_of("sum", [long], axes=(0,), keepdims=False)]
    calls += [call_of("prod", [units], axes=axes, keepdims=False) for axes in ((0,), (1,), (0, 1))]
    calls += [call_of(name, [sparse.astype(dtype)], axes=(0,), keepdims=False) for name in ("any", "all")]
    for reverse, initial in ((False, False), (True, True)):
        for x, axis in ((z, 0), (z, 1), (long[:700], 0)):
            calls.append(call_of("cumulative_sum", [x], axis=axis, reverse=reverse, include_initial=initial))
    calls += [
        call_of("take", [z, np.array([3, -1, 0])], axis=0),
        call_of("take", [z, np.array([3, -1, 0])], axis=1),
        call_of("index_add", [z, index, values], axis=0, size=6),
        call_of("put", [z, index, values], axis=0, size=6),
        call_of("put", [z, index, 2 - 1j], axis=0, size=6),
        call_of("set_slice", [z, values[:, :2, :2]], index=((1, 2, 2), (0, 3, 2)), shape=z.shape),
        call_of("set_slice", [z, 1j], index=((1, 2, 2), (0, 3, 2)), shape=z.shape),
        call_of("concat", [z, z[:, ::2]], axis=1),
        call_of("triangle", [z], k=1, upper=True),
        call_of("triangle", [z], k=0, upper=False),
        call_of("fill", [1 - 2j], shape=(3, 5), dtype=dtype, device="cpu"),
        call_of("copy", [z.T]),
    ]
    return calls


@pytest.mark.parametrize("order", [0, 1, 17], ids=["forward", "backward", "shuffled"])
def test_reductions_and_movement(order: int) -> None:
    """On small whole numbers, whose sums and products are exact in any order: equal to the CPU's."""
    loader, calls = EmulationLoader(order), [one for dtype in COMPLEX for one in moved_calls(dtype)]
    works = [one.work() for one in calls]
    assert all(works)
    assert {len(work.calls) for one, work in zip(calls, works, strict=True) if work and one.op.name == "sum"} == {1, 2}
    loader.functions(kernels_of([work for work in works if work]))
    for one in calls:
        (got,) = emulated(loader, one)
        np.testing.assert_array_equal(got, on_cpu(one), str(one))


def test_an_index_out_of_range_gives_nan() -> None:
    for dtype in COMPLEX:
        (got,) = emulated(EmulationLoader(), call_of("take", [np.ones((3, 2), dtype), np.array([3, 1])], axis=0))
        assert np.isnan(got.real).all(axis=1).tolist() == np.isnan(got.imag).all(axis=1).tolist() == [True, False]


@pytest.mark.skipif(find_nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_it_compiles(arch: str) -> None:
    """What the table of ops has no complex row for."""
    works = [one.work() for one in moved_calls(C128)]
    works += [call_of(name, [np.ones(3, dtype)] * 2).work() for dtype in COMPLEX for name in ("divide", "pow")]
    works += [call_of(name, [np.ones((3, 4), C128)[:, ::2]]).work() for name in ("sign", "acosh", "tanh")]
    kernels = kernels_of([work for work in works if work])
    done = compile_cubin(translation_unit(kernels), arch, ["--ptxas-options=-v"])
    assert all(kernel.name.encode() in done.cubin for kernel in kernels)
    assert max(map(int, re.findall(r"Used (\d+) registers", done.log))) <= MAX_REGISTERS
    assert max(map(int, re.findall(r"(\d+) bytes spill stores", done.log))) <= MAX_SPILL_BYTES
    assert "warning" not in done.log
