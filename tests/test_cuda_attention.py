"""Attention on CUDA, emulated: the tiled kernels against the body and PyTorch, and memory that grows linearly."""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import brim
from attention_block import block_step
from brim import op as op_module
from brim import ops
from brim.nn import functional as F
from brim.op import REGISTRY
from brim.program.compile import plan, spec
from brim.program.plan import Plan
from brim.spec import DTYPES, Spec
from brim_cuda.emulation import EmulationLoader
from brim_cuda.kernels import attention as kernels
from brim_cuda.launch import Call
from brim_cuda.registry import work_of
from emulated import compile_for, device
from emulating import WHY_NOT, Recorded, emulated, kernels_of, same_bits
from test_cuda_composites import call_of, close, works

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

PROFILE = "h100-80gb"
HALVES = ("float16", "bfloat16")
# T, S, E, D: below, at and beside the sizes of tiles; one number a head, and as many as there may be.
SHAPES = (
    (1, 1, 1, 1), (7, 7, 4, 4), (32, 32, 16, 16), (33, 65, 7, 5), (70, 40, 64, 64), (9, 70, 128, 1), (50, 50, 100, 128),
    (34, 34, 48, 40), (20, 35, 80, 70),
)  # fmt: skip
NAN, INF = math.nan, math.inf
TIMES = {"float32": 2.0, "float16": 4.0, "bfloat16": 4.0}
"""Of the tolerance: on tensor cores, weights and slopes are rounded to half width, as operands."""

Array = np.ndarray[Any, Any]


def operands(sizes: tuple[int, int, int, int], dtype: str = "float32", lead: tuple[int, ...] = (2,)) -> list[Array]:
    """g, q, k and v."""
    T, S, E, D = sizes
    rng = np.random.default_rng(0)
    return [rng.standard_normal((*lead, *shape)).astype(DTYPES[dtype]) for shape in ((T, D), (T, E), (S, E), (S, D))]


def both_ways(
    g: Array, q: Array, k: Array, v: Array, *, causal: bool, scale: float = 0.3, **how: Any
) -> tuple[Recorded, Recorded]:  # fmt: skip
    """The calls of attention and of its gradient, with what their bodies give in float64; with `p`, weights dropped."""
    name, draw = ("attention_dropout", (5, 9)) if "p" in how else ("attention", ())
    how |= {"causal": causal, "scale": scale}
    forward = call_of(name, [q, k, v, *draw], **how)
    y, logs = forward.wrote[0].astype(q.dtype), forward.wrote[1].astype(np.float32)
    return forward, call_of(f"{name}_grad", [g, q, k, v, y, logs, *draw], **how)


def _calls() -> Iterator[Recorded]:
    for causal in (True, False):
        for sizes in SHAPES:
            yield from both_ways(*operands(sizes), causal=causal)
        yield from both_ways(*operands((40, 40, 20, 20), lead=(2, 1, 3)), causal=causal)
        yield from both_ways(*operands((5, 9, 3, 4), lead=()), causal=causal)
        for half in HALVES:
            yield from both_ways(*operands((40, 50, 24, 24), half), causal=causal)


@cache
def attention_calls() -> tuple[Recorded, ...]:
    """Calls of attention and its gradient in every dtype and with tiles of every size."""
    return tuple(_calls())


@cache
def loader_of(order: int) -> EmulationLoader:
    """A loader with all kernels, compiled together; ``order`` is that of the threads of a block."""
    made = EmulationLoader(order=order)
    made.functions(kernels_of(works(attention_calls())))
    return made


# ------------------------------------------------------------------------------------------------- against the body


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 17], ids=["forward", "backward", "shuffled"])
def test_kernels_equal_the_bodies_and_the_order_of_threads_does_not_matter(order: int) -> None:
    for one in attention_calls():
        found = emulated(loader_of(order), one)
        close(found, one, TIMES[one.ins[0].dtype.name])
        if order:
            assert all(map(same_bits, found, emulated(loader_of(0), one))), str(one)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_operands_and_gradients_lie_anywhere(dtype: str) -> None:
    """Heads as a projection wrote them, every other row, backwards, one key and value for all heads."""
    rng, loader = np.random.default_rng(0), loader_of(17)
    joined = rng.standard_normal((2, 37, 3, 3, 16)).astype(DTYPES[dtype])  # (batch, T, which, heads, numbers)
    q, k, v = (joined[:, :, which].transpose(0, 2, 1, 3) for which in range(3))
    g = np.repeat(q, 2, axis=2)[:, :, ::-2]
    shared = (np.broadcast_to(x[:, :1], x.shape) for x in (k, v))
    for given in ((g, q, k, v), (g.mT.copy().mT, q[..., ::-1], k, v[:, ::-1]), (g, q, *shared)):
        for one in both_ways(*given, causal=True):
            work = one.work()
            assert work is not None
            assert not any(work.contiguous[:5]), "nothing is copied first"
            close(emulated(loader, one), one, TIMES[dtype])
            heads_inside = [Spec(o.shape, o.dtype, _heads_inside(o.shape)) if o.ndim == 4 else o for o in one.outs]
            other = Recorded(one.op, one.ins, tuple(heads_inside), one.params, one.given, one.wrote)
            close(emulated(loader, other), other, TIMES[dtype])


def _heads_inside(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (B, heads, T, D) that lies as (B, T, heads, D)."""
    _, heads, T, D = shape
    return heads * T * D, D, heads * D, 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_extremes_are_what_the_body_gives(causal: bool, dtype: str) -> None:
    """Scores of +-inf and NaN, whole tiles of -inf, and numbers that e^x cannot hold."""
    g, q, k, v = operands((150, 150, 3, 4), dtype, lead=())
    for where, what in ((slice(0, 40), -INF), (slice(50, 51), INF), (slice(60, 61), NAN), (slice(3, 9), 200.0)):
        keys, queries = k.copy(), q.copy()
        keys[where, 0], queries[:, 0] = what, np.abs(queries[:, 0]) + 1
        for one in both_ways(g, queries, keys, v, causal=causal):
            found = emulated(loader_of(17), one)
            if causal and one.op.name == "attention_grad":  # the body multiplies what is not seen by 0, NaN or not
                assert all(np.isnan(want[np.isnan(got)]).all() for got, want in zip(found, one.wrote, strict=True))
            else:
                # Scores of some 100 are rounded to 1e-5, and slopes that add up to 0 are multiplied by 200.
                close(found, one, 20.0 if one.op.name == "attention" else 500.0)


@needs_compiler
def test_what_a_query_does_not_see_does_not_touch_it() -> None:
    g, q, k, v = operands((70, 70, 8, 8), lead=())
    how: dict[str, Any] = {"causal": True, "scale": 0.3}
    clean, _ = (first := emulated(loader_of(17), call_of("attention", [q, k, v], **how)))
    hidden_k, hidden_v, hidden_g = k.copy(), v.copy(), g.copy()
    hidden_k[45:], hidden_v[45:], hidden_g[:45] = NAN, NAN, NAN
    found = emulated(loader_of(17), call_of("attention", [q, hidden_k, hidden_v], **how))
    assert all(same_bits(one[:45], other[:45]) for one, other in zip(found, first, strict=True))
    assert np.isnan(found[0][45:]).all()
    want = emulated(loader_of(17), call_of("attention_grad", [g, q, k, v, *first], **how))
    given = emulated(loader_of(17), call_of("attention_grad", [hidden_g, q, k, v, *first], **how))
    assert same_bits(given[0][45:], want[0][45:]), "a gradient of a query is its own"
    assert np.isfinite(clean).all()
    for n in (1, 2):  # keys from 45 on are seen by the queries from 45 on alone
        assert same_bits(given[n][45:], want[n][45:])
        assert np.isnan(given[n][:45]).all()


@needs_compiler
def test_nothing_gives_nothing_or_zeros() -> None:
    for lead, T in (((0,), 5), ((2,), 0)):
        g, q, k, v = operands((T, 4, 3, 2), lead=lead)
        empty = np.zeros((*lead, T), np.float32)
        forward, backward = (
            Recorded(op, tuple(map(_spec, given)), op.infer(tuple(map(_spec, given)), how), how, tuple(given), ())
            for how in [{"causal": False, "scale": 1.0}]
            for op, given in ((REGISTRY["attention"], [q, k, v]), (REGISTRY["attention_grad"], [g, q, k, v, g, empty]))
        )
        assert [x.size for x in emulated(loader_of(0), forward)] == [0, 0]
        dq, dk, dv = emulated(loader_of(0), backward)
        assert (dq.size, dk.shape, dv.shape) == (0, k.shape, v.shape)
        assert not dk.any()
        assert not dv.any()


def _spec(x: Array) -> Spec:
    return Spec(x.shape, x.dtype)


# ---------------------------------------------------------------------------------------------------- on shapes alone


def _launches(q: Spec, k: Spec, v: Spec, **how: Any) -> list[Call]:
    how = {"causal": True, "scale": 1.0, **how}
    y, logs = (forward := REGISTRY["attention"]).infer([q, k, v], how)
    ins = [y, q, k, v, y, logs]
    backward = REGISTRY["attention_grad"]
    return [
        *work_of(forward, [q, k, v], [y, logs], how).calls,
        *work_of(backward, ins, backward.infer(ins, how), how).calls,
    ]  # type: ignore[list-item]


def test_shared_memory_is_what_every_gpu_gives() -> None:
    for numbers, dtype in itertools.product(range(1, 129), ("float32", *HALVES)):
        x = Spec((2, 50, numbers), DTYPES[dtype])
        assert max(call.shared_bytes for call in _launches(x, x, x)) <= 48 << 10, (numbers, dtype)


@pytest.mark.parametrize("lead", [(2**20, 2**10), (2**31,)], ids=str)
def test_grids_of_huge_arrays_stay_within_the_limits(lead: tuple[int, ...]) -> None:
    x = Spec((*lead, 3, 5))
    for call in _launches(x, x, x):
        assert call.blocks[0] < 2**31
        assert {p.dtype for p in call.kernel.params if p.name in ("tiles", "rows")} == {DTYPES["int64"]}


def test_what_no_kernel_is_for_is_left_to_the_body() -> None:
    x, wide = Spec((2, 6, 4)), Spec((2, 6, 129))
    how: dict[str, Any] = {"causal": False, "scale": 1.0}
    double, low = Spec((2, 6, 4), DTYPES["float64"]), Spec((2, 6, 4), DTYPES["float16"])
    assert work_of(REGISTRY["attention"], [x, x, x], [x, Spec((2, 6))], how).calls
    for q, k, v in ((double,) * 3, (wide,) * 3, (x, x, wide), (low, x, x), (x, Spec((1, 6, 4)), x)):
        y = Spec((*q.shape[:-1], v.shape[-1]), q.dtype)
        with pytest.raises(KeyError, match="no kernel for attention"):
            work_of(REGISTRY["attention"], [q, k, v], [y, Spec(q.shape[:-1])], how)
    nothing = Spec((2, 0, 4))
    with pytest.raises(KeyError, match="no kernel for attention"):
        work_of(REGISTRY["attention"], [x, nothing, nothing], [x, Spec((2, 6))], how)


# --------------------------------------------------------------------------------------------- in steps, on the device


def _formula(q: Any, k: Any, v: Any, *, is_causal: bool) -> Any:
    scale = 1.0 / math.sqrt(q.shape[-1])
    scores = q @ k.mT
    weights = ops.causal_softmax(scores, scale=scale) if is_causal else ops.softmax(scores * scale)
    return weights @ v


def _step(attend: Callable[..., Any], causal: bool) -> Callable[..., Any]:
    def step(q: Any, k: Any, v: Any) -> Any:
        for x in (q, k, v):
            x.requires_grad_()
        y = attend(q, k, v, is_causal=causal)
        (y * y).sum().backward()
        gradients = [x.grad for x in (q, k, v)]
        for x in (q, k, v):
            x.grad = None
        return y, *gradients

    return step


def _text(planned: Plan) -> str:
    """The program, without the lines of this file that its instructions come from, and the places in the arena."""
    (program,) = planned.programs
    places = [program.prepared.memory.offset_bytes(v) for v in program.kinds if v.home is None]
    return re.sub(r"\.py:\d+", "", f"{program.prepared.program} {places}")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_where_there_is_no_kernel_it_is_the_formula(causal: bool) -> None:
    """On the CPU in other dtypes than float32: the same program, the same places in memory, the same bits."""
    specs = [spec((2, 3, 9, 4), "float64")] * 3
    mine, formula = (plan(_step(attend, causal), *specs) for attend in (F.scaled_dot_product_attention, _formula))
    assert _text(mine) == _text(formula)
    for dtype in ("bfloat16", "float64"):
        given = operands((9, 9, 4, 4), dtype, lead=(2, 3))[1:]
        found = [
            _step(attend, causal)(*map(brim.asarray, given)) for attend in (F.scaled_dot_product_attention, _formula)
        ]
        assert all(a.detach().numpy().tobytes() == b.detach().numpy().tobytes() for a, b in zip(*found, strict=True))


ON_DEVICE = ((7, 7, 4, 4), (33, 50, 16, 24), (40, 20, 64, 64))


def _on(place: Any, sizes: tuple[int, int, int, int], dtype: str, causal: bool) -> list[Any]:
    """The result and the gradients of q, k and v."""
    given = [brim.asarray(x, device=place) for x in operands(sizes, dtype, lead=(2, 3))[1:]]
    return [out.detach().numpy() for out in _step(F.scaled_dot_product_attention, causal)(*given)]


@pytest.fixture(scope="module")
def _compiled() -> None:
    cases = itertools.product(ON_DEVICE, ("float32", *HALVES), (True, False))
    assert compile_for([lambda place, case=case: _on(place, *case) for case in cases]) > 60


@pytest.mark.emulated
@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("sizes", ON_DEVICE, ids=str)
def test_values_and_gradients_are_pytorchs(sizes: tuple[int, int, int, int], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tolerance = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    for causal in (True, False):
        given = operands(sizes, dtype, lead=(2, 3))[1:]
        theirs = [torch.tensor(x.astype(np.float64), requires_grad=True) for x in given]
        y = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=causal)
        (y * y).sum().backward()
        want = [y.detach().numpy(), *(x.grad.numpy() for x in theirs)]
        for got, other in zip(_on(device(), sizes, dtype, causal), want, strict=True):
            assert got.dtype == DTYPES[dtype]
            assert np.abs(got.astype(np.float64) - other).max() <= tolerance * np.abs(other).max()


def _ops_of(fn: Any, place: Any, *specs: Any) -> list[str]:
    (program,) = plan(fn, *specs, device=place).programs
    return [instruction.op.name for instruction in program.prepared.program.instructions]


@pytest.mark.emulated
def test_masks_and_other_dtypes_take_the_products() -> None:
    x, wide, mask = spec((2, 9, 4)), spec((2, 9, 4), "float64"), spec((9, 9), "bool")
    found = _ops_of(_step(F.scaled_dot_product_attention, True), device(), x, x, x)
    assert found.count("attention") == found.count("attention_grad") == 1
    assert "matmul" not in found
    with_mask = _ops_of(lambda q, m: F.scaled_dot_product_attention(q, q, q, m), device(), x, mask)
    all_dropped = _ops_of(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=1.0), device(), x)
    in_double = _ops_of(lambda q: F.scaled_dot_product_attention(q, q, q), device(), wide)
    for other in (with_mask, all_dropped, in_double):
        assert other.count("matmul") + other.count("matmul_epilogue") == 2
        assert not {"attention", "attention_dropout"} & set(other)
    with brim.autocast("bfloat16"):
        assert "attention" in _ops_of(lambda q: F.scaled_dot_product_attention(q, q, q), device(), x)


@pytest.mark.emulated
def test_gradients_of_gradients_on_the_device() -> None:
    given = operands((5, 5, 3, 4), lead=())[1:]
    found = []
    for place in ("cpu", device()):
        q, k, v = (brim.asarray(x, device=place).requires_grad_() for x in given)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        firsts = brim.grad((y * y * y).sum(), [q, k, v], create_graph=True)
        sum(((first * first).sum() for first in firsts), brim.asarray(0.0, device=place)).backward()
        found.append([x.grad.numpy() for x in (q, k, v)])
    for got, want in zip(found[1], found[0], strict=True):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- its memory


@pytest.fixture
def _without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MAX_NUMBERS", 0)
    monkeypatch.setattr(op_module._eager, "_plans", {})  # kernels are looked up anew, and again afterwards


def _of_one_block(dropout: float) -> list[tuple[int, int]]:
    """Bytes of the arena, and of the activations in it, of a step at T = 128, 256, 512 and 1024, on a card."""
    step = block_step("cpu", dropout)
    plans = [plan(step, spec((1, T, 32)), device_profile=PROFILE) for T in (128, 256, 512, 1024)]
    return [(one.arena_bytes, one.by_kind()["activations"]) for one in plans]


SCORES_BYTES = 4 * 1024 * 1024 * 4
"""Of all heads, at the longest sequence."""


DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])


@DROPOUTS
def test_memory_grows_linearly_with_the_sequence(dropout: float) -> None:
    arena_bytes, activation_bytes = zip(*_of_one_block(dropout), strict=True)
    assert [n // activation_bytes[0] for n in activation_bytes] == [1, 2, 4, 8]
    for shorter, longer in itertools.pairwise(arena_bytes):
        assert longer <= 2 * shorter
    assert arena_bytes[-1] < SCORES_BYTES, "nothing of the size of the scores"


@DROPOUTS
@pytest.mark.usefixtures("_without_the_kernel")
def test_memory_grew_with_its_square_before(dropout: float) -> None:
    arena_bytes, activation_bytes = zip(*_of_one_block(dropout), strict=True)
    assert activation_bytes[3] > 3.8 * activation_bytes[2] > 14 * activation_bytes[1]
    assert arena_bytes[3] > 4 * SCORES_BYTES


def _settled_bytes() -> int:
    gc.collect()
    device().memory.arena.release()
    return int(brim.memory_stats(device())["live_bytes"])


@pytest.mark.emulated
def test_a_planned_block_is_the_cpus_and_holds_what_was_planned() -> None:
    x = np.random.default_rng(0).standard_normal((2, 40, 32)).astype(np.float32)
    want = [out.detach().numpy() for out in block_step("cpu")(brim.asarray(x))]
    step = brim.compile(block_step(device()))
    given = brim.asarray(x, device=device())
    planned: Plan = brim.plan(step, given)
    names = [one.op.name for one in planned.programs[0].prepared.program.instructions]
    assert names.count("attention") == names.count("attention_grad") == 1
    others_bytes = _settled_bytes() - sum(r.reserved_bytes for r in planned.residents if r.exists)
    brim.reset_peak_memory(device())
    found = step(given)
    held_bytes = brim.memory_stats(device())["peak_bytes"] - others_bytes
    assert held_bytes == planned.peak_bytes - planned.by_kind()["overhead"]
    for got, other in zip(found, want, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), other, rtol=2e-4, atol=2e-5 * max(1.0, np.abs(other).max()))
