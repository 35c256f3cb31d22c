"""Settings for all tests: Hypothesis without a deadline; GPU tests skipped, with the reason, where none can run."""

from __future__ import annotations

import functools
import importlib.util

import pytest
from hypothesis import settings

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and (reason := _why_no_cuda()):
        pytest.skip(reason)
