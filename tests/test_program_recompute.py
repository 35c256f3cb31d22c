"""Recomputation and half activations: less is kept, blocks one after the other; results are the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.op import REGISTRY
from brim.program.compile import CompiledStep
from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.choose import choose
from brim.program.passes.common import common
from brim.program.passes.dead_code import dead_code
from brim.program.passes.half_activations import half_activations
from brim.program.passes.liveness import live_bytes
from brim.program.passes.recompute import blocks, expanded, extra_arithmetic, matcher, recompute, shortened
from brim.program.passes.rematerialise import rematerialise
from brim.program.passes.schedule import schedule
from brim.program.plan import Plan
from brim.program.verify import verify
from brim.spec import Spec
from program_oracle import run_program
from random_programs import random_arrays, random_program

F = nn.functional
Step = Callable[..., Any]


class Block(nn.Module):
    """A residual block with two convolutions, batch norms and a dropout."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Any) -> Any:
        h = self.drop(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(h)) + x)


class Net(nn.Module):
    def __init__(self, C: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, C, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(C) for _ in range(depth)])
        self.head = nn.Linear(C, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _step(model: nn.Module, optimizer: optim.Optimizer) -> Step:
    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _cnn(depth: int = 4) -> tuple[nn.Module, Step]:
    brim.manual_seed(2)
    model = Net(4, depth)
    return model, _step(model, optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def _mlp(depth: int = 9) -> tuple[nn.Module, Step]:
    brim.manual_seed(2)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(16, 3))
    return model, _step(model, optim.Adam(model.parameters(), lr=0.01))


def _images(N: int = 6, count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(4)
    return [(rng.standard_normal((N, 2, 10, 10)).astype("f4"), rng.integers(0, 3, N)) for _ in range(count)]


def _rows(N: int = 256, count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(4)
    return [(rng.standard_normal((N, 16)).astype("f4"), rng.integers(0, 3, N)) for _ in range(count)]


def _train(make: Callable[[], tuple[nn.Module, Step]], data: Any, **options: Any) -> tuple[Any, Plan]:
    model, step = make()
    compiled = CompiledStep(step, **options)
    losses = [compiled(x, y).item() for x, y in data]
    return (losses, {k: v.numpy().tobytes() for k, v in model.state_dict().items()}), compiled.current_plan()


def _traced(make: Callable[[], tuple[nn.Module, Step]], data: Any) -> Program:
    program = CompiledStep(make()[1]).plan(*data[0]).programs[0].traced
    assert program is not None
    return dead_code(program)


LAYERS = [
    ["blocks.0"],
    ["blocks.*"],
    ["blocks"],
    ["blocks.0..1", "blocks.2..3"],
    ["blocks.1", "blocks.1.bn1", "blocks.1"],
    ["blocks.0.bn1", "blocks.2.conv2", "stem"],
    ["*"],
    [":elementwise"],
    [":elementwise", "blocks.1"],
]


@pytest.mark.parametrize("layers", LAYERS, ids="+".join)
def test_the_same_bits(layers: Sequence[str]) -> None:
    plain, _ = _train(_cnn, _images())
    again, plan = _train(_cnn, _images(), recompute=layers)
    assert again == plain
    assert plan.options.recompute == tuple(layers)


@pytest.mark.parametrize("layers", LAYERS, ids="+".join)
def test_programs_are_well_formed(layers: Sequence[str]) -> None:
    before = _traced(_cnn, _images())
    after = recompute(before, layers)
    verify(after)
    verify(schedule(common(dead_code(after))))
    assert [i for i in after.instructions if i.op is STORE] == [i for i in before.instructions if i.op is STORE]


def test_recomputed_blocks_need_less() -> None:
    _, plain = _train(_cnn, _images(count=1))
    _, one = _train(_cnn, _images(count=1), recompute=["blocks.0"])
    _, every = _train(_cnn, _images(count=1), recompute=["blocks.*"])
    assert every.arena_bytes < one.arena_bytes < plain.arena_bytes
    assert every.arena_bytes < 0.6 * plain.arena_bytes
    assert every.by_kind()["activations"] < 0.5 * plain.by_kind()["activations"]


def test_blocks_do_not_live_all_at_once() -> None:
    deep, deeper = (
        max(live_bytes(recompute(_traced(lambda n=n: _cnn(n), _images()), ["blocks.*"])))
        for n in (4, 8)  # type: ignore[misc]
    )
    value_bytes = 6 * 4 * 10 * 10 * 4
    # Four more blocks cost their inputs, one value each, and a few statistics.
    assert 4 * value_bytes <= deeper - deep <= 5 * value_bytes


def test_a_block_saves_what_it_says() -> None:
    program = _traced(_cnn, _images())
    saved = {name: (nbytes, cost) for name, nbytes, cost in blocks(program)}
    value_bytes = 6 * 4 * 10 * 10 * 4
    # Of a block: both convolutions' outputs, the rectified one and the one after dropout, and a few statistics.
    assert 4 * value_bytes <= saved["blocks.1"][0] <= 5 * value_bytes
    assert saved["blocks"][0] > 3 * saved["blocks.1"][0]
    assert saved["blocks.1"][1] > 2 * 2 * (6 * 10 * 10 * 4) * 4 * 9  # two convolutions
    assert "head" not in saved
    kept = _kept_bytes(program) - _kept_bytes(recompute(program, ["blocks.1"]))
    assert kept == saved["blocks.1"][0]


def _kept_bytes(program: Program) -> int:
    """Bytes of forward values that the backward pass reads."""
    phases = {out: i.phase for i in program.instructions for out in i.outs}
    read = {ref.value for i in program.instructions if i.phase == "backward" for ref in i.refs}
    return sum(value.nbytes for value in read if phases.get(value) == "forward")


def test_dropout_draws_the_same_mask() -> None:
    before = _traced(_cnn, _images())
    after = recompute(before, ["blocks.2"])
    assert after.scalars() == before.scalars()
    drawn = [i for i in after.instructions if i.op.name == "dropout" and i.layer == "blocks.2.drop"]
    forward, repeated = drawn[0], next(i for i in drawn[1:] if i.ins[0].value is not drawn[0].ins[0].value)
    assert forward.ins[1:] == repeated.ins[1:]
    assert repeated.phase == "backward"


def test_running_statistics_move_once() -> None:
    model, step = _cnn()
    CompiledStep(step, recompute=["blocks.*"])(*_images()[0])
    assert all(int(v.numpy()) == 1 for k, v in model.state_dict().items() if k.endswith("num_batches_tracked"))


def test_a_state_that_was_overwritten_is_not_read_again() -> None:
    """What was made from a state's old value is kept; what follows from it is made again."""
    spec = Spec((8, 4))
    x, w = Value(spec, "input"), Value(spec, "state")
    scaled, bent, grown, other, new, result = (Value(spec) for _ in range(6))

    def one(op: str, out: Value, *ins: Any, layer: str = "", phase: str = "forward") -> Instruction:
        operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
        return Instruction(REGISTRY[op], operands, (out,), {}, layer, phase=phase)

    def program(is_stored: bool) -> Program:
        store = Instruction(STORE, (Ref.of(w), Ref.of(new)), (), phase="update")
        return Program(
            [x], [w], {},
            [
                one("multiply", scaled, w, x, layer="a"),
                one("tanh", bent, scaled, layer="a"),
                one("exp", grown, bent, layer="a"),
                one("negative", other, grown, layer="b"),
                one("add", new, x, 1.0, phase="update"),
                *([store] if is_stored else []),
                one("multiply", result, bent, other, layer="a", phase="backward"),
            ],
            [Ref.of(result)],
        )  # fmt: skip

    given = {x: np.full((8, 4), 0.5, "f4"), w: np.full((8, 4), 3.0, "f4")}
    for is_stored, repeated in ((False, ["multiply", "tanh"]), (True, ["tanh"])):
        before = program(is_stored)
        after = recompute(before, ["a"])
        verify(after)
        assert [i.op.name for i in after.instructions if i.layer == "a" and i.phase == "backward"][:-1] == repeated
        expected, found = run_program(before, given), run_program(after, given)
        assert found.results[0].tobytes() == expected.results[0].tobytes()


def test_one_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
            self.head = nn.Linear(16, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.inner(self.inner(x)))

    def make() -> tuple[nn.Module, Step]:
        brim.manual_seed(6)
        model = Twice()
        return model, _step(model, optim.SGD(model.parameters(), lr=0.1))

    plain, _ = _train(make, _rows())
    again, _ = _train(make, _rows(), recompute=["inner"])
    assert again == plain
    program = _traced(make, _rows())
    made = recompute(program, ["inner"]).instructions
    twice = [n for n, i in enumerate(made) if i.op.name == "tanh" and i.layer == "inner.1"]
    assert len(twice) == 4  # two calls, each repeated once
    second = [n for n, i in enumerate(made) if i.op.name == "matmul" and (i.phase, i.layer) == ("backward", "inner.2")]
    # The first call is not repeated before gradients of the second one are made.
    assert any(twice[2] < n < twice[3] for n in second)


def test_names() -> None:
    assert matcher("a.b")("a.b")
    assert matcher("a.b")("a.b.c")
    assert not matcher("a.b")("a.bc")
    assert matcher("a.1..3")("a.2.conv")
    assert not matcher("a.1..3")("a.4")
    assert not matcher("a.1..3")("b.2")
    assert matcher("0..3")("3")
    assert matcher("a.*")("a.x.y")
    assert not matcher("a.*")("a")
    with pytest.raises(ValueError, match="two dots and a number"):
        matcher("a..b")
    known = ["a.0", "a.0.conv", "a.1", "a.2.bn", "b"]
    assert expanded(["a.*", "b"], known) == ["a.0", "a.1", "a.2", "b"]
    assert shortened(["a.0", "a.1", "a.2", "b"], known) == ("a.*", "b")
    assert shortened(["a.0", "a.1", "b"], known) == ("a.0", "a.1", "b")


def test_an_unknown_layer_is_named() -> None:
    _, step = _cnn()
    with pytest.raises(ValueError, match=r"'blocks\.9'.*stem"):
        CompiledStep(step, recompute=["blocks.9"])(*_images()[0])
    with pytest.raises(ValueError, match="'float16'"):
        CompiledStep(step, activations="float16")
    with pytest.raises(ValueError, match="'shrink'"):
        CompiledStep(step, fit="shrink")


def test_nothing_to_recompute_changes_nothing() -> None:
    program = _traced(_mlp, _rows())
    assert recompute(program, []) is program
    assert recompute(program, ["18"]) is program  # the last layer: its input is another one's
    forward = CompiledStep(lambda x: brim.tanh(x)).plan(_rows()[0][0]).programs[0].traced
    assert forward is not None
    assert blocks(forward) == []


# -------------------------------------------------------------------- choosing


def _peak(program: Program) -> int:
    return max(live_bytes(schedule(program)))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_choose_fits_with_little_more_arithmetic(share: float) -> None:
    program = _traced(lambda: _cnn(6), _images())
    limit = int(_peak(program) * share)
    found = choose(program, _peak, limit, 60)
    assert found.fits
    assert found.peak_bytes == _peak(found.program) == _peak(recompute(program, found.layers)) <= limit
    every = recompute(program, ["blocks.*"])
    assert 0 < found.extra_arithmetic <= extra_arithmetic(program, every)
    if share == 0.9:
        assert found.extra_arithmetic < 0.5 * extra_arithmetic(program, every)


def test_choose_does_nothing_where_nothing_is_needed() -> None:
    program = _traced(_cnn, _images())
    assert choose(program, _peak, _peak(program), 60).layers == ()


def test_choose_is_no_worse_than_every_block() -> None:
    for make, data in ((_cnn, _images()), (_mlp, _rows())):
        program = _traced(make, data)
        found = choose(program, _peak, 1, 60)
        assert not found.fits
        assert found.complete
        names = [name for name, _, _ in blocks(program)]
        for depth in range(3):
            every = [name for name in names if name.count(".") == depth]
            assert found.peak_bytes <= _peak(recompute(program, every))


def test_choose_cuts_a_chain_into_segments() -> None:
    program = _traced(lambda: _mlp(24), _rows())
    found = choose(program, _peak, 1, 60)
    assert any(".." in name for name in found.layers)
    assert found.peak_bytes < 0.6 * _peak(program)


def test_choose_stops_in_time() -> None:
    program = _traced(_cnn, _images())
    found = choose(program, _peak, 1, 0.0)
    assert not found.complete
    assert not found.fits


# -------------------------------------------------------------------- what elementwise instructions make again


def test_normalised_and_rectified_values_are_made_again() -> None:
    program = _traced(_cnn, _images())
    made = rematerialise(program)
    verify(made)
    assert _kept_bytes(made) < 0.7 * _kept_bytes(program)
    assert 0 < extra_arithmetic(program, made) < 0.4
    repeated = len(made.instructions) - len(program.instructions)
    assert repeated > 0
    assert not any(i.op.name in ("conv2d", "matmul") for i in made.instructions if i not in program.instructions)
    assert rematerialise(made) is made
    _, plain = _train(_cnn, _images(32, 1))
    _, less = _train(_cnn, _images(32, 1), recompute=[":elementwise"])
    assert less.arena_bytes < 0.75 * plain.arena_bytes


def _chain(length: int, is_stored: bool = False, is_result: bool = False) -> tuple[Program, dict[Value, np.ndarray]]:
    """``y = tanh(tanh(...(w + x)))``, read again in the backward pass beside x."""
    spec = Spec((64, 64))
    x, w, g = Value(spec, "input"), Value(spec, "state"), Value(spec)
    values = [Value(spec) for _ in range(length)]
    ins: list[tuple[Any, ...]] = [(Ref.of(w), Ref.of(x)), *((Ref.of(v),) for v in values[:-1])]
    body = [Instruction(REGISTRY["tanh" if n else "add"], ins[n], (values[n],), phase="forward") for n in range(length)]
    total, new = Value(Spec((64,))), Value(spec)
    body.append(Instruction(REGISTRY["sum"], (Ref.of(values[-1]),), (total,), {"axes": (0,), "keepdims": False}))
    if is_stored:
        body.append(Instruction(REGISTRY["negative"], (Ref.of(x),), (new,), phase="update"))
        body.append(Instruction(STORE, (Ref.of(w), Ref.of(new)), (), phase="update"))
    body.append(Instruction(REGISTRY["multiply"], (Ref.of(values[-1]), Ref.of(x)), (g,), phase="backward"))
    results = [Ref.of(total), Ref.of(g)] + ([Ref.of(values[-1])] if is_result else [])
    rng = np.random.default_rng(0)
    return Program([x], [w], {}, body, results), {v: rng.standard_normal((64, 64)).astype("f4") for v in (x, w)}


@pytest.mark.parametrize(
    ("length", "options", "changes"),
    [(3, {}, True), (30, {}, False), (3, {"is_stored": True}, False), (3, {"is_result": True}, False)],
    ids=["short", "long", "state overwritten", "result"],
)
def test_what_can_be_made_again(length: int, options: dict[str, bool], changes: bool) -> None:
    program, arrays = _chain(length, **options)
    verify(program)
    made = rematerialise(program)
    verify(made)
    assert (made is not program) is changes
    if changes:
        assert max(live_bytes(made)) <= max(live_bytes(program))
    expected, found = run_program(program, arrays), run_program(made, arrays)
    assert [r.tobytes() for r in found.results] == [r.tobytes() for r in expected.results]


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_give_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brim.program.passes.rematerialise._SMALL_BYTES", 0)
    program = random_program(random.Random(seed), 30)
    made = rematerialise(program)
    verify(made)
    arrays = random_arrays(program, seed)
    expected, found = run_program(program, arrays), run_program(made, arrays)
    assert [r.tobytes() for r in found.results] == [r.tobytes() for r in expected.results]
    assert all(found.states[s].tobytes() == expected.states[s].tobytes() for s in program.states)


# -------------------------------------------------------------------- half activations


def test_half_activations_keep_half() -> None:
    program = _traced(_cnn, _images(32))
    made = half_activations(program)
    verify(made)
    assert _kept_bytes(made) < 0.52 * _kept_bytes(program)
    assert half_activations(made) is made


def test_half_activations_leave_the_forward_pass_alone() -> None:
    (plain, _), before = _train(_cnn, _images(32))
    (half, _), after = _train(_cnn, _images(32), activations="bfloat16")
    assert half[0] == plain[0]  # the first loss, to the last bit
    assert half[1:] != plain[1:]
    np.testing.assert_allclose(half, plain, rtol=0.02)
    assert after.arena_bytes < 0.7 * before.arena_bytes


def test_half_activations_leave_small_values_and_inputs_alone() -> None:
    program = _traced(_mlp, _rows(8))  # 8 x 16 float32 are 512 bytes
    assert half_activations(program) is program
    made = half_activations(_traced(_mlp, _rows(256)))
    cast = [i for i in made.instructions if i.op.name == "astype" and i.outs[0].spec.dtype.itemsize == 2]
    assert cast
    assert all(i.ins[0].value.origin == "temp" and i.ins[0].value.nbytes >= 4096 for i in cast)


def test_recomputation_and_half_activations_together() -> None:
    _, one = _train(_cnn, _images(32, 1), recompute=["blocks.*"])
    _, both = _train(_cnn, _images(32, 1), recompute=["blocks.*"], activations="bfloat16")
    assert both.arena_bytes < one.arena_bytes
