"""Small instructions side by side: fewer instructions, the same bits, no higher peak, updates still in place."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import brim
from brim.check.networks import NETWORKS, compiled, make
from brim.program.ir import FUSED, FUSED_MANY, STORE, HostScalar, Instruction, Program, Ref, Value, parts_of
from brim.program.lower import arena_bytes, prepare, scratch_bytes
from brim.program.passes import default_passes
from brim.program.passes.dead_code import dead_code
from brim.program.passes.fuse import fuse
from brim.program.passes.in_place import in_place
from brim.program.passes.liveness import live_bytes
from brim.program.passes.schedule import schedule
from brim.program.passes.side_by_side import ARRAY_BYTES_MAX, side_by_side
from brim.program.place import plan_memory
from brim.program.verify import verify
from brim.spec import DTYPES, Spec
from brim_cpu import backend, native
from program_oracle import run_program
from random_programs import random_arrays, random_program
from update_programs import (
    F32,
    MANY,
    Updates,
    constant_formula,
    joined,
    many_of,
    names,
    room,
    step,
    store,
)

CPU = backend()


# --------------------------------------------------------------------------------------------------------- what joins


def test_updates_become_one_instruction_at_the_place_of_the_last() -> None:
    program = room(Updates([(3,), (2, 5), (), (0, 4)]).program())
    after = joined(program)
    assert (
        names(after)[2:]
        == ["square", "square", "square", "fused_many", *["store"] * 6, "square", "fused"] + ["store"] * 2
    )  # an array without elements is no work, and joins nothing
    (many,) = many_of(after)
    assert (many.params["count"], many.params["shared"], many.phase, many.layer) == (3, 2, "update", "")
    assert [out.spec.shape for out in many.outs] == [(3,), (3,), (2, 5), (2, 5), (), ()]
    assert all(isinstance(x, HostScalar) for x in many.ins[:2])
    assert [len(ins) for ins, _ in parts_of(many)] == [5, 5, 5]


def test_new_values_are_written_in_place() -> None:
    updates = Updates([(3,), (2, 5), (7,)])
    after = in_place(joined(room(updates.program())), lambda i: True)
    verify(after)
    assert "store" not in names(after)
    (many,) = many_of(after)
    assert {out.home for out in many.outs} == {*updates.params, *updates.velocities}
    apart = in_place(joined(room(updates.program())), lambda i: i.op is not FUSED_MANY)
    assert "store" in names(apart), "a kernel that may not alias"


def test_scalars_may_differ_by_part() -> None:
    rates = [HostScalar(lambda: 0.5), HostScalar(lambda: 2.0), HostScalar(lambda: 8.0)]
    (many,) = many_of(joined(room(Updates([(3,), (4,), (5,)], rates).program())))
    assert many.params["shared"] == 1
    assert [[x for x in ins[1:] if isinstance(x, HostScalar)] for ins, _ in parts_of(many)] == [[r] for r in rates]


def test_scalars_that_are_made_alike_are_shared() -> None:
    base = HostScalar(lambda: 0.25)
    (many,) = many_of(joined(room(Updates([(3,), (4,)], [1 - base, 1 - base]).program())))
    assert many.params["shared"] == 2
    (many,) = many_of(joined(room(Updates([(3,), (4,)], [1 - base, 2 - base]).program())))
    assert many.params["shared"] == 1
    (many,) = many_of(joined(room(Updates([(3,), (4,)], [base - 1, base - 1.0]).program())))
    assert many.params["shared"] == 1
    (many,) = many_of(joined(room(Updates([(3,), (4,)], [base * 2, base + 2]).program())))
    assert many.params["shared"] == 1


def test_scalars_of_one_reading_are_told_apart() -> None:
    """As a trace makes them: the same function, which picks another number for each."""
    both = HostScalar(lambda: (0.5, 2.0), tuple)
    rates = [HostScalar(lambda numbers, n=n: numbers[n], float, (both,)) for n in range(2)]

    def picked(n: int) -> HostScalar:
        return HostScalar(lambda numbers: numbers[n], float, (both,))

    for chosen in (rates, [picked(0), picked(1)]):
        (many,) = many_of(joined(room(Updates([(3,), (4,)], chosen).program())))
        assert many.params["shared"] == 1


def two(first: Instruction, second: Instruction, inputs: list[Value]) -> Program:
    return room(Program(inputs, [], {}, [first, second], [Ref.of(o) for i in (first, second) for o in i.outs]))


@pytest.mark.parametrize(
    ("numbers", "count"),
    [((2.0, 2.0), 1), ((0.0, -0.0), 0), ((1, True), 0), ((2, 2.0), 0), ((float("nan"), float("nan")), 1)],
    ids=["equal", "sign of zero", "bool", "type", "nan"],
)
def test_only_equal_formulas_join(numbers: tuple[Any, Any], count: int) -> None:
    xs = [Value(Spec((n,)), "input") for n in (3, 4)]
    parts = [
        Instruction(FUSED, (Ref.of(x),), (Value(x.spec),), {"formula": constant_formula(number)})
        for x, number in zip(xs, numbers)
    ]
    assert len(many_of(joined(two(*parts, xs)))) == count


def test_plain_elementwise_instructions_join_too() -> None:
    counters = [Value(Spec((), DTYPES["int64"]), "state") for _ in range(3)]
    made = [Value(c.spec) for c in counters]
    steps = [i for c, m in zip(counters, made) for i in (step("add", c, 1, out=m), store(c, m))]
    after = joined(Program([], counters, {}, steps, []))
    assert names(after) == ["fused_many", "store", "store", "store"]


def test_an_array_of_one_element_is_shared_only_if_it_is_the_same() -> None:
    xs = [Value(Spec((n,)), "input") for n in (3, 4)]
    factors = [Value(Spec(()), "input") for _ in range(2)]

    def scaled(which: tuple[int, int]) -> Program:
        parts = [step("multiply", x, factors[f], out=Value(x.spec)) for x, f in zip(xs, which)]
        return two(*parts, [*xs, *factors])  # type: ignore[misc]

    (many,) = many_of(joined(scaled((1, 1))))
    assert many.params["shared"] == 1
    assert many.ins[0].value is factors[1]
    (many,) = many_of(joined(scaled((0, 1))))
    assert many.params["shared"] == 0
    assert [ref.value for ref in many.refs] == [xs[0], factors[0], xs[1], factors[1]]


def _apart(second: Any) -> Program:
    x, y = Value(Spec((4, 3)), "input"), Value(Spec((5, 3)), "input")
    return two(step("exp", x, out=Value(Spec((4, 3)))), second(x, y), [x, y])


APART = {
    "another function": lambda x, y: step("tanh", y, out=Value(y.spec)),
    "a turned input": lambda x, y: step("exp", Ref(y, Spec((3, 5), F32, (1, 3))), out=Value(Spec((3, 5)))),
    "a turned output": lambda x, y: step("exp", y, out=Value(Spec((5, 3), F32, (1, 5)))),
    "a column": lambda x, y: step("exp", Ref(y, Spec((5, 4), F32, (3, 0))), out=Value(Spec((5, 4)))),
    "no elementwise op": lambda x, y: step("sum", y, out=Value(Spec((3,))), axes=(0,), keepdims=False),
    "too large": lambda x, y: step(
        "exp", Ref(y, Spec((ARRAY_BYTES_MAX // 4 + 1,), F32, (0,))), out=Value(Spec((ARRAY_BYTES_MAX // 4 + 1,)))
    ),
}


@pytest.mark.parametrize("which", APART)
def test_what_stays_apart(which: str) -> None:
    assert not many_of(joined(_apart(APART[which])))


def test_updates_join_up_to_a_size_of_their_own() -> None:
    count = ARRAY_BYTES_MAX // 4 + 1
    updates = Updates([(count,), (7,), (3, count)])
    program = room(updates.program(), 2**24)
    assert not many_of(joined(program))
    (many,) = many_of(joined(program, update_bytes=2 * ARRAY_BYTES_MAX))
    assert [out.spec.shape for out in many.outs] == [(count,), (count,), (7,), (7,)]
    assert {i.params["count"] for i in many_of(joined(program, update_bytes=2**24))} == {3}
    gradients = [i for i in joined(program, update_bytes=2**24).instructions if i.op.name == "square"]
    assert len(gradients) == 1 + 3, "what is no update stays apart"


def test_equal_ones_beside_them_join() -> None:
    assert many_of(joined(_apart(lambda x, y: step("exp", y, out=Value(y.spec)))))


def test_random_numbers_are_not_joined() -> None:
    seed, counter = HostScalar(lambda: 3, int), HostScalar(lambda: 4, int)
    xs = [Value(Spec((n,)), "input") for n in (3, 4)]
    parts = [step("dropout", x, seed, counter, out=Value(x.spec), p=0.5) for x in xs]
    assert names(joined(two(*parts, xs)))[2:] == ["dropout", "dropout"]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------- dependencies


def test_what_depends_on_another_does_not_join_it() -> None:
    x = Value(Spec((3,)), "input")
    values = [Value(x.spec) for _ in range(3)]
    chain = [step("exp", a, out=b) for a, b in zip([x, *values], values)]
    assert names(joined(room(Program([x], [], {}, chain, [Ref.of(values[2])]))))[2:] == ["exp"] * 3


def test_a_reader_in_between_keeps_an_instruction_where_it_is() -> None:
    x, y = Value(Spec((3,)), "input"), Value(Spec((3,)), "input")
    a, b, read = Value(x.spec), Value(x.spec), Value(Spec(()))
    total = step("sum", a, out=read, axes=(0,), keepdims=False)
    steps = [step("exp", x, out=a), total, step("exp", y, out=b)]
    results = [Ref.of(v) for v in (b, read)]
    assert names(joined(room(Program([x, y], [], {}, steps, results))))[2:] == ["exp", "sum", "exp"]
    later = [steps[0], steps[2], total]
    assert names(joined(room(Program([x, y], [], {}, later, results))))[2:] == ["fused_many", "sum"]


def test_an_old_value_is_read_before_its_state_is_written() -> None:
    """The first reads what the store in between overwrites, so it cannot wait for the second."""
    x, state, other = Value(Spec((3,)), "input"), Value(Spec((3,)), "state"), Value(Spec((3,)))
    a, b = Value(x.spec), Value(x.spec)
    steps = [step("exp", state, out=a), step("sin", x, out=other), store(state, other), step("exp", x, out=b)]
    program = Program([x], [state], {}, steps, [Ref.of(a), Ref.of(b)])
    assert names(joined(room(program)))[2:] == ["exp", "sin", "store", "exp"]


def test_a_second_store_stays_second() -> None:
    x, y, state = Value(Spec((3,)), "input"), Value(Spec((3,)), "input"), Value(Spec((3,)), "state")
    a, b, c = (Value(x.spec) for _ in range(3))
    steps = [step("exp", x, out=a), store(state, a), step("sin", x, out=c), store(state, c), step("exp", y, out=b)]
    assert not many_of(joined(room(Program([x, y], [state], {}, steps, [Ref.of(b)]))))
    between = [*steps[:2], steps[4], *steps[2:4]]
    after = joined(room(Program([x, y], [state], {}, between, [Ref.of(b)])))
    assert names(after)[2:] == ["fused_many", "store", "sin", "store"]


# ------------------------------------------------------------------------------------------------------------- memory


def test_gradients_do_not_pile_up_beyond_the_peak() -> None:
    alone = Updates([(256,)] * 8, from_states=True).program()  # 1 KiB each
    assert max(live_bytes(alone)) == 1024
    assert not many_of(joined(alone)), "the peak is one gradient"
    roomy = room(alone, 2048)
    counts = [i.params["count"] for i in many_of(joined(roomy))]
    assert counts == [4, 4], "as many gradients as the peak elsewhere allows"
    assert max(live_bytes(joined(roomy))) == max(live_bytes(roomy)) == 4096


@pytest.mark.parametrize(("keeps_bytes", "counts"), [(0, []), (1023, []), (1024, [2] * 4), (3072, [4, 4]), (7168, [8])])
def test_only_so_many_bytes_are_kept_longer(keeps_bytes: int, counts: list[int]) -> None:
    updates = Updates([(256,)] * 8, from_states=True)
    found = joined(room(updates.program(), 2**20), keeps_bytes)
    assert [i.params["count"] for i in many_of(found)] == counts


def test_a_result_in_the_place_of_what_dies_costs_nothing() -> None:
    states = [Value(Spec((n,)), "state") for n in (3, 4)]
    squares, results = ([Value(s.spec) for s in states] for _ in range(2))
    steps = []
    for s, x, y in zip(states, squares, results):
        steps += [step("square", s, out=x), step("exp", x, out=y)]
    program = room(Program([], states, {}, steps, [Ref.of(y) for y in results]))
    after = joined(program, 0)
    assert names(after)[2:] == ["square", "square", "fused_many"]


def test_alignment_counts() -> None:
    updates = Updates([(1,)] * 8, from_states=True)
    program = room(updates.program(), 2**20)
    assert [i.params["count"] for i in many_of(joined(program, 28))] == [8]
    assert [i.params["count"] for i in many_of(joined(program, 512, alignment_bytes=256))] == [3, 3, 2]


def test_the_judge_decides() -> None:
    program = room(Updates([(256,)] * 4).program(), 2**20)
    asked: list[int] = []

    def peak(one: Program) -> int:
        asked.append(len(one.instructions))
        return 1 if one is program else 2

    assert side_by_side(program, MANY, peak=peak) is program
    assert len(asked) > 2, "less was tried"
    assert many_of(side_by_side(program, MANY, peak=lambda one: 1))
    assert side_by_side(program, MANY, scratch_bytes=lambda i: 0) is not program


# ------------------------------------------------------------------------------------------- programs of other makings


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_keep_their_results_also_in_their_arena(seed: int) -> None:
    program = random_program(random.Random(seed), 30)
    after = joined(program)
    assert max(live_bytes(after)) <= max(live_bytes(program))

    def aliasing(i: Instruction) -> bool:
        return i.op in (FUSED, FUSED_MANY) or i.op.kind == "elementwise"

    placed = in_place(after, aliasing)
    verify(placed)
    memory = plan_memory(placed, [0] * len(placed.instructions), list(map(aliasing, placed.instructions)))
    arrays = random_arrays(program, seed)
    wanted, found = run_program(program, arrays), run_program(placed, arrays, memory)
    for a, b in zip(wanted.results, found.results, strict=True):
        np.testing.assert_array_equal(a, b)
    for state in program.states:
        np.testing.assert_array_equal(wanted.states[state], found.states[state])


def test_joining_finds_something_in_random_programs() -> None:
    found = [side_by_side(random_program(random.Random(seed), 30), MANY) for seed in range(60)]
    assert sum(bool(many_of(one)) for one in found) > 10


WITHOUT = [one for one in default_passes(CPU) if getattr(one, "__name__", "") != "side_by_side"]
PASSES = [*WITHOUT, lambda program: side_by_side(program, 2**20, CPU.alignment_bytes)]


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "clipped", "mixed_precision", "rmsprop", "lstm"])
def test_networks_train_the_same(name: str) -> None:
    ends = []
    for passes in (WITHOUT, PASSES):
        net = make(name)
        steps = compiled(net, passes=passes)
        for which, arguments in net.calls[:3]:
            steps[which](*arguments)
        plans = [one.plan(*net.calls[0][1]) for one in steps[:1]]
        ends.append((net.state(), [len(many_of(p.programs[0].prepared.program)) for p in plans]))
    (wanted, without), (found, with_it) = ends
    assert without == [0]
    assert with_it != [0]
    for key, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert value.tobytes() == found[key].tobytes(), key


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_backend_that_asks_gets_fewer_instructions_and_no_higher_peak(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for keeps_bytes in (0, 2**20):
        monkeypatch.setattr(brim.device("cpu").backend, "joins_side_by_side", keeps_bytes, raising=False)
        net = make(name)
        which, arguments = net.calls[0]
        found.append(compiled(net)[which].plan(*arguments).programs[0].prepared)
    before, after = found
    assert not many_of(before.program)
    assert after.memory.arena_bytes <= before.memory.arena_bytes
    assert len(after.program.instructions) == len(before.program.instructions) - sum(
        i.params["count"] - 1 for i in many_of(after.program)
    )
    stores = [[i.op for i in one.program.instructions].count(STORE) for one in found]
    assert stores[0] == stores[1], "updates are as often in place"


def test_updates_of_a_traced_step_join_after_the_usual_passes() -> None:
    net = make("transformer")
    which, arguments = net.calls[0]
    traced = compiled(net, passes=())[which].plan(*arguments).programs[0].traced
    assert traced is not None
    program = schedule(fuse(dead_code(traced)))
    after = side_by_side(program, 2**20, CPU.alignment_bytes)
    parts = sorted(i.params["count"] for i in many_of(after) if i.phase == "update" or not i.layer)
    assert parts[-1] >= 20
    bound: Any = {}
    found = [scratch_bytes(i, CPU, bound) for i in many_of(after)]
    assert found == [bound[i].scratch_bytes for i in many_of(after)]
    assert native.available() or max(found) > 0  # native kernels need no working memory
    assert arena_bytes(after, CPU, bound) == prepare(after, CPU, ()).memory.arena_bytes
