"""Norms with formulas in one native call: the bits of formula, norm and formula by themselves, for any threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import brim
from brim.backend import ScalarCell
from brim.expr import FormulaBuilder, FusedFormula
from brim.program.ir import FUSED
from brim.program.norm_groups import FUSED_NORMS, identity, norm_group
from brim.spec import DTYPES, Spec
from brim_cpu import native
from brim_cpu.device import CpuBackend
from brim_cpu.overlay import bind_native

F32, BOOL = DTYPES["float32"], DTYPES["bool"]
ROWS = ((9, 33), (2, 3, 64), (5, 3000), (700, 24), (3, 5, 128), (4, 1))
IMAGES = ((3, 40, 5, 7), (2, 3, 4, 4), (4, 9, 37, 30), (5, 2, 90, 41), (700, 33), (64, 10, 8, 8), (2, 12, 64, 63))
SEED, COUNTER, RATE = 17, 2**40 + 3, 0.3
Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")


def formula(dtypes: list[Any], build: Callable[..., Any], *outs: Any) -> FusedFormula:
    """``build(builder)`` gives operands, which are brought to the dtypes ``outs``."""
    builder = FormulaBuilder(dtypes)
    return builder.formula([builder.result(x, F32, dtype) for x, dtype in zip(build(builder), outs, strict=True)])


def dropped(b: FormulaBuilder, x: Any, seed: Any, counter: Any) -> Any:
    away = b.call("lt", [b.step("uniform", (seed, counter), DTYPES["uint64"], F32), ("const", RATE)], F32)
    return b.call("where", [away, ("const", 0.0), b.call("mul", [x, ("const", 1 / (1 - RATE))], F32)], F32)


def masked(b: FormulaBuilder, x: Any) -> Any:
    return b.call("where", [b.call("gt", [x[0], ("const", 0)], F32), x[1], ("const", 0.0)], F32)


class Case:
    """Operands of a norm with formulas; ``order``: "" is row-major."""

    def __init__(self, name: str, shape: tuple[int, ...], order: str = "", special: bool = False) -> None:
        self.name, self.shape, self.order, self.special = name, shape, order, special
        self.rng = np.random.default_rng(0)
        self.rows = name.startswith("layer")
        self.params: dict[str, Any] = {"eps": 1e-3, **({"ndim": 1} if self.rows else {})}
        vector = shape[-1:] if self.rows else shape[1:2]
        statistics = (*shape[:-1], 1) if self.rows else (1, shape[1], *(1 for _ in shape[2:]))
        self.own: list[Any] = [self.array(*vector) + F32.type(1), self.array(*vector)]
        if name.endswith("_grad"):
            mean = self.array(*statistics)
            self.own = [self.image(), self.own[0], mean, np.abs(mean) + F32.type(1)]

    def array(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(np.float32)

    def image(self) -> Array:
        made = self.array(*self.shape)
        if self.special:
            made.flat[:: made.size // 3 + 1] = np.nan
            made.flat[1 :: made.size // 2 + 1] = np.inf
        if self.order != "channels last":
            return made
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(made, 1, -1)), -1, 1)

    def call(self, before: Any, after: Any, others: Sequence[Any]) -> tuple[str, list[Any], list[Spec], dict[str, Any]]:
        """Op, operands, Specs of results and params; None as a formula hands on what it is given."""
        kinds = [x.dtype if isinstance(x, np.ndarray) else None for x in others]
        head, tail = identity(F32), identity(F32)
        if before is not None:
            build, *kept = before
            head = formula(kinds, lambda b: build(b, [("in", n) for n in range(len(others))]), F32, *kept)
        if after is not None:
            build, *made = after
            later = [("in", n + 1) for n in range(len(others))]
            tail = formula([F32, *kinds], lambda b: build(b, ("in", 0), later), *made)
        params = {**self.params, "before": head, "after": tail, "shape": self.shape}
        ins = [*self.own, *others]
        outs = [self.laid_out(spec) for spec in FUSED_NORMS[self.name].infer(specs(ins), params)]
        return f"{self.name}_fused", ins, outs, params

    def laid_out(self, spec: Spec) -> Spec:
        if self.order != "channels last" or spec.shape != self.shape:
            return spec
        _, c, h, w = spec.shape
        return Spec(spec.shape, spec.dtype, (c * h * w, 1, w * c, c))

    def calls(self) -> Iterator[Any]:
        """What is joined with this norm."""
        yield from (self._after() if self.name != "batch_norm_grad" else ())
        yield from (self._before() if self.name != "batch_norm" else ())
        yield from (self._rows() if self.rows else ())

    def _after(self) -> Iterator[Any]:
        image = self.image
        relu = lambda b, y, x: [b.call("max", [y, ("const", 0)], F32)]  # noqa: E731
        sums = lambda b, y, x: [b.call("max", [b.call("add", [y, x[1]], F32), ("const", 0)], F32)]  # noqa: E731
        plus = lambda b, y, x: [b.call("add", [x[1], y], F32)]  # noqa: E731
        yield self.call(None, (relu, F32), [image()])
        yield self.call(None, (sums, F32), [image(), image()])
        yield self.call(None, (plus, F32), [image(), image()])

    def _before(self) -> Iterator[Any]:
        if self.order:
            return
        image = self.image
        added = lambda b, x: masked(b, [x[0], b.call("add", [x[1], x[2]], F32)])  # noqa: E731
        yield self.call((lambda b, x: [masked(b, x)],), None, [image(), image()])
        if self.rows:
            yield self.call((lambda b, x: [masked(b, x)] * 2, F32), None, [image(), image()])
            yield self.call((lambda b, x: [added(b, x)],), None, [image(), image(), image()])
            yield self.call((lambda b, x: [added(b, x)] * 2, F32), None, [image(), image(), image()])

    def _rows(self) -> Iterator[Any]:
        image = self.image
        both = lambda b, y, x: [b.call("max", [b.call("add", [y, x[1]], F32), ("const", 0)], F32), y]  # noqa: E731
        pick = lambda b, y, x: [b.call("gt", [y, x[0]], F32), b.call("mul", [y, x[2]], F32)]  # noqa: E731
        yield self.call(None, (both, F32, F32), [image(), image()])
        yield self.call(None, (pick, BOOL, F32), [image(), image(), 2.5])
        bias, places = self.array(self.shape[-1]), self.array(*self.shape[1:])
        add = lambda b, x: [(s := b.call("add", [x[0], x[1]], F32)), b.call("mul", [s, x[2]], F32), s]  # noqa: E731
        tanh = lambda b, y, x: [b.call("tanh", [b.call("mul", [y, x[1]], F32)], F32)]  # noqa: E731
        yield self.call((add, F32, F32), (tanh, F32), [image(), bias, places])
        yield self.call((add, F32, F32), (tanh, F32), [image(), places, 0.5])


def specs(operands: Sequence[Any]) -> list[Any]:
    return [spec_of(x) if isinstance(x, np.ndarray) else x for x in operands]


def spec_of(array: Array) -> Spec:
    steps = tuple(stride // array.itemsize for stride in array.strides)
    return Spec(array.shape, array.dtype, None if array.flags.c_contiguous else steps)


def empty(spec: Spec) -> Array:
    room = np.zeros(max(1, spec.nbytes), np.uint8)
    return np.ndarray(spec.shape, spec.dtype, room, 0, tuple(step * spec.dtype.itemsize for step in spec.strides))


def run(kernel: Any, ins: Sequence[Any], outs: Sequence[Array], params: dict[str, Any]) -> None:
    scratch = np.zeros(kernel.scratch_bytes + 64, np.uint8)
    start = -scratch.ctypes.data % 64
    out = outs[0] if len(outs) == 1 else tuple(outs)
    with np.errstate(all="ignore"):
        kernel.run(out, *ins, scratch=scratch[start : start + kernel.scratch_bytes], **params)


def apart(call: Any) -> list[Array]:
    """Formula, norm and formula, each by itself, on arrays that are laid out like the results."""
    name, ins, outs, params = call
    group = norm_group(name, ins, [empty(out) for out in outs], params)
    like = outs[0].layout
    first, result = empty(Spec(params["shape"], F32, like)), empty(Spec(params["shape"], F32, like))
    parts = (
        (FUSED, group.others, (first, *group.kept), {"formula": group.before}),
        (group.norm, (first, *group.own), (result, *group.rest), group.params),
        (FUSED, (result, *group.others), group.made, {"formula": group.after}),
    )
    for op, given, made, own in parts:
        run(brim.device("cpu").backend.bind(op, specs(given), specs(made), own), given, made, own)
    return [*group.made, *group.kept, *group.rest]


def joined(call: Any, threads: int = 2, over: dict[int, int] | None = None) -> list[Array]:
    """The native call's results; ``over``: output -> the operand in whose memory it lies."""
    name, ins, outs, params = call
    before = native.get_threads()
    native.set_threads(threads)
    try:
        kernel = bind_native(name, specs(ins), outs, params)
        assert kernel is not None
        copies = [x.copy(order="K") if isinstance(x, np.ndarray) else x for x in ins]
        made = [copies[(over or {})[n]] if n in (over or {}) else empty(out) for n, out in enumerate(outs)]
        run(kernel, copies, made, params)
        for n, (x, y) in enumerate(zip(ins, copies, strict=True)):
            assert n in (over or {}).values() or np.array_equal(x, y, equal_nan=True)
        return made
    finally:
        native.set_threads(before)


def same_bits(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


CASES = [
    (name, shape, order)
    for name in FUSED_NORMS
    for shape in (
        ROWS if name.startswith("layer") else IMAGES if name == "batch_norm" else [s for s in IMAGES if len(s) > 2]
    )
    for order in ("", "channels last")
    if not order or (name == "batch_norm" and len(shape) == 4)
]


@pytest.mark.parametrize(
    ("name", "shape", "order"), CASES, ids=lambda x: "x".join(map(str, x)) if x and isinstance(x, tuple) else x or "-"
)
@pytest.mark.parametrize("special", [False, True], ids=["finite", "nan"])
def test_the_bits_of_the_parts(name: str, shape: tuple[int, ...], order: str, special: bool) -> None:
    for call in Case(name, shape, order, special).calls():
        expected = apart(call)
        assert same_bits(joined(call, 1), expected)
        assert same_bits(joined(call, 2), expected)


@pytest.mark.parametrize("name", FUSED_NORMS)
@pytest.mark.parametrize("order", ["", "channels last"])
def test_results_may_lie_over_operands_as_programs_place_them(name: str, order: str) -> None:
    rows, gradient = name.startswith("layer"), name.endswith("_grad")
    for shape in ((7, 1500),) if rows else ((3, 12, 33, 9), (3, 12, 5, 9), (2, 9, 40, 40)):
        case = Case(name, shape, "" if rows else order)
        own = len(case.own)
        for call in case.calls():
            group = norm_group(call[0], call[1], call[2], call[3])
            others = [own + n for n, x in enumerate(group.others) if np.shape(x) == shape]
            free = [0, *others] if gradient and not group.kept else others
            if any(out.dtype != F32 for out in group.made):
                continue
            expected = apart(call)
            for which in free:
                assert same_bits(joined(call, 2, {0: which}), expected)
            if group.keeps_first is not None and name != "layer_norm":
                for which in others:
                    assert same_bits(joined(call, 2, {1: which}), expected)


@pytest.mark.parametrize("name", FUSED_NORMS)
def test_large_results_that_are_written_past_the_caches(name: str) -> None:
    for call in list(Case(name, (3000, 768) if name.startswith("layer") else (40, 16, 60, 60)).calls())[:1]:
        assert same_bits(joined(call), apart(call))


def test_numbers_that_change_are_read_at_each_run() -> None:
    case = Case("layer_norm_grad", (6, 40))
    scale = ScalarCell(5.0)
    scaled = lambda b, y, x: [b.call("mul", [y, x[1]], F32)]  # noqa: E731
    name, ins, outs, params = case.call(None, (scaled, F32), [case.image(), 5.0])
    kernel = bind_native(name, specs(ins), outs, params)
    assert kernel is not None
    assert kernel.prepare is not None
    made, scratch = [empty(out) for out in outs], np.zeros(kernel.scratch_bytes, np.uint8)
    calls = kernel.prepare(tuple(made), *ins[:-1], scale, scratch=scratch, **params)
    assert calls
    for number in (5.0, 9.0):
        scale.value = number
        for call in calls:
            call()
        assert same_bits(made, apart((name, [*ins[:-1], number], outs, params)))


@pytest.mark.parametrize("why", ["float64", "strided", "long rows", "two large results", "draws"])
def test_what_has_no_kernel_stays_apart(why: str) -> None:
    shape = {"long rows": (2, 5000), "two large results": (3000, 768)}.get(why, (4, 30))
    case = Case("layer_norm", shape)
    sums = lambda b, y, x: [b.call("add", [y, x[1]], F32)]  # noqa: E731
    both = lambda b, y, x: [b.call("add", [y, x[1]], F32), y]  # noqa: E731
    call: Any = case.call(None, (sums, F32), [case.image(), case.image()])
    assert joins(call) is (why != "long rows")
    if why == "float64":
        call[1][0] = call[1][0].astype(np.float64)
    elif why == "strided":
        call = case.call(None, (sums, F32), [case.image(), np.ascontiguousarray(case.image().T).T])
    elif why == "draws":
        call = case.call(None, (lambda b, y, x: [dropped(b, y, x[1], x[2])], F32), [case.image(), SEED, COUNTER])
    elif why == "two large results":
        call = case.call(None, (both, F32, F32), [case.image(), case.image()])
    assert not joins(call)


def joins(call: Any) -> bool:
    name, ins, outs, params = call
    return CpuBackend().joins_norms(FUSED_NORMS[name.removesuffix("_fused")], specs(ins), outs, params)


@pytest.mark.parametrize("why", ["broadcast", "strided", "min", "order", "negative zero", "two results", "before"])
def test_other_forms_around_batch_norm_stay_apart(why: str) -> None:
    case = Case("batch_norm", (3, 4, 5, 6))
    shortcut, zero, fn, before = case.image(), 0.0, "max", None
    if why == "broadcast":
        shortcut = case.array(1, 4, 1, 1)
    elif why == "strided":
        shortcut = np.ascontiguousarray(shortcut.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    elif why == "negative zero":
        zero = -0.0
    elif why == "before":
        before = (lambda b, x: [b.call("neg", [x[0]], F32)],)
    fn = "min" if why == "min" else "max"

    def build(b: FormulaBuilder, y: Any, x: Any) -> list[Any]:
        args = [b.call("add", [y, x[1]], F32), ("const", zero)]
        made = b.call(fn, args[::-1] if why == "order" else args, F32)
        return [made, y] if why == "two results" else [made]

    call = case.call(before, (build, *[F32] * (2 if why == "two results" else 1)), [case.image(), shortcut])
    assert not joins(call)
    assert joins(next(case.calls()))


@pytest.mark.parametrize("why", ["less", "other value", "after", "stored", "large image"])
def test_other_forms_around_the_gradient_of_batch_norm_stay_apart(why: str) -> None:
    case = Case("batch_norm_grad", (2, 3, 70, 70) if why == "large image" else (3, 4, 5, 6))

    def build(b: FormulaBuilder, x: Any) -> list[Any]:
        asked = b.call("lt" if why == "less" else "gt", [x[0], ("const", 0)], F32)
        made = b.call("where", [asked, x[1], ("const", 1.0 if why == "other value" else 0.0)], F32)
        return [made] * (2 if why == "stored" else 1)

    after = (lambda b, y, x: [b.call("neg", [y], F32)], F32) if why == "after" else None
    stored = [F32] if why == "stored" else []
    assert not joins(case.call((build, *stored), after, [case.image(), case.image()]))
    assert joins(next(Case("batch_norm_grad", (3, 4, 5, 6)).calls()))
