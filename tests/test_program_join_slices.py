"""Gradients of slices that make up a whole: joined where they do, with the bits of the sum; others are left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.ir import Instruction, Program, Ref, Value
from brim.program.passes import default_passes
from brim.program.passes.join_slices import join_slices
from brim.spec import Spec
from program_oracle import changed_by

WIDE = Spec((2, 6))


def _program(
    slices: list[tuple[int, int]],
    order: list[tuple[int, int]],
    zero: float = 0.0,
    axis: int = 1,
    dtype: str = "float32",
) -> Program:
    """Slices (start, count) of an array of (2, 6), padded with zeros; ``order`` says which two are added next."""
    wide = Spec(WIDE.shape, np.dtype(dtype))
    inputs, steps, terms = [], [], []
    for start, count in slices:
        shape = (2, count) if axis == 1 else (count, 6)
        index = ((0, 1, 2), (start, 1, count)) if axis == 1 else ((start, 1, count), (0, 1, 6))
        x, out = Value(Spec(shape, wide.dtype), "input"), Value(wide)
        inputs.append(x)
        ref = Ref(x, Spec((1, *shape), wide.dtype))
        steps.append(Instruction(REGISTRY["set_slice"], (zero, ref), (out,), {"index": index, "shape": wide.shape}))
        terms.append(out)
    for a, b in order:
        out = Value(wide)
        steps.append(Instruction(REGISTRY["add"], (Ref.of(terms[a]), Ref.of(terms[b])), (out,)))
        terms.append(out)
    return Program(inputs, [], {}, steps, [Ref.of(terms[-1])])


def _names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


THIRDS = [(0, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize(
    ("slices", "order"),
    [
        (THIRDS, [(0, 1), (3, 2)]),
        (THIRDS, [(1, 2), (0, 3)]),
        ([(4, 2), (0, 2), (2, 2)], [(0, 1), (3, 2)]),
        ([(0, 5), (5, 1)], [(1, 0)]),
        ([(0, 1), (1, 2), (3, 1), (4, 2)], [(0, 1), (2, 3), (4, 5)]),
    ],
)
def test_what_makes_up_a_whole_is_joined(slices: list[tuple[int, int]], order: list[tuple[int, int]]) -> None:
    program = changed_by(join_slices, _program(slices, order))
    assert sorted(_names(program)) == ["add"] * len(slices) + ["concat"]
    assert program.instructions[-1].params == {"axis": 1}
    starts = [slices[program.inputs.index(i.ins[0].value)][0] for i in program.instructions[:-1]]
    pieces = {i.outs[0]: start for i, start in zip(program.instructions, starts, strict=False)}
    assert [pieces[ref.value] for ref in program.instructions[-1].refs] == sorted(starts)


def test_along_another_axis() -> None:
    program = changed_by(join_slices, _program([(1, 1), (0, 1)], [(0, 1)], axis=0))
    assert program.instructions[-1].params == {"axis": 0}


@pytest.mark.parametrize(
    ("slices", "order", "options"),
    [
        ([(0, 2), (2, 2)], [(0, 1)], {}),  # a hole at the end
        ([(0, 2), (3, 3)], [(0, 1)], {}),  # a hole between
        ([(0, 4), (2, 4)], [(0, 1)], {}),  # they overlap
        (THIRDS, [(0, 1), (2, 3), (4, 3)], {}),  # a sum that is read twice
        ([(0, 3), (3, 3)], [(0, 1)], {"zero": 1.0}),
        ([(0, 3), (3, 3)], [(0, 1)], {"zero": -0.0}),
        ([(0, 3), (3, 3)], [(0, 1)], {"dtype": "int32"}),
        ([(0, 6)], [], {}),
    ],
)
def test_what_does_not_stays(slices: Any, order: Any, options: Any) -> None:
    program = _program(slices, order, **options)
    assert join_slices(program) is program


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_bits_of_a_sum_with_zeros(dtype: str) -> None:
    """0 of -0, which a plain joining would keep; infinities and NaN as they are."""
    numbers = np.array([[0.0, -0.0, 1.5, -np.inf, np.nan, -2.0]] * 2, np.float32)

    def step(x: Any, g: Any) -> Any:
        x = x.detach().astype(dtype).requires_grad_()
        a, b, c = brim.ops.split(x, 3, axis=1)
        loss = [(a * 1.0), (b * 1.0), (c * 1.0)]
        total = sum((part * g.astype(dtype)[:, 2 * n : 2 * n + 2]).sum() for n, part in enumerate(loss))
        return brim.grad(total, [x])[0].astype("float32")

    run = compile_step(step)
    found = run(np.ones((2, 6), np.float32), numbers).numpy()
    assert "concat" in _names(run.program())
    assert "set_slice" not in _names(run.program())
    expected = step(brim.asarray(np.ones((2, 6), np.float32)), brim.asarray(numbers)).numpy()
    assert found.tobytes() == expected.tobytes()
    assert not np.signbit(found[0, 1])


def test_attention_as_it_is_written() -> None:
    """Queries, keys and values from one product: fewer kernels and bytes, no higher peak, the bits of eager steps."""

    def make() -> tuple[Any, nn.Linear]:
        brim.manual_seed(3)
        qkv = nn.Linear(8, 24)
        optimizer = optim.SGD(qkv.parameters(), lr=0.1)

        def step(x: Any) -> Any:
            shape = (2, 5, 2, 4)
            parts = brim.ops.split(qkv(x), 3, axis=-1)
            q, k, v = (part.reshape(shape).permute_dims((0, 2, 1, 3)) for part in parts)
            loss = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step, qkv

    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    eager, first = make()
    expected = [eager(brim.asarray(x)).item() for _ in range(3)]
    plain, second = make()
    run = compile_step(plain)
    assert [run(x).item() for _ in range(3)] == expected
    assert second.weight.numpy().tobytes() == first.weight.numpy().tobytes()
    assert "set_slice" not in _names(run.program())
    passes = [one for one in default_passes(brim.device("cpu").backend) if one is not join_slices]
    without = compile_step(plain, passes=passes).plan(brim.spec((2, 5, 8)))
    planned = compile_step(plain).plan(brim.spec((2, 5, 8)))
    assert planned.peak_bytes <= without.peak_bytes
    assert planned.traffic().total.nbytes < without.traffic().total.nbytes
    assert planned.traffic().total.launches < without.traffic().total.launches
