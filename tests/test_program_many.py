"""Instructions of several parts (``fused_many``): what placing, the verifier and the CPU make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from brim.expr import FormulaBuilder
from brim.program.ir import FUSED_MANY, Instruction, Program, Ref, Value
from brim.program.passes.liveness import live_bytes
from brim.program.place import overwritable, plan_memory
from brim.program.verify import ProgramError, verify
from brim.spec import Spec
from brim_cpu import backend
from update_programs import (
    F32,
    constant_formula,
    momentum_formula,
    step,
)

CPU = backend()


def many(*parts: tuple[tuple[Value, ...], tuple[Value, ...]], shared: tuple[Any, ...] = ()) -> Instruction:
    ins = [Ref.of(v) for part, _ in parts for v in part]
    params = {"formula": momentum_formula(), "count": len(parts), "shared": len(shared)}
    return Instruction(FUSED_MANY, (*shared, *ins), tuple(o for _, outs in parts for o in outs), params)


def _values(count: int, shape: tuple[int, ...] = (4,)) -> list[Value]:
    return [Value(Spec(shape)) for _ in range(count)]


def test_a_part_writes_only_over_what_it_alone_reads() -> None:
    a, b, c, d, e = _values(5)
    outs = _values(4)
    instruction = many(((a, b, c), (outs[0], outs[1])), ((d, b, e), (outs[2], outs[3])))
    assert overwritable(instruction, outs[0]) == overwritable(instruction, outs[1]) == [a, c]
    assert overwritable(instruction, outs[3]) == [d, e]
    turned = replace(instruction, ins=(Ref(a, Spec((4,), F32, (-1,)), 3), *instruction.ins[1:]))
    assert overwritable(turned, outs[0]) == [c]


def test_a_part_takes_over_no_memory_of_another() -> None:
    x, state = Value(Spec((4,)), "input"), Value(Spec((4,)), "state")
    a, b, at_home, out = Value(x.spec), Value(x.spec), Value(x.spec, home=state), Value(x.spec)
    params = {"formula": constant_formula(2.0), "count": 2, "shared": 0}
    both = Instruction(FUSED_MANY, (Ref.of(a), Ref.of(b)), (at_home, out), params)
    steps = [step("square", x, out=a), step("exp", x, out=b), both]
    for results, shares, nbytes in (((b, out), {}, 48), ((out,), {out: b}, 32)):
        program = Program([x], [state], {}, steps, [Ref.of(v) for v in results])
        verify(program)
        found = plan_memory(program, [0] * 3, [False, False, True]).shares
        assert found == shares
        assert live_bytes(program)[2] == nbytes


def test_the_verifier_knows_parts() -> None:
    x = Value(Spec((4,)), "input")
    y = Value(Spec((4, 1)), "input")
    state = Value(Spec((4,)), "state")

    def check(*instructions: Instruction) -> None:
        verify(Program([x, y], [state], {}, list(instructions), []))

    formula = constant_formula(2.0)

    def plain(ins: tuple[Value | Ref, ...], outs: tuple[Value, ...], **params: Any) -> Instruction:
        refs = tuple(i if isinstance(i, Ref) else Ref.of(i) for i in ins)
        return Instruction(FUSED_MANY, refs, outs, {"formula": formula, "count": 2, "shared": 0, **params})

    check(plain((x, y), (Value(x.spec), Value(y.spec))))
    with pytest.raises(ProgramError, match="2 inputs and 3 outputs are not those of 2 equal parts"):
        check(plain((x, y), tuple(_values(3))))
    with pytest.raises(ProgramError, match="not those of 3 equal parts"):
        check(plain((x, y), tuple(_values(2)), count=3))
    with pytest.raises(ProgramError, match="not those of 0 equal parts"):
        check(plain((x, y), tuple(_values(2)), count=0))
    with pytest.raises(ProgramError, match="larger than an output"):
        check(plain((x, y), tuple(_values(2))))
    with pytest.raises(ProgramError, match="no param formula"):
        check(plain((x, y), (Value(x.spec), Value(y.spec)), formula="2 x"))
    with pytest.raises(ProgramError, match="not row-major"):
        check(plain((Ref(x, Spec((4,), F32, (-1,)), 3), x), tuple(_values(2))))
    with pytest.raises(ProgramError, match="another size"):
        check(plain((y, y), (Value(y.spec), Value(Spec((4, 5))))))
    home = Value(state.spec, home=state)
    check(plain((state, x), (home, Value(x.spec))))
    with pytest.raises(ProgramError, match="otherwise than element for element"):
        check(plain((x, state), (home, Value(x.spec))))


def test_the_cpu_kernel_runs_the_parts_in_order() -> None:
    rng = np.random.default_rng(0)
    sizes = (5, 0, 1, 40_000)
    arrays = [[rng.standard_normal(n).astype("f4") for _ in range(3)] for n in sizes]
    flat = [a for part in arrays for a in part]
    builder = FormulaBuilder([None, None, F32, F32, F32])  # lr and momentum come first: they are shared
    velocity = builder.call("add", [builder.call("mul", [("in", 1), ("in", 3)], F32), ("in", 4)], F32)
    param = builder.call("sub", [("in", 2), builder.call("mul", [("in", 0), velocity], F32)], F32)
    params = {"formula": builder.formula([param[1], velocity[1]]), "count": 4, "shared": 2}
    specs = [Spec(a.shape, a.dtype) for a in flat]
    out_specs = [Spec((n,)) for n in sizes for _ in range(2)]
    kernel = CPU.bind(FUSED_MANY, [1.0, 1.0, *specs], out_specs, params)
    assert kernel.aliasing
    outs = tuple(np.zeros(s.shape, "f4") for s in out_specs)
    scratch = CPU.allocate(0, kernel.scratch_bytes)
    kernel.run(outs, 0.1, 0.9, *flat, scratch=scratch, **params)
    for n, (p, v, g) in enumerate(arrays):
        new = np.float32(0.9) * v + g
        np.testing.assert_array_equal(outs[2 * n + 1], new)
        np.testing.assert_array_equal(outs[2 * n], p - np.float32(0.1) * new)
    again = tuple(a for p, v, _ in arrays for a in (p, v))
    assert kernel.prepare is not None
    for call in kernel.prepare(again, 0.1, 0.9, *flat, scratch=scratch, **params) or ():
        call()
    for got, want in zip(again, outs, strict=True):
        np.testing.assert_array_equal(got, want)
