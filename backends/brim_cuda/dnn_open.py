"""Whether cuDNN is used, and what is said where it is not: the variable BRIM_CUDNN, what is installed, a first try.

``BRIM_CUDNN`` is "auto" (used where it is there; the default), "0" (never) or "1" (an error where it cannot be used).
A plan for a card that is not there can ask cuDNN, too, where its libraries load: they need the NVIDIA driver's library
beside them, though no GPU, and brim must know the card's properties.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from brim.errors import DeviceError
from brim.spec import DTYPES
from brim_cuda import cublaslt
from brim_cuda.dnn import Cudnn, DnnTensor
from brim_cuda.dnn_conv import ConvRequest
from brim_cuda.requirements import about_cudnn, installed_packages

__all__ = ["CARDS", "Opened", "open_for_device", "open_for_profile", "wanted"]

_WAYS = {"auto": "auto", "": "auto", "0": "0", "off": "0", "no": "0", "false": "0", "1": "1", "on": "1", "yes": "1"}
Opened = tuple[Cudnn | None, str]
"""The library, None where it is not used, and one line about it."""

_H100 = {
    "maxGridSize": [2**31 - 1, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536,
    "multiProcessorCount": 132, "smCountOrigin": 0, "smClockRateKHz": 1980000, "memClockRateKHz": 2619000,
    "memoryBusWidth": 5120, "l2CacheSize": 50 << 20, "warpSize": 32, "maxSharedMemoryPerBlock": 48 << 10,
    "maxSharedMemoryPerBlockOptin": 227 << 10, "oversizedSharedMemoryPerBlock": 0,
    "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "pciDeviceId": 0, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "isTccDriver": 0, "supportCoopLaunch": 1, "deviceVer": 900,
    "driverVer": 13000, "cudaDeviceId": 0, "totalGlobalMem": 80 << 30, "deviceName": "NVIDIA H100 80GB HBM3",
}  # fmt: skip
CARDS: dict[str, tuple[int, dict[str, Any]]] = {"h100-80gb": (90, _H100)}
"""Profile -> compute capability and properties, as the frontend reads them. Source: NVIDIA's H100 data sheet and the
table of compute capability 9.0 in the CUDA C++ Programming Guide; written by hand, not read from a card."""

_SQUARE = DnnTensor((8, 8, 8, 8), (512, 1, 64, 8), DTYPES["float16"])
_WEIGHT = DnnTensor((8, 8, 1, 1), (8, 1, 8, 8), DTYPES["float16"])
_PROBE = ConvRequest("fprop", _SQUARE, _WEIGHT, _SQUARE, (1, 1), (0, 0), (1, 1))
"""What is tried, to see whether there are plans at all."""


def wanted(environ: Mapping[str, str] = os.environ) -> str:
    """ "auto", "0" or "1". Raises DeviceError for anything else."""
    said = environ.get("BRIM_CUDNN", "auto").strip().lower()
    if said not in _WAYS:
        raise DeviceError(f"BRIM_CUDNN is {said!r}; known are 0 (never), 1 (or an error) and auto (where it is there)")
    return _WAYS[said]


def _frontend(
    cuda_major: int | None, packages: Callable[[], Iterable[str]], import_module: Callable[[str], Any]
) -> tuple[Any, str]:
    """The frontend with a library of its own, or None and what is missing."""
    problem = about_cudnn(packages(), cuda_major)
    if problem:
        return None, problem
    try:
        module = import_module("cudnn")
        problem = about_cudnn(packages(), cuda_major, str(module.__version__))
        int(module.backend_version())
    except Exception as error:  # a broken wheel may raise anything
        text = " ".join(str(error).split())[:300]
        return None, f"cuDNN does not load: {text}. Reinstall it: `pip install --force-reinstall 'brim[cudnn12]'`"
    return (None, problem) if problem else (module, "")


def _refuse(way: str, problem: str) -> Opened:
    if way == "1":
        raise DeviceError(f"BRIM_CUDNN=1, but {problem}. Set BRIM_CUDNN=auto to go without")
    return None, f"not used: {problem}"


def open_for_device(
    cuda_major: int | None,
    *,
    environ: Mapping[str, str] = os.environ,
    packages: Callable[[], Iterable[str]] = installed_packages,
    import_module: Callable[[str], Any] = importlib.import_module,
) -> Opened:
    """cuDNN for the device that is current. Raises DeviceError where it was asked for and cannot be had.

    Arguments:
        cuda_major: of the CUDA that CuPy is built for.
    """
    way = wanted(environ)
    if way == "0":
        return None, "not used: BRIM_CUDNN=0"
    module, problem = _frontend(cuda_major, packages, import_module)
    if module is None:
        return _refuse(way, problem)
    try:
        library = Cudnn(module, handle=module.create_handle())
        return library, f"{library.version()} (frontend {module.__version__})"
    except Exception as error:
        return _refuse(way, f"cuDNN does not start: {' '.join(str(error).split())[:300]}")


def open_for_profile(
    profile: str,
    *,
    environ: Mapping[str, str] = os.environ,
    packages: Callable[[], Iterable[str]] = installed_packages,
    import_module: Callable[[str], Any] = importlib.import_module,
    load_library: Callable[[str], Any] = ctypes.CDLL,
) -> Opened:
    """cuDNN for plans alone, for a card of a profile. Raises DeviceError as ``open_for_device`` does."""
    way = wanted(environ)
    if way == "0":
        return None, "not used: BRIM_CUDNN=0"
    if profile not in CARDS:
        return _refuse(way, f"cuDNN is not asked for plans for {profile}, but for {', '.join(CARDS)} alone")
    try:
        load_library("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        cublaslt.load()  # the library ends the process where it does not find it
    except (OSError, DeviceError) as error:
        return _refuse(way, f"cuDNN makes no plans on this machine, libraries that it loads are missing: {error}")
    module, problem = _frontend(None, packages, import_module)
    if module is None:
        return _refuse(way, problem)
    sm_version, properties = CARDS[profile]
    try:
        described = module.create_device_properties(json.dumps(properties))
        library = Cudnn(module, properties=described, sm_version=sm_version)
        library.plan(_PROBE)
    except Exception as error:
        return _refuse(way, f"cuDNN makes no plans on this machine: {' '.join(str(error).split())[:200]}")
    return library, f"{library.version()} asked for plans without the card"
