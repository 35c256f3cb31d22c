"""Chains of the native interpreter give the bits of their lines one by one: every link, random formulas, any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from brim.backend import ScalarCell
from brim.expr import FormulaBuilder, FusedFormula
from brim.spec import DTYPES, Spec
from brim_cpu import native
from brim_cpu.overlay import chains, elementwise, program

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

Array = np.ndarray[Any, Any]
Operand = tuple[str, Any]
F32 = DTYPES["float32"]
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 1.0], F32)


@contextmanager
def chained(wanted: bool) -> Iterator[None]:
    """Programs made inside have chains, or none."""
    before, program.CHAINS = program.CHAINS, wanted
    try:
        yield
    finally:
        program.CHAINS = before


def spec_of(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x.value if isinstance(x, ScalarCell) else x
    strides = tuple(s // x.itemsize for s in x.strides)
    return Spec(x.shape, x.dtype, None if x.flags.c_contiguous else strides)


def call_of(formula: FusedFormula, ins: Sequence[Any], outs: Sequence[Array]) -> Callable[[], None]:
    kernel = elementwise.bind_formula(formula, [spec_of(x) for x in ins], [spec_of(x) for x in outs])
    assert kernel is not None
    assert kernel.prepare is not None
    calls = kernel.prepare(outs[0] if len(outs) == 1 else tuple(outs), *ins)
    assert calls is not None
    return lambda: [call() for call in calls] and None


def values(rng: np.random.Generator, shape: int | tuple[int, ...]) -> Array:
    """Ordinary numbers, and every tenth something special."""
    x = rng.standard_normal(shape).astype(F32)
    flat = x.reshape(-1)
    flat[::10] = rng.choice(SPECIAL, flat[::10].size)
    return x


def assert_same_bits(one: Array, other: Array) -> None:
    """NaN is NaN; zeros have their signs."""
    nan = np.isnan(one)
    assert (nan == np.isnan(other)).all()
    assert (np.where(nan, 0, one.view(np.uint32)) == np.where(nan, 0, other.view(np.uint32))).all()


def links_of(formula: FusedFormula, scalars: Sequence[bool]) -> list[str]:
    """The names of a formula's links."""
    made = program.lines_of(formula, scalars, [formula.steps[n].dtype for n in formula.outputs], frozenset())
    assert made is not None
    names = {code: name for name, code in chains.link_codes().items()}
    return [names[code] for code, *_ in made.chains.links]


# ---- every kind of link

UFUNCS: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
UFUNCS |= {"max": np.maximum, "min": np.minimum, "neg": np.negative, "abs": np.abs, "square": np.square}
UFUNCS |= {"sqrt": np.sqrt, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
UFUNCS |= {"gt": np.greater, "ge": np.greater_equal}
PAIRS = ("am", "ac", "ma", "ca", "aa", "mm", "mc", "cm")
KINDS = [f"{fn}.{kinds}" for fn in (*chains.BINARY, *chains.COMPARISONS) for kinds in PAIRS]
KINDS += [f"{fn}.{kinds}" for fn in chains.UNARY for kinds in "am"]
KINDS += [f"{fn}.{kinds}" for fn in ("add", "sub") for kinds in ("amm", "amc", "acm", "mma", "mca", "cma")]


def formula_with(kind: str, constant: float) -> tuple[FusedFormula, Callable[[Array, Array], Array]]:
    """A formula of inputs x and y that has this link, and NumPy's result; a is x + y there, and m is x or y."""
    fn, letters = kind.split(".")
    builder = FormulaBuilder([F32, F32])
    start = builder.call("add", [("in", 0), ("in", 1)], F32)
    memory: list[Operand] = [("in", 1), ("in", 0)]
    operands: list[Operand] = [
        start if k == "a" else memory.pop() if k == "m" else ("const", constant) for k in letters
    ]
    if len(letters) == 3:
        first = 0 if letters.endswith("a") else 1
        product = builder.call("mul", operands[first : first + 2], F32)
        operands[first : first + 2] = [product]
    last = builder.call(fn, operands, F32)
    if fn in chains.COMPARISONS:
        last = builder.call("where", [last, ("in", 1), start], F32)
    if "a" not in letters:
        last = builder.call("neg", [last], F32)  # something that makes it a chain

    def numpys(x: Array, y: Array) -> Array:
        inputs, whole = [y, x], x + y
        given = [whole if k == "a" else inputs.pop() if k == "m" else F32.type(constant) for k in letters]
        if len(letters) == 3:
            first = 0 if letters.endswith("a") else 1
            given[first : first + 2] = [given[first] * given[first + 1]]
        result = UFUNCS[fn](*given)
        if fn in chains.COMPARISONS:
            result = np.where(result, y, whole)
        return result if "a" in letters else -result

    return builder.formula([last[1]]), numpys


def test_the_table_of_links_is_the_librarys() -> None:
    others = ["end", "store", "prefetch", *(f"where.{kinds}" for kinds in CHOICES)]
    assert sorted([*KINDS, *others]) == sorted(chains.link_codes())


@pytest.mark.parametrize("kind", KINDS)
def test_every_link(kind: str) -> None:
    for constant in (1.5, -0.0, float("nan"), float("inf")):
        formula, numpys = formula_with(kind, constant)
        assert kind in links_of(formula, [False, False])
        x, y = values(np.random.default_rng(1), (2, 1291))
        out = np.empty_like(x)
        with np.errstate(all="ignore"):
            call_of(formula, [x, y], [out])()
            expected = numpys(x, y)
        # NumPy's own maximum is not of one mind about the zero that it takes.
        assert np.array_equal(out, expected, equal_nan=True)
        with chained(False):
            alone = np.empty_like(x)
            call_of(formula, [x, y], [alone])()
        assert_same_bits(out, alone)


CHOICES = ("mm", "mc", "cm", "cc")


@pytest.mark.parametrize("kinds", CHOICES)
def test_every_choice(kinds: str) -> None:
    builder = FormulaBuilder([F32, F32])
    memory: list[Operand] = [("in", 1), ("in", 0)]
    constants: list[Operand] = [("const", -0.0), ("const", 7.0)]
    condition = builder.call("lt", [("in", 0), ("in", 1)], F32)
    operands = [memory.pop() if kind == "m" else constants.pop() for kind in kinds]
    formula = builder.formula([builder.call("where", [condition, *operands], F32)[1]])
    assert f"where.{kinds}" in links_of(formula, [False, False])
    x, y = values(np.random.default_rng(1), (2, 1291))
    inputs, numbers = [y, x], [F32.type(-0.0), F32.type(7)]
    given = [inputs.pop() if kind == "m" else numbers.pop() for kind in kinds]
    out = np.empty_like(x)
    call_of(formula, [x, y], [out])()
    assert_same_bits(out, np.where(x < y, *given).astype(F32))


def test_a_truth_value_that_others_read_is_no_link() -> None:
    builder = FormulaBuilder([F32, F32])
    condition = builder.call("lt", [("in", 0), ("in", 1)], F32)
    chosen = builder.call("where", [condition, ("in", 0), ("const", 0.0)], F32)
    twice = builder.call("where", [condition, chosen, ("in", 1)], F32)
    x, y = values(np.random.default_rng(1), (2, 1291))
    for outputs in ([twice[1]], [chosen[1], condition[1]]):
        formula = builder.formula(outputs)
        assert not any(name.startswith("where") for name in links_of(formula, [False, False]))
        outs = [np.empty(x.shape, formula.steps[n].dtype) for n in formula.outputs]
        call_of(formula, [x, y], outs)()
        assert_same_bits(outs[0], np.where(x < y, x, 0 if len(outs) == 2 else y).astype(F32))


# ---- random formulas

BINARY = (*chains.BINARY, *chains.BINARY, "copysign", "fmax")
UNARY = (*chains.UNARY, *chains.UNARY, "exp", "tanh", "floor")


def random_formula(rng: np.random.Generator) -> FusedFormula:
    """Up to 25 steps on 3 arrays and a number, with up to 3 outputs; the arithmetic of chains and other functions."""
    builder = FormulaBuilder([F32, F32, F32, None])
    steps: list[Operand] = []

    def operand() -> Operand:
        kind = rng.integers(8)
        if steps and kind < 5:
            return steps[-1] if kind < 3 else steps[rng.integers(len(steps))]
        return ("const", float(rng.choice([0.5, -2.0, 0.0, 3.0]))) if kind == 7 else ("in", int(rng.integers(4)))

    for _ in range(rng.integers(2, 26)):
        which = rng.integers(10)
        if which == 0:
            condition = builder.call("lt", [operand(), ("in", 0)], F32)
            steps.append(builder.call("where", [condition, operand(), ("in", 1)], F32))
        elif which < 7:
            steps.append(builder.call(str(rng.choice(BINARY)), [operand(), operand()], F32))
        else:
            steps.append(builder.call(str(rng.choice(UNARY)), [operand()], F32))
    wanted = {steps[-1][1], *(steps[rng.integers(len(steps))][1] for _ in range(rng.integers(3)))}
    return builder.formula(sorted(wanted))


@pytest.mark.parametrize("seed", range(60))
def test_random_formulas_with_and_without_chains(seed: int) -> None:
    """Also where outputs are inputs, in any pairing."""
    rng = np.random.default_rng(seed)
    formula = random_formula(rng)
    for size in (1, 127, 128, 1025, 3333):
        arrays = [values(rng, size) for _ in range(3)]
        places = [int(n) for n in rng.permutation(3)[: len(formula.outputs)]] if seed % 2 else []
        found = []
        for wanted in (True, False):
            with chained(wanted), np.errstate(all="ignore"):
                ins = [x.copy() for x in arrays]
                outs = [ins[n] for n in places] or [np.empty(size, F32) for _ in formula.outputs]
                call_of(formula, [*ins, 0.75], outs)()
                assert all((ins[n].tobytes() == arrays[n].tobytes()) for n in range(3) if n not in places)
                found.append(outs)
        for one, other in zip(*found, strict=True):
            assert_same_bits(one, other)


def test_random_formulas_have_chains() -> None:
    lengths = [len(links_of(random_formula(np.random.default_rng(seed)), [False] * 3 + [True])) for seed in range(60)]
    assert sum(length >= 5 for length in lengths) > 30


def test_long_formulas_are_several_chains() -> None:
    """Also where one would be cut between a comparison and its choice."""
    x = values(np.random.default_rng(6), 1291)
    for shift in (0, 1):
        builder = FormulaBuilder([F32])
        expected, last, outputs = x, ("in", 0), []
        for n in range(150):
            if n or not shift:
                last, expected = builder.call("add", [last, ("const", float(n % 7))], F32), expected + F32.type(n % 7)
            condition = builder.call("lt", [last, ("const", 200.0)], F32)
            last = builder.call("where", [condition, last, ("in", 0)], F32)
            expected = np.where(expected < 200, expected, x)
            outputs += [last[1]] if n % 10 == 0 else []
        formula = builder.formula([*outputs, last[1]])
        assert links_of(formula, [False]).count("end") == 3
        outs = [np.empty_like(x) for _ in formula.outputs]
        with np.errstate(all="ignore"):
            call_of(formula, [x], outs)()
        assert_same_bits(outs[-1], expected)


# ---- layouts, sizes, threads


def update() -> FusedFormula:
    """v = m v + (g + d p); p = p - r v, of p, g, v, r, m, d."""
    builder = FormulaBuilder([F32, F32, F32, None, None, None])
    decayed = builder.call("add", [("in", 1), builder.call("mul", [("in", 5), ("in", 0)], F32)], F32)
    velocity = builder.call("add", [builder.call("mul", [("in", 4), ("in", 2)], F32), decayed], F32)
    param = builder.call("sub", [("in", 0), builder.call("mul", [("in", 3), velocity], F32)], F32)
    return builder.formula([param[1], velocity[1]])


def updated(p: Array, g: Array, v: Array, r: float, m: float, d: float) -> tuple[Array, Array]:
    v = F32.type(m) * v + (g + F32.type(d) * p)
    return p - F32.type(r) * v, v


def test_an_update_is_one_chain_without_intermediate_stores() -> None:
    names = links_of(update(), [False] * 3 + [True] * 3)
    assert names == ["mul.cm", "add.ma", "add.cma", "store", "mul.ca", "sub.ma", "store", "end"]


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "rows": lambda x: x,
    "columns": np.asfortranarray,
    "every second": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "a row": lambda x: x[:1],
    "a column": lambda x: x[:, :1],
    "one number": lambda x: x[:1, :1],
    "unaligned": lambda x: np.concatenate([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (300, 7), (7, 3000), (129, 130), (33, 128)], ids=str)
def test_layouts(layout: str, shape: tuple[int, int]) -> None:
    p, g, v = values(np.random.default_rng(2), (3, *shape))
    if 0 not in shape:
        g = LAYOUTS[layout](g)
    out = LAYOUTS[layout](np.zeros(shape, F32)) if layout in ("columns", "every second", "unaligned") else None
    outs = [np.empty(shape, F32) if out is None else out, np.empty(shape, F32)]
    with np.errstate(all="ignore"):
        call_of(update(), [p, g, v, 0.25, 0.9, 0.01], outs)()
        for found, expected in zip(outs, updated(p, g, v, 0.25, 0.9, 0.01), strict=True):
            assert np.array_equal(found, expected, equal_nan=True)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arrays = values(np.random.default_rng(3), (3, 300_001))
    found = []
    before = native.get_threads()
    try:
        for threads in (1, 2, 3):
            native.set_threads(threads)
            outs = [np.empty_like(arrays[0]) for _ in range(2)]
            call_of(update(), [*arrays, 0.25, 0.9, 0.01], outs)()
            found.append([out.tobytes() for out in outs])
    finally:
        native.set_threads(before)
    assert found[0] == found[1] == found[2]


def test_large_arrays_are_asked_for_ahead_and_updates_stay_in_the_caches() -> None:
    size = program.STREAM_BYTES // 4 + 130
    assert size >= program.PREFETCH_ELEMENTS
    p, g, v = np.random.default_rng(4).standard_normal((3, size)).astype(F32)
    expected = updated(p, g, v, 0.25, 0.9, 0.01)
    streamed, asked = [], []
    for outs in ([np.empty(size, F32), np.empty(size, F32)], [p, v]):
        machine = elementwise.Interpreter(update(), [False] * 3 + [True] * 3, [F32, F32])
        task = machine.task(outs, [p, g, v, 0.25, 0.9, 0.01], {})
        assert task is not None
        streamed.append([int(row[4]) for row in task.plan.arrays])
        asked.append(sum(int(row[0]) == chains.link_codes()["prefetch"] for row in task.plan.links))
        call_of(update(), [p, g, v, 0.25, 0.9, 0.01], outs)()
        for found, wanted in zip(outs, expected, strict=True):
            assert (found == wanted).all()
    assert streamed == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert asked == [3, 3]


@pytest.mark.parametrize("size", [5, 1024, 16_384, 40_003, 1_000_001])
def test_a_chain_runs_over_its_whole_piece_at_once(size: int) -> None:
    arrays = values(np.random.default_rng(6), (3, size))
    outs = [np.empty_like(arrays[0]) for _ in range(2)]
    task = elementwise.Interpreter(update(), [False] * 3 + [True] * 3, [F32, F32]).task(
        outs, [*arrays, 0.25, 0.9, 0.01], {}
    )
    assert task is not None
    assert task.plan.seamless
    call_of(update(), [*arrays, 0.25, 0.9, 0.01], outs)()
    with np.errstate(all="ignore"):
        expected = updated(*arrays, 0.25, 0.9, 0.01)
    for found, wanted in zip(outs, expected, strict=True):
        assert np.array_equal(found, wanted, equal_nan=True)


def test_what_is_kept_in_a_register_is_kept_for_one_block() -> None:
    formula, numpys = formula_with("lt.mc", 1.5)  # the sum is read after the comparison
    x, y = values(np.random.default_rng(7), (2, 5003))
    out = np.empty_like(x)
    task = elementwise.Interpreter(formula, [False] * 2, [F32]).task([out], [x, y], {})
    assert task is not None
    assert task.plan.chunks > 1
    assert not task.plan.seamless
    call_of(formula, [x, y], [out])()
    with np.errstate(all="ignore"):
        assert np.array_equal(out, numpys(x, y), equal_nan=True)


def pieces_of(sizes: Sequence[int]) -> list[int]:
    """Elements of each piece of an update of arrays of these sizes; every block is in exactly one."""
    machine = elementwise.Interpreter(update(), [False] * 3 + [True] * 3, [F32, F32])
    tasks = []
    for size in sizes:
        p, g, v = (np.empty(size, F32) for _ in range(3))
        tasks.append(machine.task([p, v], [p, g, v, 0.25, 0.9, 0.01], {}))
    assert all(task is not None for task in tasks)
    spans, starts = elementwise.pieces(tasks)
    found = []
    seen = [0] * len(sizes)
    for begin, end in pairwise(starts):
        found.append(0)
        for which, first, last in spans[begin:end]:
            block = int(tasks[which].plan.header[6])
            assert first * block == seen[which]
            seen[which] = min(last * block, sizes[which])
            found[-1] += seen[which] - first * block
    assert seen == list(sizes)
    return found


def test_pieces_of_large_calls_are_longer_and_as_many() -> None:
    small = pieces_of([235_000])
    assert max(small) <= program.PIECE_BYTES // 20 + 1024
    one, many = pieces_of([9_000_000]), pieces_of([300_000] * 30)
    for found in (one, many):
        assert max(found) > 4 * max(small)
        assert program.PIECES * 0.8 <= len(found) <= program.PIECES * 1.25
        assert max(found) <= program.PIECE_BYTES_MAX // 20 + 1024


# ---- many groups in one call


@pytest.mark.parametrize("sizes", [(5,), (0, 3), (10, 256, 2560, 200_704, 65_536, 0, 1), (7,) * 40], ids=str)
def test_many_groups_are_one_call(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    rate, momentum, decay = cells = ScalarCell(0.25), ScalarCell(0.9), ScalarCell(0.01)
    arrays = [values(rng, (3, size)) for size in sizes]
    formula = update()
    moved = {0: 3, 1: 4, 2: 5, 3: 0, 4: 1, 5: 2}  # what is shared comes first
    builder = FormulaBuilder([None, None, None, F32, F32, F32])
    steps = []
    for old in formula.steps:
        args = [("in", moved[x]) if kind == "in" else steps[x] for kind, x in old.args]
        steps.append(builder.call(old.fn, args, F32))
    many = builder.formula([steps[n][1] for n in formula.outputs])
    given = [x for three in arrays for x in three]
    outs = [x for n, three in enumerate(arrays) for x in ((three[0], three[2]) if n % 2 else np.empty_like(three[:2]))]
    specs = [spec_of(x) for x in given]
    kernel = elementwise.bind_many([0.0] * 3 + specs, [spec_of(x) for x in outs], many, len(sizes), 3)
    assert kernel is not None
    assert kernel.prepare is not None
    (call,) = kernel.prepare(tuple(outs), *cells, *given) or ()
    for rate.value, momentum.value, decay.value in ((0.25, 0.9, 0.01), (0.125, 0.5, 0.0)):
        with np.errstate(all="ignore"):
            expected = [updated(*three, rate.value, momentum.value, decay.value) for three in arrays]
            call()
        for found, wanted in zip(outs, (x for two in expected for x in two), strict=True):
            assert np.array_equal(found, wanted, equal_nan=True)


def test_groups_without_elements_are_no_call() -> None:
    builder = FormulaBuilder([F32])
    formula = builder.formula([builder.call("neg", [("in", 0)], F32)[1]])
    empty = Spec((0,), F32)
    kernel = elementwise.bind_many([empty, empty], [empty, empty], formula, 2, 0)
    assert kernel is not None
    assert kernel.prepare is not None
    assert kernel.prepare((np.empty(0, F32),) * 2, np.empty(0, F32), np.empty(0, F32)) == []


@pytest.mark.parametrize("number", [0.1, -0.0, 7, 1e-46, 3.5e38, -1e300, float("inf"), float("nan"), np.float32(0.3)])
def test_numbers_are_rounded_as_numpy_rounds_them(number: Any) -> None:
    builder = FormulaBuilder([None, None, F32])
    sum_ = builder.call("add", [("in", 2), ("in", 1)], F32)
    formula = builder.formula([builder.call("mul", [sum_, ("in", 0)], F32)[1]])
    x, out = np.array([1.0, -2.0, 0.5], F32), np.empty(3, F32)
    factor, term = cells = ScalarCell(2.0), ScalarCell(1.0)
    machine = elementwise.Interpreter(formula, [True, True, False], [F32])
    call = machine.call([out], [*cells, x])
    assert call is not None
    for factor.value, term.value in ((2.0, 1.0), (number, 0.25), (3, number), (number, number)):
        call()
        with np.errstate(all="ignore"):
            expected = (x + F32.type(term.value)) * F32.type(factor.value)
        assert_same_bits(out, expected)
