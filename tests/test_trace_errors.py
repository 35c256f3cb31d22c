"""What a compiled step refuses, naming the line and the way out, and that a refused one leaves nothing behind."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, ops
from brim.errors import BrimError, TraceError
from brim.program.compile import compile as compile_step
from brim.program.compile import plan, spec
from small_training import Training
from small_training import random_floats as _x

F = nn.functional
HERE = __file__


def _line_of(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the line of a function that contains a text."""
    lines, first = inspect.getsourcelines(function)
    found = [first + n for n, line in enumerate(lines) if n and text in line]
    assert len(found) == 1
    return f"{HERE}:{found[0]}"


# ---------------------------------------------------------------- refusals


def _reads_item(x: Any) -> Any:
    return x.sum().item()


def _reads_numpy(x: Any) -> Any:
    return x.numpy()


def _reads_float(x: Any) -> Any:
    return float(x.sum())


def _reads_int(x: Any) -> Any:
    return int(x.sum())


def _reads_list(x: Any) -> Any:
    return x.tolist()


def _reads_bool(x: Any) -> Any:
    return bool(x.sum())


def _branches(x: Any) -> Any:
    if x.sum() > 1:
        return x
    return -x


def _loops(x: Any) -> Any:
    while x.max() > 1:
        x = x / 2
    return x


def _masks(x: Any) -> Any:
    return x[x > 0].sum()


def _becomes_an_array(x: Any) -> Any:
    return np.asarray(x)


READS = [
    (_reads_item, "item()"), (_reads_numpy, "numpy()"), (_reads_float, "float("), (_reads_int, "int(x"),
    (_reads_list, "tolist()"), (_reads_bool, "bool("), (_branches, "if x"), (_loops, "while x"), (_masks, "x[x > 0]"),
    (_becomes_an_array, "np.asarray(x)"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "line"), READS, ids=[step.__name__ for step, _ in READS])
def test_a_value_that_is_read_in_a_step(step: Callable[..., Any], line: str) -> None:
    for attempt in (lambda: compile_step(step)(_x(3)), lambda: plan(step, spec((3,)))):
        with pytest.raises(TraceError) as caught:
            attempt()
        text = str(caught.value)
        assert _line_of(step, line) in text
        assert "brim.where()" in text  # a way out
        assert "return the tensor" in text.lower()
    step(brim.asarray(_x(3) + 3))  # eagerly it works


def test_a_tensor_is_printed_by_its_shape(capsys: pytest.CaptureFixture[str]) -> None:
    """Printing does no harm: it happens once, and says that there are no values yet."""

    def step(x: Any) -> Any:
        print(x * 2)
        return x

    run = compile_step(step)
    run(_x(3))
    run(_x(3))
    assert capsys.readouterr().out.splitlines() == ["tensor(..., shape=(3,), dtype=float32)"]


def test_a_tensor_of_another_device() -> None:
    with brim.meta():
        weight = brim.zeros((3,))
    for attempt in (lambda: compile_step(lambda x: x * weight)(_x(3)),):
        with pytest.raises(TraceError, match=r"meta device.*brim\.plan"):
            attempt()
    assert plan(lambda x: x * weight, spec((3,))).peak_bytes > 0  # planned all the same


def test_a_move_in_the_middle() -> None:
    def step(x: Any) -> Any:
        return (x * 2).to("meta")

    with pytest.raises(TraceError) as caught:
        compile_step(step)(_x(3))
    assert _line_of(step, "to(") in str(caught.value)
    assert "before the step" in str(caught.value)


class _Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", brim.zeros((2,)))

    def forward(self, x: Any) -> Any:
        self.seen = ops.concat([self.seen, x])
        return x


class _Widening(_Growing):
    def forward(self, x: Any) -> Any:
        self.seen = self.seen.astype("float64") + 1.0
        return x


class _Emptied(_Growing):
    def forward(self, x: Any) -> Any:
        self.seen = None
        return x


@pytest.mark.parametrize(("kind", "words"), [(_Growing, "final shape"), (_Widening, "float64"), (_Emptied, "None")])
def test_a_buffer_that_changes_its_form(kind: Any, words: str) -> None:
    model = kind()
    before = model.seen
    with pytest.raises(TraceError, match=rf"{kind.__name__}\.seen.*{words}"):
        compile_step(model)(_x(2))
    assert model.seen is before
    assert model.seen.shape == (2,)


def test_a_kept_tensor_is_a_leak() -> None:
    losses: list[Any] = []

    def step(x: Any) -> Any:
        loss = (x * x).sum()
        losses.append(loss)
        return loss

    with pytest.raises(TraceError, match=r"still referenced.*return what you want to keep") as caught:
        compile_step(step)(_x(3))
    assert _line_of(step, ".sum()") in str(caught.value)
    with pytest.raises(TraceError, match="has a shape and no values"):
        losses[0].item()
    losses.clear()


def test_a_kept_argument_is_a_leak() -> None:
    kept: list[Any] = []
    with pytest.raises(TraceError, match="still referenced"):
        compile_step(lambda x: kept.append(x))(_x(3))


def test_a_cycle_is_no_leak() -> None:
    class Node:
        pass

    def step(x: Any) -> Any:
        node = Node()
        node.me, node.value = node, x * 2  # type: ignore[attr-defined]
        return node.value + 1  # type: ignore[attr-defined]

    assert np.array_equal(compile_step(step)(_x(3)).numpy(), _x(3) * 2 + 1)


def test_random_numbers_of_the_host() -> None:
    def step(x: Any) -> Any:
        noise = brim.random.host_generator().standard_normal(3)
        return x + noise

    with pytest.raises(TraceError, match=r"dropout.*argument"):
        compile_step(step)(_x(3))


def test_a_write_through_a_view() -> None:
    state = brim.zeros((4, 3))
    view = state[1:3]

    def step(x: Any) -> Any:
        view.write(x)
        return x

    with pytest.raises(TraceError, match="on the tensor itself") as caught:
        compile_step(step)(_x(2, 3))
    assert _line_of(step, "view.write") in str(caught.value)
    assert not state.numpy().any()


def test_a_write_by_index() -> None:
    state = brim.zeros((4, 3))

    def step(x: Any) -> None:
        state[1:3] = x

    run = compile_step(step)
    for n in range(3):
        run(_x(2, 3, seed=n))
        assert np.array_equal(state.numpy()[1:3], _x(2, 3, seed=n))
        assert not state.numpy()[[0, 3]].any()


def test_a_step_inside_a_step() -> None:
    inner = compile_step(lambda x: x * 2)
    assert np.array_equal(compile_step(lambda x: inner(x) + 1)(_x(3)).numpy(), _x(3) * 2 + 1)  # part of the outer one
    with pytest.raises(TraceError, match="inside another"):
        compile_step(lambda x: plan(lambda y: y, spec((3,))) and x)(_x(3))


def test_errors_of_the_step_itself_come_through() -> None:
    with pytest.raises(BrimError, match=r"\(3,\).*\(4,\)|\(4,\).*\(3,\)"):
        compile_step(lambda x: x + brim.zeros((4,)))(_x(3))
    with pytest.raises(ZeroDivisionError):
        compile_step(lambda x: 1 // 0)(_x(3))


# ---------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize("where", ["forward", "backward", "update"])
def test_a_failed_trace_changes_nothing(where: str) -> None:
    training, other = Training(), Training()
    gradient = brim.ones((3, 6))
    training.model[4].weight.grad = gradient
    state, buffers = training.values(), dict(training.model.named_buffers())
    seed = brim.random.get_state()
    gc.collect()
    live_bytes = brim.memory_stats()["live_bytes"]

    def failing(x: Any, y: Any) -> Any:
        out = training.model(x)
        if where == "forward":
            raise KeyboardInterrupt
        F.cross_entropy(out, y).backward()
        if where == "backward":
            raise KeyboardInterrupt
        training.optimizer.step()
        training.optimizer.zero_grad()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_step(failing)(*training.batch())
    assert training.model[4].weight.grad is gradient
    assert all(p.grad is None for p in training.model.parameters() if p is not training.model[4].weight)
    assert all(b is buffers[name] for name, b in training.model.named_buffers())
    assert training.optimizer.state_arrays() == {}
    assert training.values() == state
    assert brim.random.get_state() == seed
    gc.collect()
    assert brim.memory_stats()["live_bytes"] == live_bytes
    training.model[4].weight.grad = None
    brim.manual_seed(5)
    loss = training.step(*training.batch()).item()
    brim.manual_seed(5)
    assert loss == other.step(*other.batch()).item()


def test_a_refused_step_changes_nothing() -> None:
    training = Training()
    state, seed = training.values(), brim.random.get_state()
    gc.collect()
    live_bytes = brim.memory_stats()["live_bytes"]
    with pytest.raises(brim.BudgetExceeded):
        compile_step(training.step, budget=live_bytes + 64)(*training.batch())
    gc.collect()
    assert brim.memory_stats()["live_bytes"] == live_bytes
    assert training.values() == state
    assert training.optimizer.state_arrays() == {}
    assert brim.random.get_state() == seed
    training.compiled(*training.batch())  # within the budget it runs


def test_state_that_a_compiled_step_makes_is_the_eager_one() -> None:
    one, other = Training(), Training()
    one.compiled(*one.batch())
    brim.manual_seed(1)
    other = Training()
    other.step(*other.batch())
    arrays, expected = one.optimizer.state_arrays(), other.optimizer.state_arrays()
    assert list(arrays) == list(expected)
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    kinds = {t._block.record.category for values in one.optimizer.state.values() for t in values.values()}
    assert kinds == {"optimizer"}
