"""``brim check``, ops and networks: what is right passes, what is broken fails, each in its row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
import brim.op
from brim.check import ops, training
from brim.check.compare import Mismatch, Worst, compare, demand_same_bits
from brim.check.networks import CHOSEN, IN_HALF, NETWORKS
from brim.check.result import Check, Finding, Result, Skip, perform
from brim.check.table import Row, all_rows
from brim.op import REGISTRY
from second_device import SecondBackend, double, results_of, spoil_cpu

CPU = brim.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_kernels")


def row_of(name: str) -> Row:
    return next(row for row in all_rows() if row.name == name)


def the_row(name: str, device: Any = CPU) -> Result:
    (check,) = ops.checks(device, rows=[row_of(name)])
    return perform(check)


def overwrite_input(outs: Any, ins: Any) -> None:
    ins[0].reshape(-1)[:1] = 3


# ---------------------------------------------------------------- comparing


def test_floats_are_compared_within_the_tolerance() -> None:
    want = np.array([1.0, np.nan, np.inf, -2.0])
    got = np.array([1.0001, np.nan, np.inf, -2.0], np.float32)
    worst = compare("x", got, want, 2e-4, 0.0, dtype=got.dtype)
    assert worst.difference == pytest.approx(1e-4, rel=1e-2)
    assert worst.share == pytest.approx(0.5, rel=1e-2)
    with pytest.raises(Mismatch, match=r"x: 1 of 4 elements are off, the worst at \[0\]") as caught:
        compare("x", got, want, 5e-5, 0.0, dtype=got.dtype)
    assert caught.value.worst is not None
    assert caught.value.worst.share == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([np.nan], [1.0]),
        ([1.0], [np.nan]),
        ([np.inf], [1.0]),
        ([1.0], [np.inf]),
        ([-np.inf], [np.inf]),
        ([3e38], [np.inf]),
    ],
)
def test_nan_and_infinity_only_where_they_belong(got: list[float], want: list[float]) -> None:
    with pytest.raises(Mismatch):
        compare("x", np.array(got), np.array(want), 1.0, 1.0)


def test_integers_shapes_and_dtypes_are_compared_exactly() -> None:
    one = np.array([[1, 2]])
    assert compare("x", one, one.copy(), 1.0, 1.0) == Worst()
    for other in (np.array([[1, 3]]), np.array([1, 2]), np.array([[1, 2]], np.int32), np.array([[1.0, 2.0]])):
        with pytest.raises(Mismatch, match=r"^x: "):
            compare("x", other, one, 1.0, 1.0)
    assert compare("x", np.zeros((0, 3)), np.zeros((0, 3)), 0.0, 0.0) == Worst()


def test_bits() -> None:
    demand_same_bits("x", np.array([np.nan, -0.0]), np.array([np.nan, -0.0]))
    with pytest.raises(Mismatch, match=r"1 of 2 elements differ in their bits, the first at \[1\]"):
        demand_same_bits("x", np.array([1.0, 0.0]), np.array([1.0, -0.0]))


# ---------------------------------------------------------------- rows


def test_whatever_a_check_raises_becomes_a_row() -> None:
    def raising(error: BaseException) -> Result:
        def run() -> Finding:
            raise error

        return perform(Check("ops", "", "it", run))

    assert raising(Skip("no such thing")).outcome == "skipped"
    assert raising(Mismatch("off", Worst(1.0, 2.0))).worst == Worst(1.0, 2.0)
    lost = raising(brim.errors.DeviceError("device lost; restart"))
    assert (lost.outcome, lost.reason) == ("failed", "device lost; restart")
    assert raising(KeyError("x")).reason == "KeyError: 'x'"
    with pytest.raises(KeyboardInterrupt):
        raising(KeyboardInterrupt())
    fine = perform(Check("ops", "", "it", lambda: Finding("that", Worst(1e-7, 0.1), {"calls": 2})))
    assert (fine.outcome, fine.compared, fine.reason) == ("passed", "that", "")
    assert fine.elapsed_s >= 0


# ---------------------------------------------------------------- ops

SAMPLE = ["exp", "matmul", "where", "max_pool2d", "dropout", "index_add", "cumulative_sum", "fill", "layer_norm"]


@pytest.mark.parametrize("name", SAMPLE)
def test_rows_pass(name: str, second: Any) -> None:
    for device in (CPU, second[0]):
        result = the_row(name, device)
        assert (result.outcome, result.reason) == ("passed", "")
    assert result.compared.startswith("the CPU, ")
    assert result.worst is not None
    assert result.worst.share < 0.05


def test_every_row_is_checked_on_the_cpu() -> None:
    names = [c.name for c in ops.checks(CPU)]
    assert len(set(names)) == len(all_rows())
    failed = {n: r.reason for n, r in results_of(ops.checks(CPU, quick=True)).items() if r.outcome != "passed"}
    assert failed == {}


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "second"])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [(double, "elements are off"), (overwrite_input, "which the op may not modify")],
    ids=["broken kernel", "modified input"],
)
def test_a_broken_kernel_fails(spoil: Any, expected: str, on_cpu: bool, second: Any, monkeypatch: Any) -> None:
    device, backend = second
    if on_cpu:
        spoil_cpu(monkeypatch, "exp", spoil)
    else:
        backend.spoilt["exp"] = spoil
    result = the_row("exp", CPU if on_cpu else device)
    assert result.outcome == "failed"
    assert expected in result.reason
    assert "float32" in result.reason
    assert the_row("tanh", CPU if on_cpu else device).outcome == "passed"


def test_an_error_in_strided_inputs_alone_is_found(second: Any) -> None:
    device, backend = second

    def only_strided(outs: Any, ins: Any) -> None:
        if not ins[0].flags.c_contiguous:
            outs[0][...] = 0

    backend.spoilt["exp"] = only_strided
    result = the_row("exp", device)
    assert (result.outcome, result.reason[:16]) == ("failed", "strided inputs: ")


def test_a_wrong_gradient_fails_by_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY["tanh"], "vjp", lambda g, _x, y: g * (1.001 - y * y))
    result = the_row("tanh")
    assert result.outcome == "failed"
    assert result.reason.startswith("gradient, by differences: ")


def test_a_wrong_gradient_fails_against_the_cpu(second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        REGISTRY["tanh"], "vjp", lambda g, _x, y: g * ((1.001 if g.device.kind == "second" else 1) - y * y)
    )
    result = the_row("tanh", second[0])
    assert result.outcome == "failed"
    assert result.reason.startswith("gradient in float32 with respect to input 0: ")


def test_random_numbers_are_compared_to_the_bit(second: Any) -> None:
    device, backend = second

    def one_rounding(outs: Any, ins: Any) -> None:
        outs[0][...] = np.nextafter(outs[0], outs[0].dtype.type(0))

    backend.spoilt["dropout"] = backend.spoilt["exp"] = one_rounding
    result = the_row("dropout", device)
    assert result.outcome == "failed"
    assert "differ in their bits" in result.reason
    assert the_row("exp", device).outcome == "passed"


def test_a_missing_kernel_fails(second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = SecondBackend.bind

    def without_exp(self: Any, op: Any, *rest: Any) -> Any:
        if op.name == "exp":
            raise KeyError(op.name)
        return bind(self, op, *rest)

    monkeypatch.setattr(SecondBackend, "bind", without_exp)
    assert "no kernel for exp" in the_row("exp", second[0]).reason


# ---------------------------------------------------------------- networks


def test_fourteen_networks() -> None:
    assert len(CHOSEN) == len(set(CHOSEN)) == 14
    assert set(CHOSEN) <= NETWORKS.keys() | IN_HALF.keys()
    assert set(IN_HALF) <= set(CHOSEN), "the only ones whose products and attention run in half width"
    assert set(training.QUICK) <= set(CHOSEN)
    assert [c.name for c in training.checks(CPU)] == [f"{n}, {how}" for n in CHOSEN for how in ("eager", "planned")]


@pytest.mark.parametrize("name", ["mlp", "dropout_heavy", "accumulation_across_calls", "hypergradient"])
def test_networks_pass(name: str, second: Any) -> None:
    for device in (CPU, second[0]):
        results = results_of(training.checks(device, names=[name]))
        assert {n: (r.outcome, r.reason) for n, r in results.items()} == dict.fromkeys(
            [f"{name}, eager", f"{name}, planned"], ("passed", "")
        )
    assert results[f"{name}, planned"].figures["arrays"] > 5


def test_a_slightly_wrong_product_fails_networks(second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device, backend = second

    def as_tf32(outs: Any, ins: Any) -> None:
        outs[0][...] *= 1.0005

    backend.spoilt = {"matmul": as_tf32, "matmul_epilogue": as_tf32}
    for result in results_of(training.checks(device, names=["mlp"])).values():
        assert result.outcome == "failed"
        assert result.reason.startswith("call 0 result 0: 1 of 1 elements are off")

    def only_float32(outs: Any, ins: Any) -> None:
        if outs[0].dtype == np.float32:
            as_tf32(outs, ins)

    brim.op._eager._plans.clear()
    spoil_cpu(monkeypatch, "matmul", only_float32)
    assert results_of(training.checks(CPU, names=["mlp"]))["mlp, eager"].outcome == "failed"


def test_another_dropout_mask_fails_networks(second: Any) -> None:
    device, backend = second

    def keep_one_more(outs: Any, ins: Any) -> None:
        flat, given = outs[0].reshape(-1), ins[0].reshape(-1)
        flat[np.flatnonzero((flat == 0) & (given != 0))[:1]] = 1e-30

    backend.spoilt["dropout"] = keep_one_more
    result = results_of(training.checks(device, names=["dropout_heavy"]))["dropout_heavy, eager"]
    assert result.outcome == "failed"
    assert "call 0 result 2: 1 of" in result.reason
    assert "differ in their bits" in result.reason


def test_training_that_moves_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brim.optim.Adam, "step", lambda self: None)
    result = results_of(training.checks(CPU, names=["mlp"]))["mlp, planned"]
    assert result.outcome == "failed"
    assert result.reason.startswith("training moved no element of 0.0.weight")
