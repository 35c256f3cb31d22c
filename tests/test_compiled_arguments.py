"""What a compiled step takes and gives back: arguments of any layout and nesting, copies, empty batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, ops, optim
from brim.errors import BrimError
from brim.program.compile import compile as compile_step
from small_training import Training
from small_training import random_floats as _x


def test_arguments_of_any_layout() -> None:
    run = compile_step(lambda x: x * 2 + 1)
    whole = _x(6, 8)
    for x in (whole[::2, 1:5], whole.T[:3, :4], np.asfortranarray(whole[:3, :4]), whole[2::-1, :4]):
        assert np.array_equal(run(x).numpy(), x * 2 + 1)
        assert np.array_equal(run(brim.asarray(whole)[::2, 1:5]).numpy(), whole[::2, 1:5] * 2 + 1)
    assert run.explain().count("traced for") == 1  # all of shape (3, 4)


def test_arguments_that_require_gradients() -> None:
    run = compile_step(lambda x: brim.grad((x * x).sum(), x) if x.requires_grad else x)
    x = brim.asarray(_x(3))
    assert np.array_equal(run(x).numpy(), _x(3))
    assert np.array_equal(run(brim.asarray(_x(3)).requires_grad_()).numpy(), 2 * _x(3))
    assert run.explain().count("traced for") == 2


def test_gradients_of_arguments() -> None:
    """``x.grad`` of an argument is returned; the tensor that was passed in is copied, and stays as it is."""

    def step(x: Any) -> Any:
        (x**3).sum().backward()
        return x.grad

    x = brim.asarray(_x(3)).requires_grad_()
    assert np.allclose(compile_step(step)(x).numpy(), 3 * _x(3) ** 2)
    assert x.grad is None


def test_nested_arguments_and_results() -> None:
    def step(batch: dict[str, Any], pair: tuple[Any, Any], scale: float, flag: bool, none: None, name: str) -> Any:
        a, b = batch["x"], batch["more"][0]
        assert none is None
        out = [a * scale, (b + pair[0], pair[1]), {"sum": (a.sum(), 3, "text", None)}]
        return out if flag else out[0]

    run = compile_step(step)
    batch = {"x": _x(3), "more": [_x(2)]}
    for scale in (2.0, 3.0, 2.0):
        first, (second, third), rest = run(batch, (_x(2, seed=1), _x(1)), scale, True, None, name="n")
        assert np.array_equal(first.numpy(), _x(3) * np.float32(scale))
        assert np.array_equal(second.numpy(), _x(2) + _x(2, seed=1))
        assert np.array_equal(third.numpy(), _x(1))
        assert rest["sum"][1:] == (3, "text", None)
    assert isinstance(run(batch, (_x(2, seed=1), _x(1)), 2.0, False, None, name="n"), brim.Tensor)
    assert run.explain().count("traced for") == 3
    assert compile_step(lambda x: None)(_x(3)) is None
    assert compile_step(lambda: 7)() == 7


def test_a_number_and_its_type_are_part_of_the_program() -> None:
    run = compile_step(lambda x, n: x * n)
    assert run(np.array([2, 3]), 2).dtype == np.int64
    assert run(np.array([2, 3]), 2.0).dtype == np.float32
    assert run(np.array([2, 3]), True).dtype == np.int64
    for zero in (0.0, -0.0, 0.0):
        assert np.signbit(run(np.ones(3, np.float32), zero).numpy()).tolist() == [np.signbit(zero)] * 3
    traces = run.explain().count("traced for")
    for _ in range(3):
        assert np.isnan(run(np.ones(3, np.float32), float("nan")).numpy()).all()
    assert run.explain().count("traced for") == traces + 1


def test_keyword_and_positional_arguments() -> None:
    run = compile_step(lambda x, y: x - y)
    assert np.array_equal(run(_x(3), y=_x(3, seed=1)).numpy(), _x(3) - _x(3, seed=1))
    assert np.array_equal(run(y=_x(3), x=_x(3, seed=1)).numpy(), _x(3, seed=1) - _x(3))
    assert np.array_equal(run(x=_x(3), y=_x(3, seed=1)).numpy(), _x(3) - _x(3, seed=1))


def test_the_same_array_twice() -> None:
    run = compile_step(lambda x, y: x - 2 * y)
    x = _x(3)
    assert np.array_equal(run(x, x).numpy(), x - 2 * x)
    assert np.array_equal(run(x, x + 1).numpy(), x - 2 * (x + 1))


def test_an_argument_is_not_changed() -> None:
    def step(x: Any) -> Any:
        x += 1
        return x

    x = brim.asarray(_x(3))
    run = compile_step(step)
    for _ in range(2):
        assert np.array_equal(run(x).numpy(), _x(3) + 1)
    assert np.array_equal(x.numpy(), _x(3))


def test_results_are_copies() -> None:
    weight = brim.ones((3,))
    run = compile_step(lambda x: (x * 2, x, weight))
    first = run(_x(3))
    for result in first:
        result.write(77.0)
    assert weight.numpy().tolist() == [1.0] * 3
    second = run(_x(3))
    assert np.array_equal(second[0].numpy(), _x(3) * 2)
    assert np.array_equal(second[1].numpy(), _x(3))
    assert np.array_equal(second[2].numpy(), np.ones(3))
    assert np.array_equal(first[0].numpy(), np.full(3, 77.0))


def test_results_without_a_copy_last_until_the_next_run() -> None:
    run = compile_step(lambda x: x * 2, copy=False)
    first = run(_x(3))
    kept = first.numpy().copy()
    assert np.array_equal(kept, _x(3) * 2)
    allocations = brim.memory_stats()["allocations"]
    second = run(_x(3, seed=1))
    assert brim.memory_stats()["allocations"] == allocations
    assert np.array_equal(second.numpy(), _x(3, seed=1) * 2)
    assert np.array_equal(first.numpy(), second.numpy())  # the same memory


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_results_without_a_copy_as_the_next_arguments(kind: str) -> None:
    """Where inputs are written lies what is read: the arguments are taken out first."""

    def step(a: Any, b: Any) -> Any:
        return b + 1, ops.flip(a, axis=0) * 2 + b.sum()

    run = compile_step(step, copy=False)
    found: Any = (_x(40), _x(40, seed=1))
    expected = tuple(map(brim.asarray, found))
    for _ in range(4):
        found, expected = run(*found), step(*expected)
        assert all(np.array_equal(one.numpy(), other.numpy()) for one, other in zip(found, expected))
        if kind == "array":
            found = [one.numpy() for one in found]


def test_results_that_are_one_tensor() -> None:
    def step(x: Any) -> Any:
        y = x * 2
        return y, y, y[1:], y.reshape(3, 1)

    a, b, c, d = compile_step(step)(_x(3))
    assert np.array_equal(a.numpy(), b.numpy())
    assert np.array_equal(c.numpy(), a.numpy()[1:])
    assert d.shape == (3, 1)
    a.write(0.0)
    assert b.numpy().any()


def test_results_do_not_require_gradients() -> None:
    training = Training()
    loss = training.compiled(*training.batch())
    assert loss._node is None
    assert not loss.requires_grad
    with pytest.raises(BrimError):
        loss.backward()


def test_an_empty_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def step(x: Any) -> Any:
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss, model(x)

    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    run = compile_step(step)
    loss, out = run(np.zeros((0, 3), np.float32))
    assert loss.item() == 0.0
    assert out.shape == (0, 2)
    assert all(np.array_equal(v.numpy(), before[k]) for k, v in model.state_dict().items())


def test_a_step_without_arguments_or_work() -> None:
    counter = brim.zeros((), dtype="int64")

    def step() -> None:
        counter.write(counter + 1)

    run = compile_step(step)
    for _ in range(5):
        run()
    assert counter.item() == 5
    assert compile_step(lambda x: x)(_x(3)).numpy().tolist() == _x(3).tolist()
