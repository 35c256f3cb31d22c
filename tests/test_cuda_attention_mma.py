"""Attention on tensor cores, emulated: against the body at the edges of tiles; and what NVRTC makes of its kernels."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import brim
from brim.nn import functional as F
from brim.op import REGISTRY
from brim.precision import float32_products
from brim.program.compile import plan, spec
from brim.spec import DTYPES, Spec
from brim_cuda.emulation import EmulationLoader
from brim_cuda.launch import Call, Kernel
from brim_cuda.nvrtc import compile_cubin, compile_ptx, find_nvrtc
from brim_cuda.registry import work_of
from brim_cuda.source import translation_unit
from emulated import device
from emulating import WHY_NOT, Recorded, emulated, kernels_of, same_bits
from test_cuda_attention import TIMES, both_ways, operands
from test_cuda_composites import close, works

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")

# T, S, E, D: one block and a part of one, tiles of 16, 32 and 64 rows, rows of 32 to 256 bytes.
SHAPES = (
    (1, 1, 1, 1), (7, 7, 4, 4), (64, 64, 64, 64), (65, 129, 32, 24), (130, 64, 16, 48), (9, 70, 128, 1),
    (70, 33, 80, 70), (66, 80, 96, 100), (50, 50, 112, 128),
)  # fmt: skip


def _calls() -> Iterator[Recorded]:
    for causal in (True, False):
        for sizes in SHAPES if causal else SHAPES[::2]:
            yield from both_ways(*operands(sizes, "float16", lead=()), causal=causal)
        yield from both_ways(*operands((70, 40, 20, 20), "float16", lead=(2, 1, 3)), causal=causal)
        yield from both_ways(*operands((80, 70, 64, 64), "bfloat16", lead=()), causal=causal)
        for sizes in ((65, 70, 32, 24), (40, 64, 64, 64)):
            yield from both_ways(*operands(sizes, lead=()), causal=causal, tf32=True)


@cache
def mma_calls() -> tuple[Recorded, ...]:
    """Calls of attention and its gradient that tensor cores compute, with tiles of every size."""
    return tuple(_calls())


@cache
def loader_of(order: int) -> EmulationLoader:
    """A loader with all kernels, compiled together; ``order`` is that of the threads of a block."""
    made = EmulationLoader(order=order)
    made.functions(kernels_of(works(mma_calls())))
    return made


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 17], ids=["forward", "backward", "shuffled"])
def test_kernels_equal_the_bodies_and_the_order_of_threads_does_not_matter(order: int) -> None:
    for one in mma_calls()[:: 1 if order == 17 else 3]:
        found = emulated(loader_of(order), one)
        # TF32 has the digits of float16.
        close(found, one, TIMES[one.ins[0].dtype.name] if "tf32" not in one.params else 1000.0)
        if order:
            assert all(map(same_bits, found, emulated(loader_of(0), one))), str(one)


@needs_compiler
def test_what_a_query_does_not_see_in_other_tiles_does_not_touch_it() -> None:
    """Tiles beyond the diagonal are not looked at. In its own tile, what is not seen is multiplied by 0."""
    _, q, k, v = operands((200, 200, 8, 8), "float16", lead=())
    how: dict[str, Any] = {"causal": True, "scale": 0.3}
    clean = both_ways(q, q, k, v, **how)[0]
    first = emulated(loader_of(17), clean)
    k[128:], v[128:] = np.nan, np.nan
    found = emulated(loader_of(17), Recorded(clean.op, clean.ins, clean.outs, clean.params, (q, k, v), ()))
    assert all(same_bits(one[:128], other[:128]) for one, other in zip(found, first, strict=True))
    assert np.isnan(found[0][128:]).all()


# ---------------------------------------------------------------------------------------------- which kernel, and what


def launches(dtype: str, numbers: int, *, causal: bool = True, scale: float = 0.1, **how: Any) -> list[Call]:
    """Forward and backward; with `p`, weights dropped."""
    x = Spec((2, 3, 200, numbers), DTYPES[dtype])
    how = {"causal": causal, "scale": scale, **how}
    logs = Spec(x.shape[:-1])
    name, draw = ("attention_dropout", [0, 0]) if "p" in how else ("attention", [])
    forward = work_of(REGISTRY[name], [x, x, x, *draw], [x, logs], how)
    backward = work_of(REGISTRY[f"{name}_grad"], [x, x, x, x, x, logs, *draw], [x, x, x], how)
    return [*forward.calls, *backward.calls]  # type: ignore[list-item]


def _products(kernel: Kernel) -> int:
    return len(re.findall(r"mma\.sync", compile_ptx(translation_unit([kernel]), "compute_80")))


def test_half_width_takes_the_tensor_cores_and_float32_in_full_does_not() -> None:
    for numbers, on_them in ((64, True), (65, False)):
        found = launches("float32", numbers, tf32=True)[0]
        assert ("_mma_" in found.kernel.name) == on_them
    for dtype, scale, on_them in (
        ("float16", 0.1, True), ("bfloat16", 0.1, True), ("float32", 0.1, False),
        ("float16", -0.1, False), ("float16", 0.0, False), ("bfloat16", float("inf"), False),
    ):  # fmt: skip
        names = [call.kernel.name for call in launches(dtype, 64, scale=scale)]
        assert [("_mma_" in name) for name in names] == [on_them, False, on_them, on_them], (dtype, scale)


@pytest.mark.emulated
def test_the_precision_of_float32_products_is_that_of_attention() -> None:
    x = spec((2, 9, 4))
    for name, wanted in (("full", False), ("tf32", True)):
        with float32_products(name):
            (program,) = plan(lambda q: F.scaled_dot_product_attention(q, q, q), x, device=device()).programs
        params = [one.params for one in program.prepared.program.instructions if one.op.name == "attention"]
        assert [one.get("tf32", False) for one in params] == [wanted]
    given = [operands((40, 40, 16, 16))[n] for n in (1, 2, 3)]
    found = []
    for name in ("full", "tf32"):
        with float32_products(name):
            found.append(F.scaled_dot_product_attention(*(brim.asarray(a, device=device()) for a in given)).numpy())
    assert 1e-6 < np.abs(found[0] - found[1]).max() < 1e-2


@needs_nvrtc
def test_the_compiler_is_given_products_for_tensor_cores() -> None:
    for dtype in ("float16", "bfloat16"):
        forward, _, queries, keys = launches(dtype, 64)
        # 64 numbers are 4 products deep: of 64 keys at a time, of 2 x 16, or twice.
        assert _products(forward.kernel) == 4 * 8 + 4 * 8
        assert _products(queries.kernel) == 2 * 4 * 2 + 8
        assert _products(keys.kernel) == 2 * 4 * 2 + 2 * 8
    assert _products(launches("float32", 64)[0].kernel) == 0
    assert _products(launches("float32", 64, tf32=True)[0].kernel) == 8 * 4 + 4 * 8


def _opcodes(cubin: bytes) -> list[int]:
    """The lowest 12 bits of every instruction (16 bytes) in the sections of code of an ELF file."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + n * size) for n in range(count)]
    names = cubin[headers[names_at][4] :]
    return [
        struct.unpack_from("<H", cubin, at)[0] & 0xFFF
        for name, _, _, _, offset, length in headers
        if names[name:].startswith(b".text.")
        for at in range(offset, offset + length, 16)
    ]


HMMA, LDSM, LDGSTS = 0x23C, 0x83B, 0xFAE
"""As disassemblers name them on sm_80 and sm_90: products, loads of matrices, copies from global to shared memory."""


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_has_the_instructions_of_tensor_cores(arch: str) -> None:
    for dtype, how, products in (("bfloat16", {}, 64), ("float32", {"tf32": True}, 64), ("float32", {}, 0)):
        kernel = launches(dtype, 64, **how)[0].kernel
        found = _opcodes(compile_cubin(translation_unit([kernel]), arch).cubin)
        assert len(found) > 1000
        assert found.count(HMMA) == products, dtype
        assert (found.count(LDSM) > 20) == (found.count(LDGSTS) > 5) == (products > 0)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_registers_are_spilled(arch: str) -> None:
    calls = [
        call
        for numbers in (64, 128)
        for call in launches("float16", numbers, causal=numbers == 64)
        if "_mma_" in call.kernel.name
    ]
    calls += [call for call in launches("float32", 64, tf32=True) if "_mma_" in call.kernel.name]
    log = compile_cubin(translation_unit([call.kernel for call in calls]), arch, ["--ptxas-options=-v"]).log
    used = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(used) == len(calls)
    assert max(used) <= 255
    assert {int(n) for n in re.findall(r"(\d+) bytes spill", log)} == {0}


@needs_nvrtc
def test_older_gpus_get_the_kernels_without_tensor_cores() -> None:
    kernel = launches("float16", 64)[0].kernel
    ptx = compile_ptx(translation_unit([kernel]), "compute_75")
    assert "mma.sync" not in ptx
    assert "cp.async" not in ptx
    assert len(re.findall(r"fma\.rn\.f32", ptx)) > 8
