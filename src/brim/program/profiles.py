"""Device profiles: enough about common cards to plan a run for them on a machine that has none.

A plan made with a profile is made with the kernels of the CUDA backend, which need no device to be chosen, and equals
the plan made on the card but for the card's size and overhead; these are estimates. Sizes are what CUDA
reports as the total (what error messages of frameworks call capacity), which is less than the nominal size: the driver
keeps a part, and ECC costs a sixteenth on cards without HBM. Where reports differ, the smaller one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from brim.device import Device, find_backend

__all__ = ["PROFILES", "DeviceProfile", "ProfileDevice", "find_profile", "library_status", "profile_facts"]

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a plan needs to know about a card.

    Attributes:
        name: as given to ``--device-profile``.
        title: the product.
        memory_bytes: what a program sees as the total.
        alignment_bytes: what sizes are rounded up to.
        overhead_bytes: an estimate of context, libraries and their workspace.
        unified: the memory is shared with the host, whose programs and page cache take part of it.
        note: where the figures come from.
    """

    name: str
    title: str
    memory_bytes: int
    overhead_bytes: int
    alignment_bytes: int = 512
    unified: bool = False
    note: str = ""


# Memory sizes: data sheets of the cards at nvidia.com for the nominal size (in the title); totals as reported by
# cudaMemGetInfo or nvidia-smi in public error reports. Alignment: cudaMalloc aligns to at least 256 bytes (CUDA C++
# Programming Guide, device memory accesses); CuPy's pool and PyTorch's allocator round to 512. Overhead: a context with
# cuBLAS takes 0.3 to 0.6 GiB, more on newer architectures; cuBLAS alone recommends 32 MiB of workspace on Hopper and
# 4 MiB elsewhere (cuBLAS documentation, cublasSetWorkspace).
_CARDS: tuple[tuple[str, str, float, int, str], ...] = (
    # name, title, total in GiB, overhead in MiB, note
    ("rtx3060-12gb", "GeForce RTX 3060 12 GB", 11.75, 400, "GDDR6"),
    ("rtx3090-24gb", "GeForce RTX 3090 24 GB", 23.68, 450, "GDDR6X"),
    ("rtx4070-12gb", "GeForce RTX 4070 12 GB", 11.72, 450, "GDDR6X"),
    ("rtx4080-16gb", "GeForce RTX 4080 16 GB", 15.69, 450, "GDDR6X"),
    ("rtx4090-24gb", "GeForce RTX 4090 24 GB", 23.61, 450, "GDDR6X"),
    ("rtx5090-32gb", "GeForce RTX 5090 32 GB", 31.36, 600, "GDDR7"),
    ("t4-16gb", "Tesla T4 16 GB", 14.56, 350, "GDDR6, with ECC"),
    ("v100-16gb", "Tesla V100 16 GB", 15.77, 400, "HBM2"),
    ("v100-32gb", "Tesla V100 32 GB", 31.73, 400, "HBM2"),
    ("l4-24gb", "L4 24 GB", 22.03, 450, "GDDR6, with ECC"),
    ("l40s-48gb", "L40S 48 GB", 44.39, 450, "GDDR6, with ECC"),
    ("a100-40gb", "A100 40 GB", 39.39, 500, "HBM2"),
    ("a100-80gb", "A100 80 GB", 79.14, 500, "HBM2e"),
    ("h100-80gb", "H100 80 GB", 79.10, 600, "HBM3"),
    ("h200-141gb", "H200 141 GB", 139.72, 600, "HBM3e"),
    ("b200-180gb", "B200 180 GB", 178.35, 700, "HBM3e"),
)
_UNIFIED: tuple[tuple[str, str, float, int, str], ...] = (
    ("gb10-128gb", "GB10 (DGX Spark) 128 GB", 119.67, 600, "LPDDR5X, shared with the host"),
    ("jetson-orin-64gb", "Jetson AGX Orin 64 GB", 61.33, 400, "LPDDR5, shared with the host"),
)


def _profiles() -> dict[str, DeviceProfile]:
    found = {}
    for unified, rows in ((False, _CARDS), (True, _UNIFIED)):
        for name, title, total_gib, overhead_mib, note in rows:
            total_bytes = int(total_gib * 1024) * _MIB
            found[name] = DeviceProfile(
                name,
                title,
                total_bytes,
                overhead_mib * _MIB,
                unified=unified,
                note=f"{note}; total as reported by CUDA",
            )
    return found


PROFILES: dict[str, DeviceProfile] = _profiles()
"""All profiles by name."""


def find_profile(name: str) -> DeviceProfile:
    """The profile of a name. Raises ValueError that lists the known ones."""
    found = PROFILES.get(name.lower().replace("_", "-"))
    if found is None:
        raise ValueError(f"no device profile {name!r}; known are {', '.join(PROFILES)}")
    return found


class _ProfileBackend:
    """The CUDA backend with a profile's alignment: says what kernels need, runs none."""

    shares_host_memory = False

    def __init__(self, backend: Any, profile: DeviceProfile) -> None:
        self._backend = backend
        self.alignment_bytes = max(profile.alignment_bytes, backend.alignment_bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _planner(name: str) -> Any:
    """The CUDA backend as it chooses kernels for a profile's card."""
    backend: Any = find_backend("cuda")
    choose = getattr(backend, "for_profile", None)
    return backend if choose is None else choose(name)


def library_status(name: str) -> str:
    """One line on whether plans for a profile ask the vendor's library for convolutions; "" where nobody tells."""
    return str(getattr(_planner(name), "dnn_status", ""))


class ProfileDevice(Device):
    """A device that can be planned for, and not run on: a profile, with the kernel table of the CUDA backend.

    Attributes:
        profile: what it is.
        stands_on: where the model's tensors are while the step is traced.
    """

    __slots__ = ("profile", "stands_on")

    def __init__(self, profile: DeviceProfile | str, stands_on: Device) -> None:
        self.profile = find_profile(profile) if isinstance(profile, str) else profile
        self.stands_on = stands_on
        self.kind, self.index, self.name = stands_on.kind, stands_on.index, self.profile.name
        self.backend = _ProfileBackend(_planner(self.profile.name), self.profile)
        self.memory = None  # type: ignore[assignment]  # nothing is ever allocated here


def profile_facts(device: Device) -> dict[str, Any]:
    """What a ``Plan`` for a device says of its overhead, of how inputs arrive, and of its profile if it has one."""
    facts: dict[str, Any] = {"staging": bool(getattr(device.backend, "stages_inputs", False))}
    if isinstance(device, ProfileDevice):
        facts |= {"estimated": True, "overhead_bytes": device.profile.overhead_bytes, "profile": device.profile.name}
    elif device.memory is not None and device.memory.overhead_bytes:
        memory = device.memory
        facts |= {"overhead_bytes": memory.overhead_bytes, "overhead_exactness": memory.overhead_exactness}
    return facts
