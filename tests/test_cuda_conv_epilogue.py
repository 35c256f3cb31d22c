"""Convolutions without cuDNN that add a bias and apply relu in their products, emulated, against float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import brim
from brim import nn
from brim.expr import FormulaBuilder, FusedFormula
from brim.op import REGISTRY
from brim.program.passes.layout import channels_last
from brim.spec import DTYPES, Spec
from brim_cuda.cublaslt import Epilogue
from brim_cuda.emulation import EmulationLoader
from brim_cuda.kernels import conv
from brim_cuda.launch import Call, Product
from brim_cuda.registry import work_of
from emulating import WHY_NOT, Recorded, emulated, laid_out

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

F32 = DTYPES["float32"]
HOW: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
ROUNDING = {"float32": 2.0**-19, "float16": 2.0**-9, "bfloat16": 2.0**-6}


def formula(dtype: np.dtype[Any], relu: bool = True, added: bool = False) -> FusedFormula:
    """max(0, y + bias), perhaps with an array like y in between."""
    b = FormulaBuilder([dtype] * 3)
    term: Any = b.call("add", [("in", 0), ("in", 1)], F32)
    if added:
        term = b.call("add", [term, ("in", 2)], F32)
    if relu:
        term = b.call("max", [term, ("const", 0.0)], F32)
    return b.formula([b.cast(term, dtype)[1]])


def call_of(name: str, last: bool, relu: bool = True, shape: tuple[int, ...] = (3, 8, 6, 5)) -> Recorded:
    """A call on images of one order, with what float64 gives."""
    dtype, rng = DTYPES[name], np.random.default_rng(7)
    x = rng.standard_normal(shape).astype(dtype)
    w = (0.2 * rng.standard_normal((16, shape[1], 3, 3))).astype(dtype)
    bias = rng.standard_normal((16, 1, 1)).astype(dtype)
    out = (shape[0], 16, *shape[2:])
    specs = [Spec(s, dtype, channels_last(s) if last else None) for s in (shape, out)]
    params = {**HOW, "formula": formula(dtype, relu), "shape": out}
    wide = [brim.asarray(a.astype(np.float64)) for a in (x, w)]
    sums = np.array(REGISTRY["conv2d"](*wide, **HOW).numpy()) + bias.astype(np.float64)
    ins = (specs[0], Spec(w.shape, dtype), Spec(bias.shape, dtype))
    given = (laid_out(x, specs[0]), w, bias)
    return Recorded(
        REGISTRY["conv2d_epilogue"], ins, (specs[1],), params, given, (np.maximum(sums, 0) if relu else sums,)
    )


def _close(one: Recorded) -> None:
    found = emulated(EmulationLoader(), one)[0].astype(np.float64)
    np.testing.assert_allclose(found, one.wrote[0], rtol=0, atol=ROUNDING[one.ins[0].dtype.name] * 8)


@needs_compiler
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "bias alone"])
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "row-major"])
@pytest.mark.parametrize("name", ROUNDING)
def test_numbers(name: str, last: bool, relu: bool) -> None:
    _close(call_of(name, last, relu))


@needs_compiler
def test_every_chunk_of_images_has_its_bias() -> None:
    with patch.object(conv, "COLUMNS_BYTES", 20_000):
        one = call_of("float32", True, shape=(9, 8, 6, 5))
        work = one.work()
        assert work is not None
        products = [step for step in work.calls if isinstance(step, Product)]
        assert len(products) > 2
        assert all(step.plan.epilogue == Epilogue.RELU_BIAS and step.bias is not None for step in products)
        _close(one)


def test_channels_last_takes_no_launch_more() -> None:
    for last, more in ((True, 0), (False, 1)):
        one = call_of("bfloat16", last)
        plain = work_of(REGISTRY["conv2d"], one.ins[:2], one.outs, HOW)
        both = one.work()
        assert both is not None
        assert len(both.calls) == len(plain.calls) + more
        assert (
            sum(isinstance(step, Call) for step in both.calls) == sum(isinstance(s, Call) for s in plain.calls) + more
        )


@pytest.mark.parametrize("which", ["residual", "groups", "float64", "another function"])
def test_what_is_not_joined(which: str) -> None:
    dtype = DTYPES["float64"] if which == "float64" else F32
    x, out = Spec((2, 8, 6, 5), dtype), Spec((2, 16, 6, 5), dtype)
    ins = [x, Spec((16, 4 if which == "groups" else 8, 3, 3), dtype), Spec((16, 1, 1), dtype)]
    ins += [out] if which == "residual" else []
    made = formula(dtype, added=which == "residual")
    if which == "another function":
        b = FormulaBuilder([F32] * 2)
        made = b.formula([b.call("tanh", [b.call("add", [("in", 0), ("in", 1)], F32)], F32)[1]])
    params = {**HOW, "groups": 2 if which == "groups" else 1, "formula": made, "shape": out.shape}
    assert not conv.joins_conv_epilogue(ins, [out], params)
    with pytest.raises(KeyError):
        work_of(REGISTRY["conv2d_epilogue"], ins, [out], params)


def test_planned_networks_join_them() -> None:
    with brim.meta():
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())

    def step(x: Any) -> Any:
        with brim.no_grad():
            return model(x).sum()

    program = brim.plan(step, brim.spec((4, 3, 16, 16)), device_profile="h100-80gb").programs[0].prepared.program
    assert [i.op.name for i in program.instructions].count("conv2d_epilogue") == 2
