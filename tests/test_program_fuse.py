"""Fusion and simplification of programs: the same bits, no more memory, nothing moved past what it depends on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brim
import program_oracle
from brim import nn, optim
from brim.expr import FusedFormula
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.ir import FUSED, STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.passes.fuse import OPERANDS_MAX, STEPS_MAX, fuse
from brim.program.passes.simplify import simplify
from brim.program.verify import verify
from brim.spec import DTYPES, Spec
from program_oracle import run_program
from random_programs import random_arrays, random_program

Array = np.ndarray[Any, Any]


class Maker:
    """Writes a program by hand: each call of an op returns the value it makes."""

    def __init__(self) -> None:
        self.inputs: list[Value] = []
        self.states: list[Value] = []
        self.instructions: list[Instruction] = []
        self.phase = "forward"

    def input(self, *shape: int, dtype: str = "float32") -> Value:
        self.inputs.append(Value(Spec(shape, DTYPES[dtype]), "input"))
        return self.inputs[-1]

    def state(self, *shape: int) -> Value:
        self.states.append(Value(Spec(shape), "state"))
        return self.states[-1]

    def __call__(self, name: str, *ins: Any, **params: Any) -> Value:
        refs = tuple(Ref.of(x) if isinstance(x, Value) else x for x in ins)
        specs = [x.spec if isinstance(x, Ref) else x.kind(1) if isinstance(x, HostScalar) else x for x in refs]
        out = Value(REGISTRY[name].infer(specs, params)[0], op=name)
        self.instructions.append(Instruction(REGISTRY[name], refs, (out,), params, phase=self.phase))
        return out

    def opaque(self, x: Any) -> Value:
        """Something that is not elementwise and gives one number: it stands between others."""
        return self("sum", x, axes=(0,), keepdims=False)

    def store(self, state: Value, new: Value) -> None:
        self.instructions.append(Instruction(STORE, (Ref.of(state), Ref.of(new)), (), phase="update"))

    def program(self, *results: Value) -> Program:
        program = Program(self.inputs, self.states, {}, self.instructions, [Ref.of(x) for x in results])
        verify(program)
        return program


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


def given_for(program: Program) -> dict[Value, Array]:
    rng = np.random.default_rng(0)
    return {v: rng.standard_normal(v.spec.shape).astype(v.spec.dtype) for v in (*program.inputs, *program.states)}


def on_the_cpu(formula: FusedFormula, ins: Sequence[Any], outs: Sequence[Spec]) -> list[Array]:
    """A fused group by the CPU's own kernel, in place of the oracle's evaluation."""
    arrays = [np.empty(spec.shape, spec.dtype) for spec in outs]
    cpu = program_oracle.CPU
    specs = [
        Spec(x.shape, x.dtype, tuple(s // x.itemsize for s in x.strides)) if isinstance(x, np.ndarray) else x
        for x in ins
    ]
    kernel = cpu.bind(FUSED, specs, outs, {"formula": formula})
    kernel.run(arrays[0] if len(outs) == 1 else tuple(arrays), *ins, scratch=cpu.allocate(0, kernel.scratch_bytes))
    return arrays


def assert_same(program: Program, other: Program, arrays: dict[Value, Array]) -> None:
    verify(other)
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_oracle, "evaluate_fused", on_the_cpu)
        a, b = run_program(program, arrays), run_program(other, arrays)
    assert [x.tobytes() for x in a.results] == [x.tobytes() for x in b.results]
    assert [a.states[s].tobytes() for s in program.states] == [b.states[s].tobytes() for s in program.states]


def fused_same(program: Program, *passes: Any) -> Program:
    """The program after fusion (or the passes given), checked to compute the same."""
    after = program
    for one in passes or (fuse,):
        after = one(after)
    assert_same(program, after, given_for(program))
    return after


# ---------------------------------------------------------------------------------------------------- what is merged


def test_a_chain_becomes_one_instruction_and_its_values_go() -> None:
    make = Maker()
    x, y = make.input(5, 3), make.input(5, 3)
    out = make("tanh", make("add", make("multiply", x, y), 2.0))
    program = make.program(out)
    after = fused_same(program)
    assert names(after) == ["fused"]
    assert [ref.value for ref in after.instructions[0].refs] == [x, y]
    assert after.instructions[0].outs == (out,)
    assert [step.fn for step in after.instructions[0].params["formula"].steps] == ["mul", "add", "tanh"]


def test_a_value_that_others_need_is_written_out_and_used_inside() -> None:
    make = Maker()
    x = make.input(5)
    middle = make("exp", x)
    out = make("negative", middle)
    total = make.opaque(middle)
    after = fused_same(make.program(total, out))
    assert names(after) == ["fused", "sum"]
    assert set(after.instructions[0].outs) == {middle, out}


def test_running_earlier_must_not_hold_more() -> None:
    """The consumer at the producer's place would hold its result over the sum, beside the producer's."""
    make = Maker()
    middle = make("exp", make.input(5))
    total = make.opaque(middle)
    out = make("negative", middle)
    assert names(fused_same(make.program(total, out, middle))) == ["exp", "sum", "negative"]


def test_equal_steps_are_merged_and_dtypes_are_converted_as_before() -> None:
    make = Maker()
    x, h = make.input(40), make.input(40, dtype="bfloat16")
    a = make("multiply", make("exp", h), 1.7)
    b = make("add", make("exp", h), a)
    out = make("add", x, make("multiply", b, a))
    mask = make("greater", out, h)
    chosen = make("where", mask, out, 0)
    after = fused_same(make.program(chosen, mask))
    assert names(after) == ["fused"]
    assert [s.fn for s in after.instructions[0].params["formula"].steps].count("exp") == 1


def test_host_scalars_stay_inputs() -> None:
    make = Maker()
    rate = HostScalar(lambda: 0.5)
    p, g = make.state(4), make.input(4)
    new = make("subtract", p, make("multiply", g, rate))
    make.store(p, new)
    after = fused_same(make.program())
    assert names(after) == ["fused", "store"]
    assert rate in after.instructions[0].ins


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_dropout_joins_its_neighbours(dtype: str, p: float) -> None:
    make = Maker()
    x = make.input(33, 5, dtype=dtype)
    counter = HostScalar(lambda: 11, int)
    out = make("relu", make("dropout", make("multiply", x, 3.0), 5, counter, p=p))
    after = fused_same(make.program(out))
    assert names(after) == ["fused"]
    assert [s.fn for s in after.instructions[0].params["formula"].steps].count("uniform") == 1


def test_groups_stay_within_their_limits() -> None:
    make = Maker()
    values = [make.input(6) for _ in range(60)]
    out = values[0]
    for n in range(150):
        out = make(("add", "multiply", "maximum")[n % 3], out, values[n % 60])
    after = fused_same(make.program(out))
    groups = [i for i in after.instructions if i.op is FUSED]
    assert 3 <= len(after.instructions) <= 20
    for group in groups:
        assert len(group.params["formula"].steps) <= STEPS_MAX
        assert len(group.ins) + len(group.outs) <= OPERANDS_MAX


# ------------------------------------------------------------------------------------------------ what stays apart


def test_other_shapes_stay_apart() -> None:
    make = Maker()
    x, scale = make.input(6, 4), make.input(4)
    out = make("multiply", x, make("exp", make("negative", scale)))
    after = fused_same(make.program(out))
    assert names(after) == ["fused", "multiply"]
    assert after.instructions[0].outs[0].spec.shape == (4,)


def test_a_transposed_or_shifted_reading_stays_apart() -> None:
    for spec, offset in ((Spec((4, 4), DTYPES["float32"], (1, 4)), 0), (Spec((4, 4), DTYPES["float32"], (-4, 1)), 12)):
        make = Maker()
        x = make.input(4, 4)
        y = make("exp", x)
        out = make("add", y, Ref(y, spec, offset))
        assert names(fused_same(make.program(out))) == ["exp", "add"]


def test_a_state_is_not_read_after_it_was_written() -> None:
    make = Maker()
    p, q = make.state(4), make.state(4)
    old = make("exp", p)
    make.store(p, q)
    out = make("add", old, 1.0)
    after = fused_same(make.program(out))
    where = names(after)
    assert where == ["fused", "store"], "both at the place of the first"
    make = Maker()
    p, q = make.state(4), make.state(4)
    old = make("exp", p)
    make.store(p, q)
    late = make.opaque(q)
    out = make("add", old, late)
    after = fused_same(make.program(out))
    assert names(after) == ["exp", "store", "sum", "add"], "neither place is possible"


def test_the_result_between_two_dependencies_is_placed_between() -> None:
    """The producer may not run later than a store, the consumer not before a product that comes earlier."""
    make = Maker()
    p, q = make.state(4), make.state(4)
    old = make("exp", p)
    early = make.opaque(q)
    make.store(p, q)
    out = make("add", old, early)
    after = fused_same(make.program(out))
    assert names(after) == ["sum", "fused", "store"]


# ------------------------------------------------------------------------------------- forward and backward, memory


def two_phases(readers: int, keep: bool) -> Program:
    """f = x + y in the forward pass, read in the backward pass only, far away; ``keep``: so are x and y."""
    make = Maker()
    x, y = (make("exp", make.input(50)) for _ in range(2))
    make.opaque(x)
    make.opaque(y)
    f = make("add", x, y)
    totals = [make.opaque(x)]
    make.phase = "backward"
    outs = [make("tanh", f) for _ in range(readers)]
    totals += [make.opaque(out) for out in outs]
    if keep:
        totals += [make.opaque(x), make.opaque(y)]
    return make.program(*totals)


def test_fusing_across_phases_does_not_raise_memory() -> None:
    apart = fused_same(two_phases(1, keep=False))
    assert any(i.op.name == "add" or (i.op is FUSED and i.phase == "forward") for i in apart.instructions)
    after = fused_same(two_phases(1, keep=True))
    assert "add" not in names(after)
    (group,) = (i for i in after.instructions if i.op is FUSED)
    assert group.phase == "backward"
    assert [s.fn for s in group.params["formula"].steps] == ["add", "tanh"]


def mask_program(op: str, params: dict[str, Any] | None = None) -> tuple[Program, Value]:
    """A value read in both phases, by elementwise instructions alone; what it is made of is there anyway."""
    make = Maker()
    x = make("exp", make.input(50))
    make.opaque(x)
    m = make(op, x, 0.5) if REGISTRY[op].arity == 2 else make(op, x)
    total = make.opaque(make("where", make("greater", m, 0.0), x, 0.0))
    make.phase = "backward"
    g = make("add", make.input(50), total)
    make.opaque(g)
    late = make.opaque(make("multiply", make("multiply", g, m), x))
    return make.program(total, late), m


def test_a_cheap_value_is_computed_again_instead_of_kept() -> None:
    program, m = mask_program("subtract")
    after = fused_same(program)
    assert all(m not in i.outs for i in after.instructions), "its value is never stored"
    program, m = mask_program("tanh")
    after = fused_same(program)
    assert any(m in i.outs for i in after.instructions), "tanh is not computed twice"


def test_a_cheap_value_is_kept_where_its_inputs_would_be_kept_instead() -> None:
    make = Maker()
    x, y = (make("exp", make.input(50)) for _ in range(2))
    make.opaque(x)
    make.opaque(y)
    m = make("subtract", x, y)
    total = make.opaque(make("exp", m))
    make.phase = "backward"
    late = make.opaque(make("multiply", m, total))
    after = fused_same(make.program(total, late))
    assert any(m in i.outs for i in after.instructions)


# --------------------------------------------------------------------------------------------------- simplification


def fill(make: Maker, value: float, *shape: int, dtype: str = "float32") -> Value:
    return make("fill", value, shape=shape, dtype=DTYPES[dtype], device="cpu")


def test_a_filled_value_is_read_as_its_number_and_goes() -> None:
    make = Maker()
    x = make.input(7)
    seed = fill(make, 1.0, 7)
    tenth = fill(make, 0.1, 7)
    out = make("multiply", make("multiply", seed, x), make("add", x, tenth))
    kept = fill(make, 3.0, 2, 2)
    after = fused_same(make.program(out, make("matmul", kept, kept)), simplify, fuse)
    assert sorted(names(after)) == ["fill", "fused", "matmul"]
    (group,) = (i for i in after.instructions if i.op is FUSED)
    assert [s.fn for s in group.params["formula"].steps] == ["add", "mul"]


def test_a_filled_value_keeps_its_dtype() -> None:
    make = Maker()
    h = make.input(300, dtype="bfloat16")
    wide = fill(make, 0.1, 300)  # a float32 array, so the sum is float32
    out = make("add", h, wide)
    narrow = make("multiply", h, fill(make, 0.1, 300, dtype="bfloat16"))
    after = fused_same(make.program(out, narrow), simplify)
    assert names(after) == ["fused", "fused"]
    assert out.spec.dtype == DTYPES["float32"]
    assert narrow.spec.dtype == DTYPES["bfloat16"]


def test_adding_zero_is_not_dropped() -> None:
    make = Maker()
    x = make.input(3)
    out = make("add", x, fill(make, 0.0, 3))
    program = make.program(out)
    after = simplify(program)
    assert [s.fn for s in after.instructions[0].params["formula"].steps] == ["add"]
    assert_same(program, after, {x: np.array([-0.0, 0.0, -1.0], "f4")})


def test_infinite_and_overwritten_fills_stay() -> None:
    make = Maker()
    x = make.input(3)
    out = make("astype", make("minimum", x, fill(make, float("inf"), 3)), dtype=DTYPES["int32"])
    after = fused_same(make.program(out), simplify)
    assert "fill" in names(after)


# ------------------------------------------------------------------------------------------------------ random, whole


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_random_programs_compute_the_same(seed: int) -> None:
    program = random_program(random.Random(seed), 14)
    arrays = random_arrays(program)
    assert_same(program, fuse(program), arrays)
    assert_same(program, fuse(simplify(program)), arrays)
    assert str(fuse(program)) == str(fuse(program))


def test_fusion_finds_something_in_random_programs() -> None:
    programs = [random_program(random.Random(seed), 14) for seed in range(50)]
    before = sum(len(p.instructions) for p in programs)
    assert sum(len(fuse(p).instructions) for p in programs) < 0.8 * before


def train(passes: Any) -> tuple[list[bytes], int]:
    brim.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)
    )
    optimizer = optim.AdamW(model.parameters(), lr=0.01)

    def step(x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 6)).astype("f4"), rng.integers(0, 3, 32)
    runs, count = step, 0
    if passes is not None:
        runs = compile_step(step, passes=passes)
    else:
        x, y = brim.asarray(x), brim.asarray(y)
    losses = [runs(x, y).numpy().tobytes() for _ in range(4)]
    if passes is not None:
        count = len(runs.program().instructions)  # type: ignore[attr-defined]
    return losses + [p.numpy().tobytes() for p in model.parameters()], count


def test_a_training_is_the_same_to_the_last_bit() -> None:
    eager, _ = train(None)
    plain, many = train(())
    fused, few = train((simplify, fuse))
    assert eager == plain == fused
    assert few < many / 2
