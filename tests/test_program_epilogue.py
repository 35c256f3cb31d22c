"""Epilogues: which groups join their product and where, at no cost in memory, with the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brim
from brim import nn, optim
from brim.expr import FormulaBuilder
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.ir import FUSED, STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.passes.dead_code import dead_code
from brim.program.passes.epilogue import MATMUL_EPILOGUE, epilogue, is_epilogue, product_of
from brim.program.passes.fuse import fuse
from brim.program.verify import ProgramError, verify
from brim.spec import DTYPES, Spec
from program_oracle import CPU, changed_by
from random_programs import random_program

F32, F16 = DTYPES["float32"], DTYPES["float16"]
everything = partial(epilogue, accepts=lambda instruction: True)


def step(op: str, *ins: Any, out: Value, phase: str = "forward", **params: Any) -> Instruction:
    operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
    return Instruction(REGISTRY[op], operands, (out,), params, phase=phase)


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


def given_values(*shapes: tuple[int, ...]) -> list[Value]:
    return [Value(Spec(shape), "input") for shape in shapes]


def joined(program: Program) -> Program:
    """The program after the pass, checked: well formed, the argument unchanged, the same bits."""
    return changed_by(everything, program)


# ---- what is joined ----


def test_bias_and_activation_join_their_product() -> None:
    x, w, b = given_values((5, 3), (3, 4), (4,))
    y, z, r = (Value(Spec((5, 4))) for _ in range(3))
    steps = [step("matmul", x, w, out=y), step("add", y, b, out=z), step("relu", z, out=r)]
    after = joined(fuse(Program([x, w, b], [], {}, steps, [Ref.of(r)])))
    assert names(after) == ["matmul_epilogue"]
    (instruction,) = after.instructions
    assert is_epilogue(instruction)
    assert product_of(instruction) == (REGISTRY["matmul"], {})
    assert [ref.value for ref in instruction.refs] == [x, w, b]
    assert instruction.outs == (r,)


def test_a_product_that_is_read_again_is_an_output_too() -> None:
    """Inputs x and w are read to the end, so nothing could have died between the two."""
    x, w = given_values((5, 3), (3, 4))
    y, r = (Value(Spec((5, 4))) for _ in range(2))
    steps = [step("matmul", x, w, out=y), step("tanh", y, out=r)]
    results = [Ref.of(v) for v in (y, r, x, w)]
    after = joined(Program([x, w], [], {}, steps, results))
    assert names(after) == ["matmul_epilogue"]
    assert after.instructions[0].outs == (r, y)


def test_a_second_output_waits_where_an_input_of_the_product_dies() -> None:
    x, w = given_values((5, 3), (3, 4))
    y, r = (Value(Spec((5, 4))) for _ in range(2))
    steps = [step("matmul", x, w, out=y), step("tanh", y, out=r)]
    assert names(joined(Program([x, w], [], {}, steps, [Ref.of(y), Ref.of(r)]))) == ["matmul", "tanh"]


def test_a_batch_of_rows_read_in_another_shape() -> None:
    x, w, b = given_values((6, 3), (3, 4), (4,))
    y, r = Value(Spec((6, 4))), Value(Spec((2, 3, 4)))
    steps = [step("matmul", x, w, out=y), step("add", Ref(y, Spec((2, 3, 4))), b, out=r)]
    after = joined(Program([x, w, b], [], {}, steps, [Ref.of(r)]))
    assert names(after) == ["matmul_epilogue"]
    assert after.instructions[0].params["shape"] == (2, 3, 4)


def test_what_the_group_reads_besides_may_be_made_in_between() -> None:
    x, w, b = given_values((5, 3), (3, 4), (4,))
    y, c, r = Value(Spec((5, 4))), Value(Spec((4,))), Value(Spec((5, 4)))
    steps = [step("matmul", x, w, out=y), step("sum", Ref(b, Spec((1, 4))), out=c, axes=(0,), keepdims=False)]
    steps += [step("add", y, c, out=r)]
    kept = [Ref.of(r), Ref.of(x), Ref.of(w)]
    assert names(joined(Program([x, w, b], [], {}, steps, kept))) == ["sum", "matmul_epilogue"]
    # Where x and w die with the product, it is made early, and the group follows.
    assert names(joined(Program([x, w, b], [], {}, steps, kept[:1]))) == ["matmul", "sum", "add"]


def test_a_state_that_the_product_reads_is_not_written_before_it() -> None:
    (x,), state = given_values((4, 4)), Value(Spec((4, 4)), "state")
    y, new, c, r = (Value(Spec((4, 4))) for _ in range(4))
    steps = [
        step("matmul", x, state, out=y),
        step("multiply", state, 0.5, out=new),
        Instruction(STORE, (Ref.of(state), Ref.of(new)), ()),
        step("matmul", x, x, out=c),
        step("add", Ref(y, Spec((4, 4))), Ref(c, Spec((4, 4), layout=(1, 4))), out=r),
    ]
    after = joined(Program([x], [state], {}, steps, [Ref.of(r), Ref.of(x)]))
    assert names(after)[0] == "matmul"


@pytest.mark.parametrize("why", ["transposed", "part", "twice", "phase", "one row"])
def test_what_does_not_read_the_product_as_it_is_stays_apart(why: str) -> None:
    x, w = given_values((4, 4), (4, 4))
    y = Value(Spec((4, 4)))
    turned = Ref(y, Spec((4, 4), layout=(1, 4)))
    reader = {
        "transposed": lambda: step("square", turned, out=Value(Spec((4, 4)))),
        "part": lambda: step("square", Ref(y, Spec((2, 4))), out=Value(Spec((2, 4)))),
        "twice": lambda: step("add", y, turned, out=Value(Spec((4, 4)))),
        "phase": lambda: step("square", y, out=Value(Spec((4, 4))), phase="backward"),
        "one row": lambda: step("add", Ref(y, Spec((1, 4))), x, out=Value(Spec((4, 4)))),
    }[why]()
    program = Program([x, w], [], {}, [step("matmul", x, w, out=y), reader], [Ref.of(reader.outs[0])])
    assert names(joined(program))[0] == "matmul"


def test_the_backend_decides() -> None:
    x, w = given_values((5, 3), (3, 4))
    y, r = (Value(Spec((5, 4))) for _ in range(2))
    program = Program([x, w], [], {}, [step("matmul", x, w, out=y), step("tanh", y, out=r)], [Ref.of(r)])
    assert names(epilogue(program, lambda instruction: False)) == ["matmul", "tanh"]


def test_the_verifier_knows_the_rule() -> None:
    x, w = given_values((5, 3), (3, 4))
    builder = FormulaBuilder([F32])
    formula = builder.formula([builder.call("tanh", [("in", 0)], F32)[1]])
    for shape, out, ins in (((5, 4), Spec((5, 4)), (x, w)), ((4, 5), Spec((4, 5)), (x, w))):
        operands = tuple(map(Ref.of, ins))
        params = {"formula": formula, "shape": shape}
        verify(Program([x, w], [], {}, [Instruction(MATMUL_EPILOGUE, operands, (Value(out),), params)], []))
    wrong = Instruction(
        MATMUL_EPILOGUE, (Ref.of(x), Ref.of(w)), (Value(Spec((5, 5))),), {"formula": formula, "shape": (5, 5)}
    )
    with pytest.raises(ProgramError, match="epilogue works on shape"):
        verify(Program([x, w], [], {}, [wrong], []))


# ---- the CPU's kernel ----


def outputs_of_other_dtypes() -> tuple[Any, list[Spec]]:
    builder = FormulaBuilder([F32, F32])
    total = builder.call("add", [("in", 0), ("in", 1)], F32)
    positive = builder.call("gt", [total, ("const", 0.0)], F32)
    half = builder.cast(total, F16)
    return builder.formula([positive[1], half[1]]), [Spec((6, 5), DTYPES["bool"]), Spec((6, 5), F16)]


def test_a_product_that_no_output_can_hold_is_made_in_scratch() -> None:
    formula, outs = outputs_of_other_dtypes()
    generator = np.random.default_rng(3)
    a, b, c = (generator.standard_normal(shape).astype("f4") for shape in ((6, 3), (3, 5), (5,)))
    specs = [Spec(x.shape) for x in (a, b, c)]
    kernel = CPU.bind(MATMUL_EPILOGUE, specs, outs, {"formula": formula, "shape": (6, 5)})
    scratch = CPU.allocate(0, kernel.scratch_bytes)
    made = tuple(np.empty(s.shape, s.dtype) for s in outs)
    want = a @ b + c
    kernel.run(made, a, b, c, scratch=scratch)
    np.testing.assert_array_equal(made[0], want > 0)
    np.testing.assert_array_equal(made[1], want.astype("f2"))
    assert kernel.prepare is not None
    for array in made:
        array.fill(0)
    for call in kernel.prepare(made, a, b, c, scratch=scratch) or ():
        call()
    np.testing.assert_array_equal(made[1], want.astype("f2"))


# ---- any program, whole steps ----


@settings(max_examples=80)
@given(source=st.randoms(use_true_random=False))
def test_no_number_changes(source: random.Random) -> None:
    joined(random_program(source, 14))


def mlp() -> Any:
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 5), nn.Dropout(0.3), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 3)
    )


@pytest.mark.parametrize(("make", "shape"), [(mlp, (8, 6)), (cnn, (2, 3, 8, 8))], ids=["mlp", "cnn"])
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
        found.append((losses, compiled.current_plan().peak_bytes, names(compiled.program())))
    (plain, plain_peak, _), (with_epilogues, peak, ops) = found
    assert plain == with_epilogues
    assert peak <= 1.05 * plain_peak  # registers of the group, while inputs of the product are there
    assert any(name.endswith("_epilogue") for name in ops)


def test_usual_steps_have_epilogues_where_the_device_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = brim.device("cpu").backend
    model = cnn().eval()
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype("f4")

    def ops() -> list[str]:
        compiled = compile_step(lambda x: model(x))
        compiled(x)
        return names(compiled.program())

    monkeypatch.setattr(backend, "joins_epilogue", None, raising=False)
    assert not any(name.endswith("_epilogue") for name in ops())

    def wanted(op: Any, ins: Any, outs: Any, params: Any) -> bool:
        return op is MATMUL_EPILOGUE and ins[0].shape == (2, 36) and outs[0].shape == params["shape"] == (2, 3)

    monkeypatch.setattr(backend, "joins_epilogue", wanted, raising=False)
    assert [name for name in ops() if name.endswith("_epilogue")] == ["matmul_epilogue"]


def test_a_host_scalar_reaches_the_formula() -> None:
    x, w = given_values((5, 3), (3, 4))
    y, r = (Value(Spec((5, 4))) for _ in range(2))
    number = HostScalar(lambda: 2.5)
    program = Program([x, w], [], {}, [step("matmul", x, w, out=y), step("multiply", y, number, out=r)], [Ref.of(r)])
    after = joined(program)
    assert names(after) == ["matmul_epilogue"]
    assert after.scalars() == [number]
    assert FUSED not in [i.op for i in after.instructions]
