"""Bound native calls and chains of them: the same calls in the same order, with numbers that are read anew each run."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest

from brim.backend import ScalarCell
from brim_cpu import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native library: {native.status()}")

PROBE = "brim_team_probe"  # (out, count, turns): out[n] += n + 1


def probe(out: np.ndarray, count: object) -> native.Call:
    return native.Function(PROBE, "pii").bind(out, count, 1)


def test_a_call_runs_each_time_it_is_called() -> None:
    out = np.zeros(3, np.int64)
    call = probe(out, 3)
    call()
    call()
    assert out.tolist() == [2, 4, 6]


def test_a_cell_is_read_at_each_run_alone_and_in_a_chain() -> None:
    out, cell = np.zeros(3, np.int64), ScalarCell(1)
    call = probe(out, cell)
    call()
    cell.value = 3
    call()
    assert out.tolist() == [2, 2, 3]
    (chain,) = native.chained([call, call])
    cell.value = 2
    chain()
    assert out.tolist() == [4, 6, 3]


def test_a_chain_keeps_order_and_leaves_other_calls_where_they_are() -> None:
    out, seen = np.zeros(1, np.int64), []
    calls = [probe(out, 1), probe(out, 1), lambda: seen.append(int(out[0])), probe(out, 1)]
    chained = native.chained(calls)
    assert len(chained) == 3
    assert chained[1] is calls[2]
    assert chained[2] is calls[3]
    for _ in range(2):
        for call in chained:
            call()
    assert seen == [2, 5]
    assert out[0] == 6


def test_a_long_chain_lets_ctrl_c_through() -> None:
    out = np.zeros(1, np.int64)
    slow = native.Function(PROBE, "pii").bind(out, 1, 30_000_000)  # some milliseconds
    (chain,) = native.chained([slow] * 2000)
    interrupt = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            chain()
    finally:
        interrupt.join()
        signal.signal(signal.SIGINT, before)
    assert 0 < out[0] < 2000


def test_a_chain_that_came_back_goes_on_where_it_was() -> None:
    out = np.zeros(1, np.int64)
    slow = native.Function(PROBE, "pii").bind(out, 1, 30_000_000)
    (chain,) = native.chained([slow] * 8 + [probe(out, 1)] * 100)
    chain()
    assert out[0] == 108


def test_nothing_is_chained_where_there_is_nothing_native() -> None:
    calls = [lambda: None, lambda: None]
    assert native.chained(calls) == calls
    assert native.chained([]) == []


def test_a_chain_keeps_its_arrays_alive() -> None:
    out = np.zeros(1000, np.int64)
    (chain,) = native.chained([probe(out, 1000), probe(out, 1000)])
    before = out.__array_interface__["data"][0]
    view = out[:]
    del out
    chain()
    assert view.__array_interface__["data"][0] == before
    assert view.tolist() == list(range(2, 2002, 2))


def test_a_number_of_the_wrong_type_is_refused_when_it_is_bound() -> None:
    with pytest.raises(TypeError):
        probe(np.zeros(1, np.int64), "many")


def test_a_signature_that_the_table_lacks_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"brim_team_probe: the signature 'dfdfd' is not in native/calls\.cpp"):
        native.Function(PROBE, "dfdfd").bind(0, 0, 0, 0, 0)


def stopping(last_class: int, seen: list[str]) -> native.Call:
    """A loss of one row, which stops where its class is not 0 or 1."""
    losses, top, total = (np.zeros(1, np.float32) for _ in range(3))
    x, index = np.zeros((1, 2), np.float32), np.array([last_class])
    loss = native.Function("brim_cross_entropy_f32", "pppppppiiiif")
    call = loss.bind(losses, top, total, None, np.zeros(2, np.int64), x, index, 8, 1, 2, -100, 0.0)
    call.checks.append(lambda: seen.append(f"class {last_class}"))
    return call


def test_a_call_that_asks_to_stop_is_checked_alone_and_in_a_chain() -> None:
    seen: list[str] = []
    good, bad = stopping(1, seen), stopping(2, seen)
    good()
    assert seen == []
    bad()
    assert seen == ["class 2"]
    out = np.zeros(1, np.int64)
    (chain,) = native.chained([probe(out, 1), good, probe(out, 1), bad, probe(out, 1)])
    for runs in (1, 2):
        chain()
        assert out.tolist() == [2 * runs]  # nothing after the one that stopped
        assert len(seen) == 1 + runs
    (chain,) = native.chained([good, probe(out, 1)])  # what stopped before is forgotten
    chain()
    assert out.tolist() == [5]
    assert len(seen) == 3
    slow = native.Function(PROBE, "pii").bind(out, 1, 30_000_000)  # the chain comes back to let Ctrl-C through
    (chain,) = native.chained([slow] * 8 + [good, bad, probe(out, 1)])
    chain()
    assert (out.tolist(), len(seen)) == ([13], 4)
