"""Datasets in memory and their transforms: rows, views, splits, what is refused."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.data import (
    ArrayDataset,
    Cast,
    Compose,
    Flatten,
    Normalize,
    train_validation_split,
    transform_config,
    transform_from_config,
)
from brim.errors import DataError, DTypeError, ShapeError
from loading import numbers

Batch = tuple[np.ndarray[Any, Any], ...]


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
