"""One launch for the updates of many parameters: the CPU's bits, every array in guarded memory, launches counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import brim
import emulated
from brim import nn, optim
from brim.backend import ScalarCell
from brim.check.networks import compiled, make
from brim.expr import FormulaBuilder, FusedFormula
from brim.program.ir import FUSED_MANY, HostScalar, Instruction, Ref
from brim.program.passes import default_passes
from brim.program.passes.side_by_side import side_by_side
from brim.spec import DTYPES, Spec
from brim_cpu import backend
from brim_cuda.emulation import EmulationError, EmulationLoader, Guarded
from brim_cuda.kernels import many
from brim_cuda.launch import Call, Entry, In, Kernel, Out, Param, Table, named_kernel
from brim_cuda.many_c import PARAMETER_BYTES_MAX
from brim_cuda.nvrtc import compile_cubin, compile_ptx, find_nvrtc
from brim_cuda.registry import Work, bind, work_of
from brim_cuda.source import translation_unit
from brim_cuda.steps import bound
from emulating import WHY_NOT, kernels_of, poison, same_bits

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")

CPU = backend()
Array = np.ndarray[Any, Any]
F32, F64, BF16, INT64 = (DTYPES[name] for name in ("float32", "float64", "bfloat16", "int64"))
SIZES = [5, 1, 0, 1023, 4, 2050, 7, 256, 1024, 3]


class Many:
    """A joined instruction with numbers to work on.

    Arguments:
        formula: its first ``shared`` inputs are shared.
        shared: their values.
        parts: the other inputs of each part; numbers and arrays.
        outs: dtypes of the outputs of a part.
    """

    def __init__(
        self, formula: FusedFormula, shared: Sequence[Any], parts: Sequence[Sequence[Any]], outs: Sequence[Any]
    ) -> None:
        self.params = {"formula": formula, "count": len(parts), "shared": len(shared)}
        self.ins = [*shared, *(x for part in parts for x in part)]
        self.specs = [_spec(x) for x in self.ins]
        shapes = [next(x.shape for x in part if isinstance(x, np.ndarray)) for part in parts]
        self.outs = [Spec(shape, dtype) for shape in shapes for dtype in outs]

    def work(self) -> Work:
        return work_of(FUSED_MANY, self.specs, self.outs, self.params)

    def from_slots(self) -> Work:
        """The same launches with scalars in device memory."""
        form = self.params["count"], self.params["shared"]
        slots = many.many_slot_values(self.params["formula"], self.specs, self.ins, *form)
        return Work(many.many_calls(self.params["formula"], self.specs, self.outs, *form, slots))

    def on_cpu(self) -> list[Array]:
        outs = [np.zeros(spec.shape, spec.dtype) for spec in self.outs]
        kernel = CPU.bind(FUSED_MANY, self.specs, self.outs, self.params)
        scratch = CPU.allocate(0, kernel.scratch_bytes)
        with CPU.running(0):
            kernel.run(tuple(outs), *self.ins, scratch=scratch, **self.params)
        return outs

    def emulated(self, loader: EmulationLoader, prepared: bool = False) -> list[Array]:
        """Every array in guarded memory of its own."""
        held = [Guarded(x) if isinstance(x, np.ndarray) else x for x in self.ins]
        given = [x.array if isinstance(x, Guarded) else x for x in held]
        outs = [Guarded(np.zeros(spec.shape, spec.dtype)) for spec in self.outs]
        for out in outs:
            poison(out.array)
        kernel = bind(loader, FUSED_MANY, self.specs, self.outs, self.params)
        assert kernel.aliasing
        targets = tuple(out.array for out in outs)
        if prepared:
            assert kernel.prepare is not None
            for call in kernel.prepare(targets, *given, **self.params) or ():
                call()
        else:
            kernel.run(targets, *given, **self.params)
        for memory in (*outs, *(x for x in held if isinstance(x, Guarded))):
            memory.check()
        for before, after in zip(self.ins, given, strict=True):
            assert not isinstance(before, np.ndarray) or before.tobytes() == after.tobytes()
        return list(targets)


def _spec(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    return Spec(x.shape, x.dtype, None if x.flags.c_contiguous else tuple(s // x.itemsize for s in x.strides))


def sgd(dtype: np.dtype[Any] = F32) -> FusedFormula:
    """Of lr, momentum; p, v, g: p - lr v', v' = momentum v + g."""
    b = FormulaBuilder([None, None, dtype, dtype, dtype])
    velocity = b.call("add", [b.call("mul", [("in", 1), ("in", 3)], dtype), ("in", 4)], dtype)
    param = b.call("sub", [("in", 2), b.call("mul", [("in", 0), velocity], dtype)], dtype)
    return b.formula([param[1], velocity[1]])


def adam() -> FusedFormula:
    """Of lr, beta1, beta2, eps; p, m, v, g, correction1, root of correction2, which differ by parameter."""
    b = FormulaBuilder([None] * 4 + [F32] * 4 + [None] * 2)
    p, m, v, g = (("in", n) for n in range(4, 8))

    def make(fn: str, *args: Any) -> Any:
        return b.call(fn, args, F32)

    m2 = make("add", m, make("mul", make("sub", ("const", 1.0), ("in", 1)), make("sub", g, m)))
    square = make("mul", make("sub", ("const", 1.0), ("in", 2)), make("square", g))
    v2 = make("add", make("mul", ("in", 2), v), square)
    bottom = make("add", make("div", make("sqrt", v2), ("in", 9)), ("in", 3))
    step = make("mul", make("div", ("in", 0), ("in", 8)), make("div", m2, bottom))
    return b.formula([make("sub", p, step)[1], m2[1], v2[1]])


def sgd_case(sizes: Sequence[int], dtype: np.dtype[Any] = F32, scalars: Sequence[Any] = (0.1, 0.9)) -> Many:
    rng = np.random.default_rng(len(sizes))
    parts = [[rng.standard_normal(n).astype(dtype) for _ in range(3)] for n in sizes]
    return Many(sgd(dtype), scalars, parts, [dtype, dtype])


def adam_case(sizes: Sequence[int]) -> Many:
    rng = np.random.default_rng(len(sizes))
    parts: list[list[Any]] = []
    for n, size in enumerate(sizes):
        p, m, g = (rng.standard_normal(size).astype(F32) for _ in range(3))
        parts.append([p, m, rng.random(size).astype(F32), g, 1.0 - 0.9 ** (n + 1), (1.0 - 0.999 ** (n + 1)) ** 0.5])
    return Many(adam(), (1e-3, 0.9, 0.999, 1e-8), parts, [F32] * 3)


def numbers_case(sizes: Sequence[int]) -> Many:
    """Each part has numbers of its own in arrays of one element, in front of and behind its others."""
    b = FormulaBuilder([F32, F32, F32, F32])
    scaled = b.call("mul", [b.call("mul", [("in", 0), ("in", 1)], F32), ("in", 2)], F32)
    formula = b.formula([b.call("add", [scaled, ("in", 3)], F32)[1]])
    rng = np.random.default_rng(len(sizes))
    parts = [[np.asarray(rng.standard_normal(n), F32) for n in ((), (size,), ())] for size in sizes]
    made = Many(formula, [np.array(1.5, F32)], parts, [F32])
    made.outs = [Spec((size,), F32) for size in sizes]
    return made


def odd_sizes(count: int) -> list[int]:
    return [(37 * n * n + 11 * n) % 1500 for n in range(1, count + 1)]


# ------------------------------------------------------------------------------------------------------------- numbers

CASES = {
    **{f"sgd {count}": (lambda count=count: sgd_case(odd_sizes(count))) for count in (1, 2, 3, 10, 60)},
    **{f"adam {count}": (lambda count=count: adam_case(odd_sizes(count))) for count in (1, 5, 60)},
    "sgd sizes": lambda: sgd_case(SIZES),
    "adam sizes": lambda: adam_case(SIZES),
    "sgd bfloat16": lambda: sgd_case(SIZES, BF16),
    "sgd float64": lambda: sgd_case(SIZES, F64),
    "numbers of their own": lambda: numbers_case([5, 1023, 4, 2050, 7, 256, 3]),
    "many numbers of their own": lambda: numbers_case([1 + n for n in odd_sizes(90)]),
    "sgd nan": lambda: sgd_case(SIZES, scalars=(float("nan"), float("inf"))),
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_cpu(name: str) -> None:
    case = CASES[name]()
    want = case.on_cpu()
    for order in (0, 1, 2):
        loader = EmulationLoader(order)
        got = case.emulated(loader, prepared=order == 1)
        assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))
        assert loader.launches == len(case.work().calls)


@needs_compiler
def test_arrays_that_start_anywhere() -> None:
    """Vector loads only where every array of the part is aligned, also those that are written."""
    rng = np.random.default_rng(1)
    case = Many(
        sgd(), (0.5, 0.25), [[rng.standard_normal(515).astype(F32) for _ in range(3)] for _ in range(5)], [F32] * 2
    )
    starts = [(0, 0, 0), (1, 0, 0), (0, 2, 3), (4, 8, 0), (0, 0, 0)]
    out_starts = [(0, 0), (0, 0), (1, 1), (4, 0), (0, 1)]
    memory = Guarded(np.zeros((25, 528), F32))
    assert memory.array.ctypes.data % 16 == 0
    rows = iter(memory.array)
    views = [next(rows)[at:][:515] for part in starts for at in part]
    outs = tuple(next(rows)[at:][:515] for part in out_starts for at in part)
    for view, x in zip(views, case.ins[2:], strict=True):
        view[...] = x
    loader = EmulationLoader()
    bind(loader, FUSED_MANY, case.specs, case.outs, case.params).run(outs, 0.5, 0.25, *views, **case.params)
    memory.check()
    assert all(same_bits(g, w) for g, w in zip(outs, case.on_cpu(), strict=True))
    assert loader.launches == 1


@needs_compiler
@pytest.mark.parametrize("start", [0, 1])
def test_new_values_over_old_ones(start: int) -> None:
    """Each element is read and written once, with vector loads and without."""
    case = sgd_case(SIZES)
    held = [Guarded(np.zeros(16 + x.size, F32)) for x in case.ins[2:]]
    arrays = [x.array[-x.array.ctypes.data // 4 % 4 + start :][: x.array.size - 16] for x in held]
    for array, x in zip(arrays, case.ins[2:], strict=True):
        array[...] = x
    outs = tuple(x for n, x in enumerate(arrays) if n % 3 < 2)
    bind(EmulationLoader(2), FUSED_MANY, case.specs, case.outs, case.params).run(outs, 0.1, 0.9, *arrays, **case.params)
    for memory in held:
        memory.check()
    assert all(same_bits(g, w) for g, w in zip(outs, case.on_cpu(), strict=True))


@needs_compiler
def test_scalars_are_read_anew_before_each_launch() -> None:
    first, second = adam_case([3, 1025, 9]), adam_case([3, 1025, 9])
    changed = {0: 0.5, 8: 0.25, 9: 0.75, 4 + 6 + 4: 0.125}  # shared; of the first part; of the second part
    for n, value in changed.items():
        assert isinstance(second.ins[n], float)
        second.ins[n] = value
    cells = [ScalarCell(x) if isinstance(x, float) else x for x in first.ins]
    outs = tuple(np.zeros(spec.shape, spec.dtype) for spec in first.outs)
    kernel = bind(EmulationLoader(), FUSED_MANY, first.specs, first.outs, first.params)
    assert kernel.prepare is not None
    calls = kernel.prepare(outs, *cells, **first.params) or []
    for case in (first, second):
        for cell, value in zip(cells, case.ins, strict=True):
            if isinstance(cell, ScalarCell):
                cell.value = value
        for call in calls:
            call()
        assert all(same_bits(g, w) for g, w in zip(outs, case.on_cpu(), strict=True))


@needs_compiler
@pytest.mark.parametrize("count", [3, 80])
def test_scalars_from_device_memory(count: int) -> None:
    """They may be written anew between launches of the same call, as a captured graph needs it."""
    case, loader = adam_case(odd_sizes(count)), EmulationLoader()
    given = case.params["formula"], case.specs
    form = count, 4

    def numbers() -> Array:
        scalars = [x if isinstance(x, float) else None for x in case.ins]
        return many.many_slot_values(*given, scalars, *form)

    slots = Guarded(numbers())
    arrays = [Guarded(x) if isinstance(x, np.ndarray) else None for x in case.ins]
    outs = [Guarded(np.zeros(spec.shape, spec.dtype)) for spec in case.outs]
    kernel = bound(loader, many.many_calls(*given, case.outs, *form, slots.array))
    assert kernel.prepare is not None
    calls = kernel.prepare(tuple(out.array for out in outs), *(x.array if x else None for x in arrays)) or []
    assert len(calls) == len(case.work().calls)
    for changed in ({}, {0: 0.5, 8: 0.25, 4 + 6 * count - 1: 0.125}):
        for n, value in changed.items():
            assert isinstance(case.ins[n], float)
            case.ins[n] = value
        slots.array[:] = numbers()
        for call in calls:
            call()
        for memory in (slots, *outs):
            memory.check()
        assert all(same_bits(g.array, w) for g, w in zip(outs, case.on_cpu(), strict=True))


def test_no_slots_for_what_is_launched_alone() -> None:
    case = sgd_case([3, 4])
    specs = [Spec((3, 4), F32, (1, 3)) if isinstance(s, Spec) else s for s in case.specs]
    with pytest.raises(KeyError, match="scalars in its memory"):
        many.many_calls(sgd(), specs, [Spec((3, 4), F32, (1, 3))] * 4, 2, 2, np.zeros(2, np.uint64))


@needs_compiler
def test_an_array_of_one_element_for_all() -> None:
    b = FormulaBuilder([F32, F32])
    formula = b.formula([b.call("mul", [("in", 0), ("in", 1)], F32)[1]])
    rng = np.random.default_rng(2)
    parts = [[rng.standard_normal(n).astype(F32)] for n in SIZES]
    case = Many(formula, [np.array(0.3, F32)], parts, [F32])
    loader = EmulationLoader()
    got = case.emulated(loader)
    assert loader.launches == 1
    assert all(same_bits(g, w) for g, w in zip(got, case.on_cpu(), strict=True))


# ------------------------------------------------------------------------------------------------------------ launches


def launches(case: Many) -> int:
    return len(case.work().calls)


def test_launches() -> None:
    assert launches(sgd_case([0, 0])) == 0
    assert launches(sgd_case([1])) == 1
    assert launches(adam_case([5] * 50)) == 1
    assert launches(adam_case([5] * 60)) == 2
    assert launches(sgd_case([5] * 80)) == 1
    assert launches(sgd_case([5] * 160)) == 2, "a model of 160 parameters"


@pytest.mark.parametrize("count", [1, 3, 4, 5, 17, 60, 200])
def test_parameters_stay_within_what_every_driver_takes(count: int) -> None:
    for case in (adam_case([3] * count), sgd_case([3] * count, F64), sgd_case([3] * count, BF16)):
        for call in (*case.work().calls, *case.from_slots().calls):
            assert isinstance(call, Call)
            used = 0
            for param in call.kernel.params:  # each begins at a multiple of its alignment
                size = 8 if param.is_pointer else param.dtype.itemsize
                alignment = 8 if param.is_pointer else param.dtype.alignment
                used = -(-used // alignment) * alignment + size
            assert used <= PARAMETER_BYTES_MAX
            assert call.blocks[0] >= 1


def test_few_kernels_for_many_counts() -> None:
    """So that a new model needs no new one: room is a power of two, or all that fits."""
    works = [adam_case([3] * count).work() for count in (*range(1, 10), 16, 17, 32, 33, 50, 64, 65, 100, 199)]
    assert len(kernels_of(works)) <= 6


@needs_compiler
def test_what_is_not_alike_is_launched_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)

    def arrays(shape: tuple[int, ...]) -> list[Array]:
        return [rng.standard_normal(shape).astype(F32) for _ in range(3)]

    turned = [rng.standard_normal((6, 5)).astype(F32).T for _ in range(3)]
    case = Many(sgd(), (0.1, 0.9), [arrays((7,)), turned, arrays((3, 5)), arrays((40,))], [F32, F32])
    assert launches(case) == 2
    monkeypatch.setattr(many, "ELEMENTS_MAX", 39)
    assert launches(case) == 3
    got = case.emulated(EmulationLoader())
    assert all(same_bits(g, w) for g, w in zip(got, case.on_cpu(), strict=True))


def test_no_kernel_is_said_at_once() -> None:
    b = FormulaBuilder([DTYPES["int32"]])
    formula = b.formula([b.step("exp", [("in", 0)], DTYPES["int32"], DTYPES["int32"])[1]])
    for size in (3, 0):
        specs = [Spec((size,), DTYPES["int32"])] * 2
        with pytest.raises(KeyError, match="exp in int32"):
            work_of(FUSED_MANY, specs, specs, {"formula": formula, "count": 2, "shared": 0})


# --------------------------------------------------------------------------------------------------------- real steps


def joined_in(name: str) -> list[Instruction]:
    """The joined instructions of a network's step."""
    passes = [*default_passes(CPU), lambda program: side_by_side(program, 2**20, 512)]
    net = make(name)
    which, arguments = net.calls[0]
    program = compiled(net, passes=passes)[which].plan(*arguments).programs[0].prepared.program
    return [i for i in program.instructions if i.op is FUSED_MANY]


def case_of(instruction: Instruction, seed: int) -> Many:
    """An instruction on random numbers."""
    rng = np.random.default_rng(seed)
    case = Many.__new__(Many)
    case.params = instruction.params
    case.ins = [
        np.abs(rng.standard_normal(x.spec.shape)).astype(x.spec.dtype)
        if isinstance(x, Ref)
        else float(rng.random())
        if isinstance(x, HostScalar)
        else x
        for x in instruction.ins
    ]
    case.specs = [_spec(x) for x in case.ins]
    case.outs = [Spec(out.spec.shape, out.spec.dtype) for out in instruction.outs]
    return case


NAMES = ["mlp", "cnn", "transformer", "clipped", "rmsprop"]


@needs_compiler
def test_joined_updates_of_networks() -> None:
    cases = [case_of(one, n) for n, name in enumerate(NAMES) for one in joined_in(name)]
    assert len(cases) >= 8
    loader = EmulationLoader()
    loader.functions(kernels_of([case.work() for case in cases]))
    for case in cases:
        loader.launches = 0
        got = case.emulated(loader)
        assert loader.launches == 1, "the parts of each are alike"
        library = {step.fn for step in case.params["formula"].steps} & {"rsqrt", "exp", "log", "tanh", "pow"}
        for g, w in zip(got, case.on_cpu(), strict=True):
            if library:
                np.testing.assert_allclose(g, w, 1e-6, 1e-6)
            else:
                assert same_bits(g, w)


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_a_step_on_the_device_has_fewer_launches_and_the_same_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, loader = emulated.device(), emulated.machine().loader
    found = []
    for keeps_bytes in (0, 2**20):
        monkeypatch.setattr(place.backend, "joins_side_by_side", keeps_bytes, raising=False)
        brim.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.ReLU()))).to(place)
        rules = {"adam": optim.Adam, "momentum": lambda params, lr: optim.SGD(params, lr, momentum=0.9)}
        optimizer = rules[name](model.parameters(), lr=0.1)

        def step(x: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            loss = (model(x) * model(x)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        planned = brim.compile(step, device=place)
        losses = []
        for k in range(3):
            before = loader.launches
            losses.append(planned(np.full((200, 6), k + 1, "f4")).item())
        numbers = [p.detach().numpy().tobytes() for p in model.parameters()]
        peak_bytes = planned.plan(np.zeros((200, 6), "f4")).peak_bytes
        found.append((losses, numbers, peak_bytes, loader.launches - before))
    apart, together = found
    assert together[:2] == apart[:2]
    assert together[2] <= apart[2]
    assert together[3] <= apart[3] - 5, "of eight updates"


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_compiles(arch: str) -> None:
    works = (
        [CASES[name]().work() for name in CASES]
        + [CASES[name]().from_slots() for name in CASES]
        + [sgd_case([3] * count).work() for count in (5, 9, 17, 200)]
    )
    kernels = kernels_of([*works, *(case_of(one, 0).work() for name in NAMES for one in joined_in(name))])
    done = compile_cubin(translation_unit(kernels), arch, ["--ptxas-options=-v"])
    registers = list(map(int, re.findall(r"Used (\d+) registers", done.log)))
    assert len(registers) == len(kernels)
    assert max(registers) <= 128
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.log)) == {"0"}
    assert "warning" not in done.log


@needs_nvrtc
def test_arrays_are_read_in_pieces_of_16_bytes() -> None:
    ptx = compile_ptx(translation_unit(kernels_of([sgd_case([100] * 3).work()])), "compute_80")
    assert len(re.findall(r"ld\S*\.v4\.[fbu]32", ptx)) >= 3
    assert len(re.findall(r"st\S*\.v4\.[fbu]32", ptx)) >= 2
    assert "fma" not in ptx
    assert ".local" not in ptx, "the struct stays in the parameters"


# ------------------------------------------------------------------------------------------------------------- tables


def _table_kernel() -> tuple[Kernel, np.dtype[Any]]:
    table = np.dtype([("at", np.uint64, (2,)), ("by", np.float32, (2,))], align=True)
    params = [Param("t", table, ctype="NAME_t")]
    text = (
        "struct NAME_t { u64 at[2]; float by[2]; };\n"
        'extern "C" __global__ void NAME(PARAMS) { ((float*)t.at[1])[0] = ((const float*)t.at[0])[0] * t.by[1]; }\n'
    )
    return named_kernel("table", params, text, ("scalar.cuh",)), table


@needs_compiler
def test_a_table_is_filled_with_addresses_and_scalars() -> None:
    kernel, dtype = _table_kernel()
    entries = (Entry("at", (0,), In(0, 1), F32), Entry("at", (1,), Out(0), F32), Entry("by", (1,), In(1)))
    call = Call(kernel, (1,), (Table(np.zeros((), dtype), entries),), 1)
    steps = bound(EmulationLoader(), [call])
    x, y, cell = np.array([2, 3], F32), np.zeros(1, F32), ScalarCell(5)
    steps.run(y, x, cell)
    assert y[0] == 15
    assert steps.prepare is not None
    (launch,) = steps.prepare(y, x, cell) or ()
    for cell.value, want in ((2, 6), (0.5, 1.5)):
        launch()
        assert y[0] == want
    with pytest.raises(TypeError, match="parameter at is a pointer to float32, got an array of float64"):
        steps.run(y, x.astype(F64), cell)
    with pytest.raises(TypeError, match="parameter at is a pointer to float32, got float"):
        steps.run(y, 2.0, cell)
    wrong = Call(kernel, (1,), (Table(np.zeros((), np.dtype([("at", np.uint64, (2,))])), ()),), 1)
    with pytest.raises(TypeError, match="is a struct"):
        bound(EmulationLoader(), [wrong]).run(y, x, cell)
    missing = Call(kernel, (1,), (Table(np.zeros((), dtype), ()),), 1)
    with pytest.raises(EmulationError, match="t"):
        bound(EmulationLoader(), [missing]).run(y, x, cell)
