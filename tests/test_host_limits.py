"""What host memory this process may use, on machines of ``fake_machines`` and on this one."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from brim.errors import BudgetExceeded, DeviceError, SwapDetected
from brim.memory import host
from brim.memory.budget import Budget
from brim.memory.host import SwapWatch, peak_rss_bytes, read_host_memory, rss_bytes
from brim.memory.ledger import BlockRecord, Ledger
from brim.memory.pool import Pool, Refusal
from brim.memory.report import MemoryReport, budget_exceeded
from fake_machines import GIB, KIB, MACHINES, MIB, Machine


@pytest.mark.parametrize("name", MACHINES)
def test_limits_of_machines(name: str, tmp_path: Path) -> None:
    machine, limit_bytes, source, available_bytes = MACHINES[name]
    memory = read_host_memory(machine.build(tmp_path), rlimits={})
    assert memory.total_bytes == machine.total
    assert memory.tightest == (source, limit_bytes)
    assert memory.limit_bytes == limit_bytes == min(value for _, value in memory.sources)
    assert memory.available_bytes == available_bytes
    assert memory.available_bytes == max(0, memory.tightest_available[1])
    assert memory.swap_used_bytes == 0


def test_each_limit_is_listed_once(tmp_path: Path) -> None:
    machine = MACHINES["v1 the ancestor's limit wins and is named by its own file"][0]
    assert read_host_memory(machine.build(tmp_path), rlimits={"RLIMIT_AS": 3 * GIB}).sources == (
        ("physical memory (MemTotal)", 64 * GIB),
        ("cgroup v1 /sys/fs/cgroup/memory/pod/memory.limit_in_bytes", 2 * GIB),
        ("RLIMIT_AS", 3 * GIB),
    )


def test_a_busy_host_does_not_fail_a_small_container(tmp_path: Path) -> None:
    machine = MACHINES["host at 95 %, container at 12 %"][0]
    memory = read_host_memory(machine.build(tmp_path), rlimits={})
    limit = Budget("auto").resolve(memory.limit_bytes, memory.available_bytes, memory.headroom_bytes)
    assert limit is not None
    assert limit >= 2 * GIB  # 3.2 GiB are there: a 2 GiB job is no reason to complain
    assert limit <= memory.available_bytes
    assert memory.tightest_available == ("MemAvailable", memory.available_bytes)


@pytest.mark.parametrize(
    ("rlimits", "limit_bytes", "available_bytes", "source"),
    [
        ({"RLIMIT_AS": None, "RLIMIT_DATA": None}, 64 * GIB, 50 * GIB, "physical memory (MemTotal)"),
        ({"RLIMIT_AS": 10 * GIB}, 10 * GIB, 8 * GIB, "RLIMIT_AS"),  # VmSize is 2 GiB
        ({"RLIMIT_DATA": 10 * GIB}, 10 * GIB, 9 * GIB, "RLIMIT_DATA"),  # VmData is 1 GiB
        ({"RLIMIT_AS": 12 * GIB, "RLIMIT_DATA": 10 * GIB}, 10 * GIB, 9 * GIB, "RLIMIT_DATA"),
        ({"RLIMIT_AS": GIB}, GIB, 0, "RLIMIT_AS"),
        ({"RLIMIT_AS": 10**18}, 64 * GIB, 50 * GIB, "physical memory (MemTotal)"),
    ],
)
def test_process_limits(
    rlimits: dict[str, int | None], limit_bytes: int, available_bytes: int, source: str, tmp_path: Path
) -> None:
    memory = read_host_memory(Machine().build(tmp_path), rlimits=rlimits)
    assert (memory.limit_bytes, memory.available_bytes, memory.tightest[0]) == (limit_bytes, available_bytes, source)


def test_swap_is_never_available(tmp_path: Path) -> None:
    without = read_host_memory(Machine(available=8 * GIB).build(tmp_path / "a"), rlimits={})
    with_swap = read_host_memory(
        Machine(available=8 * GIB, swap_total=64 * GIB, swap_free=64 * GIB).build(tmp_path / "b"), rlimits={}
    )
    assert with_swap == without
    assert with_swap.available_bytes == 8 * GIB


def test_own_swap_is_told(tmp_path: Path) -> None:
    machine = Machine(status="VmSwap:\t    1024 kB\n")
    assert read_host_memory(machine.build(tmp_path), rlimits={}).swap_used_bytes == MIB


def test_memory_available_of_old_kernels(tmp_path: Path) -> None:
    root = Machine().build(tmp_path)
    lines = "MemTotal: 4096 kB\nMemFree: 1000 kB\nBuffers: 100 kB\nCached: 900 kB\nSwapFree: 4096 kB\nShmem: 500 kB\n"
    (root / "proc/meminfo").write_text(lines)
    assert read_host_memory(root, rlimits={}).available_bytes == (1000 + 100 + 900 - 500) * KIB


def test_machines_that_do_not_tell(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no proc/meminfo below"):
        read_host_memory(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("nothing here\n")
    with pytest.raises(DeviceError, match="no line MemTotal"):
        read_host_memory(tmp_path)


# --- refused although swap would take it ------------------------------------------------------------------------------


def test_more_than_available_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    root = Machine(available=8 * GIB, swap_total=16 * GIB, swap_free=16 * GIB).build(tmp_path)
    taken: list[int] = []

    def refuse(refusal: Refusal) -> BudgetExceeded:
        nbytes = refusal.record.reserved_bytes
        needed = refusal.held_bytes + nbytes
        report = MemoryReport(
            "cpu", "test block", "eager", None, "off", needed, refusal.held_bytes, nbytes, {"temps": needed},
            available_bytes=refusal.limit_bytes, available_text="MemAvailable",
        )  # fmt: skip
        return budget_exceeded(report)

    pool = Pool(
        lambda nbytes: taken.append(nbytes) or bytearray(0),
        Ledger("cpu"),
        available=lambda _nbytes: read_host_memory(root, rlimits={}).available_bytes,
        refuse=refuse,
    )
    record = BlockRecord(12 * GIB, "temps", "test", "", None)
    with pytest.raises(BudgetExceeded, match=r"12\.0 GiB more on cpu, only 8\.0 GiB available \(MemAvailable\)"):
        pool.allocate(12 * GIB, record)
    assert taken == []
    assert pool.held_bytes == 0
    block = pool.allocate(7 * GIB, BlockRecord(7 * GIB, "temps", "test", "", None))
    assert taken == [7 * GIB]
    del block


# --- swapping of this process -----------------------------------------------------------------------------------------


def swap_to(root: Path, kib: int) -> None:
    (root / "proc/self/status").write_text(f"Name:\tpython\nVmRSS:\t 1000 kB\nVmSwap:\t{kib:>8} kB\nThreads:\t1\n")


def test_growing_swap_is_an_error_that_names_the_amount(tmp_path: Path) -> None:
    root = Machine().build(tmp_path)
    swap_to(root, 512)  # swapped before we came: not ours to complain about
    watch = SwapWatch(root=root)
    assert watch.supported
    assert watch.check() == 0
    swap_to(root, 512 + 3072)
    with pytest.raises(SwapDetected, match=r"3\.0 MiB of this process moved to swap at step 7: 3\.5 MiB") as caught:
        watch.check("step 7")
    assert caught.value.swapped_bytes == 3 * MIB
    assert isinstance(caught.value, BudgetExceeded)
    assert isinstance(caught.value, MemoryError)
    assert watch.check() == 0  # once for each growth
    swap_to(root, 0)
    assert watch.check() == 0
    swap_to(root, 4)
    with pytest.raises(SwapDetected, match=r"4\.0 KiB"):
        watch.check()


def test_policy_warn_continues(tmp_path: Path) -> None:
    root = Machine().build(tmp_path)
    watch = SwapWatch("warn", root)
    swap_to(root, 2048)
    with pytest.warns(RuntimeWarning, match=r"2\.0 MiB of this process moved to swap"):
        assert watch.check() == 2 * MIB
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.check() == 0


def test_policy_off_and_tolerance(tmp_path: Path) -> None:
    root = Machine().build(tmp_path)
    off, tolerant = SwapWatch("off", root), SwapWatch("error", root, tolerance_bytes=MIB)
    swap_to(root, 1024)
    assert off.check() == 0
    assert tolerant.check() == 0
    swap_to(root, 1024 + 1025)
    assert off.check() == 0
    with pytest.raises(SwapDetected):
        tolerant.check()
    with pytest.raises(ValueError, match='"warn"'):
        SwapWatch("sometimes", root)


def test_no_swap_line_means_unsupported(tmp_path: Path) -> None:
    watch = SwapWatch(root=tmp_path)
    assert not watch.supported
    assert watch.check() == 0


# --- this machine -----------------------------------------------------------------------------------------------------


def test_this_machine() -> None:
    memory = read_host_memory()
    assert 0 < memory.limit_bytes <= memory.total_bytes
    assert 0 <= memory.available_bytes <= memory.limit_bytes
    assert 0 < memory.headroom_bytes < memory.limit_bytes
    assert memory.tightest in memory.sources
    assert SwapWatch("warn").check() >= 0


def test_resident_memory_follows_what_is_touched() -> None:
    before = rss_bytes()
    block = mmap.mmap(-1, 64 * MIB)  # fresh pages: the heap may have some that were touched before
    for at in range(0, 64 * MIB, 4 * KIB):
        block[at] = 1
    assert rss_bytes() >= before + 60 * MIB
    assert peak_rss_bytes() >= before + 60 * MIB
    held = peak_rss_bytes()
    block.close()
    assert peak_rss_bytes() >= held - MIB  # a peak does not fall (the kernel's counters are a little late)


def test_readings_of_other_systems_agree_with_ours() -> None:
    psutil = pytest.importorskip("psutil")
    memory = host._from_psutil()
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.available_bytes <= memory.limit_bytes
    if sys.platform == "linux":
        assert memory.total_bytes == read_host_memory().total_bytes
        assert abs(host._from_sysconf().total_bytes - memory.total_bytes) <= memory.total_bytes // 100


def test_windows_reading() -> None:
    def answer(status: host._MemoryStatusEx) -> int:
        assert status.length == 64  # what Windows checks
        status.total_phys, status.avail_phys = 16 * GIB, 9 * GIB
        status.total_page_file, status.avail_page_file = 20 * GIB, 6 * GIB
        status.total_virtual, status.avail_virtual = 128 * 1024 * GIB, 127 * 1024 * GIB
        return 1

    memory = host._from_windows(answer)
    assert (memory.total_bytes, memory.limit_bytes, memory.available_bytes) == (16 * GIB, 16 * GIB, 6 * GIB)
    with pytest.raises(DeviceError, match="GlobalMemoryStatusEx"):
        host._from_windows(lambda _status: 0)


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced like this on Linux only")
def test_a_real_address_space_limit_is_seen_and_stops_foreign_code() -> None:
    out = run_python(
        """
        import resource
        import numpy as np
        from brim.memory.host import read_host_memory

        MIB = 2**20
        free = read_host_memory()
        np.empty(900 * MIB, np.uint8)  # no cap yet: this works
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        cap = used + 512 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
        memory = read_host_memory()
        assert memory.tightest == ("RLIMIT_AS", cap) or memory.limit_bytes < cap, memory
        assert ("RLIMIT_AS", cap) in memory.sources, memory
        assert memory.available_bytes <= 512 * MIB, memory
        assert free.limit_bytes >= memory.limit_bytes
        np.empty(128 * MIB, np.uint8)
        try:
            np.empty(900 * MIB, np.uint8)
        except MemoryError:
            print("refused")
        """
    )
    assert out == "refused\n"


@pytest.mark.skipif(sys.platform != "linux", reason="psutil is used elsewhere")
def test_linux_needs_no_psutil() -> None:
    out = run_python(
        """
        import sys
        from brim.memory.host import SwapWatch, peak_rss_bytes, read_host_memory, rss_bytes

        read_host_memory(), rss_bytes(), peak_rss_bytes(), SwapWatch("warn").check()
        print("psutil" in sys.modules)
        """
    )
    assert out == "False\n"
