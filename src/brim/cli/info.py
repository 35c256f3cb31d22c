"""``brim info``: what this machine and this installation offer, and what is missing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import brim
from brim.device import available_backends, device
from brim.errors import BrimError
from brim.memory.host import read_host_memory
from brim.program.profiles import PROFILES
from brim.units import format_bytes

__all__ = ["run"]

_PACKAGES = ("numpy", "ml_dtypes", "opt_einsum", "safetensors", "psutil", "rich", "cyclopts", "pooch", "cupy", "cudnn")
_DISTRIBUTIONS = {"cudnn": "nvidia-cudnn-frontend"}
_EXTRAS = {
    "pooch": "downloads of data sets: pip install 'brim[data]'",
    "cupy": "NVIDIA GPUs: pip install 'brim[cuda12]' or 'brim[cuda13]' (as the driver allows)",
    "cudnn": "faster convolutions and attention on NVIDIA GPUs: pip install 'brim[cudnn12]' or 'brim[cudnn13]'",
}


def run() -> int:
    """Print; returns the exit code."""
    print(f"brim      {brim.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"packages  {', '.join(f'{name} {_version(name)}' for name in _PACKAGES if find_spec(name))}")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"threads   {brim.get_threads()} of brim, {_cpus()} processors for this process; OMP_NUM_THREADS {threads}")
    host = read_host_memory()
    most, available = format_bytes(host.limit_bytes), format_bytes(host.available_bytes)
    print(f"memory    {most} at most ({host.tightest[0]}), {available} available without swap")
    print(f"native    {_native()}")
    for kind in sorted(available_backends()):
        try:
            found = device(kind)
        except (BrimError, ImportError) as error:
            print(f"device    {kind}: not usable here: {str(error).removeprefix(f'device {kind!r} cannot be used: ')}")
            continue
        limit = found.memory.limit_bytes
        print(f"device    {found}: budget {found.memory.budget}{'' if limit is None else f' = {format_bytes(limit)}'}")
        told = getattr(found.backend, "facts", None)
        if told is not None and "cudnn" in (said := told(found.index)):
            print(f"          cuDNN: {said['cudnn']}")
    print(f"profiles  brim plan --device-profile {', '.join(PROFILES)}")
    for name, how in _EXTRAS.items():
        if find_spec(name) is None:
            print(f"missing   {name}, for {how}")
    return 0


def _version(name: str) -> str:
    try:
        return version(_DISTRIBUTIONS.get(name, name))
    except PackageNotFoundError:
        return "(version unknown)"


def _native() -> str:
    """What the CPU backend says about its compiled kernels."""
    told = getattr(device("cpu").backend, "native_status", None)
    return "none" if told is None else str(told())


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
