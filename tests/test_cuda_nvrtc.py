"""Every CUDA kernel compiles for the GPUs that brim is meant for: NVRTC alone, no driver and no GPU."""

from __future__ import annotations

import re

import pytest

from brim.check.table import TESTED_ELSEWHERE
from brim.op import REGISTRY
from brim.spec import DTYPES, Spec
from brim_cuda import nvrtc
from brim_cuda.launch import named_kernel, pointer
from brim_cuda.nvrtc import NvrtcError, compile_cubin, compile_ptx, find_nvrtc, nvrtc_version
from brim_cuda.registry import KERNELS, work_of
from brim_cuda.source import translation_unit
from cuda_kernels import (
    MAX_REGISTERS,
    REGISTERS_OF_BLOCK,
    Compilation,
    by_origin,
    calls_by_origin,
    most_registers,
)
from emulating import kernels_of, recorded
from test_cuda_attention import attention_calls
from test_cuda_attention_dropout import dropout_calls
from test_cuda_composites import composite_calls
from test_cuda_together import calls as together_calls

needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
MAX_SPILL_BYTES = 16


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_compiles(arch: str) -> None:
    launched = calls_by_origin()
    kernels = [kernel for group in by_origin(launched).values() for kernel in group]
    together = together_calls().values()
    calls = (*recorded(), *composite_calls(), *attention_calls(), *dropout_calls(), *together)
    called = {one.op.name for one in calls if one.work() is not None}
    assert called >= set(KERNELS) - set(TESTED_ELSEWHERE)
    made = Compilation(kernels, arch)
    assert made.cubin.startswith(b"\x7fELF")
    assert all(kernel.name.encode() in made.cubin for kernel in kernels)
    assert len(made.registers) == len(kernels)
    ceilings = {kernel.name: most_registers(kernel) for kernel in kernels}
    assert sorted(made.names) == sorted(ceilings)
    assert not [name for name, used in zip(made.names, made.registers, strict=True) if used > ceilings[name]]
    used = dict(zip(made.names, made.registers, strict=True))
    for call in (call for group in launched.values() for call in group):
        # Registers are given to warps, eight to each thread at a time.
        together = -(-used[call.kernel.name] // 8) * 8 * -(-call.threads // 32) * 32
        assert together <= REGISTERS_OF_BLOCK, f"{call.kernel.name}: {together} registers for {call.threads} threads"
        stated = re.search(r"__launch_bounds__\((\d+)", call.kernel.source)
        assert stated is None or call.threads <= int(stated[1]), f"{call.kernel.name}: {call.threads} threads"
        assert stated is not None or call.threads <= 256, f"{call.kernel.name} states no launch bounds"
    of_attention = {f"attention{part}{kind}" for part in ("", "_grad_queries", "_grad_keys") for kind in ("", "_mma")}
    assert {name.rpartition("_")[0] for name, most in ceilings.items() if most > MAX_REGISTERS} == of_attention
    assert max(made.spill_bytes) <= MAX_SPILL_BYTES
    assert "warning" not in made.log


@needs_nvrtc
@pytest.mark.parametrize(("dtype", "loads"), [("float32", "v4"), ("float64", "v2"), ("bfloat16", "v4")])
def test_dense_arrays_are_read_and_written_in_pieces_of_16_bytes(dtype: str, loads: str) -> None:
    specs = [Spec((1000,), DTYPES[dtype])] * 2
    work = work_of(REGISTRY["add"], specs, specs[:1], {})
    ptx = compile_ptx(translation_unit(kernels_of([work])), "compute_80")
    kind = {"float32": "[fbu]32", "float64": "[fbu]64", "bfloat16": "[bu](32|16)"}[dtype]
    assert len(re.findall(rf"ld\.global\S*\.{loads}\.{kind}", ptx)) >= 2
    assert len(re.findall(rf"st\.global\S*\.{loads}\.{kind}", ptx)) >= 1
    assert "fma" not in ptx, "a contracted product would round otherwise than the CPU"
    assert ".ftz" not in ptx


def small(body: str) -> str:
    params = [pointer("x", DTYPES["float32"])]
    kernel = named_kernel("small", params, f'extern "C" __global__ void NAME(PARAMS) {{ {body} }}\n', ("scalar.cuh",))
    return translation_unit([kernel])


@needs_nvrtc
def test_errors_name_the_file_and_line() -> None:
    assert nvrtc_version() >= (12, 0)
    assert compile_cubin(small("x[0] = s::exp(x[1]);"), "sm_90").log == ""
    with pytest.raises(NvrtcError, match=r"(?s)refuses the kernels for sm_90.*small_\w+\(1\): error.*nonsense"):
        compile_cubin(small("nonsense;"), "sm_90")
    with pytest.raises(NvrtcError, match="sm_1"):
        compile_cubin(small(""), "sm_1")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: None)
    nvrtc._library.cache_clear()
    with pytest.raises(NvrtcError, match="pip install nvidia-cuda-nvrtc-cu12"):
        compile_cubin("", "sm_90")
    nvrtc._library.cache_clear()
