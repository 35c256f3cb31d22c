"""Products with what follows them in one native call: the bits of the product and the group by themselves, whatever the
shapes, dtypes and number of threads; and which formulas are left to two calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.backend import ScalarCell
from brim.expr import FormulaBuilder
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.passes.epilogue import MATMUL_EPILOGUE
from brim.spec import Spec
from brim_cpu import native
from brim_cpu.overlay import bind_native
from brim_cpu.overlay.matmul_epilogue import strides_as
from native_running import run, spec_of

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

Array = np.ndarray[Any, Any]
F32, BOOL, F16 = np.dtype("float32"), np.dtype("bool"), np.dtype("float16")
CPU = brim.device("cpu").backend


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = brim.get_threads()
    yield
    brim.set_threads(before)


def formula_of(*steps: tuple[Any, ...], inputs: int, outputs: tuple[int, ...], dtype: Any = F32) -> Any:
    """Steps are (function, operand, ...): numbers of inputs as "i0", of steps as "s0", and constants."""
    builder = FormulaBuilder([dtype] * inputs)
    made: list[Any] = []
    for fn, *operands in steps:
        args = [
            ("const", x) if isinstance(x, float) else ("in", int(x[1:])) if x[0] == "i" else made[int(x[1:])]
            for x in operands
        ]
        made.append(builder.call(fn, args, dtype))
    return builder.formula([made[n][1] for n in outputs])


FORMULAS = {
    "bias": (formula_of(("add", "i0", "i1"), inputs=2, outputs=(0,)), ["row"]),
    "bias and relu": (formula_of(("add", "i0", "i1"), ("max", "s0", 0.0), inputs=2, outputs=(1,)), ["row"]),
    "bias and tanh, both kept": (formula_of(("add", "i0", "i1"), ("tanh", "s0"), inputs=2, outputs=(0, 1)), ["row"]),
    "scale, shift, relu": (
        formula_of(("mul", "i0", "i1"), ("add", "s0", "i2"), ("max", "s1", 0.0), inputs=3, outputs=(2,)),
        ["row", "row"],
    ),
    "erf of the sum with a whole array": (
        formula_of(("add", "i0", "i1"), ("mul", "s0", 0.70710677), ("erf", "s1"), ("mul", "s2", "s0"), inputs=2,
                   outputs=(3,)),
        ["whole"],
    ),
    "the product read last": (formula_of(("exp", "i0"), ("mul", "s0", "i0"), inputs=1, outputs=(0, 1)), []),
}  # fmt: skip


def two_calls(a: Array, b: Array, others: list[Any], formula: Any, shape: tuple[int, ...], outs: list[Spec]) -> Any:
    """The product, then the group, by themselves."""
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    product = np.empty((*lead, a.shape[-2], b.shape[-1]), a.dtype)
    kernel = CPU.bind(REGISTRY["matmul"], [spec_of(a), spec_of(b)], [Spec(product.shape, a.dtype)], {})
    kernel.run(product, a, b)
    made = [np.empty(out.shape, out.dtype) for out in outs]
    given = [product.reshape(shape), *others]
    group = CPU.bind(REGISTRY["fused"], [spec_of(x) for x in given], outs, {"formula": formula})
    scratch = np.empty(group.scratch_bytes, np.uint8)
    with np.errstate(all="ignore"):
        group.run(tuple(made) if len(made) > 1 else made[0], *given, scratch=scratch, formula=formula)
    return made if len(made) > 1 else made[0]


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = F32) -> Array:
    made = rng.standard_normal(shape).astype(dtype)
    if made.size > 8:
        made.reshape(-1)[[1, 5, 7]] = np.nan, np.inf, -0.0
    return made


def assert_same(found: Any, expected: Any) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
    for got, want in pairs:
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
        ordinary = ~np.isnan(want)
        assert got[ordinary].tobytes() == want[ordinary].tobytes()


SHAPES = [
    (1, 1, 1),
    (1, 300, 77),
    (3, 65, 130),
    (5, 40, 10),
    (32, 784, 256),
    (130, 513, 333),
    (67, 9, 1100),
    (700, 70, 64),
]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=str)
def test_the_bits_of_two_calls(m: int, k: int, n: int, name: str) -> None:
    rng = np.random.default_rng(0)
    formula, kinds = FORMULAS[name]
    others = [numbers(rng, (n,) if kind == "row" else (m, n)) for kind in kinds]
    outs = [Spec((m, n))] * len(formula.outputs)
    for stored in ("plain", "transposed"):
        a = numbers(rng, (m, k))
        b = numbers(rng, (k, n)) if stored == "plain" else numbers(rng, (n, k)).T
        found = run("matmul_epilogue", a, b, *others, outs=outs, formula=formula, shape=(m, n))
        assert_same(found, two_calls(a, b, others, formula, (m, n), outs))


def test_float64() -> None:
    rng = np.random.default_rng(1)
    f64 = np.dtype("float64")
    formula = formula_of(("add", "i0", "i1"), ("max", "s0", 0.0), inputs=2, outputs=(1,), dtype=f64)
    a, b, c = (numbers(rng, shape, f64) for shape in ((33, 70), (70, 90), (90,)))
    outs = [Spec((33, 90), f64)]
    found = run("matmul_epilogue", a, b, c, outs=outs, formula=formula, shape=(33, 90))
    assert_same(found, two_calls(a, b, [c], formula, (33, 90), outs))


def test_outputs_of_other_dtypes_beside_one_of_the_products() -> None:
    rng = np.random.default_rng(2)
    builder = FormulaBuilder([F32, F32])
    total = builder.call("add", [("in", 0), ("in", 1)], F32)
    positive, half = builder.call("gt", [total, ("const", 0.0)], F32), builder.cast(total, F16)
    formula = builder.formula([positive[1], half[1], total[1]])
    a, b, c = (rng.standard_normal(shape).astype(F32) for shape in ((20, 30), (30, 70), (70,)))
    outs = [Spec((20, 70), BOOL), Spec((20, 70), F16), Spec((20, 70))]
    params = {"formula": formula, "shape": (20, 70)}
    kernel = bind_native("matmul_epilogue", [spec_of(x) for x in (a, b, c)], outs, params)
    assert kernel is not None
    found = [np.empty(out.shape, out.dtype) for out in outs]
    kernel.run(tuple(found), a, b, c, **params)
    expected = two_calls(a, b, [c], formula, (20, 70), outs)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("other", [(64,), (3, 1, 1, 64), (3, 2, 40, 64), (2, 40, 64), (40, 64)], ids=str)
def test_batches_and_what_is_shared_by_them(other: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    a, b = numbers(rng, (3, 2, 40, 16)), numbers(rng, (3, 2, 16, 64))
    formula, _ = FORMULAS["bias and relu"]
    shape = (3, 2, 40, 64)
    c = numbers(rng, other)
    outs = [Spec(shape)]
    kernel = bind_native("matmul_epilogue", [spec_of(x) for x in (a, b, c)], outs, {"formula": formula, "shape": shape})
    if kernel is None:  # the products are one row of six, for which this array has no one step
        assert other in ((3, 1, 1, 64), (2, 40, 64))
        return
    found = run("matmul_epilogue", a, b, c, outs=outs, formula=formula, shape=shape)
    assert_same(found, two_calls(a, b, [c], formula, shape, outs))


def test_rows_of_a_batch_read_in_another_shape() -> None:
    rng = np.random.default_rng(4)
    a, b, c = numbers(rng, (60, 30)), numbers(rng, (30, 70)), numbers(rng, (5, 12, 70))
    formula, _ = FORMULAS["bias and relu"]
    outs = [Spec((5, 12, 70))]
    found = run("matmul_epilogue", a, b, c, outs=outs, formula=formula, shape=(5, 12, 70))
    assert_same(found, two_calls(a, b, [c], formula, (5, 12, 70), outs))
    shared = numbers(rng, (4, 15, 30))  # one matrix of 60 rows
    found = run("matmul_epilogue", shared, b, c.reshape(4, 15, 70), outs=[Spec((4, 15, 70))], formula=formula,
                shape=(4, 15, 70))  # fmt: skip
    assert_same(found, two_calls(shared, b, [c.reshape(4, 15, 70)], formula, (4, 15, 70), [Spec((4, 15, 70))]))


def test_strided_operands() -> None:
    rng = np.random.default_rng(5)
    a, b = numbers(rng, (40, 100))[:, 7:90], numbers(rng, (83, 200))[:, 3:103]
    c, row = numbers(rng, (80, 120))[::2, 5:105], numbers(rng, (300,))[1:101]
    formula, _ = FORMULAS["scale, shift, relu"]
    outs = [Spec((40, 100))]
    found = run("matmul_epilogue", a, b, c, row, outs=outs, formula=formula, shape=(40, 100))
    assert_same(found, two_calls(a, b, [c, row], formula, (40, 100), outs))


def test_a_number_that_changes_from_run_to_run() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((9, 20), np.float32), rng.standard_normal((20, 70), np.float32)
    builder = FormulaBuilder([F32, None])
    formula = builder.formula([builder.call("mul", [("in", 0), ("in", 1)], F32)[1]])
    kernel = bind_native(
        "matmul_epilogue", [spec_of(a), spec_of(b), 1.0], [Spec((9, 70))], {"formula": formula, "shape": (9, 70)}
    )
    assert kernel is not None
    assert kernel.prepare is not None
    out, cell = np.empty((9, 70), np.float32), ScalarCell(2.0)
    (call,) = kernel.prepare(out, a, b, cell, formula=formula, shape=(9, 70)) or ()
    for value in (2.0, -3.5):
        cell.value = value
        call()
        plain = CPU.bind(REGISTRY["matmul"], [spec_of(a), spec_of(b)], [Spec((9, 70))], {})
        product = np.empty((9, 70), np.float32)
        plain.run(product, a, b)
        assert (out == product * np.float32(value)).all()


def test_what_is_left_to_two_calls() -> None:
    formula, _ = FORMULAS["bias"]

    def bound(
        a: Spec, b: Spec, c: Spec, shape: tuple[int, ...], formula: Any = formula, out: Spec | None = None
    ) -> Any:
        outs = [out or Spec(shape, a.dtype)]
        return bind_native("matmul_epilogue", [a, b, c], outs, {"formula": formula, "shape": shape})

    assert bound(Spec((8, 9)), Spec((9, 70)), Spec((70,)), (8, 70)) is not None
    assert bound(Spec((8, 9)), Spec((9, 70)), Spec((8, 1)), (8, 70)) is None  # one number for a row
    assert bound(Spec((8, 9)), Spec((9, 70)), Spec((70,), layout=(2,)), (8, 70)) is None
    assert bound(Spec((8, 0)), Spec((0, 70)), Spec((70,)), (8, 70)) is None
    assert bound(Spec((8, 9)), Spec((9, 70)), Spec((35,)), (8, 2, 35)) is None  # rows of another length
    assert bound(Spec((8, 9)), Spec((9, 70)), Spec((70,)), (8, 70), out=Spec((8, 70), layout=(1, 8))) is None
    assert bound(Spec((5000, 9)), Spec((9, 5)), Spec((5,)), (5000, 5)) is None  # many short rows
    whole = Spec((8, 9), np.dtype("int32"))
    assert bound(whole, Spec((9, 70), np.dtype("int32")), Spec((70,), np.dtype("int32")), (8, 70)) is None


def test_strides_in_another_shape() -> None:
    assert strides_as((2, 3, 4), (12, 4, 1), (6, 4)) == (4, 1)
    assert strides_as((6, 4), (4, 1), (2, 3, 4)) == (12, 4, 1)
    assert strides_as((2, 3, 4), (0, 0, 1), (6, 4)) == (0, 1)
    assert strides_as((2, 3, 4), (100, 4, 1), (6, 4)) is None
    assert strides_as((2, 3, 4), (100, 4, 1), (2, 12)) == (100, 1)
    assert strides_as((5, 1, 4), (4, 9, 1), (1, 5, 4)) == (0, 4, 1)
    assert strides_as((0, 4), (4, 1), (0, 4)) is None


# ---- programs ----


def small_model() -> Any:
    brim.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 64), nn.GELU(), nn.Linear(64, 10)
    )


def test_an_evaluated_model_has_one_call_for_a_layer() -> None:
    model = small_model().eval()
    x = np.random.default_rng(7).standard_normal((9, 20)).astype("f4")
    compiled = compile_step(lambda x: model(x))
    found = compiled(x).numpy()
    assert [i.op for i in compiled.program().instructions].count(MATMUL_EPILOGUE) == 3
    assert found.shape == (9, 10)


def test_a_training_step_keeps_its_numbers_and_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((32, 20)).astype("f4"), rng.integers(0, 10, 32)
    found = []
    for joins in (True, False):
        if not joins:
            monkeypatch.setattr(CPU, "joins_epilogue", None, raising=False)
        model = small_model()
        optimizer = optim.Adam(model.parameters(), lr=0.01)

        def train(x: Any, y: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        compiled = compile_step(train)
        losses = [compiled(x, y).item() for _ in range(4)]
        has = any(i.op is MATMUL_EPILOGUE for i in compiled.program().instructions)
        found.append((losses, compiled.current_plan().peak_bytes))
        assert has is joins
    assert found[0][0] == found[1][0]
    assert found[0][1] <= found[1][1]
