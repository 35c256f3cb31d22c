"""The emulation of CUDA kernels catches what a GPU would not forgive; the launch layer refuses untyped arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from brim.spec import DTYPES
from brim_cuda import gpu
from brim_cuda.emulation import EmulationError, EmulationLoader, Guarded
from brim_cuda.launch import Call, In, Kernel, Out, Param, named_kernel, pack, pointer
from brim_cuda.steps import bound
from emulating import WHY_NOT

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
F32, I32 = DTYPES["float32"], DTYPES["int32"]
INCLUDES = ("scalar.cuh", "shared.cuh")
THREADS = 128


def made(body: str) -> Kernel:
    """A kernel with an input x, an output y (both float32) and a number n."""
    params = [pointer("x", F32, const=True), pointer("y", F32), Param("n", I32)]
    return named_kernel("tried", params, f'extern "C" __global__ void NAME(PARAMS) {{ {body} }}\n', INCLUDES)


def tree(barrier: str = "__syncthreads();") -> str:
    return f"""
    DYN_SHARED(float, part);
    const int me = threadIdx.x;
    part[me] = me < n ? x[me] : 0.0f;
    {barrier}
    for (int half = {THREADS // 2}; half > 0; half /= 2) {{
        if (me < half) part[me] += part[me + half];
        __syncthreads();
    }}
    if (me == 0) y[0] = part[0];
"""


GOOD = {
    "tree": tree(),
    "warps": """
    float v = threadIdx.x < n ? x[threadIdx.x] : 0.0f;
    for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    DYN_SHARED(float, part);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f;
        for (int o = 16; o > 0; o /= 2) v += __shfl_down_sync(0xffffffffu, v, o);
        if (threadIdx.x == 0) y[0] = v;
    }
""",
    "atomics": """
    if (threadIdx.x == 0) y[0] = 0.0f;
    __syncthreads();
    if (threadIdx.x < n) atomicAdd(y, x[threadIdx.x]);
""",
    "votes": """
    const unsigned lanes = __ballot_sync(0xffffffffu, threadIdx.x < n);
    DYN_SHARED(int, counts);
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = __popc(lanes);
    const int any = __syncthreads_or(threadIdx.x == 77);
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (int i = 0; i < n; ++i) total += x[i];
        y[0] = counts[0] + counts[1] + counts[2] + counts[3] == n && any ? total : -1.0f;
    }
""",
}
BAD = {
    "barrier in a branch": ("if (threadIdx.x < 50) __syncthreads();", "not reached by every thread"),
    "two barriers": (
        "if (threadIdx.x < 50)\n __syncthreads();\n else\n __syncthreads();",
        "not reached by every thread",
    ),
    "thread that left": ("if (threadIdx.x == 3) return;\n __syncthreads();", "not reached by every thread"),
    "half a warp": ("if (threadIdx.x < 16) y[0] = __shfl_sync(0xffffffffu, 1.0f, 0);", "divergent warp"),
    "shuffle and barrier": (
        "float v = 0.0f;\n if (threadIdx.x < 7)\n v = __shfl_xor_sync(0xffffffffu, v, 1);\n else __syncthreads();",
        "divergent warp",
    ),
    "not in its mask": ("if (threadIdx.x < 4) y[0] = __shfl_sync(0x1u, 1.0f, 0);", "not in its own mask"),
    "read past the end": ("y[0] = x[n + threadIdx.x];", r"outside of its memory.*\+512 bytes from the start of x"),
    "write past the end": ("y[threadIdx.x] = 0.0f;", "outside of its memory by thread"),
    "too little shared memory": ("DYN_SHARED(float, s); s[threadIdx.x + 1] = 1.0f;", "outside of its memory"),
    "division": ("y[0] = (float)(7 / (n - n));", "division by zero"),
    "misaligned": ("y[0] = ((const Pack<float, 4>*)(x + 1))->v[0];", "misaligned access by thread"),
}


def run(kernel: Kernel, order: int = 0, x: Any = None) -> np.ndarray[Any, Any]:
    """The kernel on 128 numbers and one result, 512 bytes of shared memory."""
    given = Guarded(np.arange(THREADS, dtype=np.float32) if x is None else x)
    result = Guarded(np.full(1, np.nan, np.float32))
    call = Call(kernel, (1,), (In(0), Out(0), I32.type(THREADS)), THREADS, 4 * THREADS)
    bound(EmulationLoader(order), [call]).run(result.array, given.array)
    given.check()
    result.check()
    return result.array


@needs_compiler
@pytest.mark.parametrize("name", GOOD)
def test_right_kernels_give_the_sum_in_any_order(name: str) -> None:
    for order in (0, 1, 7):
        assert run(made(GOOD[name]), order).tolist() == [THREADS * (THREADS - 1) / 2]


@needs_compiler
def test_a_missing_barrier_shows() -> None:
    racy = made(tree(barrier=""))
    wrong = [float(run(racy, order)[0]) != THREADS * (THREADS - 1) / 2 for order in (0, 1, 7)]
    assert sum(wrong) >= 2


@needs_compiler
@pytest.mark.parametrize("name", BAD)
def test_wrong_kernels_are_caught(name: str) -> None:
    body, message = BAD[name]
    kernel = made(body)
    with pytest.raises(EmulationError, match=f"(?s){kernel.name}: .*{message}"):
        run(kernel)
    assert run(made(GOOD["tree"])).tolist() == [8128.0], "the emulation works on after a failure"


@needs_compiler
def test_writes_beside_an_array_are_found_afterwards() -> None:
    kernel = made("if (threadIdx.x == 0) y[-3] = 1.0f;")
    with pytest.raises(MemoryError, match="wrote up to 12 bytes before its array of 4 bytes"):
        run(kernel)
    with pytest.raises(MemoryError, match="wrote up to 12 bytes after its array of 4 bytes"):
        run(made("if (threadIdx.x == 0) { y[0] = 0.0f; y[3] = 1.0f; }"))


@needs_compiler
def test_static_shared_memory_and_nonsense_do_not_compile() -> None:
    with pytest.raises(EmulationError, match="use_DYN_SHARED"):
        run(made("__shared__ float part[32]; part[0] = 1.0f;"))
    with pytest.raises(EmulationError, match=r"tried_.*nonsense"):
        run(made("nonsense;"))


@needs_compiler
def test_grids_blocks_and_structs() -> None:
    struct = np.dtype([("base", I32), ("step", I32, (2,))])
    params = [pointer("y", I32), Param("where", struct, ctype="Place")]
    text = """struct Place { int base, step[2]; };
extern "C" __global__ void NAME(PARAMS) {
    const int at = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    y[at * blockDim.x + threadIdx.x] = where.base + where.step[0] * at + where.step[1] * (int)threadIdx.x;
}
"""
    kernel = named_kernel("placed", params, text, ("scalar.cuh",))
    place = np.array((5, (100, 1)), struct)
    out = np.zeros((24, 3), np.int32)
    for order in (0, 1, 3):
        out[...] = 0
        bound(EmulationLoader(order), [Call(kernel, (2, 3, 4), (Out(0), place), 3)]).run(out)
        np.testing.assert_array_equal(out, 5 + 100 * np.arange(24)[:, None] + np.arange(3))


def test_guarded_copies_keep_values_and_strides() -> None:
    x = np.arange(60.0).reshape(6, 10)
    for view in (x, x.T, x[::-2, 1::3], x[3:3], x[2, 5:6].reshape(())):
        guarded = Guarded(view)
        np.testing.assert_array_equal(guarded.array, view)
        assert guarded.array.shape == view.shape
        assert guarded.array.strides == view.strides or view.size == 0
        first, last = guarded.bounds
        assert first % 16 == 0
        low, high = np.lib.array_utils.byte_bounds(view)
        assert last - first == (high - low if view.size else 0)


# ----------------------------------------------------------------------------------------------------- typed arguments


def test_numbers_are_packed_by_their_declared_type() -> None:
    def param(name: str) -> Param:
        return Param("p", DTYPES[name])

    for name, value in (("float32", 0.1), ("int32", -3), ("uint64", 2**64 - 1), ("bool", True), ("float64", 2)):
        packed = pack(param(name), value)
        assert packed.dtype == DTYPES[name]
        assert packed == DTYPES[name].type(value)
    assert pack(param("bfloat16"), 1.5).tobytes() == ml_dtypes.bfloat16(1.5).tobytes()
    assert pack(param("float16"), np.float16(2)).nbytes == 2
    for name, value in (("int32", 1.0), ("int64", True), ("float32", np.float64(1)), ("float32", "1"), ("bool", 1)):
        with pytest.raises(TypeError, match="parameter p is"):
            pack(param(name), value)
    with pytest.raises(OverflowError):
        pack(param("int32"), 2**31)
    with pytest.raises(TypeError, match="is a pointer"):
        pack(pointer("x", F32), 1234)
    with pytest.raises(TypeError, match="is a struct"):
        pack(Param("s", np.dtype([("a", I32)]), ctype="S"), 1)


@needs_compiler
def test_arrays_of_another_dtype_and_missing_arguments_are_refused() -> None:
    kernel = made("y[0] = x[0];")
    good = bound(EmulationLoader(), [Call(kernel, (1,), (In(0), Out(0), 1), 1)])
    y = np.zeros(1, np.float32)
    good.run(y, np.ones(1, np.float32))
    assert y[0] == 1
    with pytest.raises(TypeError, match="pointer to float32, got an array of float64"):
        good.run(y, np.ones(1))
    with pytest.raises(TypeError, match="takes 3 arguments, got 2"):
        bound(EmulationLoader(), [Call(kernel, (1,), (In(0), Out(0)))])
    with pytest.raises(TypeError, match="parameter n is int32, got float"):
        bound(EmulationLoader(), [Call(kernel, (1,), (In(0), Out(0), 1.0), 1)]).run(y, y)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    kernel = made("y[0] = 1.0f + 41.0f; /* not compiled before */")
    with pytest.raises(EmulationError, match=r"g\+\+, which was not found"):
        EmulationLoader().functions([kernel])


def test_importing_the_backend_does_not_load_cupy() -> None:
    code = "import sys, brim_cuda.gpu, brim_cuda.registry, brim_cuda.nvrtc; print('cupy' in sys.modules)"
    path = os.pathsep.join([*map(str, Path(gpu.__file__).parents[1:2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.stdout.split() == ["False"], done.stderr
