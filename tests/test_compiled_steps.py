"""When a compiled step is traced again, what it shares with the eager code around it, and with threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import TraceError
from brim.program.compile import compile as compile_step
from small_training import Training
from small_training import random_floats as _x

# ---------------------------------------------------------------- when a step is traced again


def test_once_for_each_kind_of_arguments() -> None:
    run = compile_step(lambda x: x * 2)
    for _ in range(2):
        for x in (_x(3), _x(4), _x(3, 1), _x(3).astype(np.float64), _x(3).astype(np.int32)):
            out = run(x)
            assert np.array_equal(out.numpy(), x * 2)
            assert out.dtype == x.dtype
    lines = [line for line in run.explain().splitlines() if line.startswith("traced")]
    assert len(lines) == 5
    assert "float32[3]" in lines[0]
    assert "first call" in lines[0]
    assert "float64[3]" in lines[3]
    assert "new shapes" in lines[3]


def test_nothing_was_called() -> None:
    run = compile_step(lambda x: x)
    assert "not called" in run.explain()
    with pytest.raises(TraceError, match="not been called"):
        run.program()


def test_mode() -> None:
    training = Training()
    batch = training.batch()
    forward = compile_step(lambda x: training.model(x))
    for _ in range(2):
        forward(batch[0])
        training.model.eval()
        expected = training.model(brim.asarray(batch[0])).detach().numpy()
        # Not to the last bit: in evaluation, batch norm may be folded into the layer before it.
        assert np.allclose(forward(batch[0]).numpy(), expected, rtol=1e-5, atol=1e-6)
        training.model.train()
    lines = [line for line in forward.explain().splitlines() if line.startswith("traced")]
    assert len(lines) == 2
    assert "evaluation mode" in lines[1]
    training.model[3].eval()  # one layer's mode counts as well
    forward(batch[0])
    assert forward.explain().count("traced for") == 3


def test_gradients_that_are_there_already() -> None:
    weight = brim.ones((3,), requires_grad=True)
    run = compile_step(lambda x: (x * weight).sum().backward())
    for n in range(1, 4):
        run(_x(3))
        assert weight.grad is not None
        assert np.allclose(weight.grad.numpy(), n * _x(3))
    lines = [line for line in run.explain().splitlines() if line.startswith("traced")]
    assert len(lines) == 2
    assert "gradient" in lines[1]
    weight.grad = None
    run(_x(3))
    assert np.array_equal(weight.grad.numpy(), _x(3))
    assert run.explain().count("traced for") == 2  # both programs are kept


@pytest.mark.parametrize("change", [{"nesterov": True}, {"momentum": 0.0}, {"maximize": True}, {"weight_decay": 0.1}])
def test_a_setting_that_decides_what_happens(change: dict[str, Any]) -> None:
    one, other = Training(), Training()
    for training, step in ((one, one.compiled), (other, other.step)):
        brim.manual_seed(5)
        for n in range(4):
            if n == 2:
                training.optimizer.param_groups[0].update(change)
            step(*training.batch(seed=n))
    assert one.values() == other.values()
    assert len(one.traces()) == 2
    assert "setting" in one.traces()[1]


def test_numbers_that_change_need_no_trace() -> None:
    one, other = Training(weight_decay=0.01), Training(weight_decay=0.01)
    for training, step in ((one, one.compiled), (other, other.step)):
        brim.manual_seed(5)
        schedule = optim.schedules.StepLR(training.optimizer, 2, 0.5) if hasattr(optim, "schedules") else None
        for n in range(6):
            training.optimizer.param_groups[0]["weight_decay"] = 0.01 * (n + 1)
            step(*training.batch(seed=n))
            if schedule is not None:
                schedule.step()
            else:
                training.optimizer.param_groups[0]["lr"] *= 0.7
    assert one.values() == other.values()
    assert len(one.traces()) == 1
    rate = one.optimizer.param_groups[0]["lr"]
    one.optimizer.param_groups[0]["lr"] = 0.0
    one.optimizer.param_groups[0]["momentum"] = 0.5
    before = one.model[4].weight.detach().numpy().copy()
    one.compiled(*one.batch())
    assert np.array_equal(one.model[4].weight.detach().numpy(), before)
    assert rate > 0.0
    assert len(one.traces()) == 1


def test_a_parameter_that_is_another_one_now() -> None:
    model = nn.Linear(3, 2)
    run = compile_step(lambda x: model(x))
    run(_x(4, 3))
    model.weight = nn.Parameter(brim.asarray(_x(2, 3, seed=9)))
    assert np.array_equal(run(_x(4, 3)).numpy(), model(brim.asarray(_x(4, 3))).detach().numpy())
    model.bias = None
    assert np.array_equal(run(_x(4, 3)).numpy(), model(brim.asarray(_x(4, 3))).detach().numpy())
    model.to(dtype="float64")
    out = run(_x(4, 3).astype("float64"))
    assert np.array_equal(out.numpy(), model(brim.asarray(_x(4, 3).astype("float64"))).detach().numpy())
    assert out.dtype == np.float64


def test_a_layer_that_is_another_one_now() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    run = compile_step(lambda x: model(x))
    run(_x(4, 3))
    model[1] = nn.Tanh()
    assert np.array_equal(run(_x(4, 3)).numpy(), model(brim.asarray(_x(4, 3))).detach().numpy())
    model.append(nn.Linear(2, 1))
    assert np.array_equal(run(_x(4, 3)).numpy(), model(brim.asarray(_x(4, 3))).detach().numpy())


def test_a_frozen_parameter() -> None:
    one, other = Training(), Training()
    for training, step in ((one, one.compiled), (other, other.step)):
        brim.manual_seed(5)
        for n in range(4):
            training.model[0].weight.requires_grad_(n % 2 == 0)
            step(*training.batch(seed=n))
    assert one.values() == other.values()


def test_flags_that_the_step_itself_turns() -> None:
    """Two networks against each other: the second half of the step freezes one of them, as it does in eager code."""

    def make() -> tuple[list[Any], Callable[..., Any]]:
        brim.manual_seed(1)
        maker, judge = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
        optimizers = optim.Adam(maker.parameters(), lr=0.01), optim.Adam(judge.parameters(), lr=0.01)

        def step(noise: Any, real: Any) -> Any:
            made = maker(noise)
            for loss, frozen in ((judge(made.detach()) - judge(real), False), (-judge(made), True)):
                judge.requires_grad_(not frozen)
                loss = loss.mean() if not frozen else (-judge(made)).mean()
                loss.backward()
                optimizers[frozen is False].step()
                optimizers[frozen is False].zero_grad()
            judge.requires_grad_(True)
            return loss

        return [maker, judge], step

    batches = [(_x(6, 3, seed=n), _x(6, 4, seed=10 + n)) for n in range(4)]
    modules, step = make()
    losses = [step(*map(brim.asarray, batch)).item() for batch in batches]
    others, other_step = make()
    run = compile_step(other_step)
    assert [run(*batch).item() for batch in batches] == losses
    assert run.explain().count("traced for") == 1
    for one, other in zip(modules, others):
        for p, q in zip(one.parameters(), other.parameters()):
            assert np.array_equal(p.detach().numpy(), q.detach().numpy())


def test_a_setting_of_a_layer() -> None:
    one, other = Training(), Training()
    for training, step in ((one, one.compiled), (other, other.step)):
        brim.manual_seed(5)
        for n, p in enumerate((0.2, 0.2, 0.5, 0.5, 0.2)):
            training.model[3].p = p
            step(*training.batch(seed=n))
    assert one.values() == other.values()
    assert len(one.traces()) == 2  # the first program serves again
    assert "Dropout.p changed from 0.2 to 0.5" in one.traces()[1]


def test_a_layer_that_counts_its_calls() -> None:
    """It counts when it is traced only, and that is no reason to trace again."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x * 2

    model = Counting()
    run = compile_step(model)
    for _ in range(3):
        run(_x(3))
    assert model.calls == 1
    assert run.explain().count("traced for") == 1


def test_the_cache_is_bounded() -> None:
    run = compile_step(lambda x: x * 2)
    for n in range(1, 41):
        run(_x(n))
    assert sum(map(len, run._versions.values())) <= 16
    assert "forgot" in run.explain()
    for n in range(41, 141):
        run(_x(n))
    assert len(run.explain().splitlines()) <= 106
    assert np.array_equal(run(_x(1)).numpy(), _x(1) * 2)  # a forgotten one is made again
    flag = {"on": 0}

    def step(x: Any) -> Any:
        return x * brim.context.baked(lambda: flag["on"])

    many = compile_step(step)
    for n in range(20):
        flag["on"] = n
        assert np.array_equal(many(_x(3)).numpy(), _x(3) * n)
    assert sum(map(len, many._versions.values())) <= 16


# ---------------------------------------------------------------- beside eager code


def test_loading_takes_effect_in_the_next_run() -> None:
    one, other = Training(), Training()
    saved = {name: value.numpy().copy() for name, value in one.model.state_dict().items()}
    for training, step in ((one, one.compiled), (other, other.step)):
        brim.manual_seed(5)
        states = []
        for n in range(3):
            step(*training.batch(seed=n))
            states.append({k: np.array(v) for k, v in training.optimizer.state_arrays().items()})
        training.model.load_state_dict(saved)
        training.optimizer.load_state(states[0], training.optimizer.state_settings())
        for n in range(3):
            step(*training.batch(seed=n))
        other_model = nn.Linear(4, 6)
        training.model[0].load_state_dict(other_model.state_dict())
        step(*training.batch(seed=4))
    assert len(one.traces()) == 1
    assert {k: v for k, v in one.values().items() if not k.startswith("0.")}.keys() == {
        k for k in other.values() if not k.startswith("0.")
    }


def test_loading_gives_what_it_gives_eagerly() -> None:
    one, other = Training(), Training()
    for training, step in ((one, one.compiled), (other, other.step)):
        brim.manual_seed(5)
        step(*training.batch())
        model = {k: v.numpy().copy() for k, v in training.model.state_dict().items()}
        arrays = {k: np.array(v) for k, v in training.optimizer.state_arrays().items()}
        settings = training.optimizer.state_settings()
        seed = brim.random.get_state()
        loss = step(*training.batch(seed=1)).item()
        after = training.values()
        step(*training.batch(seed=2))
        training.model.load_state_dict(model)
        training.optimizer.load_state(arrays, settings)
        brim.random.set_state(seed)
        assert step(*training.batch(seed=1)).item() == loss
        assert training.values() == after
    assert one.values() == other.values()
    assert len(one.traces()) == 1


def test_eager_and_compiled_steps_in_turn() -> None:
    one, other = Training(), Training()
    brim.manual_seed(5)
    losses = [other.step(*other.batch(seed=n)).item() for n in range(8)]
    brim.manual_seed(5)
    found = [(one.compiled if n in (1, 2, 5, 7) else one.step)(*one.batch(seed=n)).item() for n in range(8)]
    assert found == losses
    assert one.values() == other.values()


def test_gradients_of_eager_and_compiled_steps_add_up() -> None:
    def run(kinds: str) -> np.ndarray:
        weight = brim.ones((3,), requires_grad=True)

        def step(x: Any) -> None:
            (brim.asarray(x) * weight).sum().backward()

        compiled = compile_step(step)
        for n, kind in enumerate(kinds):
            (compiled if kind == "c" else step)(_x(3, seed=n))
        assert weight.grad is not None
        return weight.grad.numpy().copy()

    expected = run("eeeee")
    for kinds in ("ccccc", "ecece", "cceec", "eeccc"):
        assert np.array_equal(run(kinds), expected), kinds


def test_a_budget_or_batch_in_between() -> None:
    """A larger program moves the arena; the smaller one goes on in the new one."""
    one, other = Training(), Training()
    sizes = [5, 50, 5, 500, 50, 5]
    for training, step in ((one, one.compiled), (other, other.step)):
        brim.manual_seed(5)
        for n, size in enumerate(sizes):
            step(*training.batch(size, seed=n))
    assert one.values() == other.values()
    assert len(one.traces()) == 3


# ---------------------------------------------------------------- threads


def test_two_threads_on_one_device() -> None:
    expected, found, errors = [], {}, []
    for n in range(2):
        training = Training()
        training.model[3] = nn.Identity()
        expected.append([training.step(*training.batch(5 + 40 * n, seed=s)).item() for s in range(40)])
    trainings = [Training(), Training()]

    def work(n: int) -> None:
        try:
            training = trainings[n]
            training.model[3] = nn.Identity()
            found[n] = [training.compiled(*training.batch(5 + 40 * n, seed=s)).item() for s in range(40)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [found[0], found[1]] == expected


def test_one_step_in_two_threads() -> None:
    run = compile_step(lambda x: (x * 2).sum())
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for n in range(60):
            x = _x(3 + n % 4, seed=seed)
            if run(x).item() != (brim.asarray(x) * 2).sum().item():
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
