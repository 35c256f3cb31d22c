"""What device "cuda" says when something is missing: every case told exactly, all with made-up facts; and the probe."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from brim.errors import DeviceError
from brim_cuda.requirements import Facts, missing, probe, require

COMPLETE = Facts(
    cupy_packages=("cupy-cuda12x",),
    cupy_version="14.2.0",
    build_version=12090,
    driver_found=True,
    driver_version=12040,
    device_count=1,
)


def test_a_complete_machine_lacks_nothing() -> None:
    assert missing(COMPLETE) is None
    assert require(COMPLETE) is COMPLETE


@pytest.mark.parametrize("driver_version", [12000, 12040, 12090, 13000, 13020])
def test_a_driver_runs_its_own_major_version_and_older_ones(driver_version: int) -> None:
    assert missing(replace(COMPLETE, driver_version=driver_version)) is None


CASES = {
    "no CuPy": (
        replace(COMPLETE, cupy_packages=(), cupy_version="", build_version=None, device_count=None),
        ["CuPy is not installed", "pip install 'brim[cuda12]'", "the driver runs CUDA up to 12.4"],
    ),
    "no CuPy, driver for 13": (
        replace(COMPLETE, cupy_packages=(), cupy_version="", build_version=None, driver_version=13000),
        ["CuPy is not installed", "pip install 'brim[cuda13]'", "the driver runs CUDA up to 13.0"],
    ),
    "no CuPy, no driver": (
        Facts(),
        ["CuPy is not installed", "pip install 'brim[cuda12]'", "or 'brim[cuda13]'", "NVIDIA driver must be there"],
    ),
    "two wheels": (
        replace(COMPLETE, cupy_packages=("cupy-cuda13x", "cupy-cuda12x")),
        [
            "cupy-cuda12x and cupy-cuda13x are both installed",
            "`pip uninstall cupy-cuda12x cupy-cuda13x`",
            "pip install 'brim[cuda12]'",
        ],
    ),
    "AMD": (
        replace(COMPLETE, cupy_packages=("cupy-rocm-7-0",)),
        ["is for AMD GPUs", "pip uninstall cupy-rocm-7-0", "pip install 'brim[cuda12]'"],
    ),
    "no driver": (
        replace(COMPLETE, driver_found=False, driver_version=None, device_count=None),
        ["no NVIDIA driver was found", "nvidia-smi", "--gpus all"],
    ),
    "old driver": (
        replace(COMPLETE, cupy_packages=("cupy-cuda13x",), build_version=13020, device_count=None),
        [
            "the NVIDIA driver runs CUDA up to 12.4",
            "(cupy-cuda13x) is built for CUDA 13.2",
            "580 or newer",
            "`pip uninstall cupy-cuda13x`",
            "`pip install 'brim[cuda12]'`",
        ],
    ),
    "old driver, CuPy not importable": (
        replace(COMPLETE, cupy_packages=("cupy-cuda13x",), build_version=None, cupy_version="", cupy_error="x"),
        ["the NVIDIA driver runs CUDA up to 12.4", "built for CUDA 13.0"],
    ),
    "very old driver": (
        replace(COMPLETE, driver_version=11040),
        ["the NVIDIA driver runs CUDA up to 11.4", "built for CUDA 12.9", "525 or newer"],
    ),
    "broken CuPy": (
        replace(COMPLETE, cupy_version="", build_version=None, cupy_error="libcudart.so.12: cannot open"),
        ["cupy-cuda12x) is installed but cannot be imported", "libcudart.so.12: cannot open", "--force-reinstall"],
    ),
    "old CuPy": (
        replace(COMPLETE, cupy_version="13.6.0"),
        ["CuPy 13.6.0 is too old, 14.1 or newer", "pip install -U 'brim[cuda12]'"],
    ),
    "no toolkit": (
        replace(COMPLETE, missing_libraries=("NVRTC", "cuBLASLt")),
        ["NVRTC, cuBLASLt", "pip install 'brim[cuda12]'", "cupy-cuda12x[ctk]", "CUDA_PATH to a CUDA 12 toolkit"],
    ),
    "no toolkit, 13": (
        replace(
            COMPLETE,
            cupy_packages=("cupy-cuda13x",),
            build_version=13020,
            driver_version=13020,
            missing_libraries=("cuBLASLt",),
        ),
        ["not found: cuBLASLt.", "pip install 'brim[cuda13]'", "cupy-cuda13x[ctk]", "CUDA 13 toolkit"],
    ),
    "no toolkit, conda": (
        replace(COMPLETE, cupy_packages=("cupy",), missing_libraries=("NVRTC",)),
        ["not found: NVRTC.", "conda install cuda-nvrtc"],
    ),
    "hidden GPUs": (
        replace(COMPLETE, device_count=0, visible_devices=""),
        ["sees no GPU", "CUDA_VISIBLE_DEVICES is ''"],
    ),
    "no GPU": (replace(COMPLETE, device_count=0), ["sees no GPU", "nvidia-smi"]),
    "CUDA fails": (
        replace(COMPLETE, device_count=None, device_error="cudaErrorUnknown: unknown error"),
        ["CUDA does not start: cudaErrorUnknown: unknown error"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_told_with_what_to_do(case: str) -> None:
    facts, expected = CASES[case]
    text = missing(facts)
    assert text is not None
    assert text.startswith("device 'cuda' cannot be used: ")
    assert text.endswith(".")
    for part in expected:
        assert part in text
    with pytest.raises(DeviceError) as caught:
        require(facts)
    assert str(caught.value) == text


def test_a_conda_install_is_not_told_to_put_a_wheel_beside_it() -> None:
    facts, _ = CASES["no toolkit, conda"]
    assert "pip install" not in str(missing(facts))


def test_messages_of_different_cases_differ() -> None:
    texts = [missing(facts) for facts, _ in CASES.values()]
    assert len(set(texts)) == len(texts)


# ---- the probe, with libraries that are not there ----


class CudaError(RuntimeError):
    """Stands for cupy.cuda.runtime.CUDARuntimeError."""


def fake_driver(version: int, code: int = 0) -> Any:
    def answer(number: Any) -> int:
        number._obj.value = version
        return code

    return lambda name: SimpleNamespace(cuDriverGetVersion=answer)


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


def fake_modules(devices: int | str = 1, absent: tuple[str, ...] = (), headers: str | None = "/include") -> Any:
    def count() -> int:
        if isinstance(devices, str):
            raise CudaError(devices)
        return devices

    def load(name: str) -> None:
        if name in absent:
            raise RuntimeError(f"no {name}")

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CudaError)
    cuda = SimpleNamespace(runtime=runtime, driver=SimpleNamespace(get_build_version=lambda: 12090))
    modules = {
        "cupy": SimpleNamespace(__version__="14.2.0", cuda=cuda),
        "cuda.pathfinder": SimpleNamespace(
            load_nvidia_dynamic_lib=load, find_nvidia_header_directory=lambda name: headers
        ),
    }

    def import_module(name: str) -> Any:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return modules[name]

    import_module.modules = modules  # type: ignore[attr-defined]
    return import_module


def test_the_probe_of_a_complete_machine() -> None:
    found = probe(
        packages=lambda: ["numpy", "CuPy_CUDA12x", "cupyx-helpers"],
        load_library=fake_driver(12040),
        import_module=fake_modules(),
        environ={},
    )
    assert found == COMPLETE


def test_the_probe_names_what_is_not_there() -> None:
    def probed(**changes: Any) -> Facts:
        arguments: dict[str, Any] = {
            "packages": lambda: ["cupy-cuda12x"],
            "load_library": fake_driver(12040),
            "import_module": fake_modules(),
            "environ": {},
        }
        return probe(**{**arguments, **changes})

    assert probed(load_library=no_library).driver_found is False
    assert probed(load_library=fake_driver(0, code=34)).driver_found is False, "the toolkit's stub is no driver"
    assert probed(load_library=fake_driver(0, code=999)).driver_version is None
    assert probed(import_module=fake_modules(absent=("nvrtc",))).missing_libraries == ("NVRTC",)
    assert probed(import_module=fake_modules(absent=("cublasLt",))).missing_libraries == ("cuBLASLt",)
    assert probed(import_module=fake_modules(headers=None)).missing_libraries == ("CUDA headers",)
    assert probed(import_module=fake_modules("cudaErrorNoDevice: no\n device")).device_error == (
        "cudaErrorNoDevice: no device"
    )
    assert probed(environ={"CUDA_VISIBLE_DEVICES": "7"}).visible_devices == "7"
    lost = fake_modules()
    del lost.modules["cuda.pathfinder"]
    assert probed(import_module=lost).missing_libraries == ("NVRTC", "cuBLASLt", "CUDA headers")
    broken = fake_modules()
    del broken.modules["cupy"]
    assert probed(import_module=broken).cupy_error == "No module named 'cupy'"
    assert probed(import_module=broken).cupy_version == ""


def test_two_wheels_are_seen_without_importing_either() -> None:
    def import_module(name: str) -> Any:
        raise AssertionError(f"{name} was imported")

    found = probe(
        packages=lambda: ["cupy-cuda12x", "cupy-cuda13x"],
        load_library=fake_driver(12040),
        import_module=import_module,
        environ={},
    )
    assert found.cupy_packages == ("cupy-cuda12x", "cupy-cuda13x")
    assert "both installed" in str(missing(found))


def test_this_machine_can_be_probed() -> None:
    found = probe()
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        assert not found.driver_found
        assert missing(found) is not None
    else:
        assert found.driver_found or found.driver_version is None


def test_the_package_imports_without_cupy() -> None:
    code = (
        "import sys; sys.modules['cupy'] = None; sys.modules['cuda'] = None\n"
        "import brim_cuda, brim_cuda.requirements, brim_cuda.providers, brim_cuda.vram, brim_cuda.cupy_runtime\n"
        "import brim_cuda.stray, brim_cuda.staging\n"
        "print(sorted(name for name in sys.modules if name.startswith('cupy') and sys.modules[name]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
