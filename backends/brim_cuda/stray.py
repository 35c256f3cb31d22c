"""Memory that CuPy would take behind the guard's back: allocators that are refused, and the cap on CuPy's own pool.

brim takes device memory itself (``vram.py``), so whatever comes from CuPy's own pool is a mistake and must fail loudly.
Managed and system memory lie in host memory when the device is full: that is what a budget is there to prevent.

Source: CuPy 14, ``cupy/cuda/memory.pyx`` (rules of allocators and limits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from brim.errors import DeviceError

__all__ = ["CuPyPool", "allocator_problem", "cap", "refuse_allocators", "uncap"]


class CuPyPool(Protocol):
    """What is used of ``cupy.get_default_memory_pool()``."""

    def free_all_blocks(self) -> None:
        """Give unused blocks back."""

    def total_bytes(self) -> int:
        """What the pool holds."""

    def get_limit(self) -> int:
        """0 for none."""

    def set_limit(self, size: int) -> None:
        """0 for none."""


def allocator_problem(environ: Mapping[str, str], allocator: Any, default_pool: Any) -> str | None:
    """Why brim does not start beside this allocator of CuPy; None if it does.

    Arguments:
        environ: the environment variables.
        allocator: what ``cupy.cuda.get_allocator()`` gives.
        default_pool: what ``cupy.get_default_memory_pool()`` gives.
    """
    unified = environ.get("CUPY_ENABLE_UMP", "").strip()
    if unified not in ("", "0"):
        return (
            f"the environment variable CUPY_ENABLE_UMP is {unified!r}: CuPy would then take host memory for device "
            "memory, so that no budget of the device holds. Take it out of the environment (or set it to 0)"
        )
    owner = getattr(allocator, "__self__", None)
    name = str(getattr(allocator, "__name__", type(allocator).__name__))
    if owner is default_pool and name == "malloc":
        return None
    if owner is None or type(owner).__name__ == "module":
        if name == "_malloc":  # cudaMalloc without a pool: `cupy.cuda.set_allocator(None)`
            return None
        kind = {
            "malloc_managed": "managed memory, which moves to host memory when the device is full",
            "malloc_system": "host memory",
            "malloc_async": "the driver's asynchronous pool, whose size nobody can bound",
        }.get(name, "memory that brim cannot account for")
    else:
        name = f"{type(owner).__name__}.{name}"
        asynchronous = type(owner).__name__ == "MemoryAsyncPool"
        kind = (
            "the driver's asynchronous pool, whose size nobody can bound"
            if asynchronous
            else ("memory that brim cannot account for: it may be managed memory")
        )
    return (
        f"CuPy's allocator was set to {name}, which gives {kind}. Take out that call of "
        "`cupy.cuda.set_allocator`; `cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)` undoes it"
    )


def refuse_allocators(environ: Mapping[str, str], allocator: Any, default_pool: Any) -> None:
    """Raise DeviceError with the text of ``allocator_problem``, if there is one."""
    problem = allocator_problem(environ, allocator, default_pool)
    if problem is not None:
        raise DeviceError(f"device 'cuda' does not start: {problem}.")


def cap(pool: CuPyPool) -> tuple[int, int]:
    """Let CuPy's pool give nothing more on the current device: whatever asks it fails with a limit of 1 byte.

    Returns:
        The limit of before (0 for none), for ``uncap``; and the bytes that arrays of the user hold there already.
    """
    pool.free_all_blocks()
    before = pool.get_limit()
    pool.set_limit(size=1)  # 0 would mean no limit
    return before, pool.total_bytes()


def uncap(pool: CuPyPool, limit_bytes: int) -> None:
    """Put back the limit that ``cap`` returned."""
    pool.set_limit(size=limit_bytes)
