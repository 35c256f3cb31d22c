"""Datasets, transforms and loaders: rows, views and splits; every sample once; exact resume; threads that end."""

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
    Compose,
    DataLoader,
    Flatten,
    Normalize,
    train_validation_split,
    transform_config,
    transform_from_config,
)
from brim.errors import CheckpointError, DataError, DTypeError, ShapeError

Batch = tuple[np.ndarray[Any, Any], ...]


def numbers(count: int, **settings: Any) -> ArrayDataset:
    """Sample ``i`` is (i, -i)."""
    return ArrayDataset(np.arange(count), -np.arange(count), **settings)


def loader_of(dataset: Any, batch_size: int = 1, **settings: Any) -> DataLoader:
    """A loader that gives NumPy arrays."""
    return DataLoader(dataset, batch_size, to_tensor=False, **settings)


def seen(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [number for batch in seen(batches) for number in batch]


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


class TestArrayDataset:
    def test_reads_samples_slices_and_batches(self) -> None:
        x, y = np.arange(12).reshape(4, 3), np.array([3, 2, 1, 0])
        data = ArrayDataset(x, y)
        assert len(data) == 4
        assert [field.tolist() for field in data[1]] == [[3, 4, 5], 2]
        assert [field.tolist() for field in data[-1]] == [[9, 10, 11], 0]
        assert data[1:3][1].tolist() == [2, 1]
        assert data[[3, 0]][1].tolist() == [0, 3]
        assert data.batch([2, 2, -4])[0].tolist() == [[6, 7, 8], [6, 7, 8], [0, 1, 2]]
        assert data.batch(np.array([True, False, False, True]))[1].tolist() == [3, 0]
        assert data.batch([])[0].shape == (0, 3)

    def test_a_batch_is_a_copy_and_the_dataset_is_not(self) -> None:
        x = np.zeros((4, 2))
        data = ArrayDataset(x)
        data.batch([0, 1])[0][:] = 7
        data.batch(np.arange(4))[0][:] = 7
        assert not x.any()
        assert data.arrays[0] is x

    def test_lengths_that_differ_are_named(self) -> None:
        with pytest.raises(ShapeError, match="lengths 5, 4, 5"):
            ArrayDataset(np.zeros(5), np.zeros((4, 2)), np.zeros(5))
        with pytest.raises(ShapeError, match=r"array 1 .* single number"):
            ArrayDataset(np.zeros(1), np.float32(3))
        with pytest.raises(ValueError, match="at least one array"):
            ArrayDataset()

    @pytest.mark.parametrize("array", [["a", "b"], np.array([{}, []], dtype=object), np.zeros(2, "datetime64[s]")])
    def test_what_no_tensor_holds_is_refused(self, array: Any) -> None:
        with pytest.raises(DTypeError, match="array 1 of the dataset"):
            ArrayDataset(np.zeros(2), array)

    def test_foreign_byte_order_becomes_native(self) -> None:
        data = ArrayDataset(np.array([1, 258], ">i4"))
        assert data.arrays[0].dtype.isnative
        assert data.arrays[0].tolist() == [1, 258]

    def test_bad_indices(self) -> None:
        data = numbers(4)
        for index in (4, -5):
            with pytest.raises(IndexError):
                data[index]
            with pytest.raises(IndexError):
                data.batch([index])
            with pytest.raises(IndexError):
                data.subset([0, index])
        with pytest.raises(TypeError, match="float64"):
            data.batch([0.5])
        with pytest.raises(ShapeError, match="3 for 4"):
            data.batch([True, False, True])
        with pytest.raises(ShapeError, match="sequence of integers"):
            data.batch([[0, 1]])

    def test_uint8_stays_in_memory_and_is_converted_per_batch(self) -> None:
        images = np.full((10, 1, 2, 2), 255, np.uint8)
        data = ArrayDataset(images, np.zeros(10, np.int64), transform=Compose(Normalize(0.5, 0.25, 1 / 255), Flatten()))
        assert data.arrays[0].dtype == np.uint8
        assert data.nbytes == 10 * 4 + 10 * 8
        batch, labels = data.batch([1, 2, 3])
        assert (batch.dtype, batch.shape, labels.shape) == (np.dtype("float32"), (3, 4), (3,))
        np.testing.assert_allclose(batch, 2.0, rtol=1e-6)
        assert data[0][0].shape == data.input_shape == (4,)
        assert [(str(spec), spec.nbytes) for spec in data.spec] == [("float32[4]", 16), ("int64[scalar]", 8)]
        assert ArrayDataset(images[:0], transform=Flatten()).input_shape == (4,)

    def test_one_transform_per_array(self) -> None:
        data = numbers(3, transform=[None, lambda batch: batch * 10])
        assert [field.tolist() for field in data.batch([2])] == [[2], [-20]]
        assert data.with_transform(None).batch([2])[1].tolist() == [-2]
        assert data.batch([2])[1].tolist() == [-20]
        with pytest.raises(ValueError, match="3 transforms for 2 arrays"):
            numbers(3, transform=[None, None, None])
        with pytest.raises(TypeError, match="callable"):
            numbers(3, transform=5)

    def test_a_transform_that_changes_the_rows_is_caught(self) -> None:
        with pytest.raises(ShapeError, match=r"got 2 rows .* \(1,\)"):
            numbers(3, transform=lambda batch: batch[:1]).batch([0, 1])
        with pytest.raises(TypeError, match="returned list"):
            numbers(3, transform=lambda batch: batch.tolist()).batch([0, 1])

    def test_views_share_the_arrays_and_keep_their_indices(self) -> None:
        data = numbers(10)
        view = data.subset([9, 3, 3, -2])
        assert view.arrays[0] is data.arrays[0]
        assert view.batch([0, 1, 3])[0].tolist() == [9, 3, 8]
        again = view.subset(slice(1, None, 2))
        assert again.indices.tolist() == [3, 8]
        assert again.field(1).tolist() == [-3, -8]
        assert data.subset(np.arange(10) % 5 == 0).indices.tolist() == [0, 5]
        assert len(data.subset([])) == 0
        assert len(data) == 10

    def test_classes(self) -> None:
        data = ArrayDataset(np.zeros((3, 2)), [0, 1, 1], class_names=["no", "yes"])
        assert (data.num_classes, data.class_names, data.classes) == (2, ("no", "yes"), ("no", "yes"))
        assert data.subset([0]).num_classes == 2
        assert numbers(3).num_classes is None
        assert numbers(3).class_names is None
        with pytest.raises(ValueError, match="3, but there are 2"):
            ArrayDataset(np.zeros(1), [0], num_classes=3, class_names=["a", "b"])
        with pytest.raises(ValueError, match="2 classes, but a target of 2"):
            ArrayDataset(np.zeros(2), [0, 2], num_classes=2)

    def test_pickles(self) -> None:
        data = ArrayDataset(np.eye(4, dtype=np.uint8), [0, 1, 0, 1], transform=Normalize((0, 1, 2, 3)), num_classes=2)
        again = pickle.loads(pickle.dumps(data.subset([2, 1])))
        for ours, theirs in zip(again.batch([0, 1]), data.batch([2, 1])):
            np.testing.assert_array_equal(ours, theirs)
        assert again.num_classes == 2

    def test_repr_says_what_it_is(self) -> None:
        text = repr(ArrayDataset(np.zeros((2000, 1, 8, 8), np.uint8), np.zeros(2000, np.int64), num_classes=10))
        assert text == "ArrayDataset(2,000 samples of uint8[1, 8, 8], int64[], 10 classes; 140.6 KiB)"


class TestSplit:
    @given(count=st.integers(2, 200), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
    def test_parts_are_disjoint_complete_and_repeatable(self, count: int, fraction: float, seed: int) -> None:
        data = numbers(count)
        size = round(fraction * count)
        if size in (0, count):
            with pytest.raises(ValueError, match="one part empty"):
                data.split(fraction, seed)
            return
        first, rest = data.split(fraction, seed)
        assert len(first) == size
        assert sorted([*first.indices, *rest.indices]) == list(range(count))
        assert first.arrays[0] is rest.arrays[0] is data.arrays[0]
        assert data.split(fraction, seed)[0].indices.tolist() == first.indices.tolist()

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
    def test_fractions_outside_are_refused(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="one part empty"):
            numbers(10).split(fraction)

    def test_seeds_differ(self) -> None:
        parts = {tuple(numbers(100).split(0.5, seed)[0].indices) for seed in range(10)}
        assert len(parts) == 10

    @given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=120), fraction=st.floats(0.1, 0.9))
    def test_stratified_shares_are_within_one_sample(self, labels: list[int], fraction: float) -> None:
        size = round(fraction * len(labels))
        if size in (0, len(labels)):
            return
        first, rest = ArrayDataset(np.arange(len(labels)), labels).split(fraction, stratify=True)
        assert (len(first), len(rest)) == (size, len(labels) - size)
        assert sorted([*first.indices, *rest.indices]) == list(range(len(labels)))
        counts, drawn = np.bincount(labels, minlength=5), np.bincount(first.field(1), minlength=5)
        assert np.all(np.abs(drawn - counts * size / len(labels)) < 1)

    def test_stratified_needs_labels(self) -> None:
        with pytest.raises(DTypeError, match="float64"):
            ArrayDataset(np.zeros(4), np.zeros(4)).split(0.5, stratify=True)
        with pytest.raises(ShapeError, match="one label per sample"):
            ArrayDataset(np.zeros(4), np.zeros((4, 2), int)).split(0.5, stratify=True)

    def test_train_validation_split(self) -> None:
        labels = np.repeat([0, 1], [90, 10])
        train, validation = train_validation_split(ArrayDataset(np.zeros(100), labels, num_classes=2), 0.2)
        assert np.bincount(validation.field(1)).tolist() == [18, 2]
        assert np.bincount(train.field(1)).tolist() == [72, 8]
        train, validation = train_validation_split(ArrayDataset(np.zeros(100), np.zeros(100)), 0.25)
        assert (len(train), len(validation)) == (75, 25)


class TestTransforms:
    @pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "float64", "float16", "bool"])
    def test_normalize_is_its_formula(self, dtype: str) -> None:
        batch = (np.arange(2 * 3 * 4).reshape(2, 3, 4) * 10 % 256).astype(dtype)
        mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
        got = Normalize(mean, std, scale=1 / 255)(batch)
        want = (batch.astype(np.float64) / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    def test_normalize_leaves_its_input_and_keeps_digits_far_from_zero(self) -> None:
        batch = 1.7e9 + np.arange(6.0).reshape(3, 2)  # seconds since 1970: float32 alone would see one number
        before = batch.copy()
        got = Normalize((1.7e9, 1.7e9 + 1), 2.0)(batch)
        assert (batch == before).all()
        assert got.tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]

    def test_normalize_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(ShapeError, match=r"3 means along axis 1, the batch has shape \(2, 4\)"):
            Normalize((1, 2, 3))(np.zeros((2, 4)))
        with pytest.raises(ShapeError, match="3 means"):
            Normalize(0.0, (1, 2, 3))(np.zeros(3))
        for bad in ({"std": 0}, {"std": (1, -1)}, {"mean": float("nan")}, {"scale": 0}, {"mean": (1, 2), "std": (1,)}):
            with pytest.raises(ValueError, match="Normalize"):
                Normalize(**bad)

    @pytest.mark.parametrize("shape", [(5000, 3), (4100, 3, 2, 2)])
    def test_fit_gives_zero_mean_and_unit_deviation(self, shape: tuple[int, ...]) -> None:
        data = np.random.default_rng(0).integers(0, 200, shape).astype(np.uint8)
        data[:, 1] = 9  # never varies
        transform = Normalize.fit(data, scale=1 / 255)
        over = tuple(i for i in range(data.ndim) if i != 1)
        got = transform(data).astype(np.float64)
        np.testing.assert_allclose(got.mean(over), 0, atol=1e-6)
        np.testing.assert_allclose(got.std(over), [1, 0, 1], atol=1e-6)
        whole = Normalize.fit(data, axis=None)
        assert isinstance(whole.mean, float)
        assert whole(data).std() == pytest.approx(1, abs=1e-5)
        with pytest.raises(ShapeError):
            Normalize.fit(data[:0])
        with pytest.raises(ShapeError, match="axis 4"):
            Normalize.fit(data, axis=4)

    def test_flatten_cast_compose(self) -> None:
        assert Flatten()(np.zeros((2, 3, 4))).shape == (2, 12)
        assert Flatten()(np.zeros((0, 3, 4))).shape == (0, 12)
        assert Flatten()(np.zeros(5)).shape == (5, 1)
        assert Cast("float32")(np.zeros(2)).dtype == np.float32
        assert Cast(np.int64).dtype == "int64"  # type: ignore[arg-type]  # dtypes are taken too
        assert Compose(Flatten(), Cast("float16"))(np.zeros((1, 2, 2))).dtype == np.float16
        with pytest.raises(TypeError, match="callables"):
            Compose(Flatten(), "flatten")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "transform",
        [
            None,
            Flatten(),
            Cast("int32"),
            Normalize((1, 2), 0.3, 1 / 255, 2),
            Compose(Normalize(0.1), Compose(Flatten())),
        ],
    )
    def test_a_transform_survives_json_and_pickle(self, transform: Any) -> None:
        assert transform_from_config(json.loads(json.dumps(transform_config(transform)))) == transform
        assert pickle.loads(pickle.dumps(transform)) == transform

    def test_foreign_transforms_are_not_written_nor_read(self) -> None:
        with pytest.raises(TypeError, match="brim's own transforms"):
            transform_config(Compose(Flatten(), lambda batch: batch))
        for config in ({"name": "Popen"}, {}, {"name": "Normalize", "std": 0}, {"name": "Flatten", "x": 1}):
            with pytest.raises(DataError):
                transform_from_config(config)


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
