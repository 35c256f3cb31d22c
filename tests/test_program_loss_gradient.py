"""Losses with their gradients: which are computed together, what runs earlier for it, and with the same bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import ShapeError
from brim.nn import functional as F
from brim.op import REGISTRY
from brim.optim import GradScaler
from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.loss_gradient import CROSS_ENTROPY_WITH_GRAD, HOISTED_BYTES_MAX, loss_gradient
from brim.spec import DTYPES, Spec
from emulated import device
from native_running import needs_library
from program_oracle import changed_by

ROWS, CLASSES = 6, 7
HOW: dict[str, Any] = {"ignore_index": -100, "smoothing": 0.1}
everything = partial(loss_gradient, accepts=lambda instruction: True, peak=lambda program: 0)


class Steps:
    """Scores from an input, their loss, and a gradient of it."""

    def __init__(self, rows: int = ROWS) -> None:
        self.x, self.g = Value(Spec((rows, CLASSES)), "input"), Value(Spec((rows,)), "input")
        self.index = Value(Spec((rows,), DTYPES["int64"]), "constant")
        self.constants = {self.index: np.arange(rows) % CLASSES}
        self.states: list[Value] = []
        self.made: list[Instruction] = []
        self.losses, self.top, self.total = self.add("cross_entropy", self.x, self.index, **HOW)

    def add(self, op: str, *ins: Any, **params: Any) -> list[Value]:
        operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
        outs = [
            Value(spec) for spec in REGISTRY[op].infer([i.spec if isinstance(i, Ref) else i for i in operands], params)
        ]
        self.made.append(Instruction(REGISTRY[op], operands, tuple(outs), params))
        return outs

    def gradient(self, g: Any) -> Value:
        (made,) = self.add("cross_entropy_grad", g, self.x, self.index, self.top, self.total, **HOW)
        return made

    def program(self, *results: Value) -> Program:
        return Program([self.x, self.g], self.states, self.constants, self.made, [Ref.of(v) for v in results])


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


def joined(program: Program) -> Program:
    """The program after the pass, checked: well formed, the argument unchanged, the same bits."""
    return changed_by(everything, program)


@needs_library
def test_a_gradient_comes_with_its_loss() -> None:
    steps = Steps()
    dx = steps.gradient(steps.g)
    after = joined(steps.program(steps.losses, dx))
    assert names(after) == ["cross_entropy_with_grad"]
    assert after.instructions[0].outs == (steps.losses, dx)


@needs_library
def test_what_the_gradient_is_given_is_computed_before() -> None:
    steps = Steps()
    (mean,) = steps.add("sum", steps.losses, axes=(0,), keepdims=False)
    (share,) = steps.add("multiply", steps.g, 0.25)
    (copied,) = steps.add("copy", share)
    dx = steps.gradient(copied)
    after = joined(steps.program(mean, dx))
    assert names(after) == ["multiply", "cross_entropy_with_grad", "sum"], "and a copy is read where it comes from"
    assert after.instructions[1].ins[2] == Ref.of(share)


@needs_library
@pytest.mark.parametrize(
    "why", ["needs the loss", "sums read again", "two gradients", "state written", "much to compute"]
)
def test_what_cannot_come_together_stays_apart(why: str) -> None:
    steps = Steps(HOISTED_BYTES_MAX // 4 + 1 if why == "much to compute" else ROWS)
    results, g = [steps.losses], steps.g
    if why == "needs the loss":
        (g,) = steps.add("multiply", steps.losses, 2.0)
    elif why == "sums read again":
        results.append(steps.total)
    elif why == "two gradients":
        results.append(steps.gradient(steps.g))
    elif why == "much to compute":
        (g,) = steps.add("multiply", steps.g, 2.0)
    else:
        state, new = Value(Spec((ROWS,)), "state"), steps.add("multiply", steps.g, 3.0)[0]
        steps.states.append(state)
        steps.made.append(Instruction(STORE, (Ref.of(state), Ref.of(new)), ()))
        (g,) = steps.add("multiply", state, 2.0)
    results.append(steps.gradient(g))
    program = steps.program(*results)
    assert everything(program) is program
    assert CROSS_ENTROPY_WITH_GRAD not in [i.op for i in program.instructions]


def test_the_backend_and_the_peak_decide() -> None:
    steps = Steps()
    program = steps.program(steps.losses, steps.gradient(steps.g))
    assert loss_gradient(program, lambda instruction: False) is program
    assert loss_gradient(program, lambda instruction: True, peak=lambda p: -len(p.instructions)) is program
    assert names(loss_gradient(program, lambda instruction: True)) == ["cross_entropy_with_grad"]


def test_the_rule() -> None:
    x, index = Spec((ROWS, CLASSES)), Spec((ROWS,), DTYPES["int64"])
    assert CROSS_ENTROPY_WITH_GRAD.infer([x, index, Spec((ROWS,))], HOW) == (Spec((ROWS,)), x)
    with pytest.raises(ShapeError, match="a gradient for each"):
        CROSS_ENTROPY_WITH_GRAD.infer([x, index, Spec((ROWS + 1,))], HOW)


# ---- on the emulated GPU ----


@pytest.mark.emulated
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("classes", [11, 16, 40000], ids=["odd", "even", "wide"])
def test_planned_steps_have_the_bits_of_eager_ones(scaled: bool, classes: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 5)).astype("f4"), rng.integers(0, classes, 9)
    y[3] = -100
    found = []
    for planned in (False, True):
        brim.manual_seed(0)
        model = nn.Linear(5, classes).to(device())
        optimizer = optim.SGD(model.parameters(), lr=0.5)
        scaler = GradScaler(64.0, device=device()) if scaled else None

        def step(x: Any, y: Any, model: Any = model, optimizer: Any = optimizer, scaler: Any = scaler) -> Any:
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            return loss

        if planned:
            run = brim.compile(step, device=device())
            losses = [run(x, y).item() for _ in range(2)]
            ops = [i.op.name for i in run.program().instructions]
            assert "cross_entropy_with_grad" in ops
            assert "cross_entropy_grad" not in ops
        else:
            losses = [step(*(brim.asarray(a, device=device()) for a in (x, y))).item() for _ in range(2)]
        found.append((losses, [p.detach().numpy().tobytes() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]
