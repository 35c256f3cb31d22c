"""Attention that drops weights, on CUDA, emulated: the mask is that of dropout; the gradient draws it again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import brim
from attention_block import block_step
from brim import ops, random
from brim.nn import functional as F
from brim.spec import DTYPES, Spec
from brim_cuda.emulation import EmulationLoader
from brim_cuda.kernels import attention as kernels
from emulated import device
from emulating import WHY_NOT, Recorded, emulated, kernels_of, same_bits
from test_cuda_attention import TIMES, both_ways, operands
from test_cuda_composites import close, works

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

# T, S, E, D; rows of scores that start at multiples of eight numbers, and others.
SHAPES = ((7, 7, 4, 4), (40, 51, 24, 24), (70, 64, 64, 64))
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (("float32", {}), ("float32", {"tf32": True}), ("float16", {}))

Array = np.ndarray[Any, Any]


def _calls() -> Iterator[Recorded]:
    for causal, (dtype, how) in itertools.product((True, False), KINDS):
        for sizes in SHAPES:
            yield from both_ways(*operands(sizes, dtype), causal=causal, p=0.3, **how)
        yield from both_ways(*operands((20, 16, 100, 90), dtype, lead=()), causal=causal, p=0.3, **how)
    yield from both_ways(*operands((70, 40, 24, 24), "bfloat16", lead=(2, 3)), causal=True, p=0.1)


@cache
def dropout_calls() -> tuple[Recorded, ...]:
    """Calls of attention that drops weights, and of its gradient, with tensor cores and without."""
    return tuple(_calls())


@cache
def loader_of(order: int) -> EmulationLoader:
    """A loader with all kernels, compiled together; ``order`` is that of the threads of a block."""
    made = EmulationLoader(order=order)
    made.functions(kernels_of(works(dropout_calls())))
    return made


# -------------------------------------------------------------------------------------------------------- the kernels


@needs_compiler
@pytest.mark.parametrize("order", [0, 17], ids=["forward", "shuffled"])
def test_kernels_equal_the_bodies_and_the_order_of_threads_does_not_matter(order: int) -> None:
    for one in dropout_calls():
        found = emulated(loader_of(order), one)
        close(found, one, TIMES[one.ins[0].dtype.name] if "tf32" not in one.params else 1000.0)
        if order:
            assert all(map(same_bits, found, emulated(loader_of(0), one))), str(one)


def _kept(shape: tuple[int, ...], seed: int, counter: int, p: float) -> Array:
    """Which elements brim's own dropout keeps on the CPU."""
    return np.array(ops.dropout(brim.asarray(np.ones(shape, np.float32)), seed, counter, p=p).numpy() != 0)


@needs_compiler
@pytest.mark.parametrize(("dtype", "how"), KINDS, ids=["float32", "tf32", "float16"])
def test_the_weights_that_are_dropped_are_those_of_dropout_to_the_bit(dtype: str, how: dict[str, Any]) -> None:
    """With the identity for v (or g), the result (or the gradient of v) shows each weight."""
    lead, T, S = (2, 3), 37, 43
    _, q, k, _ = operands((T, S, 5, 5), dtype, lead=lead)
    eyes = [np.broadcast_to(np.eye(n, dtype=DTYPES[dtype]), (*lead, n, n)).copy() for n in (T, S)]
    forward, _ = both_ways(np.zeros((*lead, T, S), DTYPES[dtype]), q, k, eyes[1], causal=False, scale=0.1, p=0.4, **how)
    shown, _ = emulated(EmulationLoader(), forward)
    kept = _kept((*lead, T, S), 5, 9, 0.4)
    assert 0.55 < kept.mean() < 0.65
    assert np.array_equal(shown != 0, kept)
    _, backward = both_ways(eyes[0], q, k, np.ones((*lead, S, T), DTYPES[dtype]), causal=False, scale=0.1, p=0.4, **how)
    _, _, dv = emulated(EmulationLoader(), backward)
    assert np.array_equal(dv.swapaxes(-1, -2) != 0, kept)
    assert np.allclose(dv.swapaxes(-1, -2).astype(np.float32), shown.astype(np.float32), rtol=4e-3, atol=1e-6)


def test_all_or_nothing_is_not_for_kernels() -> None:
    x, logs = Spec((2, 6, 4)), Spec((2, 6))
    for p in (0.0, 1.0):
        with pytest.raises(KeyError, match="drops a share"):
            kernels.attention_dropout([x, x, x, 0, 0], [x, logs], causal=True, scale=1.0, p=p)
        with pytest.raises(KeyError, match="drops a share"):
            kernels.attention_dropout_grad([x, x, x, x, x, logs, 0, 0], [x, x, x], causal=True, scale=1.0, p=p)


# ------------------------------------------------------------------------------------------------ functions and steps


def _formula(q: Any, k: Any, v: Any, *, dropout_p: float, is_causal: bool) -> Any:
    scores = q @ k.mT
    scale = q.shape[-1] ** -0.5
    weights = ops.causal_softmax(scores, scale=scale) if is_causal else ops.softmax(scores * scale)
    return F.dropout(weights, dropout_p) @ v


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_the_cpu_draws_what_dropout_of_the_weights_draws(causal: bool, p: float) -> None:
    found = []
    for attend in (F.scaled_dot_product_attention, _formula):
        brim.manual_seed(3)
        q, k, v = (brim.asarray(x).requires_grad_() for x in operands((9, 9, 4, 4), lead=(2, 3))[1:])
        y = attend(q, k, v, dropout_p=p, is_causal=causal)
        (y * y).sum().backward()
        found.append([y.detach().numpy().tobytes(), *(x.grad.numpy().tobytes() for x in (q, k, v)), random.get_state()])
    assert found[0] == found[1]
    assert found[0][-1]["counter"] == 1


def test_a_share_is_between_0_and_1() -> None:
    x = brim.asarray(np.zeros((2, 3), np.float32))
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            F.scaled_dot_product_attention(x, x, x, dropout_p=p)


@pytest.mark.emulated
def test_planned_steps_draw_anew_each_time_and_get_the_cpus_gradients() -> None:
    x = np.random.default_rng(0).standard_normal((2, 40, 32)).astype(np.float32)
    there, here = brim.compile(block_step(device(), dropout=0.1)), block_step("cpu", dropout=0.1)
    names = [
        one.op.name
        for one in brim.plan(there, brim.asarray(x, device=device())).programs[0].prepared.program.instructions
    ]
    assert names.count("attention_dropout") == names.count("attention_dropout_grad") == 1
    losses = []  # of two steps that are launched one by one, and two that are replayed
    for step, place in ((here, "cpu"), (there, device())):
        brim.manual_seed(1)
        losses.append(
            [[out.detach().numpy() for out in step(brim.asarray(x, device=place))] for _ in range(4)]
        )  # two launched one by one, two replayed
    for wanted, found in zip(*losses, strict=True):
        for want, got in zip(wanted, found, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * max(1.0, np.abs(want).max()))
    assert len({float(one[0]) for one in losses[1]}) == 4, "another mask in every step"
