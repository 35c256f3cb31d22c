"""Norms with the groups around them: what is joined and where, at no cost in memory, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.models import BasicBlock, ResNet
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.ir import STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.norm_groups import FUSED_NORMS, identity, is_fused_norm, norm_group
from brim.program.passes.dead_code import dead_code
from brim.program.passes.fuse import fuse
from brim.program.passes.join_norms import _After, _Before, join_norms
from brim.program.place import overwritable, plan_memory
from brim.program.traffic import counted
from brim.program.verify import ProgramError, verify
from brim.spec import DTYPES, Spec
from program_oracle import CPU, changed_by

SHAPE = (6, 5)


def everything(program: Program) -> Program:
    """All that may be joined, whatever memory it takes."""
    made = _After(program, lambda instruction: True, None).run()
    return _Before(made, lambda instruction: True, None).run()


def step(op: str, *ins: Any, out: Any, phase: str = "forward", **params: Any) -> Instruction:
    operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
    outs = out if isinstance(out, tuple) else (out,)
    return Instruction(REGISTRY[op], operands, outs, params, phase=phase)


def image(shape: tuple[int, ...] = SHAPE) -> Value:
    return Value(Spec(shape))


def given(*shapes: tuple[int, ...]) -> list[Value]:
    return [Value(Spec(shape), "input") for shape in shapes]


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


def joined(program: Program) -> Program:
    """The program after the pass, checked: well formed, the argument unchanged, the same bits."""
    return changed_by(everything, program)


def layer_norm(x: Value, w: Value, b: Value, y: Value) -> Instruction:
    return step("layer_norm", x, w, b, out=(y, image((6, 1)), image((6, 1))), ndim=1, eps=1e-5)


def batch_norm(x: Value, w: Value, b: Value, y: Value) -> Instruction:
    return step("batch_norm", x, w, b, out=(y, image((1, 5)), image((1, 5))), eps=1e-5)


# ---- what is joined ----


def test_a_sum_that_the_residual_stream_needs_is_stored_by_the_norm() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    total, y, z = image(), image(), image()
    steps = [step("add", x, f, out=total), layer_norm(total, w, b, y), step("multiply", y, total, out=z)]
    after = joined(Program([x, f, w, b], [], {}, steps[:2], [Ref.of(total), Ref.of(y)]))
    assert names(after) == ["layer_norm_fused"]
    (instruction,) = after.instructions
    assert is_fused_norm(instruction)
    group = norm_group(instruction.op.name, instruction.ins, instruction.outs, instruction.params)
    assert group.norm is REGISTRY["layer_norm"]
    assert (group.made, group.kept, len(group.rest)) == ((y,), (total,), 2)
    assert group.keeps_first == 0
    assert [ref.value for ref in group.own] == [w, b]
    assert [ref.value for ref in group.others] == [x, f]
    assert group.after == identity(DTYPES["float32"])
    # Where what follows reads the sum again, the sum is stored first.
    assert names(joined(Program([x, f, w, b], [], {}, steps, [Ref.of(z)]))) == ["add", "layer_norm_fused"]


def test_what_nobody_else_reads_is_not_stored() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    total, y, r = image(), image(), image()
    steps = [step("add", x, f, out=total), batch_norm(total, w, b, y), step("relu", y, out=r)]
    after = joined(Program([x, f, w, b], [], {}, steps, [Ref.of(r)]))
    assert names(after) == ["batch_norm_fused"]
    assert after.instructions[0].outs[0] is r
    assert {total, y}.isdisjoint(after.instructions[0].outs)


def test_a_shortcut_and_an_activation_follow_batch_norm() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    y, total, r = image(), image(), image()
    steps = [batch_norm(x, w, b, y), step("add", y, f, out=total), step("relu", total, out=r)]
    after = joined(fuse(Program([x, f, w, b], [], {}, steps, [Ref.of(r)])))
    assert names(after) == ["batch_norm_fused"]
    kernel = counted(after.instructions[0], CPU.bind(REGISTRY["relu"], [Spec(SHAPE)], [Spec(SHAPE)], {}), {})
    assert (kernel.read_bytes, kernel.written_bytes) == (2 * 120 + 2 * 20, 120 + 2 * 20)


@pytest.mark.parametrize("norm", ["batch_norm_grad", "layer_norm_grad"])
def test_gradients_with_a_mask_before_and_a_sum_after(norm: str) -> None:
    out, up, other, x, w = given(SHAPE, SHAPE, SHAPE, SHAPE, (5,))
    mean, var = given(*[(1, 5) if norm == "batch_norm_grad" else (6, 1)] * 2)
    positive, masked, dx, total = Value(Spec(SHAPE, DTYPES["bool"])), image(), image(), image()
    sums = image((5,)), image((5,))
    params = {"eps": 1e-5} if norm == "batch_norm_grad" else {"eps": 1e-5, "ndim": 1}
    steps = [
        step("greater", out, 0.0, out=positive),
        step("where", positive, up, 0.0, out=masked),
        step(norm, masked, x, w, mean, var, out=(dx, *sums), **params),
        step("add", dx, other, out=total),
    ]
    ins = [out, up, other, x, w, mean, var]
    results = [Ref.of(v) for v in (total, *sums)]
    after = joined(fuse(Program(ins, [], {}, steps, results)))
    assert names(after) == [f"{norm}_fused"]
    assert after.instructions[0].outs == (total, *sums)


def test_of_two_norms_that_are_added_the_later_one_takes_the_sum() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    y, z, total = image(), image(), image()
    steps = [batch_norm(x, w, b, y), batch_norm(f, w, b, z), step("add", y, z, out=total)]
    after = joined(Program([x, f, w, b], [], {}, steps, [Ref.of(total)]))
    assert names(after) == ["batch_norm", "batch_norm_fused"]


def test_a_group_of_two_norms_belongs_to_the_first_and_is_stored() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    total, y, z = image(), image(), image()
    steps = [step("add", x, f, out=total), batch_norm(total, w, b, y), batch_norm(total, b, w, z)]
    after = joined(Program([x, f, w, b], [], {}, steps, [Ref.of(y), Ref.of(z)]))
    assert names(after) == ["batch_norm_fused", "batch_norm"]
    assert after.instructions[0].outs[:2] == (y, total)


@pytest.mark.parametrize("why", ["transposed", "part", "twice", "phase", "other shape", "weight"])
def test_what_does_not_meet_element_for_element_stays_apart(why: str) -> None:
    x, f, w = given((5, 5), (5, 5), (5,))
    y, r = image((5, 5)), image((5, 5))
    turned = Ref(y, Spec((5, 5), layout=(1, 5)))
    rest = image((1, 5)), image((1, 5))
    norm = step("batch_norm", x, w, w, out=(y, *rest), eps=1e-5)
    reader = {
        "transposed": lambda: step("square", turned, out=r),
        "part": lambda: step("square", Ref(y, Spec((2, 5))), out=image((2, 5))),
        "twice": lambda: step("add", y, turned, out=r),
        "phase": lambda: step("square", y, out=r, phase="backward"),
        "other shape": lambda: step("square", Ref(y, Spec((25,))), out=image((25,))),
        "weight": lambda: step("square", rest[0], out=image((1, 5))),
    }[why]()
    program = Program([x, f, w], [], {}, [norm, reader], [Ref.of(reader.outs[0])])
    assert names(joined(program))[0] == "batch_norm"


def test_nothing_that_has_to_run_in_between_is_overtaken() -> None:
    """The sum reads what is made of the norm's result, and the norm's weight is written over in between."""
    x, f, b = given(SHAPE, SHAPE, (5,))
    state = Value(Spec((5,)), "state")
    y, c, total, new = image(), image(), image(), image((5,))
    steps = [
        batch_norm(x, state, b, y),
        step("multiply", state, 0.5, out=new),
        Instruction(STORE, (Ref.of(state), Ref.of(new)), ()),
        step("sum", Ref(y, Spec((1, *SHAPE))), out=c, axes=(0,), keepdims=False),
        step("add", y, c, out=total),
    ]
    after = joined(Program([x, f, b], [state], {}, steps, [Ref.of(total)]))
    assert names(after)[0] == "batch_norm"


def test_what_the_group_reads_besides_may_be_made_in_between() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    y, c, total = image(), image(), image()
    steps = [batch_norm(x, w, b, y), step("sum", Ref(f, Spec((1, *SHAPE))), out=c, axes=(0,), keepdims=False)]
    steps += [step("add", y, c, out=total)]
    kept = [Ref.of(v) for v in (total, x, f)]
    assert names(joined(Program([x, f, w, b], [], {}, steps, kept))) == ["sum", "batch_norm_fused"]


def test_the_backend_decides() -> None:
    x, w, b = given(SHAPE, (5,), (5,))
    y, r = image(), image()
    program = Program([x, w, b], [], {}, [batch_norm(x, w, b, y), step("tanh", y, out=r)], [Ref.of(r)])
    assert join_norms(program, lambda instruction: False) is program
    asked: list[Instruction] = []

    def refuses(instruction: Instruction) -> bool:
        asked.append(instruction)
        return False

    assert join_norms(program, refuses) is program
    assert {one.op.name for one in asked} == {"batch_norm_fused"}


def test_a_peak_that_would_be_higher_is_not_taken() -> None:
    x, w, b = given(SHAPE, (5,), (5,))
    y, r = image(), image()
    program = Program([x, w, b], [], {}, [batch_norm(x, w, b, y), step("tanh", y, out=r)], [Ref.of(r)])
    before = {2: 1000, 1: 1000}
    for after, name in ((999, "batch_norm_fused"), (1003, "batch_norm_fused"), (1010, "batch_norm")):
        peaks = {**before, 1: after}
        made = join_norms(program, lambda i: True, peak=lambda p, peaks=peaks: peaks[len(p.instructions)])
        assert names(made)[0] == name
    # The sum of two inputs and the norm's result at once, where the sum alone would have been: more bytes are alive.
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    total = image()
    steps = [step("add", x, f, out=total), batch_norm(total, w, b, y)]
    program = Program([x, f, w, b], [], {}, steps, [Ref.of(y)])
    assert join_norms(program, lambda i: True, peak=lambda p: 0) is program


def test_a_host_scalar_reaches_the_formulas() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    number = HostScalar(lambda: 2.5)
    scaled, y, r = image(), image(), image()
    steps = [step("multiply", x, number, out=scaled), batch_norm(scaled, w, b, y), step("multiply", y, number, out=r)]
    after = joined(Program([x, f, w, b], [], {}, steps, [Ref.of(r)]))
    assert names(after) == ["batch_norm_fused"]
    assert after.scalars() == [number]
    assert list(after.instructions[0].ins[2:]) == [number, Ref.of(x)] or list(after.instructions[0].ins[2:]) == [
        Ref.of(x),
        number,
    ]


def test_the_verifier_knows_the_rule() -> None:
    x, w, b = given(SHAPE, (5,), (5,))
    outs = image(), image((1, 5)), image((1, 5))
    same = identity(DTYPES["float32"])

    def program(shape: tuple[int, ...], *others: Value) -> Program:
        params = {"before": same, "after": same, "shape": shape, "eps": 1e-5}
        operands = tuple(map(Ref.of, (w, b, *others)))
        return Program([x, w, b], [], {}, [Instruction(FUSED_NORMS["batch_norm"], operands, outs, params)], [])

    verify(program(SHAPE, x))
    with pytest.raises(ProgramError, match="reads input 0 of 0"):
        verify(program(SHAPE))
    with pytest.raises(ProgramError, match=r"its op gives .*7x5"):
        verify(program((7, 5), x))


# ---- memory ----


def test_a_stored_sum_may_lie_over_what_only_it_reads() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    total, y = image(), image()
    steps = [step("add", x, f, out=total), layer_norm(total, w, b, y)]
    program = joined(Program([x, f, w, b], [], {}, steps, [Ref.of(total), Ref.of(y)]))
    (instruction,) = program.instructions
    made, kept, *rest = instruction.outs
    assert overwritable(instruction, made) == overwritable(instruction, kept) == [x, f]
    assert overwritable(instruction, rest[0]) == []
    memory = plan_memory(program, [0], [True], 1)
    assert {memory.shares[made], memory.shares[kept]} == {x, f}


def test_what_is_read_after_the_norm_is_not_written_over_before_it() -> None:
    x, f, w, b = given(SHAPE, SHAPE, (5,), (5,))
    total, y, r = image(), image(), image()
    steps = [step("add", x, f, out=total), batch_norm(total, w, b, y), step("multiply", y, f, out=r)]
    program = joined(Program([x, f, w, b], [], {}, steps, [Ref.of(total), Ref.of(r)]))
    (instruction,) = program.instructions
    assert overwritable(instruction, instruction.outs[1]) == [x]
    assert set(overwritable(instruction, instruction.outs[0])) == {x, f}


# ---- whole steps ----


class Block(nn.Module):
    """Pre-norm and post-norm residual blocks with dropout."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.first = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width), first
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Any) -> Any:
        inside = self.norm(x) if self.first else x
        total = x + self.drop(self.down(nn.functional.gelu(self.up(inside))))
        return total if self.first else self.norm(total)


def transformer() -> Any:
    return nn.Sequential(nn.Linear(6, 5), Block(5, True), Block(5, True), Block(5, False), nn.Linear(5, 3))


def residual() -> Any:
    return ResNet(BasicBlock, (1, 1, 1, 1), classes=3, image_size=32, width=4)


@pytest.mark.parametrize(("make", "shape"), [(transformer, (8, 6)), (residual, (4, 3, 32, 32))], ids=["rows", "images"])
def test_a_training_step_gives_the_same_numbers(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal(shape).astype("f4"), generator.integers(0, 3, shape[0])
    found = []
    for passes in ([dead_code, fuse], [dead_code, fuse, everything]):
        brim.manual_seed(0)
        model = make()
        optimizer = optim.Adam(model.parameters(), lr=0.01)

        def train(x: Any, y: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        compiled = compile_step(train, passes=passes)
        losses = [compiled(x, y).item() for _ in range(3)]
        found.append((losses, names(compiled.program())))
    (plain, before), (with_groups, ops) = found
    assert plain == with_groups
    assert not any(name.endswith("norm_fused") for name in before)
    if "layer_norm" in before or "batch_norm" in before:  # there are kernels for norms as such
        assert any(name.endswith("norm_fused") for name in ops)
        assert any(name.endswith("norm_grad_fused") for name in ops)
        assert len(ops) < len(before)


def test_usual_steps_have_them_where_the_device_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = brim.device("cpu").backend
    x = np.random.default_rng(0).standard_normal((8, 6)).astype("f4")
    asked: list[str] = []

    def refuses(op: Any, ins: Any, outs: Any, params: Any) -> bool:
        asked.append(op.name)
        return False

    for wanted in (None, refuses):
        monkeypatch.setattr(backend, "joins_norms", wanted, raising=False)
        compiled = compile_step(transformer())
        compiled(x)
        assert not any(name.endswith("norm_fused") for name in names(compiled.program()))
        if wanted is None:
            assert not asked
    assert asked == ["layer_norm_fused"] * len(asked)


def test_without_norms_nothing_is_searched() -> None:
    x = Value(Spec(SHAPE), "input")
    r = image()
    program = Program([x], [], {}, [step("relu", x, out=r)], [Ref.of(r)])
    assert dead_code(program).instructions
    assert join_norms(program, lambda instruction: True) is program
