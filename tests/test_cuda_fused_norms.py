"""Norms with formulas on the emulated GPU: against the three parts by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from brim.expr import FormulaBuilder, FusedFormula
from brim.op import REGISTRY
from brim.program.ir import FUSED
from brim.program.norm_groups import FUSED_NORMS, identity, norm_group
from brim.spec import DTYPES, Spec
from brim_cuda.emulation import EmulationLoader
from brim_cuda.kernels.norm import joins_norms
from brim_cuda.registry import work_of
from emulating import WHY_NOT, Recorded, emulated, kernels_of, same_bits
from test_cuda_composites import _spec, channels_last

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
F32, BOOL = DTYPES["float32"], DTYPES["bool"]
ROWS = ((9, 33), (2, 3, 64), (2, 5000), (700, 24))
IMAGES = ((3, 40, 5, 7), (2, 3, 4, 4), (4, 2, 90, 64), (700, 33))
SEED, COUNTER, RATE = 17, 2**40 + 3, 0.3


def formula(dtypes: list[Any], build: Any, *outs: Any) -> FusedFormula:
    """``build(builder)`` gives operands, which are brought to the dtypes ``outs``."""
    builder = FormulaBuilder(dtypes)
    found = build(builder)
    return builder.formula([builder.result(x, F32, dtype) for x, dtype in zip(found, outs, strict=True)])


def dropped(builder: FormulaBuilder, x: Any, seed: Any, counter: Any) -> Any:
    uniform = builder.step("uniform", (seed, counter), DTYPES["uint64"], F32)
    away = builder.call("lt", [uniform, ("const", RATE)], F32)
    return builder.call("where", [away, ("const", 0.0), builder.call("mul", [x, ("const", 1 / (1 - RATE))], F32)], F32)


class Case:
    """Operands of one norm with formulas, in one dtype; they are made anew for each way of joining."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, order: str = "") -> None:
        self.name, self.shape, self.dtype, self.order = name, shape, DTYPES[dtype], order
        self.rng = np.random.default_rng(0)
        self.rows = name.startswith("layer")
        self.wide = F32 if self.dtype.itemsize == 2 else self.dtype
        self.params: dict[str, Any] = {"eps": 1e-3, **({"ndim": 1} if self.rows else {})}
        vector = shape[-1:] if self.rows else shape[1:2]
        statistics = (*shape[:-1], 1) if self.rows else (1, shape[1], *(1 for _ in shape[2:]))
        self.own: list[Any] = [self.array(*vector) + self.dtype.type(1), self.array(*vector)]
        if name.endswith("_grad"):
            mean = self.rng.standard_normal(statistics).astype(self.wide)
            self.own = [self.image(), self.own[0], mean, np.abs(mean) + self.wide.type(1)]

    def array(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape).astype(self.dtype)

    def image(self) -> Any:
        made = self.array(*self.shape)
        return channels_last(made) if self.order == "channels last" else made

    def call(self, before: Any, after: Any, others: Sequence[Any], given: Sequence[Any] = ()) -> Recorded:
        """The joined op; ``before`` and ``after`` build formulas (None: hands on), given (builder, operands)."""
        kinds = [x.dtype if isinstance(x, np.ndarray) else None for x in others]
        numbers = [("in", n) for n in range(len(others))]
        head = identity(self.dtype)
        if before is not None:
            build, *kept = before
            head = formula(kinds, lambda b: build(b, numbers), self.dtype, *kept)
        tail = identity(self.dtype)
        if after is not None:
            build, *made = after
            later = [("in", n + 1) for n in range(len(others))]
            tail = formula([self.dtype, *kinds], lambda b: build(b, ("in", 0), later), *made)
        params = {**self.params, "before": head, "after": tail, "shape": self.shape}
        op, ins = FUSED_NORMS[self.name], tuple(_spec(x) for x in (*self.own, *others))
        outs = tuple(self.laid_out(spec) for spec in op.infer(ins, params))
        return Recorded(op, ins, outs, params, (*self.own, *others), ())

    def laid_out(self, spec: Spec) -> Spec:
        if self.order != "channels last" or spec.shape != self.shape:
            return spec
        return Spec(spec.shape, spec.dtype, _spec(channels_last(np.empty(self.shape, spec.dtype))).strides)

    def calls(self) -> Iterator[Recorded]:
        image, dtype = self.image, self.dtype
        mask = lambda b, x: [  # noqa: E731
            b.call("where", [b.call("gt", [x[0], ("const", 0)], F32), x[1], ("const", 0.0)], F32)
        ]
        relu = lambda b, y, x: [b.call("max", [y, ("const", 0)], F32)]  # noqa: E731
        shortcut = lambda b, y, x: [b.call("max", [b.call("add", [y, x[1]], F32), ("const", 0)], F32)]  # noqa: E731
        yield self.call(None, (relu, dtype), [image()])
        yield self.call(None, (shortcut, dtype), [image(), image()])
        yield self.call((mask,), (relu, dtype), [image(), image()])
        # A sum with a vector, which is stored besides; a comparison that is stored; two results in other dtypes.
        vector = self.array(*self.shape[-1:])
        add = lambda b, x: [(s := b.call("add", [x[0], x[1]], F32)), s]  # noqa: E731
        positive = lambda b, y, x: [b.call("gt", [y, x[0]], F32), b.call("mul", [y, x[2]], F32)]  # noqa: E731
        yield self.call((add, dtype), None, [image(), vector, 2.5])
        yield self.call((add, dtype), (positive, BOOL, F32 if dtype.itemsize < 8 else dtype), [image(), image(), 2.5])
        # Dropout before and after.
        both = lambda b, x: [(s := b.call("add", [x[0], dropped(b, x[1], x[2], x[3])], F32)), s]  # noqa: E731
        thinned = lambda b, y, x: [(s := b.call("add", [x[0], y], F32)), dropped(b, s, x[1], x[2])]  # noqa: E731
        yield self.call((both, dtype), None, [image(), image(), SEED, COUNTER])
        yield self.call(None, (lambda b, y, x: thinned(b, y, x), dtype, dtype), [image(), SEED, COUNTER])


def parts_of(one: Recorded) -> list[Any]:
    """What the three parts give by themselves on the emulated device: formula, norm, formula."""
    loader, shape = loader_of(0), one.params["shape"]
    group = norm_group(one.op.name, one.given, one.outs, one.params)
    like = group.made[0]
    first_spec = Spec(shape, group.first_dtype, like.layout)
    first, *kept = _run(loader, FUSED, group.others, [first_spec, *group.kept], {"formula": group.before})
    result = Spec(shape, group.own[0].dtype if group.norm.name.endswith("_grad") else group.first_dtype, like.layout)
    made, *rest = _run(loader, group.norm, [first, *group.own], [result, *group.rest], group.params)
    return [*_run(loader, FUSED, [made, *group.others], group.made, {"formula": group.after}), *kept, *rest]


def _run(loader: Any, op: Any, given: Sequence[Any], outs: Sequence[Spec], params: dict[str, Any]) -> list[Any]:
    return emulated(loader, Recorded(op, tuple(map(_spec, given)), tuple(outs), params, tuple(given), ()))


NAMES = tuple(FUSED_NORMS)
DTYPE_SHAPES = {"float32": slice(None), "float64": slice(1, 2), "bfloat16": slice(1, 2)}


@cache
def cases(name: str) -> tuple[Recorded, ...]:
    found: list[Recorded] = []
    for dtype, which in DTYPE_SHAPES.items():
        for shape in (ROWS if name.startswith("layer") else IMAGES)[which]:
            orders = ("", "channels last") if len(shape) == 4 and name.startswith("batch") else ("",)
            for order in orders:
                found += list(Case(name, shape, dtype, order).calls())[:: 1 if dtype == "float32" else 3]
    return tuple(found)


@cache
def loader_of(order: int) -> EmulationLoader:
    made = EmulationLoader(order=order)
    made.functions(kernels_of([one.work() for name in NAMES for one in cases(name)]))  # type: ignore[misc]
    return made


@needs_compiler
@pytest.mark.parametrize("order", [0, 17], ids=["forward", "shuffled"])
@pytest.mark.parametrize("name", NAMES)
def test_joined_norms_have_the_bits_of_their_parts(name: str, order: int) -> None:
    for one in cases(name):
        got = emulated(loader_of(order), one)
        for number, (found, want) in enumerate(zip(got, parts_of(one), strict=True)):
            assert same_bits(found, want), f"{one} result {number}"


def test_what_the_backend_wants() -> None:
    def wanted(case: Case, which: int) -> bool:
        one = list(case.calls())[which]
        return joins_norms(one.op.name, one.ins, one.outs, one.params)

    layer, images = Case("layer_norm", (5, 768), "float32"), Case("batch_norm", (2, 3, 4, 4), "float32")
    assert all(wanted(layer, n) for n in range(7))
    assert all(wanted(images, n) for n in range(7))
    # Eight elements of dropout are drawn at once or not at all.
    odd = Case("layer_norm", (5, 33), "float32")
    assert [wanted(odd, n) for n in range(7)] == [True] * 5 + [False] * 2
    # The gradients of layer norm's weights read what comes before once more: nothing is stored or drawn for them.
    gradient = Case("layer_norm_grad", (5, 768), "float32")
    assert [wanted(gradient, n) for n in range(7)] == [True] * 3 + [False] * 3 + [True]
    uneven = Spec((6, 5, 8, 8), F32, (640, 128, 16, 1))
    same = identity(F32)
    params = {"before": same, "after": same, "shape": uneven.shape, "eps": 1e-5}
    outs = REGISTRY["batch_norm_fused"].infer([1.0, 0.0, uneven], params)
    assert not joins_norms("batch_norm_fused", [1.0, 0.0, uneven], outs, params)
    assert work_of(REGISTRY["batch_norm_fused"], [1.0, 0.0, uneven], outs, params).contiguous == (False, False, True)
