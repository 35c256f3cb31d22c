"""Memory of CUDA devices on made-up machines: what is free, who holds the rest, one cudaMalloc, and clean refusals."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from brim.errors import BudgetExceeded, DeviceError
from brim.memory.budget import parse_budget
from brim_cuda.lowlevel import LowLevelError, Neighbour, System
from brim_cuda.providers import describe_neighbours, make_provider
from fake_cuda import CONTEXT_BYTES, GIB, LIBRARIES_BYTES, ME, MIB, Card, Machine, refused

OVERHEAD = CONTEXT_BYTES + LIBRARIES_BYTES


# ---- start and overhead ----


def test_overhead_is_measured_for_this_process_alone() -> None:
    machine = Machine(Card(processes={4242: 9 * GIB}))
    vram = machine.vram()
    assert vram.overhead is not None
    assert (vram.overhead.nbytes, vram.overhead.exactness) == (OVERHEAD, "measured")
    assert vram.unattributed_bytes() == 0
    machine.cards[0].processes[4242] += GIB
    assert vram.unattributed_bytes() == 0, "a neighbour's memory is never ours"
    machine.cards[0].mine[7] = 50 * MIB
    assert vram.unattributed_bytes() == 50 * MIB


def test_start_opens_the_context_then_loads_and_does_so_once() -> None:
    machine = Machine()
    vram = machine.vram()
    first = vram.overhead
    assert machine.calls == ["open_context", "load_libraries"]
    assert vram.start(lambda: 1 / 0, lambda: 1 / 0) is first


def test_without_process_ids_overhead_is_the_difference_of_free_memory() -> None:
    machine = Machine(Card(processes={4242: 2 * GIB}))
    machine.host_pids = True
    vram = machine.vram(container=True)
    assert vram.overhead is not None
    assert (vram.overhead.nbytes, vram.overhead.exactness) == (OVERHEAD, "measured")
    assert vram.unattributed_bytes() is None


@pytest.mark.parametrize("change_bytes", [-6 * GIB, 6 * GIB])
def test_a_neighbour_that_moves_during_the_start_is_not_counted_as_ours(change_bytes: int) -> None:
    machine = Machine(Card(processes={4242: 7 * GIB}))
    machine.host_pids = True
    vram = machine.vram(container=True, start=False)

    def open_context() -> None:
        machine.open_context()
        machine.cards[0].processes[4242] += change_bytes

    overhead = vram.start(open_context, machine.load_libraries)
    assert (overhead.nbytes, overhead.exactness) == (450 * MIB, "estimated")


def test_without_nvml_overhead_is_estimated() -> None:
    overhead = Machine().vram(nvml=False).overhead
    assert overhead is not None
    assert (overhead.nbytes, overhead.exactness) == (450 * MIB, "estimated")


def test_libraries_that_take_more_than_the_estimate_are_counted() -> None:
    overhead = Machine().vram(nvml=False, options={"estimate_bytes": 40 * MIB}).overhead
    assert overhead is not None
    assert (overhead.nbytes, overhead.exactness) == (LIBRARIES_BYTES, "estimated")


def test_a_device_that_does_not_start_says_so() -> None:
    machine = Machine()
    vram = machine.vram(start=False)

    def broken() -> None:
        raise LowLevelError("cudaErrorDevicesUnavailable", 46)

    with pytest.raises(DeviceError, match="cuda:0 does not start: cudaErrorDevicesUnavailable"):
        vram.start(broken, machine.load_libraries)
    assert vram.overhead is None
    with pytest.raises(RuntimeError, match="before start"):
        vram.take(512)


# ---- taking and giving back ----


def test_a_segment_is_one_cudamalloc_and_goes_back_with_its_last_reference() -> None:
    machine = Machine()
    vram = machine.vram()
    machine.calls.clear()
    free = machine.cards[0].free_bytes
    segment = vram.take(10 * GIB)
    assert machine.calls == [f"malloc {10 * GIB}"]
    assert machine.cards[0].free_bytes == free - 10 * GIB
    assert vram.held_bytes == segment.nbytes == 10 * GIB
    assert vram.unattributed_bytes() == 0
    del segment
    gc.collect()
    assert machine.calls == [f"malloc {10 * GIB}", "free"]
    assert vram.held_bytes == 0
    assert machine.cards[0].free_bytes == free


def test_all_that_is_free_can_be_taken_and_not_a_byte_more() -> None:
    machine = Machine(Card(processes={4242: GIB}))
    vram = machine.vram()
    free = machine.cards[0].free_bytes
    text = refused(vram, free + 1)
    assert f"needs {free + 1:,} B, and {free:,} B of" in text, "where rounded numbers look alike, the exact ones"
    assert "Free at least 1 B there" in text
    segment = vram.take(free)
    segment.release()
    segment.release()
    assert machine.calls.count("free") == 1


def test_a_lost_device_breaks_no_destructor() -> None:
    machine = Machine()
    vram = machine.vram()
    segment = vram.take(GIB)
    machine.cards[0].mine.clear()

    def lost(index: int, address: int) -> None:
        raise LowLevelError("cudaErrorIllegalAddress", 700)

    machine.free = lost  # type: ignore[method-assign]
    del segment
    gc.collect()
    assert vram.held_bytes == 0


def test_zero_bytes_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Machine().vram().take(0)


def test_threads_together_never_get_more_than_there_is() -> None:
    machine = Machine()
    vram = machine.vram()
    segments: list[Any] = []
    errors: list[BudgetExceeded] = []

    def work() -> None:
        for _ in range(4):
            try:
                segments.append(vram.take(GIB))
            except BudgetExceeded as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(segments) == 15, "16 GiB less overhead"
    assert len(errors) == 17
    assert all("15.0 GiB in segments" in str(error) for error in errors)
    assert vram.held_bytes == 15 * GIB


# ---- 33: others are named ----


def test_a_refusal_names_the_neighbours() -> None:
    machine = Machine(Card(processes={4242: int(9.1 * GIB), 7: 12 * MIB}))
    vram = machine.vram()
    machine.calls.clear()
    text = refused(vram, 10 * GIB)
    assert machine.calls == [], "nothing is tried that cannot work"
    assert text.startswith("cuda:0: the arena needs 10.0 GiB, and 6.5 GiB of 16.0 GiB are free.")
    assert "pid 4242 holds 9.1 GiB, pid 7 holds 12.0 MiB" in text
    assert f"pid {ME}" not in text
    assert "Nothing was allocated." in text
    assert "Free at least 3.5 GiB there, or lower the budget to 6.9 GiB or less." in text


def test_a_refusal_in_a_container_says_what_cannot_be_seen() -> None:
    machine = Machine(Card(processes={4242: int(9.1 * GIB)}))
    machine.host_pids = True
    text = refused(machine.vram(container=True), 10 * GIB)
    assert "another process (not visible from this container) holds 9.1 GiB" in text
    assert "pid" not in text


@pytest.mark.parametrize("platform", ["linux", "wsl2"])
def test_ids_of_another_world_are_not_shown(platform: Any) -> None:
    # Not known to be a container; but a process that holds memory and is not in the list has another id there.
    machine = Machine(Card(processes={4242: int(9.1 * GIB)}))
    machine.host_pids = True
    text = refused(machine.vram(platform=platform), 10 * GIB)
    assert "another process or the system (not named by the driver) holds 9.1 GiB" in text
    assert "pid" not in text


def test_a_container_that_sees_processes_names_them() -> None:
    machine = Machine(Card(processes={4242: int(9.1 * GIB)}))
    assert "pid 4242 holds 9.1 GiB" in refused(machine.vram(container=True), 10 * GIB)


def test_ids_of_the_host_are_not_shown_before_the_start_either() -> None:
    machine = Machine(Card(processes={4242: 9 * GIB}))
    machine.host_pids = True
    assert machine.provider(container=True).others() == [Neighbour(None, 9 * GIB + CONTEXT_BYTES)]
    assert machine.provider(platform="wsl2").others() == [Neighbour(None, 9 * GIB + CONTEXT_BYTES)]
    machine = Machine(Card(processes={4242: 9 * GIB}))
    assert machine.provider().others() == [Neighbour(4242, 9 * GIB)]


def test_a_process_that_computes_and_draws_is_counted_once() -> None:
    machine = Machine(Card(processes={4242: 9 * GIB}))
    twice = [Neighbour(4242, 9 * GIB), Neighbour(ME, None), Neighbour(4242, 9 * GIB), Neighbour(ME, MIB)]
    machine.processes = lambda handle: twice  # type: ignore[method-assign]
    assert machine.provider().others() == [Neighbour(4242, 9 * GIB)]
    assert machine.provider().used_by_me_bytes() == MIB


def test_without_nvml_the_rest_is_told_as_one_figure() -> None:
    text = refused(Machine(Card(processes={4242: 9 * GIB})).vram(nvml=False), 10 * GIB)
    assert "not named by the driver) holds" in text


def test_more_than_the_device_has_is_another_message() -> None:
    text = refused(Machine(Card(processes={4242: 9 * GIB})).vram(), 16 * GIB)
    assert "more than the device can ever give: 15.6 GiB (16.0 GiB in all, less 396.0 MiB of context" in text
    assert "4242" not in text, "nobody else is to blame"


def test_neighbours_without_figures_and_many_neighbours() -> None:
    assert describe_neighbours([], "?") == ""
    assert describe_neighbours([Neighbour(5, None)], "?") == "pid 5 holds an unknown amount"
    many = describe_neighbours([Neighbour(pid, pid * MIB) for pid in range(1, 9)], "?")
    assert many.startswith("pid 8 holds 8.0 MiB, pid 7")
    assert many.endswith("3 more hold 6.0 MiB")


# ---- 34: neighbours that move ----


def test_a_neighbour_that_releases_between_look_and_request_does_no_harm() -> None:
    machine = Machine(Card(processes={4242: 5 * GIB}))
    vram = machine.vram()
    machine.before_malloc = machine.cards[0].processes.clear
    vram.take(8 * GIB)
    assert vram.overhead is not None
    assert vram.overhead.nbytes == OVERHEAD
    assert vram.unattributed_bytes() == 0


def test_a_neighbour_that_takes_between_look_and_request_is_a_clean_refusal() -> None:
    machine = Machine()
    vram = machine.vram()
    machine.before_malloc = lambda: machine.cards[0].processes.update({4242: 9 * GIB})
    free = machine.cards[0].free_bytes
    text = refused(vram, 10 * GIB)
    assert "It went between the look at it and the request; nothing was allocated." in text
    assert "pid 4242 holds 9.0 GiB" in text
    assert machine.cards[0].free_bytes == free - 9 * GIB
    machine.cards[0].processes.clear()
    machine.before_malloc = lambda: None
    vram.take(10 * GIB)


def test_what_the_process_can_do_without_is_given_back_before_a_refusal() -> None:
    machine = Machine()
    cached: list[Any] = []
    vram = machine.vram(options={"trim": cached.clear})
    cached.append(vram.take(10 * GIB))
    kept = vram.take(12 * GIB)
    assert not cached
    assert vram.held_bytes == kept.nbytes
    assert "this process holds 12.0 GiB in segments" in refused(vram, 12 * GIB)


# ---- 36, 37: instances, and CUDA's order is not NVML's ----


@pytest.mark.parametrize("nvml_refuses", [True, False])
def test_on_a_mig_instance_only_cuda_is_believed(nvml_refuses: bool) -> None:
    machine = Machine(Card(total_bytes=10 * GIB, processes={4242: GIB}))
    if nvml_refuses:
        machine.refusals = {"memory": "no permission", "processes": "no permission"}
    else:
        machine.mig = True
    provider = machine.provider()
    assert provider.kind == "mig"
    assert provider.total_bytes() == 10 * GIB
    budget = parse_budget("50%").resolve(provider.total_bytes(), provider.free_bytes())
    assert budget == 5 * GIB
    assert provider.used_by_me_bytes() is None
    assert provider.outside_free_bytes() is None
    vram = machine.vram()
    assert vram.overhead is not None
    assert vram.overhead.exactness == "estimated"
    assert "of 10.0 GiB are free" in refused(vram, 9 * GIB)
    vram.take(8 * GIB)


def test_a_card_that_nvml_refuses_otherwise_is_no_instance() -> None:
    machine = Machine()
    machine.refusals = {"memory": "not supported"}
    assert machine.provider().kind == "discrete"
    machine.refusals = {"find": "not found"}
    assert machine.provider().kind == "discrete"


def test_cards_are_matched_by_uuid() -> None:
    machine = Machine(Card("GPU-a", 16 * GIB, {1: GIB}), Card("GPU-b", 24 * GIB, {2: 20 * GIB}))
    assert machine.provider(0).others() == [Neighbour(1, GIB)]
    assert machine.provider(1).others() == [Neighbour(2, 20 * GIB)]
    text = refused(machine.vram(1), 8 * GIB)
    assert text.startswith("cuda:1: ")
    assert "pid 2 holds 20.0 GiB" in text
    machine.vram(0).take(8 * GIB)


# ---- 42: CUDA refuses although enough is free ----


@pytest.mark.parametrize(
    ("facts", "options", "expected"),
    [
        ({}, {}, "no free piece may be that large"),
        ({}, {"address_space_limit_bytes": 40 * GIB}, "limited to 40.0 GiB (RLIMIT_AS"),
        ({"platform": "windows"}, {}, "page file"),
    ],
    ids=["pieces", "address-space", "windows"],
)
def test_a_refusal_without_need_says_what_it_may_be(facts: Any, options: Any, expected: str) -> None:
    machine = Machine(Card(processes={4242: GIB}))
    trims: list[int] = []
    vram = machine.vram(options={"trim": lambda: trims.append(1), **options}, **facts)
    machine.largest_piece_bytes = 4 * GIB
    text = refused(vram, 8 * GIB)
    assert "CUDA refused 8.0 GiB for the arena although" in text
    assert expected in text
    assert "pid 4242 holds 1.0 GiB" in text
    assert "batch" not in text
    assert "Nothing was allocated." in text
    assert (len(trims), machine.calls.count(f"malloc {8 * GIB}")) == (1, 2), "tried once more, after giving back"
    vram.take(4 * GIB)


def test_a_second_try_may_succeed() -> None:
    machine = Machine()

    def trim() -> None:
        machine.largest_piece_bytes = 8 * GIB

    vram = machine.vram(options={"trim": trim})
    machine.largest_piece_bytes = GIB
    assert vram.take(8 * GIB).nbytes == 8 * GIB


def test_other_failures_are_no_lack_of_memory() -> None:
    machine = Machine()
    vram = machine.vram()
    machine.malloc_code = 700
    with pytest.raises(DeviceError, match="This is no lack of memory") as caught:
        vram.take(GIB)
    assert not isinstance(caught.value, MemoryError)
    assert vram.held_bytes == 0


# ---- no device ----


def test_without_a_device_there_is_only_planning() -> None:
    provider = make_provider(System(), 0)
    assert provider.kind == "none"
    assert provider.others() == []
    assert provider.used_by_me_bytes() is None
    with pytest.raises(DeviceError, match="--device-profile"):
        provider.free_bytes()
