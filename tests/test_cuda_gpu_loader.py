"""The loader for a GPU with a stand-in for CuPy: what it compiles, loads and launches, and how failures are told."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from brim.errors import DeviceError
from brim.op import REGISTRY
from brim.spec import DTYPES, Spec
from brim_cuda import gpu
from brim_cuda.cubins import UNIT_KERNELS
from brim_cuda.gpu import CupyLoader
from brim_cuda.launch import Call, In, Kernel, Out, Param, Scratch, named_kernel, pointer
from brim_cuda.lowlevel import OUT_OF_MEMORY, LowLevelError
from brim_cuda.nvrtc import NvrtcError
from brim_cuda.registry import bind
from brim_cuda.steps import Steps, bound, load


class DriverError(RuntimeError):
    """As ``CUDADriverError``: a text and a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"CUDA_ERROR_{status}: words of the driver")
        self.status = status


class RuntimeFailure(DriverError):
    """As ``CUDARuntimeError``."""


class PoolFailure(MemoryError):
    """As ``OutOfMemoryError``: no status."""


@dataclass
class Launch:
    """What a kernel was launched with; ``passed`` are the bytes of each argument, as CuPy hands them to the driver."""

    device: int
    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    passed: list[bytes]
    shared_bytes: int


@dataclass
class StandIn:
    """The module ``cupy``, as far as the loader uses it.

    Attributes:
        device: index of the current one.
        capability: of all devices.
        load_failure, launch_failure, device_failure: raised by these calls, None for none.
        loaded: (device, code) of each module.
        launches: in order.
    """

    device: int = 0
    capability: str = "90"
    load_failure: Exception | None = None
    launch_failure: Exception | None = None
    device_failure: Exception | None = None
    loaded: list[tuple[int, bytes]] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cuda = SimpleNamespace(
            Device=self._device,
            function=SimpleNamespace(Module=lambda: _Module(self)),
            driver=SimpleNamespace(CUDADriverError=DriverError),
            runtime=SimpleNamespace(CUDARuntimeError=RuntimeFailure, getDevice=lambda: self.device),
            memory=SimpleNamespace(OutOfMemoryError=PoolFailure),
        )

    def _device(self) -> Any:
        if self.device_failure is not None:
            raise self.device_failure
        return SimpleNamespace(id=self.device, compute_capability=self.capability)


class _Module:
    def __init__(self, owner: StandIn) -> None:
        self.owner = owner
        self.code: bytes | None = None

    def load(self, code: bytes) -> None:
        assert type(code) is bytes
        if self.owner.load_failure is not None:
            raise self.owner.load_failure
        self.code = code
        self.owner.loaded.append((self.owner.device, code))

    def get_function(self, name: str) -> Callable[..., None]:
        assert self.code is not None
        if name.encode() not in self.code:
            raise DriverError(500)
        return lambda *args, **named: _call(self.owner, name, *args, **named)


def _call(
    owner: StandIn,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: Sequence[Any],
    shared_mem: int = 0,
    stream: Any = None,
) -> None:
    assert type(grid) is tuple
    assert type(block) is tuple
    assert stream is None, "CuPy takes the current one"
    if owner.launch_failure is not None:
        raise owner.launch_failure
    passed = []
    for value in args:  # CuPy 14: NumPy scalars by their own size, arrays of one element by value, else by Python type
        assert isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1), value
        assert value.dtype.kind in "biufV"
        passed.append(value.tobytes())
    owner.launches.append(Launch(owner.device, name, grid, block, passed, shared_mem))


@pytest.fixture
def cupy() -> StandIn:
    return StandIn()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """NVRTC 12.9 that knows three architectures and gives the text as code; (architecture, texts) of each call."""
    calls: list[tuple[str, int]] = []

    def compile_many(texts: Sequence[str], arch: str) -> list[bytes]:
        calls.append((arch, len(texts)))
        if any("nonsense" in text for text in texts):
            raise NvrtcError(f"NVRTC refuses the kernels for {arch}: nonsense")
        return [f"{arch}\n{text}".encode() for text in texts]

    monkeypatch.setattr(gpu, "compile_many", compile_many)
    monkeypatch.setattr(gpu, "supported_archs", lambda: (75, 80, 90))
    monkeypatch.setattr(gpu, "nvrtc_version", lambda: (12, 9))
    return calls


def small(number: int = 0, body: str = "", params: Sequence[Param] = ()) -> Kernel:
    return named_kernel("small", params, f'extern "C" __global__ void NAME(PARAMS) {{ {body} /* {number} */ }}\n', ())


# ---- compiling and loading -------------------------------------------------------------------------------------------


def test_kernels_are_compiled_once_for_each_device(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    loader = CupyLoader(cupy)
    kernels = [small(n) for n in range(3)]
    assert len(loader.functions([kernels[0], kernels[1], kernels[0]])) == 3
    assert compiled == [("sm_90", 1)]
    loader.functions(kernels[:2])
    assert len(compiled) == 1
    loader.functions(kernels)
    assert len(compiled) == 2
    assert loader.functions([]) == []
    cupy.device, cupy.capability = 1, "80"
    functions = loader.functions(kernels)
    assert compiled[2:] == [("sm_80", 1)]
    functions[2]((1,), 32, 0, [])
    cupy.device = 0
    loader.functions(kernels)[2]((1,), 32, 0, [])
    assert [launch.name for launch in cupy.launches] == [kernels[2].name] * 2
    assert [device for device, _ in cupy.loaded] == [0, 0, 1]


def test_many_kernels_come_in_several_modules(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    kernels = [small(n) for n in range(2 * UNIT_KERNELS + 1)]
    functions = CupyLoader(cupy).functions(kernels)
    assert compiled == [("sm_90", 3)]
    for function in functions:
        function((1,), 32, 0, [])
    assert [launch.name for launch in cupy.launches] == [kernel.name for kernel in kernels]


def test_threads_that_want_the_same_kernel_compile_it_once(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    loader = CupyLoader(cupy)
    together = threading.Barrier(4)
    got: list[Any] = []

    def work() -> None:
        together.wait()
        got.extend(loader.functions([small()]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert compiled == [("sm_90", 1)]


def test_a_kernel_that_does_not_compile_leaves_the_others(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    loader = CupyLoader(cupy)
    with pytest.raises(NvrtcError, match="refuses the kernels for sm_90"):
        loader.functions([small(), small(body="nonsense")])
    assert not cupy.loaded
    loader.functions([small()])
    assert len(cupy.loaded) == 1


# ---- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "arch"),
    [("75", "sm_75"), ("90", "sm_90"), ("86", "compute_80"), ("100", "compute_90"), ("120", "compute_90")],
)
def test_a_gpu_that_the_compiler_does_not_know_gets_ptx(
    cupy: StandIn, compiled: list[tuple[str, int]], capability: str, arch: str
) -> None:
    cupy.capability = capability
    (function,) = CupyLoader(cupy).functions([small()])
    function((1,), 32, 0, [])
    assert compiled == [(arch, 1)]
    assert cupy.loaded[0][1].startswith(arch.encode())


@pytest.mark.parametrize(
    ("version", "advice"),
    [((12, 9), r"pip uninstall cupy-cuda12x`, then `pip install 'brim\[cuda13\]'"), ((13, 1), "nvidia-cuda-nvrtc")],
)
def test_a_driver_that_refuses_the_ptx_leads_to_newer_libraries(
    cupy: StandIn,
    compiled: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, int],
    advice: str,
) -> None:
    monkeypatch.setattr(gpu, "nvrtc_version", lambda: version)
    cupy.capability, cupy.load_failure = "120", DriverError(222)
    words = rf"NVRTC {version[0]}\.{version[1]} is older .*capability 12\.0.*compute_90.*CUDA_ERROR_222.*{advice}"
    with pytest.raises(NvrtcError, match=words):
        CupyLoader(cupy).functions([small()])


@pytest.mark.parametrize(
    ("version", "advice"), [((12, 9), "The GPU is too old"), ((13, 0), r"cupy-cuda13x`.*brim\[cuda12\]")]
)
def test_a_gpu_that_is_too_old_leads_to_older_libraries(
    cupy: StandIn,
    compiled: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, int],
    advice: str,
) -> None:
    monkeypatch.setattr(gpu, "nvrtc_version", lambda: version)
    cupy.capability = "61"
    with pytest.raises(NvrtcError, match=rf"capability 7\.5 and newer, this one has 6\.1.*{advice}"):
        CupyLoader(cupy).functions([small()])
    assert not compiled


def test_a_driver_that_refuses_machine_code_is_to_be_updated(
    cupy: StandIn, compiled: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy.load_failure = DriverError(209)
    with pytest.raises(NvrtcError, match=r"what NVRTC 12\.9 makes for sm_90: CUDA_ERROR_209.*Update the driver$"):
        CupyLoader(cupy).functions([small()])
    monkeypatch.setattr(gpu, "nvrtc_version", lambda: (13, 0))
    with pytest.raises(NvrtcError, match=r"Update the driver, or take older.*brim\[cuda12\]"):
        CupyLoader(cupy).functions([small()])


# ---- launching -------------------------------------------------------------------------------------------------------


class OnDevice(np.ndarray[Any, Any]):
    """A NumPy array with the address where CuPy has it."""

    @property
    def data(self) -> Any:  # type: ignore[override]  # as in CuPy
        return SimpleNamespace(ptr=int(self.__array_interface__["data"][0]))


def test_arguments_are_passed_in_their_declared_types(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    struct = np.dtype([("n", "i4"), ("steps", "i8", (3,))], align=True)
    names = ("bool", "uint8", "int32", "int64", "uint64", "float32", "float64", "float16", "bfloat16")
    params = [pointer("x", DTYPES["float32"]), *(Param(f"n_{name}", DTYPES[name]) for name in names)]
    kernel = small(params=[*params, Param("s", struct, ctype="S")])
    value = np.zeros((), struct)
    value["n"], value["steps"] = 7, (1, -2, 3)
    x = np.zeros(2, np.float32).view(OnDevice)
    call = Call(kernel, (4, 2), (x, True, *[3] * 8, value), threads=64, shared_bytes=1024)
    Steps(CupyLoader(cupy), [call], "a test").run(())
    (launch,) = cupy.launches
    assert (launch.grid, launch.block, launch.shared_bytes) == ((4, 2), (64,), 1024)
    numbers = [DTYPES[name].type(1 if name == "bool" else 3).tobytes() for name in names]
    assert launch.passed == [np.uint64(x.data.ptr).tobytes(), *numbers, value.tobytes()]


def test_places_count_in_elements_and_cupy_is_imported_at_the_first_use(
    cupy: StandIn, compiled: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = CupyLoader()
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]  # that is the point
    kernel = small(
        params=[pointer("x", DTYPES["float32"]), pointer("y", DTYPES["float64"]), pointer("z", DTYPES["int64"])]
    )
    x, y = np.zeros(8, np.float32).view(OnDevice), np.zeros(8).view(OnDevice)
    scratch = np.zeros(64, np.uint8).view(OnDevice)
    kernels = bound(loader, [Call(kernel, (1,), (In(0, 2), Out(0, 3), Scratch(16)))], scratch_bytes=64)
    kernels.run(y, x, scratch=scratch)
    (launch,) = cupy.launches
    starts = [x.data.ptr + 2 * 4, y.data.ptr + 3 * 8, scratch.data.ptr + 16]
    assert launch.passed == [np.uint64(start).tobytes() for start in starts]


def test_an_op_is_launched_on_its_arrays(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    spec = Spec((1000,), DTYPES["float32"])
    arrays = [np.zeros(1000, np.float32).view(OnDevice) for _ in range(3)]
    kernel = bind(CupyLoader(cupy), REGISTRY["add"], [spec, spec], [spec], {})
    kernel.run(arrays[0], arrays[1], arrays[2])
    assert kernel.prepare is not None
    for launch in kernel.prepare(arrays[0], arrays[1], arrays[2]) or ():
        launch()
    first, second = cupy.launches
    assert first == second
    for array in arrays:
        assert np.uint64(array.data.ptr).tobytes() in first.passed


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes"),
    [((1,), 1025, 0), ((1,), 32, 48 * 1024 + 4), ((1, 65536), 32, 0), ((1, 1, 65536), 32, 0), ((2**31,), 32, 0)],
)
def test_more_than_a_gpu_takes_is_refused_with_the_limits(
    cupy: StandIn, compiled: list[tuple[str, int]], blocks: tuple[int, ...], threads: int, shared_bytes: int
) -> None:
    kernel = small()
    (function,) = CupyLoader(cupy).functions([kernel])
    function((2**31 - 1, 65535, 65535), 1024, 48 * 1024, [])
    with pytest.raises(ValueError, match=rf"{kernel.name} asks for .*65535.*1024 and 49152 at most"):
        function(blocks, threads, shared_bytes, [])
    assert len(cupy.launches) == 1


# ---- failures --------------------------------------------------------------------------------------------------------

FAILURES = [(DriverError(719), 719), (RuntimeFailure(700), 700), (PoolFailure("out"), OUT_OF_MEMORY)]


@pytest.mark.parametrize(("failure", "code"), FAILURES, ids=["driver", "runtime", "pool"])
def test_failures_of_cupy_have_their_code_and_text(
    cupy: StandIn, compiled: list[tuple[str, int]], failure: Exception, code: int
) -> None:
    loader, kernel = CupyLoader(cupy), small()
    (function,) = loader.functions([kernel])
    cupy.launch_failure = failure
    with pytest.raises(LowLevelError, match=f"launching kernel {kernel.name}") as caught:
        function((1,), 32, 0, [])
    assert str(failure) in str(caught.value)
    assert caught.value.code == code
    assert caught.value.__cause__ is failure
    cupy.launch_failure, cupy.load_failure = None, failure
    with pytest.raises(LowLevelError, match="loading kernels") as caught:
        loader.functions([small(1)])
    assert caught.value.code == code
    cupy.load_failure, cupy.device_failure = None, failure
    with pytest.raises(LowLevelError) as caught:
        loader.functions([small(1)])
    assert caught.value.code == code
    cupy.device_failure = None
    loader.functions([small(1)])[0]((1,), 32, 0, [])
    assert len(cupy.launches) == 1


def test_a_fault_of_brim_itself_is_not_taken_for_one_of_the_device(
    cupy: StandIn, compiled: list[tuple[str, int]]
) -> None:
    (function,) = CupyLoader(cupy).functions([small()])
    cupy.launch_failure = TypeError("wrong arguments")
    with pytest.raises(TypeError, match="wrong arguments"):
        function((1,), 32, 0, [])


def test_an_op_that_fails_is_named(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    spec = Spec((8,), DTYPES["float32"])
    arrays = [np.zeros(8, np.float32).view(OnDevice) for _ in range(3)]
    cupy.launch_failure = DriverError(719)
    kernel = bind(CupyLoader(cupy), REGISTRY["add"], [spec, spec], [spec], {})
    with pytest.raises(DeviceError, match=r"^add\(.* on CUDA device 0: CUDA_ERROR_719.*host memory is unharmed"):
        kernel.run(arrays[0], arrays[1], arrays[2])
    assert kernel.prepare is not None
    calls = kernel.prepare(arrays[0], arrays[1], arrays[2]) or ()
    with pytest.raises(DeviceError, match=r"^add\(.* on CUDA device 0: CUDA_ERROR_719"):
        for call in calls:
            call()


def test_no_room_for_code_is_no_loss(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    cupy.device, cupy.load_failure = 1, PoolFailure("out")
    with pytest.raises(DeviceError, match=r"^a test failed on CUDA device 1, which has no room.*Nothing is lost"):
        Steps(CupyLoader(cupy), [Call(small(), (1,), ())], "a test").load()


def test_of_kernels_loaded_together_the_one_at_fault_is_named(cupy: StandIn, compiled: list[tuple[str, int]]) -> None:
    loader = CupyLoader(cupy)
    good = [bound(loader, [Call(small(n), (1,), ())], title=f"op {n}") for n in range(3)]
    bad = bound(loader, [Call(small(body="nonsense"), (1,), ())], title="the bad op")
    with pytest.raises(DeviceError, match=r"^the bad op cannot run on CUDA device 0, its kernel does not compile"):
        load([*good[:2], bad, good[2]])
    load(good)
    assert compiled.count(("sm_90", 1)) == len(compiled)
    before = len(compiled)
    for kernel in good:
        kernel.run(())
    assert len(compiled) == before
    assert len(cupy.launches) == 3


# ---- cuDNN -----------------------------------------------------------------------------------------------------------


def test_a_device_never_gets_the_cudnn_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle belongs to its device; only what is planned for a device that was not started may ask another's."""
    place = SimpleNamespace(index=0)
    driver = SimpleNamespace(CUDADriverError=DriverError, get_build_version=lambda: 12090)
    runtime = SimpleNamespace(CUDARuntimeError=RuntimeFailure, getDevice=lambda: place.index)
    memory = SimpleNamespace(OutOfMemoryError=PoolFailure)
    loader = CupyLoader(SimpleNamespace(cuda=SimpleNamespace(driver=driver, runtime=runtime, memory=memory)))
    first, third = object(), object()
    found = {0: (first, "9"), 1: (None, "not used"), 2: (third, "9")}
    monkeypatch.setattr(gpu.dnn_open, "open_for_device", lambda major: found[place.index])
    assert loader.dnn() is None
    for place.index in (0, 1):
        loader.open_dnn()
    given = []
    for place.index in (0, 1, 2):
        given.append(loader.dnn())
    assert given == [first, None, first], "device 2 was not started: plans for it are the first one's"
    loader.open_dnn()
    assert loader.dnn() is third
    loader.close_dnn()
    assert loader.dnn() is None
    place.index = 0
    assert loader.dnn() is first


# ---- the real CuPy ---------------------------------------------------------------------------------------------------


def test_the_real_cupy_has_what_the_loader_uses() -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy (no GPU)")
    loader = CupyLoader()
    driver, runtime, pool = loader._errors
    assert issubclass(driver, RuntimeError)
    assert issubclass(runtime, RuntimeError)
    assert issubclass(pool, MemoryError)
    module = cupy.cuda.function.Module()
    assert callable(module.load)
    assert callable(module.get_function)
    with pytest.raises(TypeError, match="bytes"):
        module.load("text")


def test_the_real_cupy_without_a_gpu_fails_with_a_code() -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy (no GPU)")
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(LowLevelError, match="cudaError") as caught:
        CupyLoader().functions([small()])
    assert caught.value.code in (35, 100)  # no driver; a driver and no device
