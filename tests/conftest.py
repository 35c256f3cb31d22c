"""Settings for all tests: Hypothesis without a deadline; GPU tests skipped, with the reason, where none can run."""

from __future__ import annotations

import functools
import importlib.util

import pytest
from hypothesis import settings

import brim

# A first call pays for allocations and a shared machine stalls: neither is a failure.
settings.register_profile("brim", deadline=None)
settings.load_profile("brim")


@functools.cache
def _why_no_cuda() -> str:
    """Why tests marked ``cuda`` cannot run here; empty if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy not installed"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable NVIDIA GPU: {error}"
    return "" if count else "no NVIDIA GPU"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU one skipped case a test says so; its other cases for the GPU are left out of the count."""
    if not _why_no_cuda():
        return
    seen: set[str] = set()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        name = f"{item.path}::{getattr(item, 'originalname', item.name)}"
        again = item.get_closest_marker("cuda") is not None and name in seen
        (left_out if again else kept).append(item)
        if item.get_closest_marker("cuda") is not None:
            seen.add(name)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and (reason := _why_no_cuda()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _no_arena_of_another_test() -> None:
    """How much an earlier test left in the arena depends on the order of the tests; no test's memory may."""
    brim.device("cpu").memory.arena.release()
