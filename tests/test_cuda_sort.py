"""Sorting on CUDA, emulated: rows of the table, dtypes, ties, signed zeros, NaN, strides, long lines, huge grids."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from brim.op import REGISTRY
from brim.spec import DTYPES, Spec
from brim_cpu.device import CpuBackend
from brim_cuda.emulation import EmulationLoader
from brim_cuda.kernels import sort as sort_module
from brim_cuda.launch import Scratch
from brim_cuda.nvrtc import compile_cubin, find_nvrtc
from brim_cuda.registry import Work, work_of
from brim_cuda.source import translation_unit
from cuda_kernels import MAX_REGISTERS
from emulating import WHY_NOT, Recorded, emulated, kernels_of, recorded, same_bits
from test_cuda_kernels import call_of

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")

Array = np.ndarray[Any, Any]
CPU = CpuBackend()
REAL = [name for name, dtype in DTYPES.items() if dtype.kind != "c"]
ORDERS = [0, 1, 17]
ORDER_NAMES = ["forward", "backward", "shuffled"]


def numbers(name: str, shape: tuple[int, ...]) -> Array:
    """Many ties; for floats zeros of both signs, infinities and NaN too."""
    dtype, rng = DTYPES[name], np.random.default_rng(len(shape))
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        x = rng.integers(0, 100, shape).astype(dtype)
        x[rng.random(shape) < 0.1] = info.max
        x[rng.random(shape) < 0.1] = info.min
        return x
    wide = np.round(rng.standard_normal(shape) * 4)
    for value in (0.0, -0.0, np.nan, np.inf, -np.inf):
        wide[rng.random(shape) < 0.1] = value
    with np.errstate(all="ignore"):
        return wide.astype(dtype)


def on_cpu(one: Recorded) -> Array:
    """What the CPU's kernel gives."""
    (spec,) = one.outs
    rows = [np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for x in one.given]
    ins = [Spec(x.shape, x.dtype) if isinstance(x, np.ndarray) else x for x in rows]
    kernel, out = CPU.bind(one.op, ins, one.outs, one.params), np.zeros(spec.shape, spec.dtype)
    with np.errstate(all="ignore"):
        kernel.run(out, *rows, scratch=np.zeros(kernel.scratch_bytes, np.uint8), **one.params)
    return out


def plain(x: Array) -> Array:
    """The same numbers, floats in float64."""
    return x if x.dtype.kind in "biu" else x.astype(np.float64)


def stable(x: Array) -> Array:
    """Positions of a stable sort, NaN last, by Python's own: a reference without NumPy's sorting."""
    rows = [[(n != n, 0 if n != n else n) for n in row] for row in plain(x).reshape(-1, x.shape[-1]).tolist()]
    return np.array([sorted(range(len(row)), key=row.__getitem__) for row in rows], np.int64).reshape(x.shape)


def check(loader: EmulationLoader, x: Array) -> None:
    """Both ops against a stable sort, bit by bit, and the CPU's, which leaves the order of 0.0 and -0.0 open."""
    positions, values, want = call_of("argsort", [x]), call_of("sort", [x]), stable(x)
    (order,), (ordered,) = emulated(loader, positions), emulated(loader, values)
    assert same_bits(order, want), f"argsort of {x.dtype} {x.shape}"
    assert ordered.tobytes() == np.take_along_axis(x, want, -1).tobytes(), f"sort of {x.dtype} {x.shape}"
    assert same_bits(order, on_cpu(positions))
    np.testing.assert_array_equal(plain(ordered), plain(on_cpu(values)))


def loaded(order: int, arrays: list[Array]) -> EmulationLoader:
    """Everything that these need, compiled together."""
    loader = EmulationLoader(order)
    works = [call_of(name, [x]).work() for x in arrays for name in ("sort", "argsort")]
    loader.functions(kernels_of([work for work in works if work]))
    return loader


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_rows_of_the_table(order: int) -> None:
    calls = [one for one in recorded() if one.op.name in ("sort", "argsort")]
    assert {one.op.name for one in calls} == {"sort", "argsort"}
    loader = EmulationLoader(order)
    loader.functions(kernels_of([work for one in calls if (work := one.work())]))
    for one in calls:
        assert one.work() is not None
        (got,) = emulated(loader, one)
        assert same_bits(got, one.wrote[0]), str(one)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_every_dtype(order: int) -> None:
    arrays = [numbers(name, (3, 301)) for name in REAL]
    loader = loaded(order, arrays)
    for x in arrays:
        check(loader, x)


def test_lengths_and_numbers_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several lines in a block, one, and lines of several tiles, with odd and even numbers of passes."""
    monkeypatch.setattr(sort_module, "TILE", 64)
    shapes = [(1,), (7, 1), (9, 2), (40, 7), (5, 33), (2, 63), (3, 64), (3, 65), (2, 128), (3, 129), (2, 300), (1, 999)]
    arrays = [numbers("float32", shape) for shape in shapes]
    passes = {len(work.calls) - 1 for x in arrays if (work := call_of("sort", [x]).work())}
    assert passes == {0, 1, 2, 3, 4}
    for order in ORDERS:
        loader = loaded(order, arrays)
        for x in arrays:
            check(loader, x)


def test_more_tiles_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with very many lines or elements: a block goes on with another tile, a thread with another element."""
    monkeypatch.setattr(sort_module, "TILE", 64)
    monkeypatch.setattr(sort_module, "_MAX_BLOCKS", 2)
    monkeypatch.setattr(sort_module, "blocks_for", lambda threads: 2)
    arrays = [numbers("float32", shape) for shape in ((60, 9), (7, 300))]
    for order in ORDERS:
        loader = loaded(order, arrays)
        for x in arrays:
            assert all(call.blocks == (2,) for call in call_of("sort", [x]).work().calls)  # type: ignore[union-attr]
            check(loader, x)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_long_lines(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(sort_module, "index_dtype", lambda arrays: DTYPES["int64"])
    tile = sort_module.TILE
    arrays = [numbers(name, (2, 2 * tile + 5)) for name in ("float64", "bfloat16", "int8")]
    arrays.append(np.arange(tile + 1, dtype=np.int64)[::-1])
    loader = loaded(3, arrays)
    for x in arrays:
        check(loader, x)


@pytest.mark.parametrize("tile", [64, sort_module.TILE], ids=["passes", "one launch"])
def test_strides(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sort_module, "TILE", tile)
    x = numbers("float32", (4, 5, 140))
    views = [x.transpose(2, 0, 1), x.transpose(1, 2, 0), x[::-1, :, ::-1], x[:, ::2, 1::3], x[1:, :1, 3], x[:, :, :1]]
    views.append(np.broadcast_to(x[0, 0, :70], (3, 70)))
    loader = loaded(5, views)
    for view in views:
        check(loader, view)


def test_an_empty_array_launches_nothing_and_what_has_no_kernel_is_refused() -> None:
    for shape in ((0,), (3, 0), (0, 5)):
        for name, dtype in (("sort", "float32"), ("argsort", "int64")):
            work = work_of(REGISTRY[name], [Spec(shape)], [Spec(shape, DTYPES[dtype])], {})
            assert (work.calls, work.scratch_bytes) == ([], 0)
    with pytest.raises(KeyError, match="no kernel for sort in complex64"):
        work_of(REGISTRY["sort"], [Spec((3,), DTYPES["complex64"])], [Spec((3,), DTYPES["complex64"])], {})
    with pytest.raises(KeyError, match="an output that is not row-major"):
        work_of(REGISTRY["sort"], [Spec((2, 3))], [Spec((2, 3), DTYPES["float32"], (1, 2))], {})


def sorting_work(name: str, shape: tuple[int, ...], dtype: str) -> Work:
    spec = Spec(shape, DTYPES[dtype])
    return work_of(REGISTRY[name], [spec], REGISTRY[name].infer([spec], {}), {})


@pytest.mark.parametrize("dtype", ["bool", "bfloat16", "float32", "float64"])
def test_scratch_is_the_outputs_size_for_long_lines_and_none_for_short_ones(dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    tile = sort_module.TILE
    for length, factor in ((tile, 0), (tile + 1, 1), (10 * tile, 1)):
        assert sorting_work("sort", (3, length), dtype).scratch_bytes == factor * 3 * length * size
        assert sorting_work("argsort", (3, length), dtype).scratch_bytes == factor * 3 * length * 8
    for call in sorting_work("argsort", (3, 10 * tile), dtype).calls:
        assert all(arg.offset_bytes == 0 for arg in call.args if isinstance(arg, Scratch))
        assert call.shared_bytes <= 48 * 1024


def test_huge_shapes_stay_within_the_limits_of_a_grid() -> None:
    """On shapes alone: lines of 2**31 elements and more, 2**31 lines, and few of either."""
    for shape in ((2**31,), (2**33 + 1,), (2**31, 3), (2**26, 70), (7, 2**29), (2**20, 2**12)):
        for name in ("sort", "argsort"):
            work = sorting_work(name, shape, "float32")
            passes = max(0, (shape[-1] - 1).bit_length() - (sort_module.TILE - 1).bit_length())
            assert len(work.calls) == 1 + passes
            for call in work.calls:
                assert 1 <= call.blocks[0] < 2**31
                counted = {param.dtype for param in call.kernel.params if param.name in ("lines", "length", "width")}
                assert counted == {DTYPES["int64"]}


@pytest.mark.skipif(find_nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_it_compiles(arch: str) -> None:
    """Elements of every size, and positions in int32 and int64."""
    cases = [(dtype, (3, 5000)) for dtype in ("bool", "int8", "uint16", "float16", "bfloat16", "int32", "float64")]
    cases += [("float32", (2**20, 2**12))]
    works = [sorting_work(name, shape, dtype) for name in ("sort", "argsort") for dtype, shape in cases]
    kernels = kernels_of(works)
    assert len(kernels) == 4 * len(cases)
    done = compile_cubin(translation_unit(kernels), arch, ["--ptxas-options=-v"])
    assert all(kernel.name.encode() in done.cubin for kernel in kernels)
    assert "warning" not in done.log
    assert max(map(int, re.findall(r"Used (\d+) registers", done.log))) <= MAX_REGISTERS
    assert set(re.findall(r"(\d+) bytes spill stores", done.log)) == {"0"}
