"""Copies that need not be: which go, which must stay, the same numbers; weight gradients come out row-major."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brim
from brim import nn, optim
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.ir import FUSED, STORE, Instruction, Program, Ref, Value
from brim.program.passes.copies import copies
from brim.program.passes.dead_code import dead_code
from brim.program.passes.in_place import in_place
from brim.program.place import plan_memory
from brim.program.verify import verify
from brim.spec import DTYPES, Spec
from program_oracle import changed_by, kernels_of, run_program
from random_programs import random_arrays, random_program

SQUARE = Spec((4, 4))
TURNED = Spec((4, 4), layout=(1, 4))


def step(op: str, *ins: Any, out: Value, **params: Any) -> Instruction:
    operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
    return Instruction(REGISTRY[op], operands, (out,), params)


def store(state: Value, new: Value) -> Instruction:
    return Instruction(STORE, (Ref.of(state), Ref.of(new)), (), phase="update")


def values(count: int) -> list[Value]:
    return [Value(SQUARE) for _ in range(count)]


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


def without_copies(program: Program) -> Program:
    """The program after the pass, checked: well formed, the argument unchanged, the same numbers."""
    return changed_by(copies, program)


# ---- which go ----


def test_copies_of_whole_temporaries_go() -> None:
    x = Value(SQUARE, "input")
    a, b, c, d = values(4)
    steps = [
        step("square", x, out=a),
        step("copy", a, out=b),
        step("astype", b, out=c, dtype=SQUARE.dtype),
        step("matmul", c, b, out=d),
    ]
    after = without_copies(Program([x], [], {}, steps, [Ref.of(d), Ref(c, Spec((16,)))]))
    assert names(after) == ["square", "matmul"]
    assert after.results[1].value is a


def test_a_cast_between_dtypes_stays() -> None:
    x = Value(SQUARE, "input")
    half = Value(Spec((4, 4), DTYPES["float16"]))
    program = Program([x], [], {}, [step("astype", x, out=half, dtype=DTYPES["float16"])], [Ref.of(half)])
    assert without_copies(program) is program


def test_a_new_value_is_stored_without_a_copy_and_then_made_in_place() -> None:
    state = Value(SQUARE, "state")
    new, copied = values(2)
    steps = [step("multiply", state, 0.5, out=new), step("astype", new, out=copied, dtype=SQUARE.dtype)]
    after = without_copies(Program([], [state], {}, [*steps, store(state, copied)], []))
    assert names(after) == ["multiply", "store"]
    assert names(in_place(after, lambda i: True)) == ["multiply"]


def test_a_value_that_cannot_be_made_in_the_state_keeps_its_copy() -> None:
    """The product reads the state all along: the copy is written in place, the source would live in the arena."""
    state = Value(SQUARE, "state")
    new, copied = values(2)
    steps = [step("matmul", state, state, out=new), step("copy", new, out=copied)]
    after = without_copies(Program([], [state], {}, [*steps, store(state, copied)], []))
    assert names(after) == ["matmul", "copy", "store"]


def test_the_category_of_a_copy_is_kept() -> None:
    x = Value(SQUARE, "input")
    made, grad, out = values(3)
    grad.category, grad.layer = "grads", "fc"
    steps = [step("square", x, out=made), step("copy", made, out=grad), step("sqrt", grad, out=out)]
    after = without_copies(Program([x], [], {}, steps, [Ref.of(out)]))
    assert names(after) == ["square", "sqrt"]
    assert (after.instructions[0].outs[0].category, after.instructions[0].outs[0].layer) == ("grads", "fc")
    assert made.category == "temps"


# ---- states ----


@pytest.mark.parametrize("written", [False, True])
def test_a_copy_of_a_state_goes_only_when_the_step_leaves_the_state_alone(written: bool) -> None:
    state = Value(SQUARE, "state")
    old, new, out = values(3)
    steps = [step("copy", state, out=old), step("multiply", state, 2.0, out=new)]
    steps += [store(state, new)] if written else []
    steps += [step("add", old, new, out=out)]
    after = without_copies(Program([], [state], {}, steps, [Ref.of(out)]))
    assert ("copy" in names(after)) is written


def test_a_copy_of_a_state_that_is_handed_out_stays() -> None:
    state, copied = Value(SQUARE, "state"), Value(SQUARE)
    program = Program([], [state], {}, [step("copy", state, out=copied)], [Ref.of(copied)])
    assert without_copies(program) is program


# ---- layouts ----


@pytest.mark.parametrize(("reader", "goes"), [("multiply", True), ("tanh", False), ("matmul", False)])
def test_a_transposing_copy_goes_where_every_bit_is_the_same(reader: str, goes: bool) -> None:
    x = Value(SQUARE, "input")
    turned, out = values(2)
    operands = (turned,) if reader == "tanh" else (turned, x)
    steps = [step("copy", Ref(x, TURNED), out=turned), step(reader, *operands, out=out)]
    after = without_copies(Program([x], [], {}, steps, [Ref.of(out)]))
    assert (names(after) == [reader]) is goes


def test_a_transposing_copy_with_two_readers_stays() -> None:
    x = Value(SQUARE, "input")
    turned, a, b = values(3)
    steps = [step("copy", Ref(x, TURNED), out=turned), step("square", turned, out=a), step("negative", turned, out=b)]
    assert names(without_copies(Program([x], [], {}, steps, [Ref.of(a), Ref.of(b)])))[0] == "copy"


@pytest.mark.parametrize("needed", [False, True])
def test_a_copy_of_a_part_goes_only_when_the_whole_is_there_as_long(needed: bool) -> None:
    x = Value(SQUARE, "input")
    big, part, out = Value(SQUARE), Value(Spec((2, 4))), Value(Spec((2, 4)))
    steps = [
        step("square", x, out=big),
        step("copy", Ref(big, Spec((2, 4)), 4), out=part),
        step("negative", Ref(part, Spec((2, 4), layout=(4, 1))), out=out),
    ]
    results = [Ref.of(out), Ref.of(big)] if needed else [Ref.of(out)]
    after = without_copies(Program([x], [], {}, steps, results))
    assert ("copy" in names(after)) is not needed


# ---- any program ----


def with_copies(program: Program, source: random.Random) -> Program:
    """The program with copies of operands strewn in."""
    made: list[Instruction] = []
    for instruction in program.instructions:
        ins = list(instruction.ins)
        for position, operand in enumerate(ins):
            if isinstance(operand, Ref) and source.random() < 0.5 and (instruction.op is not STORE or position):
                value = Value(Spec(operand.spec.shape, operand.spec.dtype))
                made.append(step(source.choice(("copy", "astype")), operand, out=value, dtype=value.spec.dtype))
                if made[-1].op.name == "copy":
                    made[-1] = replace(made[-1], params={})
                ins[position] = Ref.of(value)
        made.append(replace(instruction, ins=tuple(ins)))
    return program.with_instructions(made)


@settings(max_examples=120)
@given(source=st.randoms(use_true_random=False))
def test_no_number_changes(source: random.Random) -> None:
    program = with_copies(random_program(source, 12), source)
    after = without_copies(program)

    def aliasing(instruction: Instruction) -> bool:
        kernel = kernels_of(Program([], [], {}, [instruction], []))[0]
        return instruction.op is FUSED or (kernel is not None and kernel.aliasing)

    final = in_place(dead_code(after), aliasing)
    verify(final)
    scratch = [k.scratch_bytes if k is not None else 0 for k in kernels_of(final)]
    arrays = random_arrays(program)
    memory = plan_memory(final, scratch, [aliasing(i) for i in final.instructions])
    wanted, found = run_program(program, arrays), run_program(final, arrays, memory)
    for a, b in zip(wanted.results, found.results, strict=True):
        np.testing.assert_array_equal(a, b)
    for state in program.states:
        np.testing.assert_array_equal(wanted.states[state], found.states[state])


def test_a_training_step_has_no_copy_left() -> None:
    def make() -> tuple[Any, Any]:
        brim.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def train(x: Any, y: Any) -> Any:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return model, train

    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((16, 12)).astype("f4"), generator.integers(0, 3, 16)
    losses, peaks = [], []
    for passes in ([dead_code], [dead_code, copies]):
        model, train = make()
        compiled = compile_step(train, passes=passes)
        losses.append([compiled(x, y).item() for _ in range(4)])
        peaks.append(compiled.current_plan().peak_bytes)
    assert losses[0] == losses[1]
    assert peaks[1] <= peaks[0]
    copying = [
        i
        for i in compiled.program().instructions
        if i.op.name in ("copy", "store") or (i.op.name == "astype" and next(i.refs).spec.dtype == i.outs[0].spec.dtype)
    ]
    assert not copying
    assert model[0].weight.grad is None


# ---- gradients of products ----


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((1, 3, 4), (2, 4, 5)), ((6, 2, 3, 4), (2, 4, 5))],
)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_gradients_of_transposed_operands(a: Any, b: Any, left: bool, right: bool) -> None:
    """Each operand as it is, or as the transposed view of a leaf: the same gradients, row-major in the leaf."""
    generator = np.random.default_rng(1)
    plain = [generator.standard_normal(shape) for shape in (a, b)]
    weights = generator.standard_normal(np.matmul(*plain).shape)

    def leaf(array: Any, turned: bool) -> Any:
        stored = np.ascontiguousarray(array.swapaxes(-1, -2)) if turned else array
        return brim.asarray(stored).requires_grad_()

    x, y = leaf(plain[0], left), leaf(plain[1], right)
    ((x.mT if left else x) @ (y.mT if right else y) * brim.asarray(weights)).sum().backward()

    def summed_to(array: Any, shape: Any) -> Any:
        extra = array.ndim - len(shape)
        array = array.sum(tuple(range(extra)))
        axes = tuple(n for n, dim in enumerate(shape) if dim == 1 and array.shape[n] != 1)
        return array.sum(axes, keepdims=True)

    want_x = summed_to(weights @ plain[1].swapaxes(-1, -2), a)
    want_y = summed_to(plain[0].swapaxes(-1, -2) @ weights, b)
    for tensor, want, turned in ((x, want_x, left), (y, want_y, right)):
        assert tensor.grad.spec.contiguous
        np.testing.assert_allclose(tensor.grad.numpy(), want.swapaxes(-1, -2) if turned else want, rtol=1e-12)


def test_the_gradient_of_a_linear_layer_is_made_where_it_stays() -> None:
    layer = nn.Linear(6, 4)
    compiled = compile_step(lambda x: layer(x).square().sum().backward(), passes=[dead_code])
    compiled(np.ones((5, 6), "f4"))
    assert "copy" not in names(compiled.program())
