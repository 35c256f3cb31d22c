"""The memory of batches: never written while somebody holds it, used again when nobody does, right for any array."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import brim
import brim.data.loader
import brim.data.rows
from brim.data import ArrayDataset, Compose, DataLoader, Flatten, Normalize
from brim.data.rows import ArrayReader, _Reused, in_memory, reader
from brim.device import find_backend

Array = np.ndarray[Any, Any]
N, WIDTH, BATCH = 60, 5, 8


def dataset(**settings: Any) -> ArrayDataset:
    """Sample ``i`` is (five times i, -i)."""
    return ArrayDataset(np.repeat(np.arange(N, dtype=np.float32), WIDTH).reshape(N, WIDTH), -np.arange(N), **settings)


def reads_of(data: ArrayDataset, loader: DataLoader, epoch: int = 0) -> list[tuple[Array, ...]]:
    """The batches of an epoch, as the dataset itself gives them."""
    order = loader.order(epoch)
    return [data.batch(order[start : start + loader.batch_size]) for start in range(0, len(data), loader.batch_size)]


HELD_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "array": lambda batch: batch[0],
    "view": lambda batch: batch[0][:, 1:3],
    "view of a view": lambda batch: batch[0].reshape(-1)[3:][::2],
    "memoryview": lambda batch: memoryview(batch[0]),
    "asarray": lambda batch: np.asarray(batch[0]).T,
    "dlpack": lambda batch: np.from_dlpack(batch[0])[1:],
    "flat": lambda batch: batch[0].flat,
    "inside": lambda batch: {"deep": [(batch[0],)]},
}

HELD_TENSORS: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda batch: batch[0],
    "detached": lambda batch: batch[0].detach(),
    "part": lambda batch: batch[0][1:, 2],
    "numpy": lambda batch: batch[0].numpy(),
    "view of numpy": lambda batch: batch[0].numpy()[:, ::2],
    "memoryview": lambda batch: memoryview(batch[0].numpy()),
    "for gradients": lambda batch: (batch[0].requires_grad_() * 1.0,),
}


def copied(held: Any) -> Array:
    while isinstance(held, dict | list | tuple):
        held = held["deep"] if isinstance(held, dict) else held[0]
    return np.array(held.detach().numpy() if isinstance(held, brim.Tensor) else held)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flattened"])
@pytest.mark.parametrize("hold", [pytest.param(hold, id=name) for name, hold in HELD_ARRAYS.items()])
def test_what_is_held_of_an_array_is_never_overwritten(hold: Any, flatten: bool, prefetch: int) -> None:
    data = dataset(transform=Flatten() if flatten else None)  # which gives a view of what it gets
    loader = DataLoader(data, BATCH, shuffle=True, to_tensor=False, prefetch=prefetch)
    held = [hold(batch) for batch in loader]
    for got, want in zip(held, reads_of(data, loader), strict=True):
        np.testing.assert_array_equal(copied(got), copied(hold(want)))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("hold", [pytest.param(hold, id=name) for name, hold in HELD_TENSORS.items()])
def test_what_is_held_of_a_tensor_is_never_overwritten(hold: Any, prefetch: int) -> None:
    loader = DataLoader(data := dataset(), BATCH, shuffle=True, prefetch=prefetch)
    held = [hold(batch) for batch in loader]
    for got, want in zip(held, reads_of(data, loader), strict=True):
        np.testing.assert_array_equal(copied(got), copied(hold([brim.asarray(field) for field in want])))


def test_only_some_batches_are_held() -> None:
    loader = DataLoader(data := dataset(), 2, shuffle=True, to_tensor=False)
    held = [batch for number, batch in enumerate(loader) if number % 3 == 0]
    for got, want in zip(held, reads_of(data, loader)[::3], strict=True):
        np.testing.assert_array_equal(got[0], want[0])


def test_a_transform_may_keep_what_it_got() -> None:
    kept: list[Array] = []

    def keeping(batch: Array) -> Array:
        kept.append(batch)
        return batch + 1

    loader = DataLoader(dataset(transform=keeping), BATCH, to_tensor=False, prefetch=0)
    for got, before in zip([batch[0] for batch in loader], kept, strict=True):
        np.testing.assert_array_equal(got, before + 1)


@pytest.mark.skipif(not hasattr(sys, "getrefcount"), reason="this Python does not count references")
@pytest.mark.parametrize("transform", [None, Flatten(), Normalize()], ids=["plain", "view", "new"])
def test_what_nobody_holds_is_used_again(transform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    take = _Reused.take

    def noted(self: Any) -> Any:
        found = take(self)
        made.append(found.ctypes.data if isinstance(found, np.ndarray) else id(found.record))
        return found

    monkeypatch.setattr(_Reused, "take", noted)
    for to_tensor in (False, True):
        made.clear()
        for _ in DataLoader(dataset(transform=transform), BATCH, shuffle=True, to_tensor=to_tensor):
            pass
        whole = N // BATCH
        assert len(made) == 2 * whole
        assert len(set(made)) <= 4, "two pieces of memory take turns, for each of two fields"


def test_tensors_of_an_epoch_take_the_memory_of_two_batches_and_give_it_back() -> None:
    gc.collect()
    before = brim.memory_stats()
    brim.reset_peak_memory()
    for x, _y in DataLoader(dataset(), 4):
        assert x.shape == (4, WIDTH)
        live = brim.memory_stats()["live_bytes"] - before["live_bytes"]
    after = brim.memory_stats()
    one = 2 * 128  # 80 bytes and 32, in whole cache lines
    assert live <= 2 * one
    assert after["peak_bytes"] - before["live_bytes"] <= 2 * one
    assert after["allocations"] - before["allocations"] == 4
    del x, _y
    gc.collect()
    assert brim.memory_stats()["live_bytes"] == before["live_bytes"]


def test_two_threads_never_get_the_same_piece() -> None:
    pieces: _Reused[list[int]] = _Reused(lambda: [0], 4)
    wrong: list[int] = []

    def use(mark: int) -> None:
        for _ in range(3000):
            piece = pieces.take()
            piece[0] = mark
            if piece[0] != mark:
                wrong.append(mark)
            del piece

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(mark,)) for mark in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch_s)
    assert not wrong


# -------------------------------------------------------------------- arrays of all kinds

RNG = np.random.default_rng(0)
KINDS: dict[str, Array] = {
    "bool": RNG.random((N, 3)) < 0.5,
    "uint8 images": RNG.integers(0, 256, (N, 1, 4, 4)).astype(np.uint8),
    "bfloat16": RNG.random((N, 3)).astype(ml_dtypes.bfloat16),
    "complex64": RNG.random((N, 2)).astype(np.complex64),
    "numbers": RNG.random(N),
    "long rows": RNG.random((N, 6000)).astype(np.float32),
    "empty rows": np.zeros((N, 0), np.float32),
    "column-major": np.asfortranarray(RNG.random((N, 7))),
    "every other": RNG.random((2 * N, 7))[::2],
    "unaligned": np.frombuffer(b"." + RNG.random((N, 4)).tobytes(), np.float64, offset=1).reshape(N, 4),
    "read-only": np.broadcast_to(np.arange(3.0), (N, 3)),
}


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("array", [pytest.param(array, id=name) for name, array in KINDS.items()])
def test_rows_of_any_array_are_the_datasets(array: Array, prefetch: int) -> None:
    whole = ArrayDataset(array, np.arange(N))
    for data in (whole, whole.subset(np.arange(N - 1, 3, -2)), whole.subset([-1, 0, 0, -2] * 5)):
        before = array.tobytes()
        for to_tensor in (False, True):
            loader = DataLoader(data, 7, shuffle=True, to_tensor=to_tensor, prefetch=prefetch)
            for got, want in zip(loader, reads_of(data, loader), strict=True):
                for mine, theirs in zip(got, want, strict=True):
                    host = mine.numpy() if to_tensor else mine
                    assert (host.dtype, host.shape) == (theirs.dtype, theirs.shape)
                    assert host.tobytes() == theirs.tobytes()
        assert array.tobytes() == before


@pytest.mark.parametrize("order", ["row-major", "column-major"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_data_are_never_copied_as_a_whole(order: str, prefetch: int) -> None:
    x = np.zeros((2000, 1000), np.float32, order="C" if order == "row-major" else "F")
    loader = DataLoader(ArrayDataset(x), 20, shuffle=True, to_tensor=False, prefetch=prefetch)
    tracemalloc.start()
    try:
        for _ in loader:
            pass
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < x.nbytes / 8


def test_an_order_outside_of_the_dataset_is_refused() -> None:
    for order in ([0, N], [-N - 1]):
        with pytest.raises(IndexError, match=f"of a dataset with {N} samples"):
            reader(dataset(), np.asarray(order), 2, 2)
    read = reader(dataset(), np.asarray([-1, 0]), 2, 2)
    assert read.batch(0)[1].tolist() == [1 - N, 0]


def test_a_dataset_with_its_own_batches_is_asked_for_them() -> None:
    class Doubled(ArrayDataset):
        def batch(self, indices: Any) -> tuple[Array, ...]:
            return tuple(2 * field for field in super().batch(indices))

    data = Doubled(np.arange(4))
    assert not isinstance(reader(data, np.arange(4), 2, 2), ArrayReader)
    assert [batch[0].tolist() for batch in DataLoader(data, 2, to_tensor=False)] == [[0, 2], [4, 6]]


# -------------------------------------------------------------------- who copies, and where


@pytest.mark.parametrize("prefetch", [0, 1])
def test_large_batches_are_copied_by_the_backend(prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []

    class Fake:
        shares_host_memory = True

        @staticmethod
        def gather_rows(source: Array, indices: Array, out: Array, on_team: bool = True) -> None:
            calls.append((out.nbytes, on_team))
            np.take(source, indices, axis=0, out=out)

    monkeypatch.setattr(brim.data.rows, "find_backend", lambda kind: Fake)
    data = ArrayDataset(RNG.random((40, 8192)).astype(np.float32), np.arange(40))
    loader = DataLoader(data, 8, shuffle=True, to_tensor=False, prefetch=prefetch)
    for got, want in zip(loader, reads_of(data, loader), strict=True):
        np.testing.assert_array_equal(got[0], want[0])
    # The labels are too few; beside a running step the thread copies alone.
    assert calls == [(8 * 8192 * 4, prefetch == 0)] * 5


def test_the_backends_copy_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(find_backend("cpu"), "gather_rows"):
        pytest.skip("this backend does not copy rows")
    monkeypatch.setattr(brim.data.rows, "_NATIVE_BYTES", 0)
    data = dataset()
    loader = DataLoader(data, 7, shuffle=True, to_tensor=False)
    for got, want in zip(loader, reads_of(data, loader), strict=True):
        for mine, theirs in zip(got, want, strict=True):
            assert mine.tobytes() == theirs.tobytes()


class _Squares:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return index**2


def test_a_thread_is_started_where_batches_may_take_long(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with open(tmp_path / "x.npy", "r+b") as file, mmap.mmap(file.fileno(), 0) as raw:
        assert not in_memory(ArrayDataset(np.frombuffer(raw, np.uint8)))
    own = Compose(Normalize(), Compose(Flatten()))
    quick = [dataset(), dataset(transform=own), dataset().subset([1, 2])]
    slow: list[Any] = [
        ArrayDataset(mapped),
        ArrayDataset(np.arange(3), mapped[1:].reshape(-1)[:3]),
        dataset(transform=lambda batch: batch),
        dataset(transform=[None, Compose(Flatten(), lambda batch: batch)]),
        _Squares(),
    ]
    assert [in_memory(data) for data in quick] == [True] * len(quick)
    assert [in_memory(data) for data in slow] == [False] * len(slow)
    for data, threaded in [(one, False) for one in quick] + [(one, True) for one in slow]:
        batches: Any = iter(DataLoader(data, 2, to_tensor=False))
        next(batches)
        assert (batches._worker is not None) is threaded
        batches.close()


def test_a_thread_loads_while_another_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert brim.data.loader._depth(DataLoader(dataset()), "cpu") == 0
    monkeypatch.setattr(brim.data.loader, "_in_host_memory", lambda place: False)
    assert brim.data.loader._depth(DataLoader(dataset()), "cpu") == 2
    assert brim.data.loader._depth(DataLoader(dataset(), prefetch=0), "cpu") == 0


def test_batches_made_while_a_step_is_traced_are_constants_of_it() -> None:
    loader = DataLoader(dataset(), BATCH)

    def total() -> Any:
        return next(iter(loader))[0].sum()

    assert float(brim.compile(total)()) == float(np.repeat(np.arange(BATCH), WIDTH).sum())


def test_without_reference_counts_nothing_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    unused = brim.data.rows._UNUSED
    monkeypatch.setattr(brim.data.rows, "_UNUSED", -1)
    pieces: _Reused[list[int]] = _Reused(list, 4)
    assert len({id(piece) for piece in [pieces.take() for _ in range(9)]}) == 9
    assert pieces._kept == []
    if unused > 0:
        monkeypatch.setattr(brim.data.rows, "_UNUSED", unused)
        assert brim.data.rows._in_use_is_seen()
        monkeypatch.setattr(brim.data.rows, "_UNUSED", unused + 1)  # what a piece counts that somebody holds
        assert not brim.data.rows._in_use_is_seen()
