"""The loader for a GPU: kernels compiled by ``brim_cuda.nvrtc``, loaded and launched through CuPy."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from brim_cuda import cublaslt, dnn_open
from brim_cuda.cubins import compile_many, units
from brim_cuda.dnn import Cudnn
from brim_cuda.gemm_run import GemmRunner
from brim_cuda.launch import Kernel, check_launch
from brim_cuda.lowlevel import OUT_OF_MEMORY, LowLevelError
from brim_cuda.nvrtc import NvrtcError, nvrtc_version, supported_archs
from brim_cuda.source import translation_unit

__all__ = ["CupyLoader"]

_REFUSED_CODE = (200, 209, 218, 221, 222, 223)
"""CUDA_ERROR_INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, JIT_COMPILER_NOT_FOUND, UNSUPPORTED_PTX_VERSION and
JIT_COMPILATION_DISABLED: the driver cannot use what the compiler made."""


class CupyLoader:
    """Functions on the current device of CuPy; launches go to CuPy's current stream. Implements ``launch.Loader``.

    Arguments:
        cupy: the module; by default it is imported at the first use, so that plans need none.
    """

    def __init__(self, cupy: Any = None) -> None:
        self._given = cupy
        self._functions: dict[tuple[int, Kernel], Any] = {}
        self._lock = threading.Lock()
        self._gemms: dict[int, GemmRunner] = {}
        self._dnns: dict[int, Cudnn] = {}
        self._asked: set[int] = set()  # devices on which cuDNN was looked for

    @cached_property
    def _cupy(self) -> Any:
        return self._given or importlib.import_module("cupy")

    def functions(self, kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
        """Launchers of these kernels; those that are new are compiled together, for this device's architecture.

        Raises:
            NvrtcError: NVRTC is missing, refuses a kernel, or makes nothing that this device runs.
            LowLevelError: CUDA refuses anything else.
        """
        with self._lock, self._translating("loading kernels"):
            device = self._cupy.cuda.Device()
            new = [k for k in dict.fromkeys(kernels) if (device.id, k) not in self._functions]
            if new:
                self._load(device.id, device.compute_capability, new)
        return [partial(self._launch, k.name, self._functions[device.id, k]) for k in kernels]

    def _load(self, index: int, capability: str, kernels: Sequence[Kernel]) -> None:
        arch = _arch_for(capability)
        groups = units(kernels)
        for group, code in zip(groups, compile_many(list(map(translation_unit, groups)), arch), strict=True):
            module = self._cupy.cuda.function.Module()
            try:
                module.load(code)
            except self._errors as error:
                if getattr(error, "status", 0) in _REFUSED_CODE:
                    raise NvrtcError(_refusal(capability, arch, error)) from error
                raise
            self._functions.update({(index, k): module.get_function(k.name) for k in group})

    @cached_property
    def _errors(self) -> tuple[type[Exception], ...]:
        cuda = self._cupy.cuda
        return (cuda.driver.CUDADriverError, cuda.runtime.CUDARuntimeError, cuda.memory.OutOfMemoryError)

    @contextmanager
    def _translating(self, doing: str) -> Iterator[None]:
        """CuPy's errors become LowLevelError."""
        try:
            yield
        except self._errors as error:
            raise _translated(error, doing) from error

    def _launch(
        self,
        name: str,
        function: Any,
        blocks: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        packed: Sequence[Any],
    ) -> None:
        check_launch(name, blocks, threads, shared_bytes)
        try:
            # CuPy passes NumPy scalars by their own size, and an array of one element (a struct) by value.
            function(blocks, (threads,), packed, shared_mem=shared_bytes)
        except self._errors as error:
            raise _translated(error, f"launching kernel {name}") from error

    def address(self, array: Any) -> int:
        """Address on the device."""
        return int(array.data.ptr)

    def device(self) -> int:
        """The thread's current device."""
        try:
            return int(self._cupy.cuda.runtime.getDevice())
        except self._errors as error:
            raise _translated(error, "asking for the current device") from error

    def gemm(self) -> GemmRunner:
        """cuBLASLt, with a handle for the current device."""
        index = self.device()
        if index not in self._gemms:
            self._gemms[index] = GemmRunner(cublaslt.load(), self._zero)
        return self._gemms[index]

    def open_dnn(self) -> str:
        """cuDNN with a handle for the current device, if it is wanted and there."""
        build = int(self._cupy.cuda.driver.get_build_version())
        self._asked.add(self.device())
        library, status = dnn_open.open_for_device(build // 1000 or None)
        if library is not None:
            self._dnns[self.device()] = library
        return status

    def close_dnn(self) -> None:
        """Plans are made without it."""
        self._dnns.pop(self.device(), None)

    def dnn(self) -> Cudnn | None:
        """Of the current device if that was started, else of another: plans are made before a device is chosen."""
        if not self._dnns:
            return None
        device = self.device()
        return self._dnns.get(device) if device in self._asked else next(iter(self._dnns.values()))

    def stream(self) -> int:
        """CuPy's current stream."""
        return int(self._cupy.cuda.get_current_stream().ptr)

    def _zero(self, address: int, nbytes: int, stream: int) -> None:
        try:
            self._cupy.cuda.runtime.memsetAsync(address, 0, nbytes, stream)
        except self._errors as error:
            raise _translated(error, "setting memory to zero") from error


def _arch_for(capability: str) -> str:
    """What is compiled for a device: machine code, or PTX for the newest architecture that NVRTC knows below it.

    Arguments:
        capability: as CuPy writes it: "90" for 9.0, "120" for 12.0.
    """
    number, known = int(capability), supported_archs()
    if number in known:
        return f"sm_{number}"
    older = [arch for arch in known if arch < number]
    if older:
        return f"compute_{max(older)}"  # the driver compiles it for the device
    advice = f"Take older CUDA libraries: {_instead('13', '12')}" if nvrtc_version()[0] > 12 else "The GPU is too old"
    raise NvrtcError(
        f"the installed {_nvrtc()} compiles for GPUs of compute capability {_dotted(min(known))} and newer, this one "
        f"has {_dotted(number)}. {advice}"
    )


def _refusal(capability: str, arch: str, error: Exception) -> str:
    """What is said when the driver cannot use what the compiler made."""
    major = nvrtc_version()[0]
    if arch.startswith("sm_"):
        other = f", or take older CUDA libraries: {_instead('13', '12')}" if major > 12 else ""
        return f"the NVIDIA driver does not take what {_nvrtc()} makes for {arch}: {error}. Update the driver{other}"
    advice = _instead("12", "13") if major < 13 else "`pip install -U nvidia-cuda-nvrtc`"
    return (
        f"the installed {_nvrtc()} is older than this GPU (compute capability {_dotted(int(capability))}), and the "
        f"NVIDIA driver does not take its code for {arch}: {error}. Take newer CUDA libraries: {advice}"
    )


def _nvrtc() -> str:
    return "NVRTC {}.{}".format(*nvrtc_version())


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _instead(old: str, new: str) -> str:
    return f"`pip uninstall cupy-cuda{old}x`, then `pip install 'brim[cuda{new}]'`"


def _translated(error: Exception, doing: str) -> LowLevelError:
    # The exception of CuPy's pool has no number.
    code = OUT_OF_MEMORY if isinstance(error, MemoryError) else int(getattr(error, "status", 0))
    return LowLevelError(f"{error} (while {doing})", code)
