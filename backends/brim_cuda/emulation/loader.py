"""The loader for tests: kernels compiled by g++ with ``cuda_emulation.h`` and run on NumPy arrays."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from brim_cuda.cublaslt_host import HostCublasLt
from brim_cuda.dnn_host import HostCudnn
from brim_cuda.gemm_run import GemmRunner
from brim_cuda.launch import Kernel
from brim_cuda.source import translation_unit

__all__ = ["EmulationError", "EmulationLoader", "Recorded", "find_compiler"]

FOLDER = Path(__file__).parent
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
KERNELS_A_LIBRARY = 48
"""More kernels are compiled in several parts, side by side."""

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w",
         "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")  # fmt: skip


class EmulationError(RuntimeError):
    """A kernel that does not compile, diverges at a barrier or leaves its memory."""


def find_compiler() -> str | None:
    """The C++ compiler, or None: without it nothing can be emulated."""
    return shutil.which("g++")


def _folder() -> Path:
    """Where compiled kernels are kept from run to run; readable by this user only."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"brim-cuda-emulation-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != user or folder.is_symlink():
        return Path(tempfile.mkdtemp(prefix="brim-cuda-emulation-"))
    return folder


def _compiled(kernels: Sequence[Kernel]) -> Path:
    """A library with these kernels, compiled unless it was before; two processes that need it do so once."""
    exports = "\n".join(f"EMULATION_EXPORT({name})" for name in dict.fromkeys(k.name for k in kernels))
    text = f'#include "cuda_emulation.h"\n{translation_unit(kernels)}\n{exports}\n'
    headers = (header.read_text(encoding="utf-8") for header in HEADERS)
    key = hashlib.sha256("\0".join((*headers, text, *FLAGS)).encode()).hexdigest()[:32]
    target = _folder() / f"{key}.so"
    if target.exists():
        return target
    compiler = find_compiler()
    if compiler is None:
        raise EmulationError("kernels are emulated with g++, which was not found; install it")
    with tempfile.TemporaryDirectory(dir=target.parent) as work, open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            source, library = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
            source.write_text(text, encoding="utf-8")
            command = [compiler, *FLAGS, f"-I{FOLDER}", str(source), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise EmulationError(f"the kernels do not compile:\n{done.stderr[:4000]}")
            library.replace(target)  # whole or not at all
        Path(lock.name).unlink(missing_ok=True)  # who opened it before finds the library after waiting
    return target


class Recorded:
    """A launch that was captured: it runs with the arguments of then, unless others are given to it."""

    def __init__(self, run: Callable[[list[Any]], None], values: Sequence[Any]) -> None:
        self._run = run
        self.write(values)

    def write(self, values: Sequence[Any]) -> None:
        self.values = [np.array(value) for value in values]

    def __call__(self) -> None:
        self._run(self.values)


class EmulationLoader:
    """Functions that run kernels on NumPy arrays in this process, one launch at a time. Implements ``launch.Loader``.

    Attributes:
        order: in which order the threads of a block run between two barriers: 0 forward, 1 backward (blocks too),
            another number a shuffle.
        launches: how many kernels ran.
        library: what computes matrix products.
        dnn_library: what stands for cuDNN; None, as where it is not installed, unless it is set.
        recording: the list to which launches are added instead of running, inside ``record``.
    """

    def __init__(self, order: int = 0) -> None:
        self.order = order
        self.launches = 0
        self._functions: dict[Kernel, Any] = {}
        self._libraries: list[Any] = []
        self._lock = threading.Lock()
        self.library = HostCublasLt()
        self._gemm: GemmRunner | None = None
        self.dnn_library: HostCudnn | None = None
        self.recording: list[Callable[[], Any]] | None = None

    def functions(self, kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
        """Launchers of these kernels; those that are new are compiled together. Raises EmulationError."""
        new = [k for k in dict.fromkeys(kernels) if k not in self._functions]
        parts = [new[n : n + KERNELS_A_LIBRARY] for n in range(0, len(new), KERNELS_A_LIBRARY)]
        if len(parts) > 1:
            with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
                targets = list(workers.map(_compiled, parts))
        else:
            targets = [_compiled(part) for part in parts]
        for part, target in zip(parts, targets, strict=True):
            library = ctypes.CDLL(str(target))
            library.emulation_message.restype = ctypes.c_char_p
            library.emulation_fault_address.restype = ctypes.c_void_p
            for kernel in part:
                function = getattr(library, f"emulated_{kernel.name}")
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t]
                self._functions[kernel] = (function, library)
        return [partial(self._launch, k, *self._functions[k]) for k in kernels]

    def address(self, array: Any) -> int:
        """Address of the first element."""
        return int(array.__array_interface__["data"][0])

    def device(self) -> int:
        """There is one."""
        return 0

    def gemm(self) -> GemmRunner:
        """Products by the library's twin in NumPy."""
        if self._gemm is None:
            self._gemm = GemmRunner(self.library, self._zero)
        return self._gemm

    def open_dnn(self) -> str:
        """Nothing to do."""
        return "none" if self.dnn_library is None else self.dnn_library.version()

    def close_dnn(self) -> None:
        """Its twin is not used any more."""
        self.dnn_library = None

    def dnn(self) -> HostCudnn | None:
        """cuDNN's twin in NumPy, where it was set."""
        return self.dnn_library

    def _zero(self, address: int, nbytes: int, stream: int) -> None:
        run = partial(ctypes.memset, address, 0, nbytes)
        if self.recording is None:
            run()
        else:
            self.recording.append(run)

    @contextmanager
    def record(self) -> Iterator[list[Callable[[], Any]]]:
        """Nothing runs inside: what would have run is added to the list, as when a stream is captured."""
        entries: list[Callable[[], Any]] = []
        self._record_into(entries)
        try:
            yield entries
        finally:
            self._record_into(None)

    def _record_into(self, entries: list[Callable[[], Any]] | None) -> None:
        self.recording = self.library.recording = entries
        if self.dnn_library is not None:
            self.dnn_library.recording = entries

    def stream(self) -> int:
        """There is none: everything has happened when a call returns."""
        return 0

    def _launch(
        self,
        kernel: Kernel,
        function: Any,
        library: Any,
        blocks: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        packed: Sequence[Any],
    ) -> None:
        sizes = np.array([*(*blocks, 1, 1)[:3], threads, 1, 1], np.uint32)
        run = partial(self._execute, kernel, function, library, sizes, shared_bytes)
        if self.recording is None:
            run(packed)
        else:
            self.recording.append(Recorded(run, packed))

    def _execute(
        self, kernel: Kernel, function: Any, library: Any, sizes: Any, shared_bytes: int, packed: Sequence[Any]
    ) -> None:
        # Every argument in eight or more bytes of its own, as a driver's launch takes their addresses.
        places = [np.array(value) for value in packed]
        addresses = np.array([place.ctypes.data for place in places], np.uint64)
        with self._lock:
            self.launches += 1
            code = function(sizes.ctypes.data, addresses.ctypes.data, self.order, shared_bytes)
            if code == 0:
                return
            message = f"kernel {kernel.name}: {library.emulation_message().decode()}"
            if code == 2:
                message += _nearest(kernel, packed, library.emulation_fault_address() or 0)
        raise EmulationError(message)


def _nearest(kernel: Kernel, packed: Sequence[Any], address: int) -> str:
    """How far a fault lies from the start of the nearest array."""
    starts = {p.name: int(v) for p, v in zip(kernel.params, packed, strict=True) if p.is_pointer}
    if not starts:
        return f" (address {address:#x})"
    name = min(starts, key=lambda n: abs(address - starts[n]))
    return f" ({address - starts[name]:+d} bytes from the start of {name}, the nearest array)"
