"""Planned steps of real networks give the numbers of eager steps, with and without each pass.

They are equal to the last bit, but for one pass: images laid out channels-last are summed in another order, over their
pixels and channels, and float32 addition is not associative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import brim
from brim.check.networks import IN_HALF, NETWORKS, Net, compiled, make
from brim.program.passes import default_passes

NAMES = [*NETWORKS, *IN_HALF]
PASSES = {getattr(one, "func", one).__name__: one for one in default_passes(brim.device("cpu").backend)}
REORDERING = "layout"
IMAGES = ("cnn", "residual", "recomputed", "unet")
TOLERANCE = 5e-6  # absolute and relative; 3e-7 was the largest difference seen, in sums of up to 800 numbers


def _arrays(results: Any) -> list[np.ndarray]:
    if isinstance(results, dict | list | tuple):
        parts = results.values() if isinstance(results, dict) else results
        return [array for part in parts for array in _arrays(part)]
    return [] if results is None else [np.array(results.detach().numpy())]


def _run(net: Net, steps: Sequence[Any], tensors: bool = False) -> tuple[list[list[np.ndarray]], dict[str, Any]]:
    """Results of every call, and the state after the last."""
    convert = brim.asarray if tensors else lambda array: array
    found = [_arrays(steps[which](*map(convert, arguments))) for which, arguments in net.calls]
    return found, net.state()


def _assert_same(found: Any, expected: Any, what: str = "", tolerance: float = 0.0) -> None:
    """Equal to the last bit, or within a tolerance for floats."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            _assert_same(found[key], expected[key], f"{what} {key}", tolerance)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), what
        for n, (one, other) in enumerate(zip(found, expected)):
            _assert_same(one, other, f"{what}[{n}]", tolerance)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
        if tolerance and expected.dtype.kind == "f":
            assert np.allclose(found, expected, rtol=tolerance, atol=tolerance), what
        else:
            assert found.tobytes() == expected.tobytes(), what
    else:
        assert found == expected, what


_eager: dict[str, Any] = {}


def _eagerly(name: str) -> Any:
    """Results and state of an eager run; made once, since many tests compare with it."""
    if name not in _eager:
        net = make(name)
        _eager[name] = _run(net, net.steps, tensors=True)
    return _eager[name]


@pytest.mark.parametrize("name", NAMES)
def test_planned_is_eager(name: str) -> None:
    net = make(name)
    reordered = REORDERING in PASSES and name in IMAGES
    _assert_same(_run(net, compiled(net)), _eagerly(name), name, TOLERANCE if reordered else 0.0)
    if reordered:
        net = make(name)
        passes = [one for each, one in PASSES.items() if each != REORDERING]
        _assert_same(_run(net, compiled(net, passes=passes)), _eagerly(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_every_parameter(name: str) -> None:
    """Or the comparisons here would compare nothing."""
    before, after = make(name).state(), _eagerly(name)[1]
    moved = [key for key, value in before.items() if isinstance(value, np.ndarray) and (value != after[key]).any()]
    parameters = {f"{m}.{n}" for m, module in enumerate(make(name).modules) for n, _ in module.named_parameters()}
    assert parameters <= set(moved)


@pytest.mark.parametrize("only", ["none", *PASSES])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "recomputed"])
def test_each_pass_alone_gives_the_same_numbers(name: str, only: str) -> None:
    expected, _ = _eagerly(name)  # first: it seeds the random numbers, as make() does
    net = make(name)
    net.calls = net.calls if len(net.steps) > 1 else net.calls[:2]
    found, _ = _run(net, compiled(net, passes=[PASSES[only]] if only in PASSES else []))
    tolerance = TOLERANCE if only == REORDERING and name in IMAGES else 0.0
    _assert_same(found, expected[: len(found)], name, tolerance)  # the second loss depends on the first call's updates
