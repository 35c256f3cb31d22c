"""Whether cuDNN is used, and what is said where it is not: every case with stand-ins for what is installed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from brim.errors import DeviceError
from brim.spec import DTYPES
from brim_cuda import dnn_open
from brim_cuda.dnn import WORKSPACE_BYTES_MAX, Cudnn, DnnTensor, DnnUnsupported, Execute
from brim_cuda.dnn_conv import ConvRequest
from brim_cuda.dnn_open import open_for_device, open_for_profile, wanted
from brim_cuda.lowlevel import LowLevelError
from brim_cuda.requirements import about_cudnn

BOTH = ("numpy", "nvidia-cudnn-cu12", "nvidia_cudnn_frontend")


class Chained:
    """A tensor of the frontend: every setter gives it back."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: self


class Graph:
    """A graph of the frontend with plans (name, workspace bytes, or why it cannot be built)."""

    def __init__(self, frontend: Frontend, **device: Any) -> None:
        self.frontend, self.device = frontend, device
        self.built: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: Chained()

    def get_execution_plan_count(self) -> int:
        return len(self.frontend.plans)

    def get_plan_name_at_index(self, index: int) -> str:
        return self.frontend.plans[index][0]

    def build_plan_at_index(self, index: int) -> None:
        found = self.frontend.plans[index][1]
        if isinstance(found, str):
            raise RuntimeError(found)

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return self.frontend.plans[index][1]

    def deselect_numeric_notes(self, notes: list[str]) -> None:
        self.frontend.deselected.append(notes)

    def execute_plan_at_index(self, pack: dict[int, int], workspace: int, index: int, handle: Any) -> None:
        if self.frontend.broken:
            raise RuntimeError(self.frontend.broken)
        self.frontend.executed.append((pack, workspace, index, handle))


class Names:
    """An enum: every name is itself."""

    def __getattr__(self, name: str) -> str:
        return name


class Frontend:
    """The module ``cudnn``, as far as it is used."""

    data_type = numerical_note = heur_mode = Names()

    def __init__(self, version: str = "1.28.0", plans: Any = (("eng1", 64),), broken: str = "") -> None:
        self.__version__, self.plans, self.broken = version, plans, broken
        self.executed: list[Any] = []
        self.streams: list[Any] = []
        self.deselected: list[Any] = []
        self.graphs: list[Graph] = []

    def backend_version(self) -> int:
        return 92800

    def create_handle(self) -> str:
        if self.broken:
            raise RuntimeError(self.broken)
        return "handle"

    def create_device_properties(self, text: str) -> str:
        assert '"deviceVer": 900' in text
        return "an H100"

    def set_stream(self, handle: str, stream: int) -> None:
        self.streams.append((handle, stream))

    def pygraph(self, **device: Any) -> Graph:
        self.graphs.append(Graph(self, **device))
        return self.graphs[-1]


def opened(
    way: str = "auto",
    packages: Any = BOTH,
    frontend: Any = None,
    profile: str = "",
    major: int | None = 12,
    **more: Any,
) -> tuple[Cudnn | None, str]:
    made = Frontend() if frontend is None else frontend

    def load(name: str) -> Any:
        if isinstance(made, Exception):
            raise made
        assert name == "cudnn"
        return made

    given: dict[str, Any] = {"environ": {"BRIM_CUDNN": way}, "packages": lambda: packages, "import_module": load}
    return open_for_profile(profile, **given, **more) if profile else open_for_device(major, **given)


def request(channels: int = 8) -> ConvRequest:
    image = DnnTensor((1, channels, 4, 4), (16 * channels, 16, 4, 1), DTYPES["float32"])
    weight = DnnTensor((channels, channels, 1, 1), (channels, 1, 1, 1), DTYPES["float32"])
    return ConvRequest("fprop", image, weight, image, (1, 1), (0, 0), (1, 1))


# ---- what is installed -----------------------------------------------------------------------------------------------


def test_it_is_used_where_it_is_there() -> None:
    library, status = opened()
    assert library is not None
    assert status == "9.28.0 (frontend 1.28.0)"
    assert wanted({}) == "auto"


@pytest.mark.parametrize(
    ("packages", "major", "version", "said"),
    [
        (("nvidia-cudnn-cu12",), 12, "", r"frontend is not installed: `pip install 'brim\[cudnn12\]'`"),
        ((), 13, "", r"frontend is not installed: `pip install 'brim\[cudnn13\]'`"),
        ((), None, "", r"brim\[cudnn12\]"),
        ((*BOTH, "nvidia-cudnn-cu13"), 13, "", r"cu12 and nvidia-cudnn-cu13 are both .* overwrite .*brim\[cudnn13\]"),
        (BOTH, 13, "", r"nvidia-cudnn-cu12 is installed beside a CuPy for CUDA 13: `pip uninstall nvidia-cudnn-cu12`"),
        (BOTH, 12, "1.29.1", r"frontend 1\.29\.1 is installed, brim works with 1\.23 up to, not including, 1\.29"),
        (BOTH, 12, "1.9.0", r"frontend 1\.9\.0 is installed"),
    ],
)
def test_what_is_wrong_with_packages(packages: Any, major: int | None, version: str, said: str) -> None:
    problem = about_cudnn(packages, major, version)
    assert problem is not None
    assert re.search(said, problem)
    frontend = Frontend(version or "1.28.0")
    library, status = opened(packages=packages, frontend=frontend, major=major)
    assert library is None
    assert status == f"not used: {problem}"
    with pytest.raises(DeviceError, match=r"BRIM_CUDNN=1, but .*\. Set BRIM_CUDNN=auto to go without"):
        opened("1", packages, frontend, major=major)


def test_packages_that_are_right() -> None:
    for version in ("", "1.23.0", "1.28.0"):
        assert about_cudnn(BOTH, 12, version) is None
    assert about_cudnn(BOTH, None) is None
    assert about_cudnn(("nvidia-cudnn-frontend",), 12) is None, "the library may come from the system"
    assert about_cudnn(("nvidia-cudnn-frontend", "nvidia-cudnn-cu13"), 13) is None


def test_the_variable() -> None:
    assert opened("0") == (None, "not used: BRIM_CUDNN=0")
    assert opened("off", frontend=ImportError("never looked for"))[0] is None
    assert opened("1")[0] is not None
    with pytest.raises(DeviceError, match="BRIM_CUDNN is 'maybe'; known are 0"):
        opened("maybe")


def test_a_library_that_does_not_load_or_start() -> None:
    library, status = opened(frontend=ImportError("libcudnn.so.9: no such file"))
    assert library is None
    assert "cuDNN does not load: libcudnn.so.9: no such file. Reinstall it" in status
    library, status = opened(frontend=Frontend(broken="no context"))
    assert library is None
    assert status == "not used: cuDNN does not start: no context"
    with pytest.raises(DeviceError, match="no context"):
        opened("1", frontend=Frontend(broken="no context"))


# ---- plans without the card ------------------------------------------------------------------------------------------


def test_plans_for_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnn_open.cublaslt, "load", lambda: None)
    frontend = Frontend()
    library, status = opened(frontend=frontend, profile="h100-80gb", load_library=lambda _: None)
    assert library is not None
    assert status == "9.28.0 asked for plans without the card"
    assert frontend.graphs[0].device["device_property"] == "an H100"
    assert frontend.graphs[0].device["sm_version"] == 90


def test_profiles_that_are_planned_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: no such file")

    library, status = opened(profile="h100-80gb", load_library=missing)
    assert library is None
    assert "libraries that it loads are missing: " in status
    monkeypatch.setattr(dnn_open.cublaslt, "load", lambda: None)
    present: dict[str, Any] = {"load_library": lambda _: None}
    assert "not asked for plans for l4-24gb" in opened(profile="l4-24gb", **present)[1]
    assert opened("0", profile="h100-80gb", **present) == (None, "not used: BRIM_CUDNN=0")
    broken = Frontend(plans=(("eng1", "SUBLIBRARY_LOADING_FAILED"),))
    assert "SUBLIBRARY_LOADING_FAILED" in opened(frontend=broken, profile="h100-80gb", **present)[1]
    with pytest.raises(DeviceError, match="BRIM_CUDNN=1"):
        opened("1", profile="l4-24gb", **present)


# ---- which plan ------------------------------------------------------------------------------------------------------


def test_the_first_plan_that_is_allowed_is_taken() -> None:
    plans = (("python_engine", 0), ("eng9", "too new"), ("eng7", WORKSPACE_BYTES_MAX + 1), ("eng5", 640), ("eng3", 0))
    frontend = Frontend(plans=plans)
    plan = Cudnn(frontend, handle="handle").plan(request())
    assert (plan.engine, plan.workspace_bytes) == ("eng5", 640)
    assert frontend.deselected == [list(request().forbidden_notes)]


@pytest.mark.parametrize(
    ("plans", "said"),
    [
        ((), "no plan of the library gives the same bits"),
        ((("eng1", "Deselecting execution plan"),), "no plan of the library gives the same bits"),
        ((("eng1", "broken"),), "broken"),
        ((("eng1", WORKSPACE_BYTES_MAX + 1),), "bytes of scratch"),
    ],
)
def test_why_there_is_no_plan(plans: Any, said: str) -> None:
    frontend = Frontend(plans=plans)
    library = Cudnn(frontend, handle="handle")
    for _ in range(2):
        with pytest.raises(DnnUnsupported, match=said):
            library.plan(request())
    assert len(frontend.graphs) == 1, "what is refused is remembered"


def test_graphs_are_built_once_and_the_stream_set_when_it_changes() -> None:
    frontend = Frontend()
    library = Cudnn(frontend, handle="handle")
    plan = library.plan(request())
    assert library.plan(request()) is plan
    calls = [Execute(library, plan, [16, 32, 48], 64, stream, lambda error: error) for stream in (5, 5, 6)]
    for call in (*calls, calls[-1]):
        call()
    assert len(frontend.graphs) == 1
    assert frontend.streams == [("handle", 5), ("handle", 6)]
    assert frontend.executed[0] == ({1: 16, 2: 32, 3: 48}, 64, 0, "handle")
    assert frontend.executed[2][0] is frontend.executed[3][0], "the pack of addresses is made once"


def test_a_plan_of_another_device_is_built_for_this_one() -> None:
    plan = Cudnn(Frontend(plans=(("eng1", 64),)), handle="other").plan(request())
    frontend = Frontend(plans=(("eng2", 32),))
    Cudnn(frontend, handle="handle").execute(plan, {1: 16}, 64, 0)
    assert len(frontend.executed) == 1
    greedy = Cudnn(Frontend(plans=(("eng2", 65),)), handle="handle")
    with pytest.raises(LowLevelError, match="needs 65 bytes of scratch, 64 are planned"):
        greedy.execute(plan, {1: 16}, 64, 0)


def test_what_the_library_refuses_is_said_with_the_op() -> None:
    frontend = Frontend()
    library = Cudnn(frontend, handle="handle")
    plan = library.plan(request())
    frontend.broken = "CUDNN_STATUS_EXECUTION_FAILED"
    call = Execute(library, plan, [16, 32, 48], 64, 0, lambda error: DeviceError(f"conv2d: {error}"))
    with pytest.raises(DeviceError, match=r"conv2d: cuDNN \(eng1\): CUDNN_STATUS_EXECUTION_FAILED"):
        call()


def test_extents() -> None:
    assert request().x.extent_bytes == 8 * 16 * 4
    gaps = DnnTensor((2, 3), (8, 2), np.dtype(np.float32))
    assert gaps.extent_bytes == (8 + 2 * 2 + 1) * 4
