"""Budgets in force while eager code runs: refusals, memory that comes back, nesting, views, and the reports."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import brim
from brim.errors import BudgetExceeded


@pytest.fixture(autouse=True)
def fresh_books() -> None:
    gc.collect()  # an error kept by an earlier test hangs in a cycle with its frames
    brim.empty_cache()
    brim.reset_peak_memory()


def live() -> int:
    return int(brim.memory_stats()["live_bytes"])


def test_views_are_free_and_keep_the_memory() -> None:
    before = live()
    base = brim.empty((256, 256))
    assert live() - before == base.nbytes
    view = base.reshape(-1).reshape((64, 1024)).permute_dims((1, 0))
    assert live() - before == base.nbytes
    del base
    assert live() - before == view.nbytes
    del view
    assert live() == before


def test_numpy_views_keep_the_block_alive() -> None:
    tensor = brim.asarray(np.arange(50_000, dtype=np.float32))
    array = tensor.numpy()
    before = live()
    del tensor
    assert live() == before
    other = brim.asarray(np.zeros(50_000, np.float32))
    assert array[-1] == 49_999
    del array, other
    assert live() < before


def test_a_refusal_changes_nothing_and_smaller_work_goes_on() -> None:
    with brim.budget("9MiB"):
        x = brim.asarray(np.ones((1024, 1024), np.float32))
        before = live()
        with pytest.raises(BudgetExceeded, match="Nothing was allocated") as caught:
            brim.empty((2048, 1024))
        assert isinstance(caught.value, MemoryError)
        assert live() == before
        assert float((x * 2.0).sum()) == 2 * 1024 * 1024


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_memory_is_back_after_a_refused_step(phase: str) -> None:
    w = brim.asarray(np.ones((512, 512), np.float32)).requires_grad_()  # 1 MiB
    before = live()
    room = {"forward": 2, "backward": 6, "optimizer": 6}[phase] * 2**20

    def step(width: int) -> None:
        y = w
        for _ in range(5 if phase != "forward" else 50):
            y = (y * w)[:width]
        if phase == "optimizer":
            kept = [w * 1.0 for _ in range(50)]
            assert kept
        y.sum().backward()

    with pytest.raises(BudgetExceeded) as caught, brim.budget(before + room):
        step(512)
    w.grad = None
    assert live() == before, "the failed step holds memory although its error is still referenced"
    assert caught.value.report is not None
    y = w * w
    y.sum().backward()
    w.grad = None


def test_inner_budgets_only_lower() -> None:
    with brim.budget("64MiB"):
        outer = brim.memory_stats()["limit_bytes"]
        with brim.budget("1MiB"):
            assert brim.memory_stats()["limit_bytes"] == 2**20
            with pytest.raises(ValueError, match="only lower"), brim.budget("2MiB"):
                pass
        assert brim.memory_stats()["limit_bytes"] == outer


def test_off_never_refuses_and_still_counts() -> None:
    limit = brim.memory_stats()["budget"]
    brim.set_budget("off")
    try:
        before = live()
        x = brim.empty((1000, 1000))
        assert live() - before == x.nbytes
        assert brim.memory_stats()["limit_bytes"] is None
    finally:
        brim.set_budget(limit)


def test_a_tebibyte_is_refused_at_once() -> None:
    with pytest.raises(BudgetExceeded):
        brim.empty((2**20, 2**18))


def test_kinds_add_up_and_name_what_they_are() -> None:
    before = brim.memory_stats()["by_kind"]["grads"]  # of tensors that other tests keep
    x = brim.asarray(np.ones((300, 300), np.float32)).requires_grad_()
    y = (x * x * x).sum()
    stats = brim.memory_stats()
    assert sum(stats["by_kind"].values()) == stats["held_bytes"]
    assert stats["by_kind"]["activations"] >= 300 * 300 * 4
    y.backward()
    assert brim.memory_stats()["by_kind"]["grads"] - before == 300 * 300 * 4
    text = brim.memory_report()
    assert "grads" in text
    assert __file__.rsplit("/", 1)[-1] in text


def test_peak_is_the_highest_live_mark() -> None:
    brim.reset_peak_memory()
    before = live()
    x = brim.empty((1 << 18,))
    y = brim.empty((1 << 18,))
    del x, y
    assert brim.memory_stats()["peak_bytes"] - before == 2 << 20
