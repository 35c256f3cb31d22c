"""Memory beside the guard's own: CuPy's allocators and pool, and pinned host memory for copies. All with fakes."""

from __future__ import annotations

from typing import Any

import pytest

from brim.errors import BudgetExceeded, DeviceError
from brim_cuda.lowlevel import LowLevelError
from brim_cuda.staging import PinnedStaging
from brim_cuda.stray import allocator_problem, cap, refuse_allocators, uncap
from fake_cuda import GIB, MIB

# ---- 41: allocators, and CuPy's own pool ----


class Pool:
    """Stands for cupy.cuda.MemoryPool."""

    def __init__(self, held_bytes: int = 0) -> None:
        self.limit, self.held_bytes = 0, held_bytes

    def malloc(self, nbytes: int) -> None: ...

    def free_all_blocks(self) -> None:
        self.held_bytes = self.held_bytes // 2

    def total_bytes(self) -> int:
        return self.held_bytes

    def get_limit(self) -> int:
        return self.limit

    def set_limit(self, size: int) -> None:
        self.limit = size


class MemoryAsyncPool(Pool):
    """Has the name by which CuPy's is known."""


def malloc_managed(nbytes: int) -> None: ...


def malloc_system(nbytes: int) -> None: ...


def malloc_async(nbytes: int) -> None: ...


def _malloc(nbytes: int) -> None: ...


def test_cupys_own_allocators_are_fine() -> None:
    pool = Pool()
    for environ in ({}, {"CUPY_ENABLE_UMP": "0"}, {"CUPY_ENABLE_UMP": ""}):
        assert allocator_problem(environ, pool.malloc, pool) is None
        assert allocator_problem(environ, _malloc, pool) is None
    refuse_allocators({}, pool.malloc, pool)


@pytest.mark.parametrize(
    ("allocator", "expected"),
    [
        (malloc_managed, "malloc_managed, which gives managed memory"),
        (malloc_system, "malloc_system, which gives host memory"),
        (malloc_async, "malloc_async, which gives the driver's asynchronous pool"),
        (MemoryAsyncPool().malloc, "MemoryAsyncPool.malloc, which gives the driver's asynchronous pool"),
        (Pool().malloc, "Pool.malloc, which gives memory that brim cannot account for: it may be managed"),
        (lambda nbytes: None, "which gives memory that brim cannot account for"),
    ],
    ids=["managed", "system", "async", "async-pool", "other-pool", "function"],
)
def test_allocators_whose_memory_cannot_be_bounded_are_refused(allocator: Any, expected: str) -> None:
    with pytest.raises(DeviceError, match="device 'cuda' does not start: ") as caught:
        refuse_allocators({}, allocator, Pool())
    assert expected in str(caught.value)
    assert "cupy.cuda.set_allocator" in str(caught.value)


def test_unified_memory_is_refused_whatever_the_allocator() -> None:
    pool = Pool()
    with pytest.raises(DeviceError, match="CUPY_ENABLE_UMP is '1'"):
        refuse_allocators({"CUPY_ENABLE_UMP": "1"}, pool.malloc, pool)


def test_cupys_pool_is_capped_and_uncapped() -> None:
    pool = Pool(held_bytes=1000)
    pool.limit = 77
    assert cap(pool) == (77, 500)
    assert pool.limit == 1, "0 would be no limit"
    uncap(pool, 77)
    assert pool.limit == 77


# ---- pinned memory ----


class HostBooks:
    """Books pinned memory up to a limit, and notes what is pinned."""

    def __init__(self, limit_bytes: int = 2**40) -> None:
        self.limit_bytes, self.booked_bytes = limit_bytes, 0
        self.pinned: list[int] = []

    def charge(self, nbytes: int) -> Any:
        if self.booked_bytes + nbytes > self.limit_bytes:
            raise BudgetExceeded("the host is full")
        self.booked_bytes += nbytes

        def credit() -> None:
            self.booked_bytes -= nbytes

        return credit

    def pin(self, nbytes: int) -> bytearray:
        self.pinned.append(nbytes)
        return bytearray(nbytes)


def test_pinned_memory_is_one_buffer_that_is_reused_and_booked() -> None:
    books = HostBooks()
    staging = PinnedStaging(books.pin, books.charge, cap_bytes=64 * MIB)
    for nbytes in (1, 5000, 4096, 100):
        with staging.lend(nbytes) as buffer:
            assert len(buffer) >= nbytes
    assert books.pinned == [4096, 8192], "pages, not powers of two, and only when more is needed"
    assert books.booked_bytes == staging.nbytes == 8192
    with staging.lend(10 * GIB) as buffer:
        assert len(buffer) == 64 * MIB
    assert books.booked_bytes == 64 * MIB
    staging.release()
    staging.release()
    assert books.booked_bytes == staging.nbytes == 0


def test_large_copies_go_in_pieces() -> None:
    staging = PinnedStaging(bytearray, lambda nbytes: lambda: None, cap_bytes=8192)
    assert list(staging.pieces(20000)) == [(0, 8192), (8192, 8192), (16384, 3616)]
    assert list(staging.pieces(8192)) == [(0, 8192)]
    assert list(staging.pieces(0)) == []


def test_a_full_host_refuses_before_pinning_and_nothing_stays_booked() -> None:
    books = HostBooks(limit_bytes=10000)
    staging = PinnedStaging(books.pin, books.charge)
    with pytest.raises(BudgetExceeded), staging.lend(MIB):
        pass
    assert (books.pinned, books.booked_bytes) == ([], 0)
    with staging.lend(8192):
        pass

    def refused_by_system(nbytes: int) -> Any:
        raise LowLevelError("cudaErrorMemoryAllocation", 2)

    broken = PinnedStaging(refused_by_system, books.charge)
    books.limit_bytes = 2**40
    with pytest.raises(LowLevelError), broken.lend(4096):
        pass
    assert books.booked_bytes == 8192


def test_the_buffer_is_never_lent_twice() -> None:
    staging = PinnedStaging(bytearray, lambda nbytes: lambda: None)
    with staging.lend(10), pytest.raises(RuntimeError, match="lent already"), staging.lend(10):
        pass
    with staging.lend(10):
        pass


@pytest.mark.parametrize("cap_bytes", [0, -4096, 4095, 5000])
def test_the_cap_is_whole_pages(cap_bytes: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        PinnedStaging(bytearray, lambda nbytes: lambda: None, cap_bytes=cap_bytes)


# ---- the real CuPy, which needs no GPU for these questions ----


def test_cupys_real_allocators_are_told_apart() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy not installed")
    pool, ours = cupy.get_default_memory_pool(), cupy.cuda.get_allocator()
    managed = cupy.cuda.MemoryPool(cupy.cuda.malloc_managed)
    refused = {
        cupy.cuda.malloc_managed: "managed memory",
        cupy.cuda.memory.malloc_system: "host memory",
        cupy.cuda.malloc_async: "asynchronous pool",
        managed.malloc: "may be managed memory",
    }
    try:
        for allocator in (pool.malloc, None):
            cupy.cuda.set_allocator(allocator)
            assert allocator_problem({}, cupy.cuda.get_allocator(), pool) is None
        for allocator, expected in refused.items():
            cupy.cuda.set_allocator(allocator)
            assert expected in str(allocator_problem({}, cupy.cuda.get_allocator(), pool))
    finally:
        cupy.cuda.set_allocator(ours)


def test_cupy_has_all_that_is_called() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy not installed")
    names = (
        "CUDARuntimeError deviceGetPCIBusId eventCreate eventDestroy eventElapsedTime eventRecord eventSynchronize "
        "free getDeviceCount getDeviceProperties malloc memGetInfo memcpyAsync memcpyDeviceToDevice setDevice"
    )
    assert [name for name in names.split() if not hasattr(cupy.cuda.runtime, name)] == []
    assert int(cupy.cuda.driver.get_build_version()) >= 12000
    for name in ("free_all_blocks", "total_bytes", "get_limit", "set_limit"):
        assert callable(getattr(cupy.get_default_memory_pool(), name))
