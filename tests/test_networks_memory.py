"""Planned steps of real networks hold exactly the memory that their plan says, and take none beside it."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.check.networks import IN_HALF, NETWORKS, Net, compiled, make
from brim.program.compile import CompiledStep, plan, spec
from brim.program.compile import compile as compile_step
from brim.program.plan import Plan

NAMES = [*NETWORKS, *IN_HALF]
CPU = brim.device("cpu")

LARGE = {
    "mlp": 24, "accumulation_in_a_step": 160, "accumulation_across_calls": 400, "two_optimizers": 128, "rmsprop": 256,
    "clipped": 256, "hypergradient": 256, "gradient_penalty": 160, "embedding": 128, "dropout_heavy": 80, "cnn": 8,
    "shared_weights": 80, "lstm": 96, "mixed_precision": 160, "transformer": 24,
}  # fmt: skip
"""How often the batch is taken where arrays have to be larger than what Python allocates; 16 times for the others."""

TRACEMALLOC_BYTES = 64 * 1024
"""What Python and NumPy may allocate for themselves during one run: NumPy's iteration buffers, at most 8,192 elements
for an operand that is strided or converted, and the small objects of the call. Arrays of the networks are larger."""


def _live_bytes() -> int:
    gc.collect()
    return int(brim.memory_stats()["live_bytes"])


def _whole(steps: Sequence[CompiledStep], net: Net) -> Plan:
    """One plan of all of a network's steps together, made for the calls of a run."""
    kinds = {(which, *(a.shape for a in arguments)): (which, arguments) for which, arguments in net.calls}
    plans = [steps[which].plan(*arguments) for which, arguments in kinds.values()]
    return Plan([program for one in plans for program in one.programs], "cpu")


_planned: dict[str, Plan] = {}
"""Plans of the networks' first steps, before any ran."""


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_peak_is_held_to_the_byte(name: str) -> None:
    CPU.memory.arena.release()
    others_bytes = _live_bytes()
    net = make(name)
    steps = compiled(net)
    model_bytes = _live_bytes()
    specs = [spec(a.shape, a.dtype) for a in net.calls[0][1]]
    before = _planned[name] = steps[0].plan(*specs)
    assert _live_bytes() == model_bytes  # planning takes no memory
    assert all(optimizer.state_arrays() == {} for optimizer in net.optimizers)
    assert all(p.grad is None for module in net.modules for p in module.parameters())

    brim.reset_peak_memory()
    for which, arguments in net.calls:
        steps[which](*arguments)
    held_bytes = brim.memory_stats()["peak_bytes"] - others_bytes
    after = _whole(steps, net)
    # What one step makes and another reads is known as one thing only once it is there.
    planned = before if len(steps) == 1 else after
    assert held_bytes - planned.peak_bytes == 0
    assert sum(planned.by_kind().values()) == planned.peak_bytes

    if len(steps) == 1:
        run = steps[0].current_plan()
        assert run.hash == before.hash
        assert steps[0].explain().count("traced for") == 1  # traced once
        for again in (run, after):
            assert (again.peak_bytes, again.by_kind()) == (before.peak_bytes, before.by_kind())


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "mixed_precision"])
def test_a_budget_of_the_peak_fits_and_one_byte_less_does_not(name: str) -> None:
    CPU.memory.arena.release()
    others_bytes = _live_bytes()
    net = make(name)
    (step,) = net.steps
    arguments = net.calls[0][1]
    limit_bytes = others_bytes + plan(step, *arguments).peak_bytes
    state, live_bytes = net.state(), _live_bytes()
    with pytest.raises(brim.BudgetExceeded):
        compile_step(step, budget=limit_bytes - 1)(*arguments)
    assert _live_bytes() == live_bytes
    assert net.state().keys() == state.keys()  # no gradient, no optimizer state, no draw
    assert brim.random.get_state() == state["random"]
    run = compile_step(step, budget=limit_bytes)
    brim.reset_peak_memory()
    run(*arguments)
    assert brim.memory_stats()["peak_bytes"] == limit_bytes


def test_a_run_in_place_plans_nothing_extra() -> None:
    state = brim.zeros((256, 256))

    def update(x: Any) -> None:
        state.write(state * 0.5 + x)

    found = plan(update, spec((256, 256)))
    kinds = found.by_kind()
    assert kinds.pop("workspace", 0) <= 64 * 1024  # blocks of the loop
    assert kinds == {"temps": 4 * 256 * 256, "inputs": 4 * 256 * 256}  # the state and the argument
    run = compile_step(update)
    for _ in range(2):  # a transposed argument is copied like any other
        run(np.ones((256, 256), np.float32).T)
    assert run.current_plan().peak_bytes == found.peak_bytes
    assert state.numpy()[0, 0] == 1.5


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_memory_is_planned_alike(name: str) -> None:
    real = _planned[name] if name in _planned else plan(compiled(net := make(name))[0], *net.calls[0][1])
    live_bytes = _live_bytes()
    with brim.meta():
        other = make(name)
    found = plan(compiled(other)[0], *(spec(a.shape, a.dtype) for a in other.calls[0][1]))
    assert found.peak_bytes == real.peak_bytes
    assert found.by_kind() == real.by_kind()
    assert _live_bytes() == live_bytes


@pytest.mark.parametrize("name", NAMES)
def test_a_run_takes_no_memory_beside_the_arena(name: str) -> None:
    net = make(name, LARGE.get(name, 16))
    net.calls = net.calls if len(net.steps) > 1 else net.calls[:2]
    steps = compiled(net)
    for which, arguments in net.calls:  # the first run of each program makes it
        steps[which](*arguments)
    biggest = max(block.nbytes for step in steps for block in step.current_plan().alive_at_peak())
    results = max(step.current_plan().results_bytes for step in steps)
    assert biggest > TRACEMALLOC_BYTES  # or a hidden copy of it would go unnoticed
    gc.collect()
    tracemalloc.start()
    try:
        for which, arguments in net.calls[:4]:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            steps[which](*arguments)
            assert tracemalloc.get_traced_memory()[1] - before - results <= TRACEMALLOC_BYTES
    finally:
        tracemalloc.stop()


def test_a_thousand_runs_leave_nothing_behind() -> None:
    net = make("mlp")
    step = compiled(net)[0]
    arguments = net.calls[0][1]
    for _ in range(10):
        step(*arguments)
    live_bytes, allocations = _live_bytes(), brim.memory_stats()["allocations"]
    tracemalloc.start()
    try:
        traced_bytes = []
        for runs in (500, 1000):  # the first runs fill Python's and NumPy's lists of small free blocks
            for _ in range(runs):
                step(*arguments)
            gc.collect()
            traced_bytes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # One object left behind by each run would be 50 KiB; those lists alone come and go by a few.
    assert traced_bytes[1] - traced_bytes[0] < 16 * 1024
    assert _live_bytes() == live_bytes
    assert brim.memory_stats()["allocations"] == allocations + 1500  # the losses that were handed out


def test_another_batch_is_another_peak() -> None:
    step = compiled(make("mlp"))[0]
    peaks = [step.plan(spec((n, 20)), spec((n,), "int64")).peak_bytes for n in (16, 32, 64)]
    assert peaks == sorted(set(peaks))


def _two_layers() -> Any:
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = optim.Adam(model.parameters())

    def step(x: Any, y: Any) -> Any:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def test_bytes_by_hand_without_passes() -> None:
    """Two layers, Adam, batch 32, in the order in which it is written: computed on paper."""
    found = compile_step(_two_layers(), passes=[]).plan(spec((32, 48)), spec((32, 10)))
    weight1, bias1, weight2, bias2 = 4 * 64 * 48, 4 * 64, 4 * 10 * 64, 4 * 10
    params = weight1 + bias1 + weight2 + bias2
    loss = 4
    # Widest is the update of the first weight, whose gradient has become the decayed one: beside it lie the new first
    # moment and the scaled second one, and the gradients of the other three, which are updated later. Activations are
    # gone, and the inputs with them, but the loss waits for the end.
    expected = {
        "params": params,
        "grads": bias1 + weight2 + bias2,
        "optimizer": 2 * params,
        "temps": 3 * weight1 + loss + 64,  # and the copy of the loss that is handed out
        "rounding": (64 - bias2) * (1 + 2 + 1) + (64 - loss),  # to 64 bytes: last bias, moments, gradient; the loss
    }
    assert found.by_kind() == expected
    assert found.peak_bytes == sum(expected.values()) == 85376
    assert found.arena_bytes == found.peak_bytes - 3 * (params + 64 - bias2) - 64
    assert "update of 0" in found.peak_at


def test_bytes_by_hand_as_usual() -> None:
    """With all passes each parameter is updated as soon as its gradient is there, in one pass over memory."""
    found = compile_step(_two_layers()).plan(spec((32, 48)), spec((32, 10)))
    weight1, params, loss = 4 * 64 * 48, 4 * (64 * 48 + 64 + 10 * 64 + 10), 4
    product = {"inputs": 4 * 32 * 48, "temps": 4 * 32 * 64}  # what the gradient of weight1 is the product of
    kinds = found.by_kind()
    workspace = kinds.pop("workspace", 0)  # blocks of the loop that updates; the backend chooses their size
    making = workspace == 0  # the peak is when the largest gradient is made, else when it is used
    assert kinds == {
        "params": params,
        "grads": weight1,
        "optimizer": 2 * params,
        "temps": loss + 64 + making * product["temps"],
        **({"inputs": product["inputs"]} if making else {}),
        "rounding": 24 * 3 + (64 - loss),
    }
    assert making or sum(product.values()) <= workspace <= 3 * weight1
