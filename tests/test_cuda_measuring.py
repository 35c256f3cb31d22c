"""What measurements ask of a device: events, copies, facts and state, against a runtime and an NVML made here."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from brim_cuda.emulation import EmulatedMachine
from brim_cuda.lowlevel import DeviceProperties, LowLevelError
from brim_cuda.measuring import Measuring
from brim_cuda.nvml import CtypesNvml

WHO = DeviceProperties("Some Card", uuid="GPU-0f0e", pci_bus_id="0000:01:00.0")
FACTS = {"major": 9, "minor": 0, "multiProcessorCount": 132, "l2CacheSize": 50 << 20, "name": b"Some Card"}


class Event:
    """An event of a stream whose clock goes on by 5 ms at each record."""

    def __init__(self, log: list[Any], **options: Any) -> None:
        self.log, self.options, self.at_ms = log, options, 0.0

    def record(self, stream: Any) -> None:
        stream.now_ms += 5
        self.at_ms = stream.now_ms

    def synchronize(self) -> None:
        self.log.append("waited")


def made(nvml: Any = None) -> tuple[Measuring, list[Any]]:
    log: list[Any] = []
    runtime = SimpleNamespace(
        memcpyDeviceToDevice=3, getDeviceProperties=lambda index: FACTS, memGetInfo=lambda: (70 << 30, 80 << 30),
        memcpyAsync=lambda *arguments: log.append(("copy", *arguments)),
    )  # fmt: skip
    cuda = SimpleNamespace(
        runtime=runtime, Event=lambda **options: Event(log, **options),
        get_elapsed_time=lambda a, b: b.at_ms - a.at_ms,
    )  # fmt: skip

    @contextlib.contextmanager
    def working(what: str) -> Iterator[None]:
        log.append(what)
        yield

    stream = SimpleNamespace(ptr=77, now_ms=0.0)
    return Measuring(SimpleNamespace(cuda=cuda), stream, 0, working, WHO, nvml), log


def array(address: int, nbytes: int) -> Any:
    return SimpleNamespace(data=SimpleNamespace(ptr=address), nbytes=nbytes)


def test_marks_are_timed_by_the_device_and_wait_only_when_read() -> None:
    measuring, log = made()
    before, after = measuring.mark(), measuring.mark()
    assert "waited" not in log
    assert before.options == {"block": False, "disable_timing": False}
    assert measuring.seconds(before, after) == pytest.approx(0.005)
    assert log[-1] == "waited"


def test_copies_go_to_the_stream_of_launches() -> None:
    measuring, log = made()
    measuring.copy(array(1000, 64), array(2000, 64))
    assert log[-1] == ("copy", 1000, 2000, 64, 3, 77)
    with pytest.raises(ValueError, match="arrays of one size"):
        measuring.copy(array(1000, 64), array(2000, 32))


def test_facts_of_a_card() -> None:
    assert made()[0].card() == {
        "name": "Some Card", "uuid": "GPU-0f0e", "compute_capability": "9.0", "multiprocessors": 132,
        "l2_bytes": 50 << 20, "free_bytes": 70 << 30,
    }  # fmt: skip


class Library:
    """libnvidia-ml with a state; what is in ``refused`` answers "not supported"."""

    def __init__(self, refused: tuple[str, ...] = ()) -> None:
        self.refused, self.found = refused, 0

    def __getattr__(self, name: str) -> Any:
        values = {
            ("nvmlDeviceGetClockInfo", 1): 1980, ("nvmlDeviceGetClockInfo", 2): 2619,
            ("nvmlDeviceGetTemperature", 0): 61, ("nvmlDeviceGetPowerUsage",): 650_500,
            ("nvmlDeviceGetEnforcedPowerLimit",): 700_000, ("nvmlDeviceGetCurrentClocksThrottleReasons",): 4,
        }  # fmt: skip

        def call(*arguments: Any) -> int:
            if name in self.refused:
                return 3
            if name == "nvmlDeviceGetHandleByUUID":
                self.found += 1
                arguments[1]._obj.value = 11
            elif name.startswith("nvmlDeviceGet"):
                handle, *what, result = arguments
                assert isinstance(handle, ctypes.c_void_p)
                assert handle.value == 11
                result._obj.value = values[(name, *what)]
            return 0

        return call


def test_the_state_of_a_card_in_units_of_the_world() -> None:
    library = Library()
    measuring, _ = made(CtypesNvml(library))
    for _ in range(2):
        assert measuring.state() == {
            "sm_clock_hz": 1.98e9, "memory_clock_hz": 2.619e9, "temperature_celsius": 61.0,
            "power_watts": pytest.approx(650.5), "power_limit_watts": pytest.approx(700), "slowed_by": 4.0,
        }  # fmt: skip
    assert library.found == 1  # the handle is kept


def test_what_nvml_does_not_tell_is_left_out() -> None:
    refused = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetTemperature")
    state = made(CtypesNvml(Library(refused)))[0].state()
    assert set(state) == {"sm_clock_hz", "memory_clock_hz", "slowed_by"}
    assert made(None)[0].state() == {}

    class Unknown:
        def find(self, *_: Any) -> Any:
            raise LowLevelError("no such device", 6, "not found")

    assert made(Unknown())[0].state() == {}


def test_an_emulated_device_has_no_times() -> None:
    assert EmulatedMachine().measuring(0) is None
