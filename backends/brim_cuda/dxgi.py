"""DXGI through ctypes: what Windows grants this process on an adapter, and what of it has moved to host memory.

Source: Microsoft, IDXGIFactory4::EnumAdapterByLuid and IDXGIAdapter3::QueryVideoMemoryInfo; the order of methods in
the interfaces' tables is that of the header dxgi1_4.h.
"""

from __future__ import annotations

import ctypes
import uuid
from typing import Any

from brim_cuda.lowlevel import LowLevelError, VideoMemory

__all__ = ["ComDxgi", "open_dxgi"]

_FACTORY4 = uuid.UUID("1bc6ea02-ef36-464f-bf0c-21ca39e5168a")
_ADAPTER3 = uuid.UUID("645967a4-1392-4310-a798-8053ce3e93fd")
_RELEASE = 2  # of IUnknown, after QueryInterface and AddRef
_ENUM_ADAPTER_BY_LUID = 26  # of IDXGIFactory4
_QUERY_VIDEO_MEMORY_INFO = 14  # of IDXGIAdapter3
_LOCAL, _NON_LOCAL = 0, 1  # DXGI_MEMORY_SEGMENT_GROUP

_FUNCTION: Any = getattr(
    ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE
)  # the calling convention of COM; one and the same on x64
_RELEASE_TYPE = _FUNCTION(ctypes.c_ulong, ctypes.c_void_p)
_ENUM_TYPE = _FUNCTION(ctypes.c_long, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))


class _Info(ctypes.Structure):
    """DXGI_QUERY_VIDEO_MEMORY_INFO"""

    _fields_ = [
        (name, ctypes.c_uint64) for name in ("budget", "current_usage", "available_for_reservation", "reservation")
    ]


_QUERY_TYPE = _FUNCTION(ctypes.c_long, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.POINTER(_Info))


def _method(pointer: ctypes.c_void_p, number: int, prototype: Any) -> Any:
    """A method of a COM object: an object starts with the address of its table of methods."""
    assert pointer.value is not None
    table = ctypes.cast(pointer.value, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))).contents
    return prototype(table[number])


class ComDxgi:
    """``brim_cuda.lowlevel.Dxgi`` over a factory object.

    Arguments:
        factory: an IDXGIFactory4; it is kept as long as this object.
    """

    def __init__(self, factory: ctypes.c_void_p) -> None:
        self._factory = factory
        self._adapters: dict[bytes, ctypes.c_void_p] = {}

    def _adapter(self, luid: bytes) -> ctypes.c_void_p:
        if luid not in self._adapters:
            if len(luid) != 8:
                raise LowLevelError(f"an adapter's LUID has 8 bytes, got {len(luid)}", 0, "not found")
            found = ctypes.c_void_p()
            enumerate_by_luid = _method(self._factory, _ENUM_ADAPTER_BY_LUID, _ENUM_TYPE)
            # A LUID is a structure of 8 bytes, which is passed as a number of 8 bytes.
            number = int.from_bytes(luid, "little", signed=True)
            code = enumerate_by_luid(self._factory, number, _ADAPTER3.bytes_le, ctypes.byref(found))
            if code < 0 or not found.value:
                text = f"EnumAdapterByLuid failed with {code & 0xFFFFFFFF:#010x}"
                raise LowLevelError(text, code, "not found")
            self._adapters[luid] = found
        return self._adapters[luid]

    def video_memory(self, luid: bytes) -> VideoMemory:
        """Budget and use of this process on the adapter. Raises LowLevelError if Windows does not tell."""
        adapter = self._adapter(luid)
        local, non_local = (self._query(adapter, group) for group in (_LOCAL, _NON_LOCAL))
        return VideoMemory(local.budget, local.current_usage, non_local.current_usage)

    def _query(self, adapter: ctypes.c_void_p, group: int) -> _Info:
        info = _Info()
        code = _method(adapter, _QUERY_VIDEO_MEMORY_INFO, _QUERY_TYPE)(adapter, 0, group, ctypes.byref(info))
        if code < 0:
            raise LowLevelError(f"QueryVideoMemoryInfo failed with {code & 0xFFFFFFFF:#010x}", code)
        return info

    def close(self) -> None:
        """Give the COM objects back."""
        for pointer in [*self._adapters.values(), self._factory]:
            if pointer.value:
                _method(pointer, _RELEASE, _RELEASE_TYPE)(pointer)
        self._adapters.clear()
        self._factory = ctypes.c_void_p()


def open_dxgi(library: Any = None) -> ComDxgi | None:
    """DXGI of this Windows; None elsewhere and on a Windows before 10.

    Arguments:
        library: the loaded dxgi.dll, for tests.
    """
    if library is None:
        loader = getattr(ctypes, "WinDLL", None)
        if loader is None:
            return None
        try:
            library = loader("dxgi.dll")
        except OSError:
            return None
    factory = ctypes.c_void_p()
    create = getattr(library, "CreateDXGIFactory2", None)
    if create is None:
        return None
    code = create(ctypes.c_uint(0), ctypes.c_char_p(_FACTORY4.bytes_le), ctypes.byref(factory))
    return ComDxgi(factory) if code >= 0 and factory.value else None
