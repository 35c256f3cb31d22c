"""The largest batch: found exactly, in few plans, on any nearly straight line and in real steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brim
from brim import nn, optim
from brim.errors import ShapeError
from brim.program.batch import BatchSearch, batch_of
from brim.program.compile import CompiledStep
from brim.program.plan import Options


class _FakePlan:
    """A plan whose peak is any function of the batch."""

    resident_bytes = 100
    options = Options()

    def __init__(self, batch: int, peak: Callable[[int], int], seen: list[int]) -> None:
        self.input_shapes = [(batch, 3), (batch,)]
        self.peak_bytes = self.least_bytes = peak(batch)
        seen.append(batch)
        self.replan = lambda shapes: _FakePlan(shapes[0][0], peak, seen)


@given(
    st.integers(1, 5000), st.integers(0, 3000), st.integers(1, 900), st.integers(0, 300), st.integers(100, 500_000),
    st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_largest_batch_of_any_nearly_straight_line(
    batch: int, fixed: int, slope: int, noise: int, limit: int, seed: int
) -> None:
    def peak(b: int) -> int:
        return 100 + fixed + slope * b + (hash((b, seed)) % (noise + 1))

    seen: list[int] = []
    search: Any = BatchSearch(_FakePlan(batch, peak, seen), limit)  # type: ignore[arg-type]
    found = search.run()
    assert found == 0 or peak(found) <= limit
    assert peak(found + 1) > limit
    assert len(seen) == len(set(seen))
    assert len(seen) <= 20


def test_few_plans_are_made_for_a_straight_line() -> None:
    seen: list[int] = []
    search: Any = BatchSearch(_FakePlan(64, lambda b: 5000 + 700 * b, seen), 5000 + 700 * 1234 + 350)  # type: ignore[arg-type]
    assert search.run() == 1234
    assert len(seen) <= 5


def test_the_largest_batch_is_what_trying_all_finds() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 3))
    optimizer = optim.Adam(model.parameters(), lr=0.01)

    def train(x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def arguments(batch: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((batch, 24), "f4"), np.zeros(batch, "i8")

    step = CompiledStep(train)
    plan = step.plan(*arguments(300))
    peaks = {b: step.plan(*arguments(b)).peak_bytes for b in range(196, 203)}
    for limit in (peaks[199], peaks[199] - 1, peaks[201] + 1):
        best = max(b for b, nbytes in peaks.items() if nbytes <= limit)
        assert plan.largest_batch(limit) == best
    assert plan.largest_batch(plan.resident_bytes) == 0


def test_a_batch_of_one_that_batch_norm_refuses() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    step = CompiledStep(lambda x: model(x).sum())
    sizes = {b: step.plan(brim.zeros((b, 8))).peak_bytes for b in (2, 3, 64)}
    plan = step.plan(brim.zeros((64, 8)))
    assert plan.largest_batch(sizes[2]) == 2
    assert plan.largest_batch(sizes[2] - 1) == 0
    with pytest.raises(ShapeError):
        step.plan(brim.zeros((1, 8)))


def test_steps_without_a_batch() -> None:
    with pytest.raises(ValueError, match="no first axis"):
        batch_of([(4, 2), (3,)])
    with pytest.raises(ValueError, match="no first axis"):
        batch_of([()])
    plan = CompiledStep(lambda x, y: x.sum() + y.sum()).plan(np.ones((4, 2), "f4"), np.ones(3, "f4"))
    with pytest.raises(ValueError, match="no first axis"):
        plan.largest_batch("1MiB")
    with pytest.raises(ValueError, match="off"):
        plan.largest_batch("off")
