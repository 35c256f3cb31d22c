"""Kept powers: which losses keep the powers of their scores, at no cost in memory, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

import brim
from brim.check.networks import compiled, make
from brim.errors import ShapeError
from brim.nn import functional as F
from brim.op import REGISTRY
from brim.program.ir import Instruction, Program, Ref, Value
from brim.program.lower import arena_bytes, prepare
from brim.program.passes import default_passes
from brim.program.passes.keep_powers import (
    BESIDE_BYTES_MAX,
    CROSS_ENTROPY_POWERS,
    CROSS_ENTROPY_POWERS_GRAD,
    keep_powers,
)
from brim.spec import DTYPES, Spec
from native_running import needs_library, normal, run
from program_oracle import CPU, changed_by, run_program

pytestmark = needs_library  # only native kernels keep powers

ROWS, CLASSES = 8, 40
HOW = {"ignore_index": -100, "smoothing": 0.1}
I64 = DTYPES["int64"]


def accepts(instruction: Instruction) -> bool:
    ins = [ref.spec for ref in instruction.refs]
    return CPU.keeps_powers(instruction.op, ins, [out.spec for out in instruction.outs], instruction.params)


def peak(program: Program) -> int:
    return arena_bytes(program, CPU, {})


def kept(program: Program, peak: Callable[[Program], int] | None = peak) -> Program:
    """The program after the pass, checked: well formed, the argument unchanged, the same bits, no higher peak."""
    after = changed_by(partial(keep_powers, accepts=accepts, peak=peak), program)
    assert peak is None or peak(after) <= peak(program)
    return after


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


def counts(program: Program) -> tuple[int, int]:
    """Losses and gradients with kept powers."""
    ops = [i.op for i in program.instructions]
    return ops.count(CROSS_ENTROPY_POWERS), ops.count(CROSS_ENTROPY_POWERS_GRAD)


class Steps:
    """A program that is written instruction by instruction: scores from an input, their loss, gradients."""

    def __init__(self, rows: int = ROWS, classes: int = CLASSES) -> None:
        self.rows = rows
        self.given, self.index = Value(Spec((rows, classes)), "input"), Value(Spec((rows,), I64), "constant")
        self.classes = np.arange(rows) * 3 % classes
        self.g = Value(Spec((rows,)), "input")
        self.made: list[Instruction] = []
        self.results: list[Ref] = []

    def add(self, op: str, *ins: Any, **params: Any) -> list[Value]:
        operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
        specs = [i.spec if isinstance(i, Ref) else i for i in operands]
        outs = [Value(spec) for spec in REGISTRY[op].infer(specs, params)]
        self.made.append(Instruction(REGISTRY[op], operands, tuple(outs), params))
        return outs

    def scores(self) -> Value:
        return self.add("relu", self.given)[0]

    def loss(self, x: Any) -> tuple[Value, Value]:
        losses, top, total = self.add("cross_entropy", x, self.index, **HOW)
        self.results.append(Ref.of(losses))
        return top, total

    def gradient(self, x: Any, sums: Sequence[Value], **how: Any) -> Value:
        (out,) = self.add("cross_entropy_grad", self.g, x, self.index, *sums, **{**HOW, **how})
        self.results.append(Ref.of(out))
        return out

    def program(self) -> Program:
        return Program([self.given, self.g], [], {self.index: self.classes}, list(self.made), list(self.results))


# ------------------------------------------------------------------------------------------------ which losses


def test_a_loss_and_its_gradient_share_the_powers_in_the_place_of_the_scores() -> None:
    steps = Steps()
    x = steps.scores()
    steps.gradient(x, steps.loss(x))
    for judge in (peak, None):
        after = kept(steps.program(), judge)
        assert names(after) == ["relu", "cross_entropy_powers", "cross_entropy_powers_grad"]
    powers = after.instructions[1].outs[2]
    memory = prepare(after, CPU, ()).memory
    (out,) = after.instructions[2].outs
    assert (memory.shares[powers], memory.shares[out]) == (x, powers)


def test_scores_that_are_an_argument_of_the_step() -> None:
    steps = Steps()
    steps.gradient(steps.given, steps.loss(steps.given))
    assert counts(kept(steps.program())) == (1, 1)


def test_powers_larger_than_caches_only_lie_in_the_place_of_the_scores() -> None:
    classes = BESIDE_BYTES_MAX // 4 // ROWS
    for more, pairs in ((0, 1), (1, 0)):
        beside = Steps(classes=classes + more)
        beside.gradient(beside.given, beside.loss(beside.given))
        beside.results.append(Ref.of(beside.given))  # somebody reads the scores
        assert counts(keep_powers(beside.program(), accepts, peak)) == (pairs, pairs)
        over = Steps(classes=classes + more)
        x = over.scores()
        over.gradient(x, over.loss(x))
        assert counts(keep_powers(over.program(), accepts, peak)) == (1, 1)


def test_two_gradients_of_one_loss_read_the_same_powers() -> None:
    steps = Steps()
    x = steps.scores()
    sums = steps.loss(x)
    steps.gradient(x, sums)
    steps.gradient(x, sums)
    assert counts(kept(steps.program())) == (1, 2)


def test_scores_that_are_needed_later_stay_unless_there_is_room() -> None:
    steps = Steps()
    x = steps.scores()
    steps.gradient(x, steps.loss(x))
    steps.results.append(Ref.of(x))
    assert counts(kept(steps.program())) == (1, 1)  # the gradient is a result: it lies where the powers lay
    steps = Steps()
    x = steps.scores()
    sums = steps.loss(x)
    between = steps.add("exp", x)[0]  # what the loss keeps is there beside it
    steps.results.append(Ref.of(steps.add("sum", between, axes=(0, 1), keepdims=False)[0]))
    gradient = steps.gradient(x, sums)
    steps.results[-1] = Ref.of(steps.add("multiply", gradient, x)[0])
    assert peak(steps.program()) < peak(keep_powers(steps.program(), accepts, lambda one: 0))
    assert counts(kept(steps.program())) == (0, 0)


def test_losses_that_cost_nothing_keep_theirs_where_others_would_cost() -> None:
    steps = Steps()
    first, second = steps.scores(), steps.add("exp", steps.given)[0]
    sums = steps.loss(first), steps.loss(second)
    between = steps.add("exp", second)[0]
    steps.results.append(Ref.of(steps.add("sum", between, axes=(0, 1), keepdims=False)[0]))
    steps.gradient(first, sums[0])
    gradient = steps.gradient(second, sums[1])
    steps.results[-1] = Ref.of(steps.add("multiply", gradient, second)[0])
    after = kept(steps.program())
    assert counts(after) == (1, 1)
    assert next(i for i in after.instructions if i.op is CROSS_ENTROPY_POWERS).ins[0] == Ref.of(first)


def test_what_is_no_pair_stays() -> None:
    steps = Steps()
    x = steps.scores()
    steps.loss(x)
    assert counts(kept(steps.program())) == (0, 0)  # no gradient
    steps.gradient(steps.add("exp", steps.given)[0], steps.loss(x))
    steps.gradient(x, steps.loss(x), smoothing=0.0)
    top, total = steps.loss(x)
    steps.gradient(x, (total, top))
    top, total = steps.loss(x)
    steps.gradient(x, (top, total))
    steps.results.append(Ref.of(top))  # somebody wants the largest scores
    top, total = steps.loss(x)
    steps.results.append(Ref.of(total))
    assert counts(kept(steps.program())) == (0, 0)


def test_a_backend_has_to_want_both() -> None:
    steps = Steps()
    x = steps.scores()
    steps.gradient(x, steps.loss(x))
    for op in (CROSS_ENTROPY_POWERS, CROSS_ENTROPY_POWERS_GRAD):
        found = keep_powers(steps.program(), lambda instruction, op=op: instruction.op is op, peak)
        assert counts(found) == (0, 0)
    for dtype in ("float32", "float64"):
        x, index = Spec((3, 4), DTYPES[dtype]), Spec((3,), I64)
        outs = CROSS_ENTROPY_POWERS.infer((x, index), HOW)
        assert CPU.keeps_powers(CROSS_ENTROPY_POWERS, [x, index], outs, HOW) == (dtype == "float32")


def test_the_rule_of_the_gradient_names_what_does_not_fit() -> None:
    powers, index, total = Spec((5, 3)), Spec((5,), I64), Spec((5,))
    (out,) = CROSS_ENTROPY_POWERS_GRAD.infer((powers, Spec((5,)), index, total), HOW)
    assert out.shape == (5, 3)
    with pytest.raises(ShapeError, match=r"\(5, 3\) and \(4,\)"):
        CROSS_ENTROPY_POWERS_GRAD.infer((powers, Spec((4,)), index, total), HOW)


# ------------------------------------------------------------------------------------------------ whole steps


def without() -> list[Any]:
    return [one for one in default_passes(CPU, peak) if getattr(one, "__name__", "") != "keep_powers"]


@pytest.mark.parametrize("name", ["mlp", "transformer", "lstm", "mixed_precision", "recomputed"])
def test_networks_train_the_same_in_the_same_memory(name: str) -> None:
    ends = []
    for passes in (without(), default_passes(CPU, peak)):
        net = make(name)
        steps = compiled(net, passes=passes)
        outputs = [steps[which](*arguments) for which, arguments in net.calls[:4]]
        prepared = steps[0].plan(*net.calls[0][1]).programs[0].prepared
        ends.append((net.state(), repr(outputs), prepared.memory.arena_bytes, counts(prepared.program)))
    (wanted, outputs, bytes_before, none), (found, same, bytes_after, pairs) = ends
    assert (none, pairs) == ((0, 0), (1, 1))
    assert outputs == same
    assert bytes_after <= bytes_before
    for key, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert value.tobytes() == found[key].tobytes(), key


def training(model: Any, x: Any, y: Any) -> Any:
    loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
    loss.backward()
    return loss, [p.grad for p in model.parameters()]


def test_a_planned_step_gives_the_bits_of_the_eager_one_and_refuses_classes_like_it() -> None:
    x, y = normal(30, 9), np.arange(30) % 7
    y[::5] = -100
    brim.manual_seed(0)
    model = brim.nn.Linear(9, 7)

    def step(x: Any, y: Any) -> Any:
        loss, grads = training(model, x, y)
        for p in model.parameters():
            p.grad = None
        return loss, *grads

    planned = brim.compile(step)
    for found, want in zip(planned(x, y), step(brim.asarray(x), brim.asarray(y)), strict=True):
        assert found.numpy().tobytes() == want.numpy().tobytes()
    assert counts(planned.program()) == (1, 1)
    y[3] = 7
    with pytest.raises(IndexError, match="class 7 does not exist: there are 7"):
        planned(x, y)
    y[3] = 6
    assert np.isfinite(planned(x, y)[0].numpy())


def test_the_parameters_are_as_they_were_where_a_class_does_not_exist() -> None:
    model = brim.nn.Linear(5, 3)
    optimizer = brim.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    planned, x = brim.compile(step), normal(4, 5)
    planned(x, np.array([0, 1, 2, 0]))
    before = model.weight.numpy().copy()
    with pytest.raises(IndexError, match="class -1 does not exist"):
        planned(x, np.array([0, 1, -1, 0]))
    np.testing.assert_array_equal(model.weight.numpy(), before)
    planned(x, np.array([0, 1, 2, 0]))
    assert (model.weight.numpy() != before).any()


def test_usual_passes_keep_powers_only_where_the_device_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[int, int]:
        model = brim.nn.Linear(9, 7)
        step = brim.compile(lambda x, y: training(model, x, y)[0])
        return counts(step.plan(normal(30, 9), np.arange(30) % 7).programs[0].prepared.program)

    assert found() == (1, 1)
    monkeypatch.setattr(brim.device("cpu").backend, "keeps_powers", None, raising=False)
    assert found() == (0, 0)


# ------------------------------------------------------------------------------------------------ kernels

SCORES = {
    "one": normal(1, 1), "few": normal(5, 7), "batches": normal(200, 64) * 4, "wide": normal(3, 5000),
    "pieces": normal(700, 33), "steep": normal(9, 130) * 1e4,
    "special": np.array([
        [1, np.nan, 2, 3], [-np.inf, 0, 1, 2], [np.inf, 0, 1, 2], [-np.inf] * 4, [3e38, -3e38, 1, 0],
        [1e-40, 2e-40, -1e-42, 0], [np.inf, np.nan, 0, 1], [np.nan] * 4, [0] * 4,
    ], np.float32),
}  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", list(SCORES))
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_kernels_give_the_bits_of_those_that_keep_nothing(name: str, smoothing: float, dtype: str) -> None:
    x = SCORES[name]
    rows, classes = x.shape
    index = (np.arange(rows) * 5 % classes).astype(dtype)
    index[2::4] = -1
    g = normal(rows)
    how = {"ignore_index": -1, "smoothing": smoothing}
    losses, top, total = run("cross_entropy", x, index, **how)
    found_losses, found_total, powers = run("cross_entropy_powers", x, index, **how)
    np.testing.assert_array_equal(found_losses, losses)
    np.testing.assert_array_equal(found_total, total)
    want = run("cross_entropy_grad", g, x, index, top, total, **how)
    np.testing.assert_array_equal(run("cross_entropy_powers_grad", powers, g, index, total, **how), want)
    one = np.broadcast_to(g[:1], g.shape)
    want = run("cross_entropy_grad", one, x, index, top, total, **how)
    np.testing.assert_array_equal(run("cross_entropy_powers_grad", powers, one, index, total, **how), want)


@pytest.mark.parametrize("shape", [(7, 5), (200, 64), (9, 5000), (44, 50257)], ids=str)
def test_everything_may_lie_in_the_place_of_the_scores(shape: tuple[int, int]) -> None:
    steps = Steps(*shape)
    x = steps.scores()
    steps.gradient(x, steps.loss(x))
    before, after = steps.program(), kept(steps.program(), None)
    rng = np.random.default_rng(1)
    given = {one: rng.standard_normal(one.spec.shape).astype("f4") for one in (steps.given, steps.g)}
    want = run_program(before, given)
    memory = prepare(after, CPU, ()).memory
    assert len(memory.shares) == 3  # all of one array
    for one, other in zip(run_program(after, given, memory).results, want.results, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_class_that_does_not_exist(wrong: int) -> None:
    with pytest.raises(IndexError, match=f"class {wrong} does not exist: there are 5"):
        run("cross_entropy_powers", normal(3, 5), np.array([0, wrong, 4]), **HOW)
