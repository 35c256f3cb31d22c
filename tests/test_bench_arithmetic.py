"""The arithmetic limit of the CPU: a loop in registers, or NumPy's BLAS where there is no native library."""

from __future__ import annotations

import numpy as np
import pytest

import brim
from brim_bench import html_report, limits, text_report
from brim_bench.arithmetic import register_rates
from brim_cpu import native, peak


@pytest.mark.skipif(not native.available(), reason=native.status())
def test_registers_are_no_slower_than_a_blas_on_one_thread() -> None:
    rates = register_rates(3, 0.05)
    assert list(rates) == [1, 2, 3]
    assert min(rates.values()) > 1e9
    lanes = 2 * 64 // 4  # of the widest vectors there are, two a cycle at most, which no processor does at 10 GHz
    assert rates[1] < 2 * lanes * 10e9
    n = 384
    a, b = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
    a, b = brim.asarray(a), brim.asarray(b)
    before = brim.get_threads()
    brim.set_threads(1)
    try:
        product = brim.compile(lambda: a @ b, copy=False)
        took_s = limits._best_time(product, 0.1)
    finally:
        brim.set_threads(before)
    assert 2 * n**3 / took_s < 1.25 * rates[1]  # the processor's clock changes
    assert brim.get_threads() == before


@pytest.mark.skipif(not native.available(), reason=native.status())
def test_limits_of_the_cpu_name_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SIZES", (256,))
    found = limits.measure("cpu", 1, 0.01)
    assert found["flops_by_threads"] == {"1": found["flops_per_s"]}
    assert found["blas_flops_per_s"] > 1e8
    text = text_report.limits_text({**found, "flops_by_threads": {"1": 2.5e11, "2": 5e11}})
    assert "in registers" in text.splitlines()[0]
    assert text.splitlines()[1].split() == ["2", "threads", "500", "GFLOP/s"]
    assert text.splitlines()[2].split()[0] == "BLAS"
    assert "through NumPy" in html_report._limits(found)


def test_without_the_native_library_the_blas_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SIZES", (256,))
    monkeypatch.setattr(native, "available", lambda: False)
    assert peak.register_rate(0.01) is None
    assert register_rates(2, 0.01) == {}
    found = limits.measure("cpu", 1, 0.01)
    assert found["flops_per_s"] == found["blas_flops_per_s"] > 1e8
    assert found["flops_by_threads"] == {}
    text = text_report.limits_text(found)
    assert "no native library" in text
    assert "1 thread" not in text.splitlines()[1]
