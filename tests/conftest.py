"""Settings for all tests: Hypothesis without a deadline; devices that are not there are skipped, with the reason."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

import brim
import emulated
import second_device

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


def _missing(item: pytest.Item) -> tuple[str, str]:
    """The device that a test asks for by its marker, and why it is not there; the latter empty if it is."""
    if item.get_closest_marker("cuda") is not None:
        return "cuda", _why_no_cuda()
    if item.get_closest_marker("emulated") is not None:
        return "emulated", emulated.WHY_NOT
    return "", ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a device one skipped case a test says so; its other cases for it are left out of the count."""
    seen: set[tuple[str, str]] = set()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        kind, reason = _missing(item)
        key = (f"{item.path}::{getattr(item, 'originalname', item.name)}", kind)
        (left_out if reason and key in seen else kept).append(item)
        if reason:
            seen.add(key)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    kind, reason = _missing(item)
    if reason:
        pytest.skip(reason)
    if kind == "emulated":
        emulated.device()


@pytest.fixture(autouse=True)
def _no_arena_of_another_test() -> None:
    """How much an earlier test left in the arena depends on the order of the tests; no test's memory may."""
    brim.device("cpu").memory.arena.release()
    emulated.settle()


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """Kernels that one test has spoilt are not found by the next."""
    brim.op._eager._plans.clear()
    yield
    brim.op._eager._plans.clear()


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, second_device.SecondBackend]:
    """(device, backend) of a second device beside the CPU."""
    return second_device.add_second_device(monkeypatch)
