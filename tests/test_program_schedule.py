"""The schedule: a lower peak, the same bits, updates in place, and nothing moved across what it depends on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.op import REGISTRY
from brim.program.compile import CompiledStep
from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.dead_code import dead_code
from brim.program.passes.liveness import live_bytes, stored_values
from brim.program.passes.schedule import schedule
from brim.program.verify import verify
from brim.spec import Spec
from program_oracle import run_program
from random_programs import random_arrays, random_program

Step = Callable[..., Any]


def _mlp(depth: int = 4, width: int = 64, clip: bool = False) -> tuple[nn.Module, Step]:
    brim.manual_seed(1)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(width, 5))
    optimizer = optim.Adam(model.parameters(), lr=0.01)

    def step(x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if clip:
            optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step


def _data(width: int = 64, count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((8, width)).astype("f4"), rng.integers(0, 5, 8)) for _ in range(count)]


def _traced(step: Step) -> Program:
    program = CompiledStep(step, passes=()).plan(*_data()[0]).programs[0].traced
    assert program is not None
    return dead_code(program)


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_keep_their_results_and_need_no_more(seed: int) -> None:
    program = random_program(random.Random(seed), 24)
    made = schedule(program)
    verify(made)
    assert sorted(map(id, made.instructions)) == sorted(map(id, program.instructions))
    assert max(live_bytes(made)) <= max(live_bytes(program))
    given = random_arrays(program, seed)
    before, after = run_program(program, given), run_program(made, given)
    assert [r.tobytes() for r in after.results] == [r.tobytes() for r in before.results]
    assert all(after.states[s].tobytes() == before.states[s].tobytes() for s in program.states)


def test_some_random_programs_need_less() -> None:
    programs = [random_program(random.Random(seed), 24) for seed in range(60)]
    assert sum(max(live_bytes(schedule(p))) < max(live_bytes(p)) for p in programs) > 10


def test_it_is_deterministic() -> None:
    program = random_program(random.Random(5), 30)
    assert str(schedule(program)) == str(schedule(program))


def test_gradients_do_not_pile_up() -> None:
    _, step = _mlp(depth=8)
    before = CompiledStep(step, passes=(dead_code,)).plan(*_data()[0])
    after = CompiledStep(step, passes=(dead_code, schedule)).plan(*_data()[0])
    gradient_bytes = 64 * 64 * 4
    # All eight gradients at once before; after, one at a time, beside the scratch that the product of it needs.
    assert before.arena_bytes >= 8 * gradient_bytes
    assert after.arena_bytes <= 6 * gradient_bytes
    assert after.resident_bytes == before.resident_bytes


def test_every_update_is_still_written_in_place() -> None:
    _, step = _mlp()
    program = _traced(step)
    before, after = dict(stored_values(program)), dict(stored_values(schedule(program)))
    assert set(before) == set(after)
    assert before
    final = CompiledStep(step, passes=(dead_code, schedule)).plan(*_data()[0]).programs[0].prepared.program
    assert not [i for i in final.instructions if i.op is STORE]


def test_clipping_by_the_global_norm_keeps_all_gradients() -> None:
    _, step = _mlp(clip=True)
    order = schedule(_traced(step)).instructions
    norm = max(n for n, i in enumerate(order) if i.op.name == "sqrt")
    assert all(n > norm for n, i in enumerate(order) if i.op is STORE and i.ins[1].spec.nbytes > 1000)
    _, plain = _mlp()
    early = schedule(_traced(plain)).instructions
    last_product = max(n for n, i in enumerate(early) if i.op.name == "matmul")
    assert any(n < last_product for n, i in enumerate(early) if i.op is STORE and i.ins[1].spec.nbytes > 1000)


@pytest.mark.parametrize("clip", [False, True])
def test_the_same_bits_as_eager(clip: bool) -> None:
    found = []
    for planned in (False, True):
        model, step = _mlp(clip=clip)
        run = CompiledStep(step, passes=(dead_code, schedule)) if planned else _eager(step)
        losses = [run(x, y).item() for x, y in _data()]
        found.append((losses, {k: v.numpy().tobytes() for k, v in model.state_dict().items()}))
    assert found[0] == found[1]


def _eager(step: Step) -> Step:
    return lambda *arrays: step(*map(brim.asarray, arrays))


# -------------------------------------------------------------------- single moves


def _value(elements: int) -> Value:
    return Value(Spec((elements,)))


def _one(op: str, out: Value, *ins: Any, phase: str = "forward") -> Instruction:
    operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
    return Instruction(REGISTRY[op], operands, (out,), phase=phase)


def test_what_is_needed_late_sinks_to_its_reader() -> None:
    x = Value(Spec((1000,)), "input")
    a, b, c, d = (_value(1000) for _ in range(4))
    program = Program(
        [x], [], {},
        [_one("exp", a, x), _one("tanh", b, x), _one("exp", c, b), _one("add", d, c, a)],
        [Ref.of(d), Ref.of(x)],
    )  # fmt: skip
    order = schedule(program).instructions
    assert [i.outs[0] for i in order] == [b, c, a, d]


def test_it_does_not_sink_what_would_keep_more_alive() -> None:
    x, y = Value(Spec((4, 1000)), "input"), Value(Spec((1000,)), "input")
    small, b, c, d = _value(1000), _value(1000), _value(1000), _value(1000)
    total = Instruction(REGISTRY["sum"], (Ref.of(x),), (small,), {"axes": (0,), "keepdims": False})
    program = Program(
        [x, y], [], {}, [total, _one("tanh", b, y), _one("exp", c, b), _one("add", d, c, small)], [Ref.of(d), Ref.of(y)]
    )
    assert schedule(program).instructions[0] is total


def test_the_product_that_frees_its_input_comes_first() -> None:
    dy, x = Value(Spec((64, 64)), "input"), Value(Spec((64, 64)), "input")
    w = Value(Spec((64, 64)), "state")
    to_input, to_weight, done = (Value(Spec((64, 64))) for _ in range(3))
    program = Program(
        [dy, x], [w], {},
        [
            _one("matmul", to_input, dy, w, phase="backward"),
            _one("matmul", to_weight, x, dy, phase="backward"),
            _one("add", done, to_input, to_weight, phase="backward"),
        ],
        [Ref.of(done)],
    )  # fmt: skip
    made = schedule(program)
    assert made.instructions[0].outs == (to_weight,)
    assert max(live_bytes(made)) < max(live_bytes(program))


def test_a_reading_of_the_old_value_stays_before_the_store() -> None:
    x = Value(Spec((500,)), "input")
    w = Value(Spec((500,)), "state")
    new, late, sum_ = _value(500), _value(500), _value(500)
    store = Instruction(STORE, (Ref.of(w), Ref.of(new)), (), phase="update")
    program = Program(
        [x], [w], {},
        [
            _one("multiply", new, x, 2.0, phase="update"),
            _one("add", late, w, x, phase="backward"),
            _one("exp", sum_, late, phase="backward"),
            store,
        ],
        [Ref.of(sum_)],
    )  # fmt: skip
    order = schedule(program).instructions
    assert order.index(store) > next(n for n, i in enumerate(order) if i.outs == (late,))
    verify(schedule(program))
