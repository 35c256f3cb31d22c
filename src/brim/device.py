"""Devices: ``brim.device("cpu")``, and the discovery of the backends that serve them.

A backend is a package with an entry point in the group ``brim.backends``; nothing here knows CuPy or NumPy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from brim.backend import Backend
from brim.context import context
from brim.errors import DeviceError
from brim.memory.guard import DeviceMemory

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "Device",
    "available_backends",
    "default_device",
    "device",
    "find_backend",
    "meta",
    "process_default",
    "set_default_device",
]

_devices: dict[tuple[str, int], Device] = {}
_backends: dict[str, Backend] = {}
_lock = threading.RLock()
_default = "cpu"

META = "meta"
"""Device of tensors that have a spec and no memory: building a model on it costs nothing."""


class Device:
    """A place where tensors live. Two equal names are one object.

    Attributes:
        kind: "cpu", "cuda" or what a third party registered; "meta" for tensors without memory.
        index: number of the device of that kind.
        backend: kernels and raw memory.
        memory: budget, pool and ledger.
    """

    __slots__ = ("backend", "index", "kind", "memory", "name")

    def __init__(self, kind: str, index: int, backend: Backend | None) -> None:
        self.kind, self.index = kind, index
        self.name = kind if kind in ("cpu", META) else f"{kind}:{index}"
        self.backend: Backend = backend  # type: ignore[assignment]  # meta tensors never reach a kernel
        self.memory: DeviceMemory = None  # type: ignore[assignment]
        if backend is not None:
            host = None if kind == "cpu" else device("cpu").memory
            self.memory = DeviceMemory(self.name, backend, index, host)

    @property
    def is_meta(self) -> bool:
        return self.kind == META

    def __repr__(self) -> str:
        return f"device({self.name!r})"

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return device, (self.name,)


def available_backends() -> dict[str, EntryPoint]:
    """Entry points of all installed backends by device kind; none of them is loaded."""
    from importlib.metadata import entry_points  # a tenth of the time of `import brim`

    return {entry.name: entry for entry in entry_points(group="brim.backends")}


def find_backend(kind: str) -> Backend:
    """The backend of a kind, whether it has devices here or not. Raises DeviceError where none is installed."""
    if kind not in _backends:
        entries = available_backends()
        if kind not in entries:
            known = ", ".join(sorted(entries)) or "none: is brim installed (pip install .)?"
            raise DeviceError(f"no backend is installed for device {kind!r} (installed: {known})")
        _backends[kind] = entries[kind].load()()
    return _backends[kind]


def device(name: str | Device | None = None) -> Device:
    """The device of a name such as "cpu", "cuda" or "cuda:1"; None gives the default device (see ``meta``).

    Raises:
        DeviceError: no such backend, no such index, or exactly what the backend lacks on this machine.
    """
    if isinstance(name, Device):
        return name
    if name is None:
        if context.default_device is not None:
            chosen: Device = context.default_device
            return chosen
        name = _default
    if not isinstance(name, str):
        raise DeviceError(f"a device is named by a string such as 'cpu' or 'cuda:0', got {name!r}")
    kind, colon, digits = name.partition(":")
    if colon and not digits.isdecimal():
        raise DeviceError(f"device {name!r}: the part after ':' is a number, as in '{kind}:0'")
    index = int(digits) if digits else 0
    with _lock:
        found = _devices.get((kind, index))
        if found is None:
            backend = None
            if kind != META:
                backend = find_backend(kind)
                count = backend.count()
                if index >= count:
                    raise DeviceError(
                        f"device {name!r} does not exist: there are {count} ({kind}:0 to {kind}:{count - 1})"
                    )
            found = _devices[kind, index] = Device(kind, index, backend)
        return found


def default_device() -> Device:
    """The device of tensors that are made without naming one: "cpu" until ``set_default_device``."""
    return device(None)


def process_default() -> Device:
    """What ``set_default_device`` chose, also inside ``meta()``: where something without values would be computed."""
    return device(_default)


def set_default_device(name: str | Device) -> None:
    """Make tensors on this device unless told otherwise. Raises DeviceError if it is not there."""
    global _default
    _default = device(name).name


@contextmanager
def meta() -> Iterator[None]:
    """Tensors made inside without naming a device have a shape and no memory, however large: ``with brim.meta(): ...``.

    Only the calling thread is concerned.
    """
    before = context.default_device
    context.default_device = device(META)
    try:
        yield
    finally:
        context.default_device = before
