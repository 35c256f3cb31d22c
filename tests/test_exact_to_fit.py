"""A budget that only the working memory of fast convolutions exceeds is no reason to refuse a step."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import BudgetExceeded
from brim.program.compile import EXACT_TO_FIT
from brim_cpu import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"fast convolutions are native: {native.status()}")

IMAGES, CLASSES = np.ones((8, 32, 16, 16), np.float32), np.arange(8) % 5


@pytest.fixture(autouse=True)
def clean() -> None:
    """Budgets here leave no room for what other tests left behind."""
    gc.collect()
    brim.device("cpu").memory.arena.release()
    brim.empty_cache()


def model() -> nn.Sequential:
    brim.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 256, 5))


def step_of(net: nn.Module, **options: object) -> brim.program.CompiledStep:
    optimizer = optim.SGD(net.parameters(), lr=0.01)

    def step(x: brim.Tensor, y: brim.Tensor) -> brim.Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return brim.compile(step, **options)


def peaks() -> tuple[int, int]:
    """Of the step with fast and with exact convolutions, in bytes."""
    found = []
    for precision in ("fast", "exact"):
        brim.set_conv_precision(precision)
        found.append(step_of(model()).plan(IMAGES, CLASSES).peak_bytes)
    brim.set_conv_precision("fast")
    return found[0], found[1]


def test_a_step_is_planned_exactly_where_the_fast_algorithm_does_not_fit() -> None:
    fast_bytes, exact_bytes = peaks()
    assert exact_bytes < fast_bytes
    live = brim.memory_stats("cpu")["live_bytes"]
    net = model()
    parameters = brim.memory_stats("cpu")["live_bytes"] - live
    tight = step_of(net, budget=live + exact_bytes + 4096)
    assert np.isfinite(tight(IMAGES, CLASSES).item())
    assert tight.current_plan().peak_bytes == exact_bytes
    assert EXACT_TO_FIT in tight.explain()
    roomy = step_of(model(), budget=live + parameters + fast_bytes + 4096)
    roomy(IMAGES, CLASSES)
    assert EXACT_TO_FIT not in roomy.explain()
    with pytest.raises(BudgetExceeded):
        step_of(model(), budget=live + exact_bytes // 2)(IMAGES, CLASSES)


def test_the_trainer_says_so_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    data = brim.data.ArrayDataset(IMAGES, CLASSES)

    def trainer(budget: object) -> brim.Trainer:
        net = model()
        return brim.Trainer(net, optim.SGD(net.parameters(), lr=0.01), loss=nn.CrossEntropyLoss(), budget=budget)

    fast_bytes = trainer("off").plan(8, data, evaluation=False).peak_bytes
    brim.set_conv_precision("exact")
    exact_bytes = trainer("off").plan(8, data, evaluation=False).peak_bytes
    brim.set_conv_precision("fast")
    assert exact_bytes < fast_bytes
    live = brim.memory_stats("cpu")["live_bytes"]
    tight = trainer(live + exact_bytes + 16 * 1024)
    tight.fit(data, epochs=2, batch_size=8)
    assert EXACT_TO_FIT in capsys.readouterr().out
    assert tight.step == 2
    with pytest.raises(BudgetExceeded):
        trainer(live + exact_bytes // 2).fit(data, epochs=1, batch_size=8)
