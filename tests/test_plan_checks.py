"""``brim.assert_fits``, ``plan.diff`` and planning under ``brim.meta()``: what users call in their own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import brim
from brim import nn, optim


def training(width: int = 32) -> Callable[[Any, Any], Any]:
    """The training step of a small network."""
    model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


SPECS = (brim.spec((64, 20)), brim.spec((64,), "int64"))


def test_assert_fits_from_both_sides() -> None:
    step = training()
    plan = brim.assert_fits(step, *SPECS, budget="1MiB")
    assert brim.assert_fits(step, *SPECS, budget=plan.peak_bytes).peak_bytes == plan.peak_bytes
    with pytest.raises(brim.BudgetExceeded, match=r"step needs .* Nothing was run") as refused:
        brim.assert_fits(step, *SPECS, budget=plan.peak_bytes - 1)
    assert refused.value.report.needed_bytes == plan.peak_bytes
    assert any("batch" in line for line in refused.value.report.remedies)


@pytest.mark.parametrize("profile", [None, "t4-16gb"])
def test_a_plan_inside_meta_is_the_plan_outside(profile: str | None) -> None:
    outside = brim.plan(training(), *SPECS, device_profile=profile)
    live_bytes = brim.memory_stats()["live_bytes"]
    with brim.meta():
        inside = brim.plan(training(), *SPECS, device_profile=profile)
    assert inside.peak_bytes == outside.peak_bytes
    assert inside.by_kind() == outside.by_kind()
    assert inside.device == (profile or "cpu")
    assert brim.memory_stats()["live_bytes"] <= live_bytes  # less, where garbage of an earlier test went meanwhile


def test_a_model_on_meta_is_planned_and_not_run() -> None:
    with brim.meta():
        step = brim.compile(training())
    assert step.plan(*SPECS).peak_bytes > 0
    with pytest.raises(brim.TraceError, match=r"on the meta device.*brim\.plan"):
        step(brim.zeros((64, 20)), brim.zeros(64, dtype="int64"))


def test_difference_of_two_plans() -> None:
    one, other = brim.plan(training(32), *SPECS), brim.plan(training(64), *SPECS)
    assert not one.diff(one)
    assert str(one.diff(one)) == "no difference"
    found = one.diff(other)
    assert found.peak_bytes == other.peak_bytes - one.peak_bytes > 0
    assert found.by_kind["params"] == 4 * 32 * (20 + 1 + 4)
    assert found.by_layer
    assert str(found).startswith("peak       +")
    assert str(other.diff(one)).startswith("peak       -")
    assert found.to_dict()["peak_bytes"] == found.peak_bytes


def test_a_tensor_of_one_element_is_formatted_as_its_number() -> None:
    assert f"{brim.asarray(1.23456):.3f}" == "1.235"
    assert f"{brim.asarray([1.5])}" == str(brim.asarray([1.5]))


def test_the_timeline_reaches_the_peak_where_the_plan_says() -> None:
    plan = brim.plan(training(), *SPECS)
    rows = plan.timeline()
    memory = plan.programs[0].prepared.memory
    live_bytes = [sum(kinds.values()) for _, kinds in rows]
    assert len(rows) == len(plan.programs[0].prepared.program.instructions)
    assert live_bytes == memory.live_bytes[1:-1]
    assert max(live_bytes) == live_bytes[memory.peak_at] == memory.peak_live_bytes
    assert any(label.startswith("matmul") for label, _ in rows)
