"""The memory limits of this process's Linux control groups (version 1, version 2, or both), up to the visible top.

Sources: Linux ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``; ``cgroups(7)``, ``proc(5)``,
``cgroup_namespaces(7)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from brim.memory.procfs import host_path, limit_number, read_text, stat_lines, unescaped

__all__ = ["LimitedGroup", "limited_groups"]


class LimitedGroup(NamedTuple):
    """A control group that limits us: ours, or one around it.

    Attributes:
        limits: (name with its file, bytes) of each limit.
        available: (name, bytes): the smallest limit less what the group uses and cannot give back.
    """

    limits: tuple[tuple[str, int], ...]
    available: tuple[str, int]


class _Mount(NamedTuple):
    """A mounted cgroup hierarchy: ``point`` in the file system shows the group ``root`` and those below it."""

    version: int
    root: str
    point: str


def limited_groups(root: Path, total_bytes: int) -> Iterator[LimitedGroup]:
    """Every group from ours up to the top that has a limit below physical memory.

    Arguments:
        root: where the machine's ``/proc`` and ``/sys`` lie.
        total_bytes: physical memory; limits of at least as much limit nothing ("no limit" in version 1 is written as
            the largest multiple of the page size).
    """
    paths = _own_paths(read_text(root / "proc/self/cgroup"))
    mounts = _memory_mounts(read_text(root / "proc/self/mountinfo"))
    for version, read_groups in ((2, _groups_v2), (1, _groups_v1)):
        if version in paths:
            folders = _folders(root, paths[version], [mount for mount in mounts if mount.version == version])
            yield from read_groups(root, folders, total_bytes)


def _groups_v2(root: Path, folders: list[str], total_bytes: int) -> Iterator[LimitedGroup]:
    """``memory.max`` (the kernel kills above it) and ``memory.high`` (it slows to a crawl above it)."""
    for folder in folders:
        here = host_path(root, folder)
        found = [(f"cgroup v2 {folder}/{name}", _limit(here / name)) for name in ("memory.max", "memory.high")]
        limits = tuple((name, limit) for name, limit in found if limit is not None and limit < total_bytes)
        if limits:
            cache_bytes = _reclaimable_bytes(stat_lines(read_text(here / "memory.stat")), prefix="")
            used_bytes = _limit(here / "memory.current") or 0
            yield _group(f"cgroup v2 {folder}", limits, used_bytes - cache_bytes)


def _groups_v1(root: Path, folders: list[str], total_bytes: int) -> Iterator[LimitedGroup]:
    """``memory.limit_in_bytes`` of each group, and the kernel's minimum over all groups around ours, seen or not."""
    smallest_bytes = total_bytes
    for folder in folders:
        here = host_path(root, folder)
        limit = _limit(here / "memory.limit_in_bytes")
        if limit is not None and limit < total_bytes:
            smallest_bytes = min(smallest_bytes, limit)
            name = f"cgroup v1 {folder}/memory.limit_in_bytes"
            yield _group(f"cgroup v1 {folder}", ((name, limit),), _kept_bytes_v1(here))
    for folder in folders:  # innermost first: the smallest of all, so only what no file above said is news
        here = host_path(root, folder)
        limit = stat_lines(read_text(here / "memory.stat")).get("hierarchical_memory_limit")
        if limit is not None and limit < smallest_bytes:
            smallest_bytes = limit
            name = f"cgroup v1 {folder}/memory.stat hierarchical_memory_limit"
            yield _group(f"cgroup v1 around {folder}", ((name, limit),), _kept_bytes_v1(here))


def _kept_bytes_v1(here: Path) -> int:
    """What a version 1 group and those below it use and cannot give back."""
    stat = stat_lines(read_text(here / "memory.stat"))
    prefix = "total_" if "total_inactive_file" in stat else ""
    return (_limit(here / "memory.usage_in_bytes") or 0) - _reclaimable_bytes(stat, prefix)


def _reclaimable_bytes(stat: dict[str, int], prefix: str) -> int:
    """File cache. These two lists hold no shared memory (tmpfs), which could only be swapped; ``cache`` does."""
    return stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)


def _group(name: str, limits: tuple[tuple[str, int], ...], kept_bytes: int) -> LimitedGroup:
    available_bytes = min(limit for _, limit in limits) - max(0, kept_bytes)
    return LimitedGroup(limits, (f"{name}: limit less use", available_bytes))


def _limit(path: Path) -> int | None:
    return limit_number(read_text(path))


# --- where our groups are ---------------------------------------------------------------------------------------------


def _own_paths(cgroup_text: str) -> dict[int, str]:
    """{version: path of our group} from ``/proc/self/cgroup``; a hybrid layout has both versions."""
    paths: dict[int, str] = {}
    for line in cgroup_text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and hierarchy == "0" and not controllers:
            paths[2] = path
        elif colon and "memory" in controllers.split(","):
            paths[1] = path
    return paths


def _memory_mounts(mountinfo_text: str) -> list[_Mount]:
    """Cgroup mounts that can hold memory limits, in mount order."""
    mounts = []
    for line in mountinfo_text.splitlines():
        before, _, after = line.partition(" - ")
        columns, behind = before.split(" "), after.split(" ")
        if len(columns) < 5 or len(behind) < 3:
            continue
        kind, options = behind[0], behind[2].split(",")
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options else 0
        if version:
            mounts.append(_Mount(version, unescaped(columns[3]), unescaped(columns[4])))
    return mounts


def _folders(root: Path, path: str, mounts: list[_Mount]) -> list[str]:
    """Folders of our group and of each group around it that a mount shows, innermost first.

    A mount need not show the hierarchy from its top: in a container its root is often our own group.
    """
    if not mounts:
        return []
    showing = [(mount, below) for mount in mounts if (below := _below(path, mount.root)) is not None]
    if showing:  # the one that shows most groups around ours; of equal ones the last, which covers the others
        mount, names = min(reversed(showing), key=lambda shown: len(_names(shown[0].root)))
    else:  # the path is told as another namespace sees it: what the mount shows is ours, or around ours
        mount, names = mounts[-1], _names(path)
        if ".." in names or not host_path(root, "/".join([mount.point, *names])).is_dir():
            names = []
    top = mount.point.rstrip("/")
    return ["/".join([top, *names[:depth]]) for depth in range(len(names), -1, -1)]


def _below(path: str, top: str) -> list[str] | None:
    """Names that lead from group ``top`` down to ``path``; None if it does not lie there."""
    names, above = _names(path), _names(top)
    below = names[len(above) :]
    return below if names[: len(above)] == above and ".." not in below else None


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name]
