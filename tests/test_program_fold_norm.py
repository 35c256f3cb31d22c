"""Folding of batch norm in evaluation: what is folded, what must not be, how close the numbers stay, what it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.common import common
from brim.program.passes.copies import copies
from brim.program.passes.dead_code import dead_code
from brim.program.passes.fold_norm import fold_norm
from brim.program.passes.fuse import fuse
from brim.program.passes.schedule import schedule
from brim.program.passes.simplify import simplify
from brim.program.verify import verify
from brim.spec import DTYPES, Spec
from program_oracle import run_program
from random_programs import random_arrays

TOLERANCE = 2e-6
"""Largest difference by the largest result, float32: a few roundings."""


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


# ---- by hand ----


class Net:
    """A product of a number of rows and what follows it, put together by a test."""

    def __init__(self, rows: int = 40) -> None:
        self.x, self.w = Value(Spec((rows, 4)), "input"), Value(Spec((3, 4)), "state")
        self.states: list[Value] = [self.w]
        self.steps: list[Instruction] = []
        self.y = self.add("matmul", self.x, Ref(self.w, Spec((4, 3), layout=(1, 4))), shape=(rows, 3))

    def add(self, op: str, *ins: Any, shape: Any = None, phase: str = "forward", **params: Any) -> Value:
        operands = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
        out = Value(Spec(shape or operands[0].spec.shape))
        self.steps.append(Instruction(REGISTRY[op], operands, (out,), params, phase=phase))
        return out

    def state(self, shape: Any = (3,), dtype: str = "float32") -> Value:
        self.states.append(Value(Spec(shape, DTYPES[dtype]), "state"))
        return self.states[-1]

    def folded(self, *results: Value) -> Program:
        program = Program([self.x], self.states, {}, self.steps, [Ref.of(v) for v in results])
        verify(program)
        text = str(program)
        after = fold_norm(program)
        assert str(program) == text
        verify(after)
        arrays = random_arrays(program)
        for a, b in zip(run_program(program, arrays).results, run_program(after, arrays).results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(a).max())))
        return after


def test_scale_and_shift_go_into_weight_and_bias() -> None:
    net = Net()
    scaled = net.add("multiply", net.add("add", net.y, net.state()), net.state((1, 3)))
    out = net.add("subtract", scaled, net.state())
    after = net.folded(net.add("relu", out))
    assert names(after) == ["multiply", "subtract", "multiply", "matmul", "add", "relu"]
    weight = after.instructions[3].ins[1]
    assert weight.value.spec == Spec((3, 4))  # the order in memory of the weight itself
    assert weight.spec.strides == (1, 4)
    assert after.instructions[4].outs == (out,)


def test_a_scale_alone_leaves_only_the_product() -> None:
    net = Net()
    after = net.folded(net.add("multiply", net.state((1, 3)), net.y, shape=(40, 3)))
    assert names(after) == ["multiply", "matmul"]


def test_numbers_fold_along() -> None:
    net = Net()
    doubled = net.add("multiply", net.add("add", net.y, 1.5), 2.0)
    out = net.add("multiply", net.add("subtract", doubled, 0.25), net.state())
    after = net.folded(out)
    assert names(after)[-2:] == ["matmul", "add"]


def test_what_the_scale_is_made_of_is_computed_before_the_product() -> None:
    net = Net()
    scale = net.add("rsqrt", net.add("add", net.add("square", net.state()), 1.0))
    after = net.folded(net.add("multiply", net.y, Ref(scale, Spec((1, 3)))))
    assert names(after) == ["square", "add", "rsqrt", "multiply", "matmul"]


def test_a_large_weight_is_not_scaled_in_each_run() -> None:
    net = Net(rows=4)
    scaled = net.add("multiply", net.add("add", net.y, net.state()), net.state())
    after = net.folded(net.add("add", scaled, net.state()))
    assert names(after) == ["multiply", "add", "matmul", "multiply", "add"]


UNFOLDED: dict[str, Callable[[Net], tuple[Value, ...]]] = {
    "no scale": lambda net: (net.add("add", net.y, net.state()),),
    "only a number": lambda net: (net.add("multiply", net.y, 3.0),),
    "the product is read twice": lambda net: (net.add("multiply", net.y, net.state()), net.y),
    "a row has a scale": lambda net: (net.add("multiply", net.y, net.state((40, 1))),),
    "an element has a scale": lambda net: (net.add("multiply", net.y, net.state((40, 3))),),
    "the scale depends on the input": lambda net: (
        net.add("multiply", net.y, net.add("max", net.x, shape=(1, 1), axes=(0, 1), keepdims=True)),
    ),
    "backward": lambda net: (net.add("multiply", net.y, net.state()), net.add("square", net.x, phase="backward")),
    "the scale is subtracted from": lambda net: (net.add("subtract", net.state((1, 3)), net.y, shape=(40, 3)),),
}


@pytest.mark.parametrize("case", UNFOLDED)
def test_what_is_not_folded(case: str) -> None:
    net = Net()
    results = UNFOLDED[case](net)
    before = [i.op.name for i in net.steps]
    assert names(net.folded(*results)) == before


def test_a_scale_that_the_step_writes_is_read_before() -> None:
    net = Net()
    scale = net.state()
    out = net.add("multiply", net.y, scale)
    new = net.add("multiply", scale, 0.5)
    net.steps.append(Instruction(STORE, (Ref.of(scale), Ref.of(new)), (), phase="update"))
    assert names(net.folded(out)) == ["multiply", "matmul", "multiply", "store"]


# ---- networks ----


def mlp() -> tuple[Any, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)), (64, 6)


def cnn() -> tuple[Any, tuple[int, ...]]:
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.BatchNorm2d(8, affine=False),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 64, 4),
        ),
        (4, 3, 16, 16),
    )


def in_evaluation(model: Any) -> Any:
    generator = np.random.default_rng(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.write((generator.standard_normal(tensor.shape) ** 2 + 0.3).astype("f4"))
    return model.eval()


@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_a_network_gives_the_same_within_a_few_roundings(make: Callable[[], Any]) -> None:
    brim.manual_seed(0)
    model, shape = make()
    in_evaluation(model)
    x = np.random.default_rng(0).standard_normal(shape).astype("f4")

    def predict(x: Any) -> Any:
        with brim.no_grad():
            return model(x)

    found, touched = [], []
    for passes in ([dead_code, common], [dead_code, common, fold_norm]):
        compiled = compile_step(predict, passes=passes)
        found.append(compiled(x).numpy())
        kept = [i for i in compiled.program().instructions if i.op.kind == "elementwise"]
        touched.append(sum(i.outs[0].spec.size for i in kept if i.outs[0].spec.ndim in (2, 4)))
    assert np.abs(found[0] - found[1]).max() <= TOLERANCE * np.abs(found[0]).max()
    assert touched[1] < touched[0]  # elements of activations that elementwise instructions write
    assert not np.shares_memory(*found)


def test_training_is_left_alone() -> None:
    model, shape = mlp()

    def loss(x: Any) -> Any:
        out = model(x).square().mean()
        out.backward()
        return out

    compiled = compile_step(loss, passes=[fold_norm])
    compiled(np.ones(shape, "f4") * np.arange(shape[0])[:, None].astype("f4"))
    assert "sum" in names(compiled.program())


def test_evaluation_holds_little_more_than_the_two_largest_layers() -> None:
    model, shape = cnn()
    in_evaluation(model)

    def predict(x: Any) -> Any:
        with brim.no_grad():
            return model(x)

    passes = [dead_code, common, copies, fold_norm, simplify, fuse, schedule]
    compiled = compile_step(predict, passes=passes)
    compiled(np.zeros(shape, "f4"))
    two_largest_bytes = 2 * 4 * 8 * 16 * 16 * 4
    memory = compiled._latest().runner.prepared.memory
    unrolled_bytes = max(memory._scratch)
    assert two_largest_bytes <= memory.arena_bytes <= 1.1 * two_largest_bytes + unrolled_bytes + 4 * 3 * 16 * 16 * 4
