"""The loop that measures how fast the processor multiplies and adds counts what it does."""

from __future__ import annotations

import numpy as np
import pytest

from brim_cpu import native, peak

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())


def test_it_counts_its_operations_in_every_piece() -> None:
    function = native.Function("brim_peak_f32", "ppii")
    found = []
    for rounds in (0, 1, 40):
        sums, flops = np.full(3, np.nan, np.float32), np.full(3, -1, np.int64)
        function.bind(sums, flops, 3, rounds)()
        assert len(set(flops.tolist())) == len(set(sums.tolist())) == 1
        found.append((int(flops[0]), float(sums[0])))
    (none, _), (one, _), (many, total) = found
    assert none == 0
    assert one > 0
    assert many == 40 * one
    assert total == one  # as many numbers as two operations each, and every one comes to 2


def test_the_rate_is_that_of_its_threads() -> None:
    rate = peak.register_rate(0.02)
    assert rate is not None
    assert 1e5 < rate < 1e14  # little in a library that watches itself
