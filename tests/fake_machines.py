"""Machines described by small fake /proc and /sys trees, with what memory a process may use on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

KIB, MIB, GIB = 2**10, 2**20, 2**30
V1_SENTINEL = 9223372036854771712
V1 = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"


def mount(kind: str, root: str, point: str, options: str = "rw") -> str:
    """A line of mountinfo, with and without the optional column before the dash."""
    optional = "" if kind == "cgroup" else "shared:4 "
    return f"41 31 0:38 {root} {point} rw,relatime {optional}- {kind} {kind} {options}\n"


def v2_stat(inactive_file: int = 0, active_file: int = 0, shmem: int = 0, anon: int = 0) -> str:
    file = inactive_file + active_file + shmem  # as the kernel counts: tmpfs is "file", but on no file list
    return f"anon {anon}\nfile {file}\nshmem {shmem}\ninactive_file {inactive_file}\nactive_file {active_file}\n"


def v1_stat(limit: int, inactive_file: int = 0, active_file: int = 0, shmem: int = 0) -> str:
    cache = inactive_file + active_file + shmem
    return (
        f"cache {KIB}\nshmem 0\ninactive_file {KIB}\nactive_file 0\nhierarchical_memory_limit {limit}\n"
        f"total_cache {cache}\ntotal_shmem {shmem}\n"
        f"total_inactive_file {inactive_file}\ntotal_active_file {active_file}\n"
    )


@dataclass
class Machine:
    """A machine to write down: sizes in bytes, files by absolute path."""

    total: int = 64 * GIB
    available: int = 50 * GIB
    swap_total: int = 0
    swap_free: int = 0
    cgroup: str = "0::/\n"
    mounts: str = ""
    files: Mapping[str, object] = field(default_factory=dict)
    status: str = "VmSize:\t 2097152 kB\nVmData:\t 1048576 kB\nVmSwap:\t       0 kB\n"

    def build(self, root: Path) -> Path:
        meminfo = {
            "MemTotal": self.total,
            "MemFree": self.available // 2,
            "MemAvailable": self.available,
            "Shmem": 0,
            "SwapTotal": self.swap_total,
            "SwapFree": self.swap_free,
        }
        texts: dict[str, object] = {
            "/proc/meminfo": "".join(f"{name}:{count // KIB:>16} kB\n" for name, count in meminfo.items()),
            "/proc/self/status": "Name:\tpython\n" + self.status,
            "/proc/self/cgroup": self.cgroup,
            "/proc/self/mountinfo": "22 27 0:21 / /proc rw,relatime - proc proc rw\n" + self.mounts,
            **self.files,
        }
        for path, text in texts.items():
            file = root / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n" if isinstance(text, int) else str(text), encoding="utf-8")
        return root


def v2(path: str, files: Mapping[str, object], *, top: str = "/", **rest: int) -> Machine:
    """A machine with version 2 alone, mounted so that it shows the group ``top`` and those below."""
    return Machine(
        cgroup=f"0::{path}\n",
        mounts=mount("cgroup2", top, V2, "rw,nsdelegate"),
        files={f"{V2}/{name}": text for name, text in files.items()},
        **rest,
    )


def v1(path: str, files: Mapping[str, object], *, top: str = "/", more: str = "", **rest: int) -> Machine:
    """A machine with version 1; ``more`` are further lines of /proc/self/cgroup."""
    return Machine(
        cgroup=f"5:cpu,cpuacct:{path}\n4:memory:{path}\n1:name=systemd:{path}\n" + more,
        mounts=mount("tmpfs", "/", V2)
        + mount("cgroup", top, "/sys/fs/cgroup/cpu,cpuacct", "rw,cpu,cpuacct")
        + mount("cgroup", top, V1, "rw,memory")
        + (mount("cgroup2", "/", f"{V2}/unified") if more else ""),
        files={f"{V1}/{name}": text for name, text in files.items()},
        **rest,
    )


# name -> (machine, limit, what the deciding source is called, available)
MACHINES: dict[str, tuple[Machine, int, str, int]] = {
    "no cgroups at all": (Machine(cgroup=""), 64 * GIB, "physical memory (MemTotal)", 50 * GIB),
    "v2 desktop without limits": (
        v2(
            "/user.slice/session-2.scope",
            {"user.slice/session-2.scope/memory.max": "max\n", "user.slice/memory.high": "max\n"},
        ),
        64 * GIB,
        "physical memory (MemTotal)",
        50 * GIB,
    ),
    "v2 memory.max; file cache is available, shared memory is not": (
        v2(
            "/job",
            {
                "job/memory.max": 4 * GIB,
                "job/memory.high": "max\n",
                "job/memory.current": 3 * GIB,
                "job/memory.stat": v2_stat(inactive_file=512 * MIB, active_file=256 * MIB, shmem=GIB, anon=GIB),
            },
        ),
        4 * GIB,
        "cgroup v2 /sys/fs/cgroup/job/memory.max",
        4 * GIB - (3 * GIB - 768 * MIB),
    ),
    "v2 the ancestor's 2 GiB win": (
        v2(
            "/batch/job",
            {
                "batch/job/memory.max": 4 * GIB,
                "batch/job/memory.current": 100 * MIB,
                "batch/memory.max": 2 * GIB,
                "batch/memory.current": 1536 * MIB,
            },
        ),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/batch/memory.max",
        512 * MIB,
    ),
    "v2 the roomier ancestor has less left": (
        v2(
            "/batch/job",
            {
                "batch/job/memory.max": 2 * GIB,
                "batch/job/memory.current": 0,
                "batch/memory.max": 4 * GIB,
                "batch/memory.current": 3 * GIB,
            },
        ),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/batch/job/memory.max",
        1 * GIB,
    ),
    "v2 memory.high 3 GiB wins over max": (
        v2("/job", {"job/memory.max": 4 * GIB, "job/memory.high": 3 * GIB, "job/memory.current": GIB}),
        3 * GIB,
        "cgroup v2 /sys/fs/cgroup/job/memory.high",
        2 * GIB,
    ),
    "v2 memory controller on at an ancestor only": (
        v2("/pod/container/thread", {"pod/memory.max": 2 * GIB, "pod/memory.current": GIB}),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/pod/memory.max",
        1 * GIB,
    ),
    "v2 container with its own namespace": (
        v2("/", {"memory.max": 2 * GIB, "memory.current": GIB}),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/memory.max",
        1 * GIB,
    ),
    "v2 container, mount root is our own group": (
        v2("/docker/abc", {"memory.max": 2 * GIB, "memory.current": GIB}, top="/docker/abc"),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/memory.max",
        1 * GIB,
    ),
    "v2 a group inside a container whose mount root is the container": (
        v2(
            "/docker/abc/inner",
            {"inner/memory.max": GIB, "inner/memory.current": 0, "memory.max": 2 * GIB},
            top="/docker/abc",
        ),
        1 * GIB,
        "cgroup v2 /sys/fs/cgroup/inner/memory.max",
        1 * GIB,
    ),
    "v2 mount root outside our namespace": (
        v2("/", {"memory.max": 2 * GIB, "memory.current": GIB}, top="/.."),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/memory.max",
        1 * GIB,
    ),
    "v2 our group outside our namespace; a namesake outside the mount is not ours": (
        v2("/../other", {"memory.max": 2 * GIB, "memory.current": GIB, "../other/memory.max": MIB}),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/memory.max",
        1 * GIB,
    ),
    "v2 path told as the host sees it, but mounted from the top": (
        v2("/pods/ctr", {"memory.max": 2 * GIB, "memory.current": GIB, "pods/ctr/memory.max": GIB}, top="/elsewhere"),
        1 * GIB,
        "cgroup v2 /sys/fs/cgroup/pods/ctr/memory.max",
        1 * GIB,
    ),
    "v2 two mounts: the one that shows the ancestors counts": (
        Machine(
            cgroup="0::/pod/ctr\n",
            mounts=mount("cgroup2", "/pod/ctr", "/mnt/own") + mount("cgroup2", "/", V2),
            files={f"{V2}/pod/memory.max": 2 * GIB, f"{V2}/pod/memory.current": GIB, "/mnt/own/memory.max": 3 * GIB},
        ),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/pod/memory.max",
        1 * GIB,
    ),
    "v2 mount point with a space": (
        Machine(
            cgroup="0::/my job\n",
            mounts=mount("cgroup2", "/", "/mnt/c\\040groups"),
            files={"/mnt/c groups/my job/memory.max": 2 * GIB},
        ),
        2 * GIB,
        "cgroup v2 /mnt/c groups/my job/memory.max",
        2 * GIB,
    ),
    "v2 group removed under us": (
        Machine(cgroup="0::/gone (deleted)\n", mounts=mount("cgroup2", "/", V2), files={f"{V2}/memory.max": GIB}),
        1 * GIB,
        "cgroup v2 /sys/fs/cgroup/memory.max",
        1 * GIB,
    ),
    "v2 use over the limit leaves nothing, not less": (
        v2("/job", {"job/memory.max": GIB, "job/memory.current": GIB + MIB}),
        1 * GIB,
        "cgroup v2 /sys/fs/cgroup/job/memory.max",
        0,
    ),
    "v2 more cache than use (counters drift) is not more than the limit": (
        v2("/job", {"job/memory.max": GIB, "job/memory.current": 0, "job/memory.stat": v2_stat(inactive_file=MIB)}),
        1 * GIB,
        "cgroup v2 /sys/fs/cgroup/job/memory.max",
        1 * GIB,
    ),
    "v1 nested path with the sentinel has no limit": (
        v1(
            "/a/b",
            {
                "a/b/memory.limit_in_bytes": V1_SENTINEL,
                "a/b/memory.usage_in_bytes": 60 * GIB,
                "a/b/memory.stat": v1_stat(V1_SENTINEL),
                "a/memory.limit_in_bytes": V1_SENTINEL,
                "memory.limit_in_bytes": V1_SENTINEL,
            },
        ),
        64 * GIB,
        "physical memory (MemTotal)",
        50 * GIB,
    ),
    "v1 limit_in_bytes, cache of all groups below counted": (
        v1(
            "/job",
            {
                "job/memory.limit_in_bytes": 4 * GIB,
                "job/memory.usage_in_bytes": 3 * GIB,
                "job/memory.stat": v1_stat(4 * GIB, inactive_file=GIB, active_file=512 * MIB, shmem=GIB),
                "memory.limit_in_bytes": V1_SENTINEL,
            },
        ),
        4 * GIB,
        "cgroup v1 /sys/fs/cgroup/memory/job/memory.limit_in_bytes",
        4 * GIB - 1536 * MIB,
    ),
    "v1 the ancestor's limit wins and is named by its own file": (
        v1(
            "/pod/ctr",
            {
                "pod/ctr/memory.limit_in_bytes": V1_SENTINEL,
                "pod/ctr/memory.stat": v1_stat(2 * GIB),
                "pod/memory.limit_in_bytes": 2 * GIB,
                "pod/memory.usage_in_bytes": GIB,
                "pod/memory.stat": v1_stat(2 * GIB),
            },
        ),
        2 * GIB,
        "cgroup v1 /sys/fs/cgroup/memory/pod/memory.limit_in_bytes",
        1 * GIB,
    ),
    "v1 hierarchical_memory_limit of a group that we cannot see": (
        v1(
            "/docker/abc",
            {
                "memory.limit_in_bytes": V1_SENTINEL,
                "memory.usage_in_bytes": 512 * MIB,
                "memory.stat": v1_stat(2 * GIB, inactive_file=256 * MIB),
            },
            top="/docker/abc",
        ),
        2 * GIB,
        "cgroup v1 /sys/fs/cgroup/memory/memory.stat hierarchical_memory_limit",
        2 * GIB - 256 * MIB,
    ),
    "v1 usual container: the mount root is our own group": (
        v1(
            "/docker/abc",
            {"memory.limit_in_bytes": 2 * GIB, "memory.usage_in_bytes": GIB, "memory.stat": v1_stat(2 * GIB)},
            top="/docker/abc",
        ),
        2 * GIB,
        "cgroup v1 /sys/fs/cgroup/memory/memory.limit_in_bytes",
        1 * GIB,
    ),
    "v1 hybrid: memory in v1, an empty v2 beside it": (
        v1(
            "/process_api/ed926",
            {
                "process_api/ed926/memory.limit_in_bytes": V1_SENTINEL,
                "process_api/ed926/memory.stat": v1_stat(V1_SENTINEL),
                "memory.limit_in_bytes": V1_SENTINEL,
            },
            more="0::/\n",
        ),
        64 * GIB,
        "physical memory (MemTotal)",
        50 * GIB,
    ),
    "v1 hybrid with a limit": (
        v1(
            "/process_api/ed926",
            {"process_api/memory.limit_in_bytes": 3 * GIB, "process_api/memory.usage_in_bytes": GIB},
            more="0::/\n",
        ),
        3 * GIB,
        "cgroup v1 /sys/fs/cgroup/memory/process_api/memory.limit_in_bytes",
        2 * GIB,
    ),
    "hybrid: limits in both, the smaller wins": (
        Machine(
            cgroup="4:memory:/old\n0::/new\n",
            mounts=mount("cgroup", "/", V1, "rw,memory") + mount("cgroup2", "/", f"{V2}/unified"),
            files={f"{V1}/old/memory.limit_in_bytes": 3 * GIB, f"{V2}/unified/new/memory.max": 2 * GIB},
        ),
        2 * GIB,
        "cgroup v2 /sys/fs/cgroup/unified/new/memory.max",
        2 * GIB,
    ),
    "a limit over physical memory is none": (
        v2("/job", {"job/memory.max": 100 * GIB, "job/memory.current": 90 * GIB}),
        64 * GIB,
        "physical memory (MemTotal)",
        50 * GIB,
    ),
    "host at 95 %, container at 12 %": (
        v2(
            "/",
            {"memory.max": 8 * GIB, "memory.current": 1 * GIB, "memory.stat": v2_stat()},
            available=64 * GIB // 20,
        ),
        8 * GIB,
        "cgroup v2 /sys/fs/cgroup/memory.max",
        64 * GIB // 20 // KIB * KIB,
    ),
    "unreadable numbers say nothing": (
        v2("/job", {"job/memory.max": "?\n", "memory.max": "\n", "job/memory.high": "-1\n"}),
        64 * GIB,
        "physical memory (MemTotal)",
        50 * GIB,
    ),
}
