"""Loaders: every sample once an epoch; exact resume; threads that end."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brim.data.loader
import brim.data.rows
import brim.random
from brim.data import (
    ArrayDataset,
    Cast,
    DataLoader,
    Normalize,
)
from brim.errors import CheckpointError, DataError, ShapeError
from loading import flat, loader_of, numbers, seen

Batch = tuple[np.ndarray[Any, Any], ...]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "brim-prefetch"]


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    """Every test here is also a test that no prefetch thread outlives its loop."""
    yield
    gc.collect()
    assert wait_until(lambda: not prefetch_threads()), prefetch_threads()


class TestEpochs:
    @given(
        count=st.integers(1, 60),
        batch_size=st.integers(1, 20),
        shuffle=st.booleans(),
        seed=st.integers(0, 2**64 - 1),
        prefetch=st.integers(0, 3),
    )
    @settings(max_examples=60)
    def test_every_sample_exactly_once(
        self, count: int, batch_size: int, shuffle: bool, seed: int, prefetch: int
    ) -> None:
        loader = loader_of(numbers(count), batch_size, shuffle=shuffle, seed=seed, prefetch=prefetch)
        for epoch in range(2):
            assert loader.epoch == epoch
            batches = list(loader)
            assert len(batches) == len(loader)
            sizes = [len(batch[0]) for batch in batches]
            assert sizes[:-1] == [batch_size] * (len(batches) - 1)
            assert set(sizes) == set(loader.batch_sizes)
            got = np.concatenate([batch[0] for batch in batches])
            assert sorted(got.tolist()) == list(range(count))
            assert got.tolist() == loader.order(epoch).tolist()
            for x, y in batches:
                assert (x == -y).all()

    def test_without_shuffle_the_order_is_the_datasets(self) -> None:
        assert seen(loader_of(numbers(5), 2)) == [[0, 1], [2, 3], [4]]

    def test_order_is_a_function_of_seed_and_epoch(self) -> None:
        data = numbers(50)
        one, two = (loader_of(data, 7, shuffle=True, seed=3, prefetch=prefetch) for prefetch in (0, 2))
        first, second = seen(one), seen(one)
        assert first != second
        assert [seen(two), seen(two)] == [first, second]
        two.set_epoch(0)
        assert seen(two) == first
        assert seen(loader_of(data, 7, shuffle=True, seed=4)) != first

    def test_drop_last(self) -> None:
        loader = loader_of(numbers(10), 4, drop_last=True)
        assert len(loader) == 2
        assert loader.batch_sizes == (4,)
        assert seen(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert len(loader_of(numbers(8), 4, drop_last=True)) == 2
        assert loader_of(numbers(10), 4).batch_sizes == (4, 2)
        assert loader_of(numbers(3), 4).batch_sizes == (3,)

    def test_leaving_early_ends_the_epoch(self) -> None:
        loader = loader_of(numbers(6), 2, shuffle=True)
        for _ in loader:
            break
        assert (loader.epoch, loader.position) == (0, 1)
        assert flat(loader) == loader.order(1).tolist()
        assert (loader.epoch, loader.position) == (2, 0)

    def test_an_iterator_without_a_batch_does_not_count(self) -> None:
        loader = loader_of(numbers(6), 2, shuffle=True)
        iter(loader)
        iter(loader)
        assert loader.epoch == 0
        assert flat(loader) == loader.order(0).tolist()

    def test_only_the_latest_loop_moves_the_state(self) -> None:
        loader = loader_of(numbers(6), 2, shuffle=True)
        outer = iter(loader)
        next(outer)
        inner = iter(loader)
        assert flat(inner) == loader.order(1).tolist()
        assert loader.state_dict() | {"epoch": 2, "position": 0} == loader.state_dict()
        assert flat(outer) == loader.order(0).tolist()[2:]
        assert (loader.epoch, loader.position) == (2, 0)

    def test_an_exhausted_iterator_stays_exhausted(self) -> None:
        loader = loader_of(numbers(3), 2)
        batches = iter(loader)
        assert len(list(batches)) == 2
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(batches)
        assert loader.epoch == 1

    def test_spec(self) -> None:
        loader = loader_of(ArrayDataset(np.zeros((5, 2, 2), np.uint8), np.zeros(5), transform=Normalize()), 3)
        assert [str(spec) for spec in loader.spec()] == ["float32[3x2x2]", "float64[3]"]
        assert [spec.shape for spec in loader.spec(2)] == [(2, 2, 2), (2,)]

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"batch_size": 0}, ValueError, "batch_size is at least 1, not 0"),
            ({"batch_size": 2.0}, TypeError, "batch_size is an integer, not a float"),
            ({"batch_size": True}, TypeError, "batch_size is an integer"),
            ({"batch_size": 1, "seed": -1}, ValueError, "seed is at least 0"),
            ({"batch_size": 1, "seed": 2**64}, ValueError, r"seed is at most 2\*\*64 - 1"),
            ({"batch_size": 1, "seed": "0"}, TypeError, "seed is an integer"),
            ({"batch_size": 1, "prefetch": -1}, ValueError, "prefetch is at least 0"),
            (
                {"batch_size": 11, "drop_last": True},
                ValueError,
                "no batch from 10 samples; use a batch_size of at most 10",
            ),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            loader_of(numbers(10), **settings)

    def test_bad_datasets(self) -> None:
        with pytest.raises(DataError, match="empty"):
            loader_of(numbers(0))
        for dataset in (np.zeros((3, 2)), (np.zeros(3), np.zeros(3)), 5):
            with pytest.raises(TypeError, match="ArrayDataset"):
                loader_of(dataset)


class TestOtherDatasets:
    def test_samples_are_stacked(self) -> None:
        class Squares:
            def __len__(self) -> int:
                return 5

            def __getitem__(self, index: int) -> Any:
                return np.full((2,), index, np.float32), index**2, 0.5

        batches = list(loader_of(Squares(), 3))
        assert [field.dtype.name for field in batches[0]] == ["float32", "int64", "float32"]
        assert batches[1][0].tolist() == [[3, 3], [4, 4]]
        assert batches[1][1].tolist() == [9, 16]
        assert [spec.shape for spec in loader_of(Squares(), 3).spec()] == [(3, 2), (3,), (3,)]

    def test_bare_samples_make_one_field(self) -> None:
        assert [len(batch) for batch in loader_of([np.zeros(2), np.ones(2), np.ones(2)], 2)] == [1, 1]

    def test_uneven_samples_are_named(self) -> None:
        with pytest.raises(ShapeError, match=r"field 0 .* \(2,\), \(3,\)"):
            list(loader_of([np.zeros(2), np.zeros(3)], 2))
        with pytest.raises(ShapeError, match="number of fields"):
            list(loader_of([(1, 2), (1,)], 2))


class TestResume:
    @given(
        count=st.integers(1, 40),
        batch_size=st.integers(1, 9),
        shuffle=st.booleans(),
        drop_last=st.booleans(),
        prefetch=st.integers(0, 4),
        stop=st.integers(0, 60),
    )
    @settings(max_examples=80)
    def test_resuming_anywhere_equals_never_stopping(
        self, count: int, batch_size: int, shuffle: bool, drop_last: bool, prefetch: int, stop: int
    ) -> None:
        def make(seed: int) -> DataLoader:
            return loader_of(
                numbers(count),
                min(batch_size, count),
                shuffle=shuffle,
                drop_last=drop_last,
                seed=seed,
                prefetch=prefetch,
            )

        def run(loader: DataLoader, epochs: int, limit: int) -> list[tuple[int, list[int]]]:
            out: list[tuple[int, list[int]]] = []
            while loader.epoch < epochs:
                for batch in loader:
                    out.append((loader.epoch, batch[0].tolist()))
                    if len(out) == limit:
                        return out
            return out

        whole = run(make(5), 3, -1)
        loader = make(5)
        before = run(loader, 3, stop or -2) if stop else []
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = make(99)  # the state brings its seed along
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert before + run(resumed, 3, -1) == whole

    @pytest.mark.parametrize("prefetch", [0, 3])
    def test_prefetched_batches_do_not_count(self, prefetch: int) -> None:
        reads: list[int] = []

        def note(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            reads.append(int(batch[0]))
            return batch

        loader = loader_of(numbers(10, transform=note), 1, prefetch=prefetch)
        batches = iter(loader)
        next(batches)
        assert wait_until(lambda: len(reads) == 1 + prefetch)  # as far ahead as allowed ...
        time.sleep(0.02)
        assert reads == list(range(1 + prefetch))  # ... and no further
        assert loader.state_dict()["position"] == 1

    def test_a_finished_epoch_resumes_as_finished(self) -> None:
        loader = loader_of(numbers(4), 2)
        batches = iter(loader)
        next(batches), next(batches)
        state = loader.state_dict()
        assert (state["epoch"], state["position"]) == (0, 2)
        other = loader_of(numbers(4), 2)
        other.load_state_dict(state)
        assert list(other) == []
        assert (other.epoch, other.position) == (1, 0)
        assert len(list(other)) == 2

    def test_loading_detaches_a_running_loop(self) -> None:
        loader = loader_of(numbers(6), 2)
        start = loader.state_dict()
        batches = iter(loader)
        next(batches)
        loader.load_state_dict(start)
        next(batches)
        assert loader.state_dict() == start
        assert seen(loader) == [[0, 1], [2, 3], [4, 5]]

    def test_a_pickled_loader_goes_on_where_it_was(self) -> None:
        loader = loader_of(numbers(6), 2, shuffle=True)
        batches = iter(loader)
        next(batches)
        again = pickle.loads(pickle.dumps(loader))
        assert seen(again) == seen(batches)

    def test_states_that_do_not_fit_change_nothing(self) -> None:
        loader = loader_of(numbers(10), 2, shuffle=True, seed=1)
        good = loader.state_dict()
        for key, value, message in [
            ("batch_size", 3, "batch_size was 3, is 2"),
            ("num_samples", 11, "num_samples was 11, is 10"),
            ("shuffle", False, "shuffle was False"),
            ("drop_last", True, "drop_last was True"),
            ("position", 6, "at batch 6, but an epoch has 5"),
            ("position", -1, "not the state of a DataLoader"),
            ("epoch", "1", "not the state of a DataLoader"),
            ("seed", None, "not the state of a DataLoader"),
        ]:
            with pytest.raises(CheckpointError, match=message):
                loader.load_state_dict(good | {key: value})
        for bad in ({}, None, [1]):
            with pytest.raises(CheckpointError, match="not the state"):
                loader.load_state_dict(bad)  # type: ignore[arg-type]  # that is the point
        assert loader.state_dict() == good

    def test_set_epoch_refuses_nonsense(self) -> None:
        with pytest.raises(ValueError, match="epoch is at least 0"):
            loader_of(numbers(3)).set_epoch(-1)


class TestThread:
    def test_gathering_and_transforms_run_on_the_thread_and_conversion_here(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        where: dict[str, set[str]] = {"transform": set(), "convert": set()}

        def transform(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            where["transform"].add(threading.current_thread().name)
            return batch

        def convert(array: np.ndarray[Any, Any], *, device: Any) -> Any:
            where["convert"].add(threading.current_thread().name)
            return ("converted", array, device)

        monkeypatch.setattr(brim.data.loader, "asarray", convert)
        batches = list(DataLoader(numbers(4, transform=transform), 2, device="there"))
        assert where == {"transform": {"brim-prefetch"}, "convert": {threading.current_thread().name}}
        assert isinstance(batches[0], tuple)
        assert [field[0::2] for field in batches[0]] == [("converted", "there")] * 2

    def test_batches_are_tensors(self) -> None:
        for x, y in DataLoader(numbers(4), 2):
            assert not isinstance(x, np.ndarray)
            assert (x.numpy() == -y.numpy()).all()

    def test_no_thread_without_prefetch(self) -> None:
        for _ in loader_of(numbers(4), 2, prefetch=0):
            assert prefetch_threads() == []
        batches = iter(loader_of(numbers(9), 2, prefetch=1))
        next(batches)
        assert len(prefetch_threads()) == 1

    def test_early_break_stops_the_thread(self) -> None:
        for _ in range(20):
            for _ in loader_of(numbers(1000), 1, prefetch=3):
                break
        assert wait_until(lambda: not prefetch_threads(), 1.0)

    def test_an_error_in_the_loop_stops_the_thread(self) -> None:
        def use() -> None:
            for _ in loader_of(numbers(1000), prefetch=2):
                raise KeyError("training failed")

        with pytest.raises(KeyError):
            use()
        assert wait_until(lambda: not prefetch_threads(), 1.0)

    def test_an_abandoned_iterator_is_collected(self) -> None:
        loader = loader_of(numbers(1000), prefetch=2)
        batches = iter(loader)
        next(batches)
        assert len(prefetch_threads()) == 1
        cycle: list[Any] = [batches]
        cycle.append(cycle)  # only the garbage collector finds it
        del batches, cycle
        gc.collect()
        assert wait_until(lambda: not prefetch_threads(), 1.0)

    @pytest.mark.parametrize("prefetch", [0, 1, 3])
    def test_errors_arrive_at_their_batch_with_their_traceback(self, prefetch: int) -> None:
        def trip_at_six(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if 6 in batch:
                raise ZeroDivisionError("sample 6 is broken")
            return batch

        loader = loader_of(numbers(10, transform=trip_at_six), 2, prefetch=prefetch)
        got = []
        with pytest.raises(ZeroDivisionError, match="sample 6 is broken") as caught:
            for batch in loader:
                got += batch[0].tolist()
        assert got == [0, 1, 2, 3, 4, 5]
        assert loader.position == 3
        assert "trip_at_six" in "".join(traceback.format_tb(caught.value.__traceback__))

    @pytest.mark.parametrize("prefetch", [0, 1, 3])
    def test_after_a_passing_error_no_batch_is_lost(self, prefetch: int) -> None:
        failures = iter([OSError("the disk was away")])

        def fragile(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if 4 in batch and (error := next(failures, None)):
                raise error
            return batch

        batches = iter(loader_of(numbers(9, transform=fragile), 2, prefetch=prefetch))
        assert seen([next(batches), next(batches)]) == [[0, 1], [2, 3]]
        with pytest.raises(OSError, match="the disk was away"):
            next(batches)
        assert seen(batches) == [[4, 5], [6, 7], [8]]

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_stop_iteration_in_a_transform_does_not_end_the_epoch(self, prefetch: int) -> None:
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            list(loader_of(numbers(4, transform=lambda batch: next(iter(()))), prefetch=prefetch))

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_an_interrupt_in_the_conversion_loses_no_batch(
        self, prefetch: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupts = iter([KeyboardInterrupt()])

        def convert(array: np.ndarray[Any, Any], *, device: Any) -> Any:
            if 2 in array and (interrupt := next(interrupts, None)):
                raise interrupt
            return array

        for module in (brim.data.loader, brim.data.rows):
            monkeypatch.setattr(module, "asarray", convert)
        loader = DataLoader(numbers(6, transform=Cast("int64")), 2, prefetch=prefetch)
        batches = iter(loader)
        next(batches)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert loader.position == 1
        assert [np.asarray(batch[0]).tolist() for batch in batches] == [[2, 3], [4, 5]]

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this platform")
    def test_ctrl_c_while_waiting_is_prompt_and_loses_no_batch(self) -> None:
        release = threading.Event()

        def slow(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if 2 in batch:
                release.wait(10)
            return batch

        batches = iter(loader_of(numbers(6, transform=slow), 2, prefetch=1))
        next(batches)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            start = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                next(batches)
            assert time.monotonic() - start < 5
        finally:
            signal.signal(signal.SIGALRM, before)
            release.set()
        assert seen(batches) == [[2, 3], [4, 5]]

    @pytest.mark.skipif(sys.platform != "linux", reason="fork is used on Linux only")
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_a_forked_child_goes_on_where_the_parent_is(self, prefetch: int) -> None:
        batches = iter(loader_of(numbers(8), 2, shuffle=True, prefetch=prefetch))
        first = seen([next(batches)])
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def child() -> None:
            sender.send(seen(batches))

        process = context.Process(target=child, daemon=True)
        process.start()
        assert receiver.poll(10), "the child hangs"
        theirs = receiver.recv()
        process.join(10)
        assert process.exitcode == 0
        assert theirs == seen(batches)
        assert len(first + theirs) == 4

    def test_close_stops_the_thread_and_next_starts_another(self) -> None:
        batches: Any = iter(loader_of(numbers(100), 2, prefetch=2))
        next(batches)
        batches.close()
        assert wait_until(lambda: not prefetch_threads(), 1.0)
        assert seen([next(batches)]) == [[2, 3]]
        batches.close()
        batches.close()

    def test_the_interpreter_ends_with_a_loop_under_way(self) -> None:
        code = (
            "import numpy as np; from brim.data import ArrayDataset, DataLoader\n"
            "data = ArrayDataset(np.zeros((1000, 1000)))\n"
            "batches = iter(DataLoader(data, 10, to_tensor=False, prefetch=2)); next(batches)"
        )
        done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, env=os.environ)
        assert (done.returncode, done.stderr) == (0, b"")


def test_equal_keys_of_a_shuffle_keep_the_order_of_a_stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(0, 5, 3000).astype(np.uint64)

    class Ties:
        def random_raw(self, n: int) -> np.ndarray[Any, Any]:
            return keys[:n]

    monkeypatch.setattr(brim.random, "philox", lambda *_: Ties())
    assert brim.random.permutation(3000, seed=0, epoch=0).tolist() == np.argsort(keys, kind="stable").tolist()


def test_the_order_of_an_epoch_is_what_it_always_was() -> None:
    assert brim.random.permutation(8, seed=3, epoch=2).tolist() == [3, 0, 6, 5, 2, 7, 1, 4]
    keys = brim.random.philox(9, 4, 1).random_raw(70_000)
    assert (brim.random.permutation(70_000, seed=9, epoch=4) == np.argsort(keys, kind="stable")).all()
