"""What the CUDA backend needs of this machine, and exactly what to do about the first thing that is missing.

``probe`` collects facts without creating a CUDA context; ``missing`` turns facts into a message and touches nothing, so
that every case can be tried on any machine.

Sources: CuPy 14 installation guide (one wheel per CUDA version, the extra ``[ctk]``); CUDA compatibility guide (a
driver runs every toolkit of its own major version, and older ones).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any

from brim.errors import DeviceError

__all__ = ["Facts", "about_cudnn", "installed_packages", "missing", "probe", "require"]

_OLDEST_CUPY = (14, 1)
_FRONTENDS = ((1, 23), (1, 29))  # the oldest that was tried, and the first that needs packages of its own
_OLDEST_DRIVER = {12: "525", 13: "580"}  # CUDA major version -> branch of the driver that first ran it
_STUB_LIBRARY = 34  # CUDA_ERROR_STUB_LIBRARY: what the toolkit's libcuda for linking answers


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found on this machine. Versions of CUDA are 1000 x major + 10 x minor, as CUDA itself writes them.

    Attributes:
        cupy_packages: installed packages that bring ``import cupy``, e.g. ("cupy-cuda12x",).
        cupy_version: of the imported CuPy, "" where it could not be imported.
        cupy_error: why it could not be imported.
        build_version: of the CUDA that CuPy was built for, None if unknown.
        driver_found: whether the NVIDIA driver's library is there.
        driver_version: the newest CUDA that the driver runs, None if it did not say.
        device_count: number of GPUs that this process sees, None if unknown.
        device_error: what CUDA said instead of a number.
        visible_devices: the variable CUDA_VISIBLE_DEVICES, None where it is not set.
        missing_libraries: those of NVRTC, cuBLASLt and the CUDA headers that were not found.
    """

    cupy_packages: tuple[str, ...] = ()
    cupy_version: str = ""
    cupy_error: str = ""
    build_version: int | None = None
    driver_found: bool = False
    driver_version: int | None = None
    device_count: int | None = None
    device_error: str = ""
    visible_devices: str | None = None
    missing_libraries: tuple[str, ...] = ()


def missing(facts: Facts) -> str | None:
    """The first thing that device "cuda" lacks and what to do about it; None when everything is there."""
    for look in (_about_packages, _about_driver, _about_cupy, _about_libraries, _about_devices):
        text = look(facts)
        if text is not None:
            return f"device 'cuda' cannot be used: {text}"
    return None


def require(facts: Facts | None = None) -> Facts:
    """The facts of this machine (or those given). Raises DeviceError with the text of ``missing``."""
    found = probe() if facts is None else facts
    text = missing(found)
    if text is not None:
        raise DeviceError(text)
    return found


# ---- the messages ----------------------------------------------------------------------------------------------------


def _about_packages(facts: Facts) -> str | None:
    packages = sorted(facts.cupy_packages)
    extra = _extra_for_driver(facts)
    if len(packages) > 1:
        # The wheels overwrite each other's files, and removing one deletes files of the other: so all go first.
        return (
            f"{' and '.join(packages)} are both installed, and overwrite each other's files. Remove both with "
            f"`pip uninstall {' '.join(packages)}`, then install one: `pip install 'brim[{extra}]'`"
            f"{_why_extra(facts)}."
        )
    if not packages:
        return (
            f"CuPy is not installed. Install it with `pip install 'brim[{extra}]'`{_why_extra(facts)}; "
            "it brings the CUDA libraries, only an NVIDIA driver must be there already."
        )
    if packages[0].startswith("cupy-rocm"):
        return (
            f"the installed CuPy ({packages[0]}) is for AMD GPUs. Replace it: `pip uninstall {packages[0]}`, then "
            f"`pip install 'brim[{extra}]'`{_why_extra(facts)}."
        )
    return None


def _about_driver(facts: Facts) -> str | None:
    if not facts.driver_found:
        return (
            "no NVIDIA driver was found (its library libcuda.so.1, on Windows nvcuda.dll, could not be loaded). "
            "Install the driver of your GPU so that `nvidia-smi` works; in a container, start it with access to the "
            "GPU (`docker run --gpus all`, with the NVIDIA Container Toolkit on the host)."
        )
    build = facts.build_version if facts.build_version is not None else _build_of_package(facts)
    if facts.driver_version is not None and build is not None and facts.driver_version // 1000 < build // 1000:
        major, package = build // 1000, facts.cupy_packages[0]
        branch = f" ({_OLDEST_DRIVER[major]} or newer)" if major in _OLDEST_DRIVER else ""
        text = (
            f"the NVIDIA driver runs CUDA up to {_version(facts.driver_version)}, but the installed CuPy ({package}) "
            f"is built for CUDA {_version(build)}. Update the driver{branch}"
        )
        other = facts.driver_version // 1000
        if other in _OLDEST_DRIVER:
            text += f", or take the CuPy for this one: `pip uninstall {package}`, `pip install 'brim[cuda{other}]'`"
        return f"{text}."
    return None


def _about_cupy(facts: Facts) -> str | None:
    package = facts.cupy_packages[0]
    extra = _extra_of_package(facts)
    if not facts.cupy_version:
        reason = facts.cupy_error or "no reason given"
        return (
            f"CuPy ({package}) is installed but cannot be imported: {reason}. Reinstall it: "
            f"`pip install --force-reinstall 'brim[{extra}]'`."
        )
    numbers = tuple(int(part) for part in re.findall(r"\d+", facts.cupy_version)[:2])
    if numbers < _OLDEST_CUPY:
        needed = ".".join(map(str, _OLDEST_CUPY))
        return f"CuPy {facts.cupy_version} is too old, {needed} or newer is needed: `pip install -U 'brim[{extra}]'`."
    return None


def _about_libraries(facts: Facts) -> str | None:
    if not facts.missing_libraries:
        return None
    package, extra = facts.cupy_packages[0], _extra_of_package(facts)
    if package == "cupy":  # from conda or from source: a wheel beside it would break both
        how = "with the tool that installed CuPy (conda: `conda install cuda-nvrtc cuda-cudart-dev libcublas`)"
    else:
        how = f"with `pip install 'brim[{extra}]'` (that is {package}[ctk])"
    return (
        f"parts of the CUDA toolkit were not found: {', '.join(facts.missing_libraries)}. Install them {how}, "
        f"or set CUDA_PATH to a CUDA {extra.removeprefix('cuda')} toolkit."
    )


def _about_devices(facts: Facts) -> str | None:
    if facts.device_count:
        return None
    visible = facts.visible_devices
    if visible is not None:
        hint = f"CUDA_VISIBLE_DEVICES is {visible!r}: take it out of the environment, or name a GPU that is there"
    else:
        hint = "see whether `nvidia-smi` lists one"
    if facts.device_error:
        return f"CUDA does not start: {facts.device_error}; {hint}."
    return f"the NVIDIA driver is there, but this process sees no GPU; {hint}."


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _build_of_package(facts: Facts) -> int | None:
    """The CUDA version that a wheel's name promises, for a CuPy that could not be asked."""
    found = re.fullmatch(r"cupy-cuda(\d+)x", facts.cupy_packages[0])
    return 1000 * int(found[1]) if found else None


def _extra_of_package(facts: Facts) -> str:
    """The extra of brim that brings the installed CuPy."""
    build = facts.build_version if facts.build_version is not None else _build_of_package(facts)
    return f"cuda{build // 1000}" if build is not None and build // 1000 in _OLDEST_DRIVER else _extra_for_driver(facts)


def _extra_for_driver(facts: Facts) -> str:
    """The extra to recommend: the newest CUDA that the driver runs; 12 where there is no driver to ask."""
    if facts.driver_version is None:
        return "cuda12"
    return f"cuda{max((major for major in _OLDEST_DRIVER if major <= facts.driver_version // 1000), default=12)}"


def _why_extra(facts: Facts) -> str:
    if facts.driver_version is None:
        return " (or 'brim[cuda13]' with a driver of version 580 or newer)"
    return f" (the driver runs CUDA up to {_version(facts.driver_version)})"


def about_cudnn(names: Iterable[str], cuda_major: int | None, frontend_version: str = "") -> str | None:
    """What keeps brim from using cuDNN and what to do about it; None where nothing does, as far as packages tell.

    Arguments:
        names: of the installed packages.
        cuda_major: of the CUDA that CuPy is built for, None if unknown.
        frontend_version: of the imported frontend, "" where it was not.
    """
    found = {_normalised(name) for name in names}
    libraries = sorted(found & {f"nvidia-cudnn-cu{major}" for major in _OLDEST_DRIVER})
    extra = f"cudnn{cuda_major if cuda_major in _OLDEST_DRIVER else 12}"
    if len(libraries) > 1:
        return (
            f"{' and '.join(libraries)} are both installed, and overwrite each other's files: remove both with "
            f"`pip uninstall {' '.join(libraries)}`, then `pip install 'brim[{extra}]'`"
        )
    if "nvidia-cudnn-frontend" not in found:
        return f"nvidia-cudnn-frontend is not installed: `pip install 'brim[{extra}]'`"
    if libraries and cuda_major in _OLDEST_DRIVER and libraries[0] != f"nvidia-cudnn-cu{cuda_major}":
        return (
            f"{libraries[0]} is installed beside a CuPy for CUDA {cuda_major}: `pip uninstall {libraries[0]}`, then "
            f"`pip install 'brim[{extra}]'`"
        )
    numbers = tuple(int(part) for part in re.findall(r"\d+", frontend_version)[:2])
    oldest, too_new = _FRONTENDS
    if numbers and not oldest <= numbers < too_new:
        return (
            f"nvidia-cudnn-frontend {frontend_version} is installed, brim works with {_version_of(oldest)} up to, not "
            f"including, {_version_of(too_new)}: `pip install 'brim[{extra}]'`"
        )
    return None


def _version_of(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


# ---- the facts -------------------------------------------------------------------------------------------------------


def probe(
    *,
    packages: Callable[[], Iterable[str]] | None = None,
    load_library: Callable[[str], Any] = ctypes.CDLL,
    import_module: Callable[[str], Any] = importlib.import_module,
    environ: Mapping[str, str] = os.environ,
) -> Facts:
    """The facts of this machine. Creates no CUDA context; imports CuPy where exactly one is installed.

    Arguments:
        packages: gives the names of all installed packages.
        load_library: loads a shared library by name or raises OSError.
        import_module: imports a module by name or raises ImportError.
        environ: the environment variables.
    """
    names = installed_packages() if packages is None else packages()
    cupy_packages = tuple(sorted({name for name in map(_normalised, names) if _brings_cupy(name)}))
    driver_found, driver_version = _probe_driver(load_library)
    version = error = device_error = ""
    build = count = None
    libraries: tuple[str, ...] = ()
    if len(cupy_packages) == 1:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what CuPy warns of on import is said here, and better
                cupy = import_module("cupy")
            version = str(cupy.__version__)
            build = int(cupy.cuda.driver.get_build_version()) or None
        except Exception as problem:  # a broken wheel may raise anything
            error = _one_line(problem)
        if version:
            libraries = _probe_libraries(import_module)
            if driver_found:
                try:
                    count = int(cupy.cuda.runtime.getDeviceCount())
                except cupy.cuda.runtime.CUDARuntimeError as problem:
                    device_error = _one_line(problem)
    return Facts(
        cupy_packages,
        version,
        error,
        build,
        driver_found,
        driver_version,
        count,
        device_error,
        environ.get("CUDA_VISIBLE_DEVICES"),
        libraries,
    )


def installed_packages() -> list[str]:
    """Names of all installed packages."""
    return [str(found.metadata["Name"] or "") for found in distributions()]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _brings_cupy(name: str) -> bool:
    return name == "cupy" or re.fullmatch(r"cupy-(cuda|rocm)[\dx-]+", name) is not None


def _probe_driver(load_library: Callable[[str], Any]) -> tuple[bool, int | None]:
    """Whether the driver is there, and its version; cuDriverGetVersion needs no cuInit."""
    try:
        library = load_library("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False, None
    number = ctypes.c_int(0)
    code = library.cuDriverGetVersion(ctypes.byref(number))
    if code == _STUB_LIBRARY:
        return False, None
    return True, number.value if code == 0 and number.value > 0 else None


def _probe_libraries(import_module: Callable[[str], Any]) -> tuple[str, ...]:
    """What is missing of the toolkit, looked for as CuPy does: wheels, conda, the system, CUDA_PATH."""
    try:
        pathfinder = import_module("cuda.pathfinder")
    except ImportError:
        return ("NVRTC", "cuBLASLt", "CUDA headers")  # CuPy 14 itself finds none without it
    lacking = []
    for title, name in (("NVRTC", "nvrtc"), ("cuBLASLt", "cublasLt")):
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except Exception:  # RuntimeError or OSError, depending on what is broken
            lacking.append(title)
    if pathfinder.find_nvidia_header_directory("cudart") is None:
        lacking.append("CUDA headers")
    return tuple(lacking)


def _one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= 300 else f"{text[:299]}…"
