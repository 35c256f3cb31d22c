"""The pool and the ledger: rounding, reuse, exact books after every event, and refusals that name what is free."""

from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.memory.ledger import BlockRecord, Ledger
from brim.memory.pool import Block, Pool, Refusal, round_up


class Refused(MemoryError):
    """What the test pools raise, with the reason attached."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


def make_pool(limit: int | None = None, *, alignment: int = 64, small: int = 0, available: int | None = None) -> Pool:
    return Pool(
        lambda nbytes: np.empty(nbytes, np.uint8),
        Ledger("cpu"),
        alignment_bytes=alignment,
        small_bytes=small,
        limit=lambda: limit,
        available=lambda _nbytes: available,
        refuse=Refused,
    )


def take(pool: Pool, nbytes: int, category: str = "temps") -> Block:
    return pool.allocate(nbytes, BlockRecord(nbytes, category, "test", "", None))


@pytest.mark.parametrize(
    ("nbytes", "aligned_512", "aligned_64"),
    [(0, 0, 0), (1, 512, 64), (511, 512, 512), (512, 512, 512), (513, 1024, 576), (4097, 4608, 4160)],
)
def test_rounding_is_booked_as_its_own_kind(nbytes: int, aligned_512: int, aligned_64: int) -> None:
    for alignment, want in ((512, aligned_512), (64, aligned_64)):
        assert round_up(nbytes, alignment) == want
        pool = make_pool(alignment=alignment)
        block = take(pool, nbytes)
        assert pool.ledger.live_bytes == want
        assert pool.ledger.by_kind["temps"] == nbytes
        assert pool.ledger.by_kind["rounding"] == want - nbytes
        del block
        assert pool.ledger.live_bytes == 0


@pytest.mark.parametrize("small", [0, 1 << 20], ids=["segments", "one by one"])
def test_what_the_system_refuses_is_not_booked(small: int) -> None:
    pool = make_pool(small=small)
    kept = take(pool, 100)
    held_bytes, pool._allocate = pool.held_bytes, _no_memory
    with pytest.raises(MemoryError, match="the system has none"):
        take(pool, 5000)
    assert pool.held_bytes == held_bytes
    assert pool.ledger.live_bytes == kept.record.reserved_bytes


def _no_memory(nbytes: int) -> None:
    raise MemoryError(f"the system has none for {nbytes} bytes")


def test_zero_bytes_cost_nothing() -> None:
    pool = make_pool(limit=0)
    block = take(pool, 0)
    assert pool.held_bytes == pool.ledger.live_bytes == 0
    assert block.buffer is None or block.buffer.size == 0


def test_exactly_the_rest_fits_and_one_byte_more_does_not() -> None:
    pool = make_pool(limit=4096)
    first = take(pool, 1024)
    rest = take(pool, 3072)
    del rest
    pool.release_cached()
    with pytest.raises(Refused) as caught:
        take(pool, 3073)
    assert caught.value.refusal.live_bytes == 1024
    assert take(pool, 3072).record.reserved_bytes == 3072
    del first


def test_a_fragmented_pool_is_told_from_a_full_one() -> None:
    pool = make_pool(limit=4096)
    whole = take(pool, 4096)
    del whole
    blocks = [take(pool, 1024) for _ in range(4)]  # four pieces of one segment
    del blocks[2], blocks[0]
    with pytest.raises(Refused) as caught:
        take(pool, 2048)
    refusal = caught.value.refusal
    assert refusal.total_free_bytes == 2048
    assert refusal.largest_hole_bytes == 1024
    del blocks
    assert take(pool, 4096) is not None  # coalesced again
    full = make_pool(limit=1024)
    keep = take(full, 1024)
    with pytest.raises(Refused) as caught:
        take(full, 64)
    assert caught.value.refusal.total_free_bytes == 0
    del keep


def test_freed_blocks_are_reused_at_the_same_place() -> None:
    pool = make_pool()
    first = take(pool, 1 << 20)
    place = first.record.offset_bytes, id(first.buffer)
    buffer = first.buffer  # keeps the id valid
    del first
    again = take(pool, 1 << 20)
    assert (again.record.offset_bytes, id(again.buffer)) == place
    assert again.buffer is buffer
    assert pool.held_bytes == 1 << 20


def test_free_segments_are_given_back_before_refusing() -> None:
    pool = make_pool(limit=8192)
    block = take(pool, 6000)
    del block
    assert pool.held_bytes == 6016
    assert take(pool, 8192).record.reserved_bytes == 8192


def test_the_host_is_asked_and_its_refusal_is_told_apart() -> None:
    pool = make_pool(limit=1 << 30, available=1 << 20)
    with pytest.raises(Refused) as caught:
        take(pool, 2 << 20)
    assert caught.value.refusal.reason == "host"
    assert pool.held_bytes == 0


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 300_000), st.sampled_from(["params", "temps", "grads"])), max_size=60
    )
)
def test_books_are_exact_after_every_event(events: list[tuple[bool, int, str]]) -> None:
    pool = make_pool(small=4096)
    live: list[Block] = []
    peak = 0
    for is_free, number, category in events:
        if is_free and live:
            live.pop(number % len(live))
        else:
            live.append(take(pool, number, category))
        want = sum(block.record.reserved_bytes for block in live)
        peak = max(peak, want)
        assert pool.ledger.live_bytes == sum(pool.ledger.by_kind.values()) == want
        assert pool.held_bytes == want + pool.free_bytes
        spans = sorted(
            (id(b.buffer), b.record.offset_bytes, b.record.reserved_bytes) for b in live if b.record.segment is not None
        )
        for (buffer, start, size), (next_buffer, next_start, _) in itertools.pairwise(spans):
            assert buffer != next_buffer or start + size <= next_start, "two live blocks overlap"
    assert pool.ledger.peak_bytes == peak
    live.clear()
    assert pool.ledger.live_bytes == 0
    pool.release_cached()
    assert pool.held_bytes == 0


def test_recategorising_moves_bytes_between_kinds() -> None:
    pool = make_pool()
    block = take(pool, 1000)
    block.recategorise("activations", "net.0")
    assert pool.ledger.by_kind["temps"] == 0
    assert pool.ledger.by_kind["activations"] == 1000
    assert block.record.layer == "net.0"


def test_blocks_in_reference_cycles_come_back_with_the_collector() -> None:
    pool = make_pool()
    cycle: list[object] = [take(pool, 4096)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    pool.settle()
    assert pool.ledger.live_bytes == 0


def test_eight_threads_never_exceed_the_limit() -> None:
    limit = 256 * 1024
    pool = make_pool(limit=limit, small=1024)
    excess: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        mine: list[Block] = []
        for _ in range(300):
            try:
                mine.append(take(pool, int(rng.integers(1, 20_000))))
            except Refused:
                mine.clear()
            if pool.held_bytes > limit:
                excess.append(pool.held_bytes)
            if len(mine) > 4:
                mine.pop(int(rng.integers(len(mine))))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.settle()
    assert not excess
    assert pool.peak_held_bytes <= limit
    assert pool.ledger.live_bytes == 0
