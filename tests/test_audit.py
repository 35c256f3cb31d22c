"""``brim.audit``: a run held against its plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import brim
from brim import nn, optim


def _step() -> brim.program.compile.CompiledStep:
    brim.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 4))
    optimizer = optim.AdamW(model.parameters())

    def step(x: brim.Tensor, y: brim.Tensor) -> brim.Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return brim.compile(step)


def test_a_run_takes_what_was_planned() -> None:
    x, y = np.zeros((16, 20), np.float32), np.zeros(16, np.int64)
    bystander = brim.zeros(1000)  # live, but no part of the step
    found = brim.audit(_step(), x, y)
    assert found.ok
    assert found.planned_peak_bytes == found.held_peak_bytes > found.arena_bytes
    assert 0 < found.arena_written_bytes <= found.arena_bytes
    assert found.arena_bytes - found.arena_written_bytes < 64  # the plan does not reserve what nobody writes
    text = str(found)
    assert text.endswith("as planned")
    assert "exact" in text
    assert "measured" in text
    assert bystander.shape == (1000,)


def test_a_larger_arena_of_another_step_is_not_charged() -> None:
    x, y = np.zeros((16, 20), np.float32), np.zeros(16, np.int64)
    large = _step()
    large(np.zeros((400, 20), np.float32), np.zeros(400, np.int64))
    assert brim.audit(_step(), x, y).ok


def test_what_is_not_as_planned_is_said() -> None:
    found = brim.audit(_step(), np.zeros((4, 20), np.float32), np.zeros(4, np.int64))
    for wrong in (
        replace(found, held_peak_bytes=found.held_peak_bytes + 64),
        replace(found, arena_written_bytes=found.arena_bytes + 1),
    ):
        assert not wrong.ok
        assert str(wrong).endswith("NOT as planned")
