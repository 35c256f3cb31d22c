"""One number of many arrays on CUDA, emulated: the sum of their squares, whether all are finite; few launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

import brim
import emulated as device_of_tests
from brim import optim
from brim.op import REGISTRY
from brim.spec import DTYPES, Spec
from brim_cuda.emulation import EmulationLoader
from brim_cuda.launch import Call
from brim_cuda.registry import work_of
from emulating import WHY_NOT, Recorded, emulated, same_bits

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

SHAPES = ((5000,), (3, 7), (0,), (1,), (), (2, 3, 4), (4096,), (4097,), (130, 64))
F32, F64, F16, BF16, BOOL = (DTYPES[name] for name in ("float32", "float64", "float16", "bfloat16", "bool"))
Array = np.ndarray[Any, Any]


def _spec(x: Array) -> Spec:
    return Spec(x.shape, x.dtype, None if x.flags.c_contiguous else tuple(s // x.itemsize for s in x.strides))


def call_of(name: str, given: Sequence[Array]) -> Recorded:
    """A call, with what it gives in float64."""
    ins = tuple(map(_spec, given))
    if name == "squares_sum":
        out: Any = sum((x.astype(np.float64) ** 2).sum() for x in given)
        dtype = F64 if given[0].dtype == F64 else F32
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            out, dtype = all(np.isfinite(x * x.dtype.type(given[0])).all() for x in given[1:]), BOOL
    return Recorded(REGISTRY[name], ins, (Spec((), dtype),), {}, tuple(given), (np.asarray(out),))


def arrays(dtypes: Sequence[np.dtype[Any]], shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Array]:
    rng = np.random.default_rng(3)
    return [
        rng.uniform(-2, 2, shape).astype(dtypes[n % len(dtypes)]) for n, shape in enumerate(shapes)
    ]  # fmt: skip


@cache
def calls() -> dict[str, Recorded]:
    """Calls of both ops by what is special about them."""
    plain, images = arrays([F32]), np.ascontiguousarray(arrays([F32], [(2, 5, 6, 3)])[0])
    odd, factor = images.transpose(0, 3, 1, 2), np.array(0.25, np.float32)
    with_nan = [*plain[:-1], plain[-1].copy()]
    with_nan[-1][129, 63] = np.nan
    large = np.full(4099, 1e38, np.float32)
    sums = {
        "plain": plain,
        "double": arrays([F64]),
        "half widths": arrays([F16, BF16, F32]),
        "more than one launch can take": arrays([F32], [(1 + n % 5,) for n in range(450)]),
        "dense in another order": [odd, plain[0]],
        "with gaps": [plain[8][:, ::2], plain[0][::-1]],
        "nan": with_nan,
        "nothing in them": arrays([F32], [(0,), (2, 0)]),
    }
    flags = {
        "finite": [factor, *plain],
        "finite in double": [factor, *arrays([F64, F32])],
        "many finite": [factor, *sums["more than one launch can take"]],
        "not finite": [factor, *with_nan],
        "too large times the factor": [np.array(8.0, np.float32), plain[0], large],
        "not too large times the factor": [np.array(2.0, np.float32), plain[0], large],
    }
    found = {f"squares: {name}": call_of("squares_sum", given) for name, given in sums.items()}
    return found | {f"all: {name}": call_of("all_finite", given) for name, given in flags.items()}


@cache
def loader_of(order: int) -> EmulationLoader:
    made = EmulationLoader(order=order)
    made.functions([step.kernel for one in calls().values() for step in _launches(one)])
    return made


def _launches(one: Recorded) -> list[Call]:
    work = one.work()
    assert work is not None
    return [step for step in work.calls if isinstance(step, Call)]


@needs_compiler
@pytest.mark.parametrize("name", sorted(calls()))
def test_kernels_equal_the_bodies_whatever_the_order_of_threads(name: str) -> None:
    one = calls()[name]
    found = [emulated(loader_of(order), one)[0] for order in (0, 1, 17)]
    assert all(same_bits(other, found[0]) for other in found)
    rtol = 1e-13 if found[0].dtype == F64 else 1e-6
    np.testing.assert_allclose(found[0].astype(np.float64), one.wrote[0].astype(np.float64), rtol=rtol)


@needs_compiler
def test_bits_do_not_depend_on_where_an_array_starts() -> None:
    given = arrays([F32], [(9001,), (5,)])
    whole = np.zeros(9002, np.float32)
    whole[1:] = given[0]  # four bytes after an address that vectors of four may be read from
    plain, moved = call_of("squares_sum", given), call_of("squares_sum", [whole[1:], given[1]])
    assert same_bits(emulated(loader_of(0), plain)[0], emulated(loader_of(0), moved)[0])


def test_launches_are_few() -> None:
    assert len(_launches(calls()["squares: plain"])) == 2
    assert len(_launches(calls()["all: finite"])) == 2
    assert len(_launches(calls()["squares: more than one launch can take"])) <= 4
    sizes = [Spec((2**29,), F32), Spec((7,), F32)]
    large = work_of(REGISTRY["squares_sum"], sizes, [Spec((), F32)], {})
    assert len(large.calls) == 2
    assert large.scratch_bytes <= 64 << 10
    for one in calls().values():
        for step in _launches(one):
            assert sum(8 if p.is_pointer else p.dtype.itemsize for p in step.kernel.params) <= 4096


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [("squares_sum", (F32, F64)), ("squares_sum", (DTYPES["complex64"],)), ("all_finite", (F32, F16)),
     ("all_finite", (F16, F32))],
)  # fmt: skip
def test_what_has_no_kernel_runs_its_body(name: str, dtypes: Sequence[np.dtype[Any]]) -> None:
    with pytest.raises(KeyError):
        work_of(REGISTRY[name], [Spec((), dtype) for dtype in dtypes], [Spec((), F32)], {})


@needs_compiler
@pytest.mark.emulated
def test_clipping_on_the_device_is_the_cpus() -> None:
    given = arrays([F32], [shape for shape in SHAPES if shape != (0,)])
    norms, clipped = [], []
    for place in ("cpu", device_of_tests.device()):
        params = [brim.asarray(x, device=place) for x in given]
        for p, x in zip(params, given, strict=True):
            p.grad = brim.asarray(x, device=place)
        norms.append(float(optim.clip_grad_norm_(params, 0.5)))
        clipped.append([p.grad.numpy() for p in params])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for ours, theirs in zip(*clipped, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6)
