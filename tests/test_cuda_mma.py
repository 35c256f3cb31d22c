"""Products on a warp's tensor cores, emulated: which lane holds what, against the layouts that NVIDIA documents.

The emulation and the wrappers in ``mma.cuh`` were written from the same reading of the PTX ISA, so a mistake in it
could cancel out: the emulated loads and the emulated product could agree with each other and not with a GPU. Therefore
each instruction is tested by itself: single lanes' registers are given and read here, and where they belong is taken
from CuTe's layouts of the same instructions (CUTLASS, include/cute/atom/mma_traits_sm80.hpp), which state them in
another form: strides over lane and value. Matrices are asymmetric and no two elements of one are alike.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from brim.spec import DTYPES
from brim_cuda.emulation import EmulationError, EmulationLoader, Guarded
from brim_cuda.launch import C_TYPES, Call, In, Kernel, Out, named_kernel, pointer
from brim_cuda.nvrtc import compile_ptx, find_nvrtc
from brim_cuda.source import translation_unit
from brim_cuda.steps import bound
from emulating import WHY_NOT

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")

U32, F32 = DTYPES["uint32"], DTYPES["float32"]
TYPES = ("float16", "bfloat16", "float32")
INCLUDES = ("scalar.cuh", "shared.cuh", "mma.cuh")
ROW_BYTES = 64
PITCH = ROW_BYTES + 16

Array = np.ndarray[Any, Any]
Axes = Sequence[tuple[int, int]]

# CuTe: (size, stride) of the axes of the lane (t first) and of the value, into the matrix read column by column:
# row + 16 * k for the left matrix, column + 8 * k for the right one, row + 16 * column for the sums.
CUTE: dict[str, dict[int, tuple[Axes, Axes]]] = {
    "left": {
        2: (((4, 32), (8, 1)), ((2, 16), (2, 8), (2, 128))),
        4: (((4, 16), (8, 1)), ((2, 8), (2, 64))),
    },
    "right": {
        2: (((4, 16), (8, 1)), ((2, 8), (2, 64))),
        4: (((4, 8), (8, 1)), ((2, 32),)),
    },
    "sums": dict.fromkeys((2, 4), (((4, 32), (8, 1)), ((2, 16), (2, 8)))),
}


def places(which: str, itemsize: int) -> Array:
    """(32, values): where in the matrix, column by column, each lane's values belong."""

    def along(axes: Axes) -> list[int]:
        counters = itertools.product(*(range(size) for size, _ in reversed(axes)))
        return [sum(n * step for n, (_, step) in zip(reversed(at), axes, strict=True)) for at in counters]

    lanes, values = (along(axes) for axes in CUTE[which][itemsize])
    return np.array(lanes)[:, None] + np.array(values)


def held(matrix: Array, which: str) -> Array:
    """(32, words): the registers of all lanes that hold a matrix."""
    values = matrix.T.reshape(-1)[places(which, matrix.dtype.itemsize)]
    return np.ascontiguousarray(values).view(np.uint32)


def numbers(shape: tuple[int, int], dtype: str) -> Array:
    """Whole numbers, each once, in no order; exact in every dtype (bfloat16 has 8 bits)."""
    found = np.random.default_rng(shape[0] * 100 + shape[1]).permutation(shape[0] * shape[1]) - 100
    return found.reshape(shape).astype(DTYPES[dtype])


def program(body: str, x: np.dtype[Any], y: np.dtype[Any]) -> Kernel:
    params = [pointer("x", x, const=True), pointer("y", y)]
    text = f"""extern "C" __global__ void NAME(PARAMS) {{
    const int lane = (int)threadIdx.x;
    DYN_SHARED(unsigned char, tile);
    {body}
}}
"""
    return named_kernel("tried", params, text, INCLUDES)


def run(kernel: Kernel, x: Array, out: Array, shared_bytes: int = 0, order: int = 17) -> Array:
    """What one warp of it writes."""
    loader = EmulationLoader(order=order)
    call = Call(kernel, (1,), (In(0), Out(0)), threads=32, shared_bytes=shared_bytes)
    given, found = Guarded(x), Guarded(out)
    bound(loader, [call], title="tried").run(found.array, given.array)
    found.check()
    return np.array(found.array)


def product(dtype: str) -> Kernel:
    body = f"""u32 a[4] = {{x[lane * 6], x[lane * 6 + 1], x[lane * 6 + 2], x[lane * 6 + 3]}};
    float sums[4] = {{y[lane * 4], y[lane * 4 + 1], y[lane * 4 + 2], y[lane * 4 + 3]}};
    WARP_PRODUCT({C_TYPES[DTYPES[dtype]]}, sums, a, x[lane * 6 + 4], x[lane * 6 + 5]);
    for (int n = 0; n < 4; ++n) y[lane * 4 + n] = sums[n];"""
    return program(body, U32, F32)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_of_registers_is_laid_out_as_documented(dtype: str) -> None:
    deep = 32 // DTYPES[dtype].itemsize
    left, right, sums = numbers((16, deep), dtype), numbers((deep, 8), dtype), numbers((16, 8), "float32")
    given = np.concatenate([held(left, "left"), held(right.T, "right")], axis=1)
    assert given.shape == (32, 6)
    found = run(product(dtype), given, held(sums, "sums").view(np.float32))
    want = sums + left.astype(np.float32) @ right.astype(np.float32)
    assert np.array_equal(found, want.T.reshape(-1)[places("sums", 4)])
    for other in (held(left.T.copy().reshape(16, deep), "left"), np.roll(held(left, "left"), 1, axis=1)):
        wrong = run(product(dtype), np.concatenate([other, given[:, 4:]], axis=1), held(sums, "sums").view(np.float32))
        assert not np.array_equal(wrong, found), "another order of operands gives another result"


def test_the_layouts_name_every_element_once() -> None:
    for which, by_size in CUTE.items():
        for size in by_size:
            assert sorted(places(which, size).reshape(-1)) == list(range(32 * places(which, size).shape[1]))


COPY_IN = f"""for (int n = lane; n < 32 * 4; n += 32)
        copy_later(tile + n / 4 * {PITCH} + n % 4 * 16, x + n * 4, 16);
    close_copies();
    await_copies<0>();
    __syncthreads();
    u32 words[4];"""


def loads(call: str) -> Kernel:
    return program(f"{COPY_IN}\n{call}\nfor (int n = 0; n < 4; ++n) y[lane * 4 + n] = words[n];", U32, U32)


def in_tile(dtype: str) -> Array:
    """32 rows of 64 bytes: the numbers of a tile, no two alike."""
    columns = ROW_BYTES // DTYPES[dtype].itemsize
    if dtype == "bfloat16":
        return np.arange(32 * columns, dtype=np.uint16).reshape(32, columns).view(DTYPES[dtype])
    return numbers((32, columns), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_operands_come_from_tiles_as_documented(dtype: str) -> None:
    """Left and right matrices at rows and columns that are not the first, read as rows and as columns of a tile."""
    tile, name = in_tile(dtype), C_TYPES[DTYPES[dtype]]
    size = tile.dtype.itemsize
    deep = 32 // size

    def loaded(call: str) -> Array:
        out = np.zeros((32, 4), np.uint32)
        return run(loads(call), np.ascontiguousarray(tile).view(np.uint32), out, 32 * PITCH)

    left = tile[16:32, deep : 2 * deep]
    assert np.array_equal(loaded(f"load_left<{name}, {PITCH}>(words, tile, 16, 32);"), held(left, "left"))
    found = loaded(f"load_columns<{name}, {PITCH}>(words, tile, 16, 32);")
    for n in range(2):  # column j of the right matrix is a row of the tile
        columns = tile[16 + 8 * n : 24 + 8 * n, deep : 2 * deep]
        assert np.array_equal(found[:, 2 * n : 2 * n + 2], held(columns, "right"))
    if size == 2:
        found = loaded(f"load_across<{name}, {PITCH}>(words, tile, 16, 16);")
        order = list(range(16))
    else:  # word t is row 2t, word t + 4 row 2t + 1: as the columns of results lie
        found = loaded(f"load_across<{name}, {PITCH}>(words, tile, 24, 0);")
        order = [0, 2, 4, 6, 1, 3, 5, 7]
    for n in range(2):
        rows = tile[16:32, 16 + 8 * n : 24 + 8 * n] if size == 2 else tile[24:32, 8 * n : 8 + 8 * n]
        assert np.array_equal(found[:, 2 * n : 2 * n + 2], held(np.ascontiguousarray(rows[order].T), "right"))


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_results_become_a_left_matrix(dtype: str) -> None:
    """sums (16, 16) as the left matrix of the next product, its rows in the order that ``load_across`` has."""
    name, size = C_TYPES[DTYPES[dtype]], DTYPES[dtype].itemsize
    sums = numbers((16, 16), dtype).astype(np.float32)
    halves = [held(np.ascontiguousarray(sums[:, n : n + 8]), "sums").view(np.float32) for n in (0, 8)]
    body = f"""float found[2][4];
    for (int n = 0; n < 8; ++n) found[n / 4][n % 4] = x[lane * 8 + n];
    u32 words[4];
    as_left<{name}>(words, found, {0 if size == 2 else 1});
    for (int n = 0; n < 4; ++n) y[lane * 4 + n] = words[n];"""
    found = run(program(body, F32, U32), np.concatenate(halves, axis=1), np.zeros((32, 4), np.uint32))
    want = sums if size == 2 else sums[:, [8, 10, 12, 14, 9, 11, 13, 15]]
    assert np.array_equal(found, held(np.ascontiguousarray(want).astype(DTYPES[dtype]), "left"))


@needs_compiler
def test_tf32_is_rounded_to_nearest_and_unrounded_operands_are_refused() -> None:
    x = np.array([1.0, 1 + 2**-11, 1 + 2**-11 + 2**-20, 1 + 2**-12, -1 - 2**-11, np.inf, np.nan, 3e38], np.float32)
    body = "if (lane < 8) y[lane] = __int_as_float((int)rounded_tf32(x[lane]));"
    found = run(program(body, F32, F32), x, np.zeros(8, np.float32))
    assert found[:6].tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, np.inf]
    assert np.isnan(found[6])
    assert abs(found[7] / 3e38 - 1) < 2**-11
    with pytest.raises(EmulationError, match="not rounded to TF32"):
        run(product("float32"), np.full((32, 6), 0x3F800001, np.uint32), np.zeros((32, 4), np.float32))


LATE = """copy_later(tile + lane * 16, x + lane * 4, 12);
    close_copies();
    copy_later(tile + 512 + lane * 16, x + lane * 4, 16);
    close_copies();
    {wait}
    __syncthreads();
    const u32* const found = (const u32*)tile;
    y[lane] = found[(lane + 7) % 32 * 4 + 2], y[32 + lane] = found[(lane + 7) % 32 * 4 + 3];
    y[64 + lane] = found[128 + (lane + 7) % 32 * 4 + 3];"""


@needs_compiler
def test_copies_are_there_when_they_were_waited_for_and_not_before() -> None:
    x = np.arange(128, dtype=np.uint32) + 1
    want = np.roll(x.reshape(32, 4), -7, axis=0)
    nothing = np.uint32(0xFFFFFFFF)
    for wait, first, second in (("await_copies<0>();", 1, 1), ("await_copies<1>();", 1, 0), ("", 0, 0)):
        found = run(program(LATE.format(wait=wait), U32, U32), x, np.zeros((3, 32), np.uint32), 1024)
        assert np.array_equal(found[0], want[:, 2] if first else np.full(32, nothing))
        assert np.array_equal(found[1], np.full(32, 0 if first else nothing)), "beyond 12 bytes there are zeros"
        assert np.array_equal(found[2], want[:, 3] if second else np.full(32, nothing))


@needs_compiler
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("copy_later(tile + lane * 8, x, 16);", "multiples of 16"),
        ("copy_later(tile + lane * 16, x + 1, 16);", "multiples of 16"),
        ("copy_later(y, x, 16);", "shared memory"),
        ("u32 w[4]; LOAD_MATRICES(false, w, tile + lane * 8);", "multiples of 16"),
        ("u32 w[4]; LOAD_MATRICES(false, w, x);", "shared memory"),
        ("u32 w[4]; if (lane < 30) LOAD_MATRICES(true, w, tile);", "divergent warp"),
        ("copy_later(tile + lane * 16, x + lane * 4, 16); await_copies<0>(); close_copies(); await_copies<0>();", None),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_do_is_refused(body: str, why: str | None) -> None:
    x, out = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    if why is None:
        run(program(body, U32, U32), x, out, 1024)
        return
    with pytest.raises(EmulationError, match=why):
        run(program(body, U32, U32), x, out, 1024)


def test_neighbouring_rows_of_tiles_fall_on_all_banks() -> None:
    for row_bytes in range(32, 257, 32):
        words = [(row * (row_bytes + 16) // 4 + word) % 32 for row in range(8) for word in range(4)]
        assert sorted(words) == list(range(32))
        across = [(2 * t * (row_bytes + 16) // 4 + g) % 32 for t in range(4) for g in range(8)]
        assert sorted(across) == list(range(32))


@needs_nvrtc
def test_the_compiler_is_given_the_instructions() -> None:
    text = translation_unit(
        [product(dtype) for dtype in TYPES] + [loads(f"load_left<f16, {PITCH}>(words, tile, 0, 0);")]
    )
    ptx = compile_ptx(text, "compute_80")
    for shape, dtype in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")):
        assert len(re.findall(rf"mma\.sync\.aligned\.{shape}\.row\.col\.f32\.{dtype}\.{dtype}\.f32", ptx)) == 1
    assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in ptx
    assert "cp.async.cg.shared.global" in ptx
