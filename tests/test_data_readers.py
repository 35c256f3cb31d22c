"""Readers of image data sets: idx files good and damaged; the packaged digits; where data are looked for."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.data import (
    DATASETS,
    ArrayDataset,
    DataLoader,
    load,
    load_digits,
    load_fashion_mnist,
    load_mnist,
    read_idx,
    sources,
)
from brim.data.dataset import count_classes
from brim.errors import DataError

Array = np.ndarray[Any, Any]

IDX_CODES = {"uint8": 8, "int8": 9, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
DIGITS_TEST_SHA256 = "136d1006e318e16300b8f3d992d416748d9a7dd93eb434946863d7d16ff474d1"
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

needs_pooch = pytest.mark.skipif(importlib.util.find_spec("pooch") is None, reason="pooch not installed")


def idx_bytes(array: Array) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, IDX_CODES[array.dtype.name], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder: Path, train_labels: list[int], *, packed: bool = True) -> None:
    """A tiny data set in MNIST's layout: as many training images as labels, and three test images."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = [np.array(train_labels, np.uint8), np.array([1, 0, 9], np.uint8)]
    for position, part in enumerate(labels):
        images = np.full((len(part), 28, 28), 51 * (position + 1), np.uint8)
        for name, array in zip(NAMES[2 * position :], (images, part)):
            content = idx_bytes(array)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refuse_to_download(url: str, **_: Any) -> str:
    raise OSError(f"no network in tests: {url}")


@pytest.fixture(autouse=True)
def nothing_from_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data sets that happen to be installed here, and no download whatever happens."""
    monkeypatch.delenv("BRIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SYSTEM_FOLDERS", (tmp_path / "system",))
    if importlib.util.find_spec("pooch") is not None:
        monkeypatch.setattr("pooch.retrieve", refuse_to_download)


class TestIdx:
    @pytest.mark.parametrize("dtype", IDX_CODES)
    @pytest.mark.parametrize("packed", [False, True])
    def test_reads_back_what_was_written(self, tmp_path: Path, dtype: str, packed: bool) -> None:
        array = (np.arange(24).reshape(2, 3, 4) * 5).astype(dtype)
        path = tmp_path / "file"  # neither the name nor a suffix matters
        path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
        got = read_idx(path)
        assert (got.dtype, got.dtype.isnative, got.shape) == (array.dtype, True, array.shape)
        assert (got == array).all()

    def test_an_array_without_elements(self, tmp_path: Path) -> None:
        path = tmp_path / "empty"
        path.write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
        assert read_idx(path).shape == (0, 28, 28)

    @given(cut=st.integers(0, 10**9), packed=st.booleans())
    def test_any_truncation_is_noticed(self, tmp_path_factory: pytest.TempPathFactory, cut: int, packed: bool) -> None:
        content = idx_bytes(np.arange(50, dtype=np.uint8).reshape(5, 10))
        content = gzip.compress(content) if packed else content
        path = tmp_path_factory.getbasetemp() / "cut.idx"
        path.write_bytes(content[: cut % len(content)])
        with pytest.raises(DataError, match=r"cut\.idx"):
            read_idx(path)

    def test_any_flipped_bit_in_a_gzip_body_is_noticed(self, tmp_path: Path) -> None:
        content = gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8)))
        path = tmp_path / "flipped.gz"
        for position in range(10, len(content)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            with pytest.raises(DataError, match=r"flipped\.gz"):
                read_idx(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not an idx file: .* begins with nothing"),
            (b"\x89PNG....", "begins with 89 50 4e 47"),
            (b"\0\0\x0a\x01\0\0\0\0", "begins with 00 00 0a 01"),
            (b"\0\0\x08\0", "begins with 00 00 08 00"),
            (b"\0\0\x08\x03\0\0\0\x02\0\0", "announces 3 axes"),
            (struct.pack(">BBBBII", 0, 0, 8, 2, 3, 2) + b"12345", "uint8 3 x 2, 6 bytes, but 5 are there"),
            (
                struct.pack(">BBBBII", 0, 0, 8, 2, 3, 2) + b"1234567",
                "more bytes than expected: .* uint8 3 x 2, 6 bytes",
            ),
            (struct.pack(">BBBBII", 0, 0, 14, 2, 2**32 - 1, 2**32 - 1) + b"1", "a file of 13 bytes has fewer"),
        ],
    )
    def test_headers_are_checked(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "bad-idx"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"bad-idx.*{message}"):
            read_idx(path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone.* cannot be read: No such file"):
            read_idx(tmp_path / "gone")


class TestDigits:
    def test_counts_shapes_and_values(self) -> None:
        train, test = load_digits()
        assert (len(train), len(test)) == (1437, 360)
        assert train.arrays[0] is test.arrays[0]
        images, labels = train.arrays
        assert (images.dtype, images.shape, labels.dtype) == (np.dtype("uint8"), (1797, 1, 8, 8), np.dtype("int64"))
        assert (images.min(), images.max()) == (0, 16)
        # Counts as the data set's documentation gives them for the test part.
        assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert (train.num_classes, train.class_names, train.input_shape) == (10, tuple("0123456789"), (1, 8, 8))
        batch = train.batch(np.arange(1437))[0]
        assert (batch.dtype, batch.min(), batch.max()) == (np.dtype("float32"), 0, 1)

    def test_the_split_is_complete_stratified_and_always_the_same(self) -> None:
        train, test = load_digits()
        assert sorted([*train.indices, *test.indices]) == list(range(1797))
        counts = np.bincount(train.arrays[1])
        assert np.all(np.abs(np.bincount(test.field(1)) - counts * 360 / 1797) < 1)
        digest = hashlib.sha256(test.indices.astype("<i8").tobytes()).hexdigest()
        assert digest == DIGITS_TEST_SHA256, "published accuracies would no longer be comparable"

    def test_the_first_image_is_a_zero(self) -> None:
        images, labels = load_digits()[0].arrays
        assert labels[0] == 0
        assert images[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]

    def test_the_licence_is_beside_the_file(self) -> None:
        folder = Path(sources.__file__).parent / "files"
        note = (folder / "DIGITS.md").read_text(encoding="utf-8")
        assert "CC BY 4.0" in note
        assert "Alpaydin" in note
        assert hashlib.sha256((folder / "digits.csv.gz").read_bytes()).hexdigest() in note


class TestMnistFamily:
    def test_reads_images_labels_and_names(self, tmp_path: Path) -> None:
        write_mnist(tmp_path, [3, 4, 4, 2])
        train, test = load_fashion_mnist(tmp_path)
        assert (len(train), len(test), train.input_shape, train.num_classes) == (4, 3, (1, 28, 28), 10)
        assert train.class_names is not None
        assert train.class_names[9] == "Ankle boot"
        assert train.arrays[0].dtype == np.uint8
        assert train.field(1).tolist() == [3, 4, 4, 2]
        image, label = train[0]
        np.testing.assert_allclose(image, (0.2 - 0.2860) / 0.3530, rtol=1e-4)
        assert label.dtype == np.int64

    @pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
    @pytest.mark.parametrize("packed", [True, False])
    def test_folders_under_a_root(self, tmp_path: Path, folder: str, packed: bool) -> None:
        write_mnist(tmp_path / "root" / folder, [1, 2], packed=packed)
        assert len(load_mnist(tmp_path / "root")[0]) == 2
        assert len(load_mnist(str(tmp_path / "root"))[0]) == 2

    def test_order_of_places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        places = ["root", "env", "system", "cache/brim"]
        for size, place in reversed(list(enumerate(places, 1))):  # each place hides those behind it
            write_mnist(tmp_path / place / "mnist", [0] * size)
            monkeypatch.setenv("BRIM_DATA", str(tmp_path / "env"))
            assert len(load_mnist(tmp_path / "root")[0]) == size
        (tmp_path / "root" / "mnist" / f"{NAMES[3]}.gz").unlink()  # an incomplete place does not count
        assert len(load_mnist(tmp_path / "root")[0]) == 2

    def test_not_found_lists_every_place_and_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BRIM_DATA", str(tmp_path / "env"))
        write_mnist(tmp_path / "root", [1])
        (tmp_path / "root" / f"{NAMES[1]}.gz").unlink()
        (tmp_path / "system" / "fashion-mnist").mkdir(parents=True)
        with pytest.raises(DataError, match=r"Fashion-MNIST was not found") as caught:
            load_fashion_mnist(tmp_path / "root")
        text = str(caught.value)
        for line in (
            f"{tmp_path / 'root' / 'fashion-mnist'} (root): no such folder",
            f"{tmp_path / 'root'} (root): lacks {NAMES[1]}.gz",
            f"{tmp_path / 'env' / 'fashion-mnist'} (BRIM_DATA): no such folder",
            f"{tmp_path / 'system' / 'fashion-mnist'} (system): has none of the files",
            f"{tmp_path / 'cache' / 'brim' / 'fashion-mnist'} (user cache): no such folder",
            "pip install 'brim[data]'",
            "apt install dataset-fashion-mnist",
        ):
            assert line in text
        with pytest.raises(DataError) as caught:
            load_mnist(tmp_path / "nowhere")
        assert "apt install" not in str(caught.value)

    def test_another_data_set_under_the_same_names_is_noticed(self, tmp_path: Path) -> None:
        write_mnist(tmp_path, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0])  # how Fashion-MNIST begins
        assert len(load_fashion_mnist(tmp_path)[0]) == 11
        with pytest.raises(DataError, match="has the labels of Fashion-MNIST, not of MNIST"):
            load_mnist(tmp_path)

    @pytest.mark.parametrize(
        ("file", "array", "message"),
        [
            (
                0,
                np.zeros((2, 28, 27), np.uint8),
                r"expected uint8 images of shape \(N, 28, 28\), not uint8 \(2, 28, 27\)",
            ),
            (0, np.zeros((2, 28, 28), np.int16), "not int16"),
            (0, np.zeros((3, 28, 28), np.uint8), "has 3 images, but .* has 2 labels"),
            (1, np.zeros((2, 1), np.uint8), r"expected uint8 labels of shape \(N,\)"),
            (1, np.array([0, 10], np.uint8), "expected labels from 0 to 9, found 10"),
        ],
    )
    def test_contents_are_checked(self, tmp_path: Path, file: int, array: Array, message: str) -> None:
        write_mnist(tmp_path, [1, 2])
        (tmp_path / f"{NAMES[file]}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        with pytest.raises(DataError, match=f"{NAMES[file]}.*{message}"):
            load_mnist(tmp_path)

    def test_a_damaged_cached_file_is_named_and_not_used(self, tmp_path: Path) -> None:
        cache = tmp_path / "cache" / "brim" / "mnist"
        write_mnist(cache, [1, 2])
        path = cache / f"{NAMES[0]}.gz"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=f"{NAMES[0]}.gz is damaged .* delete it"):
            load_mnist(download="auto")

    def test_the_cache_is_where_the_platform_has_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert sources.user_cache() == tmp_path / "cache" / "brim"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        for platform, folder in [
            ("linux", ".cache/brim"),
            ("darwin", "Library/Caches/brim"),
            ("win32", "local/brim/Cache"),
        ]:
            monkeypatch.setattr(sys, "platform", platform)
            assert sources.user_cache() == tmp_path / folder


class TestDownload:
    def test_only_when_asked(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            load_mnist()
        assert "no network in tests" not in str(caught.value)
        with pytest.raises(ValueError, match="download is False or 'auto', not 'yes'"):
            load_mnist(download="yes")  # type: ignore[arg-type]  # that is the point

    @needs_pooch
    def test_failure_names_every_address_and_every_place(self) -> None:
        with pytest.raises(DataError, match="could not be downloaded") as caught:
            load_mnist(download="auto")
        text = str(caught.value)
        for url in sources.MNIST.urls:
            assert f"no network in tests: {url}{NAMES[0]}.gz" in text
        assert "MNIST was not found. Looked in:" in text

    @needs_pooch
    @pytest.mark.parametrize("root", [None, "mine"])
    def test_files_come_with_checksums_into_the_named_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str | None
    ) -> None:
        calls = []

        def retrieve(url: str, *, known_hash: str, fname: str, path: Path) -> str:
            if url.startswith(sources.FASHION_MNIST.urls[0]):
                raise OSError("the first address is down")
            calls.append((url, known_hash))
            write_mnist(Path(path), [4, 2])
            return str(Path(path) / fname)

        monkeypatch.setattr("pooch.retrieve", retrieve)
        folder = tmp_path / root if root else None
        assert len(load_fashion_mnist(folder, download="auto")[0]) == 2
        base = sources.FASHION_MNIST.urls[1]
        assert calls == [(base + name, f"md5:{md5}") for name, md5 in sources.FASHION_MNIST.md5.items()]
        assert ((folder or tmp_path / "cache" / "brim") / "fashion-mnist" / f"{NAMES[3]}.gz").is_file()
        monkeypatch.setattr("pooch.retrieve", None)  # the second time nothing is fetched
        assert len(load_fashion_mnist(folder, download="auto")[0]) == 2

    def test_without_pooch_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pooch", None)
        with pytest.raises(DataError, match=r"needs pooch, .*pip install 'brim\[data\]'"):
            load_fashion_mnist(download="auto")

    def test_importing_brim_data_loads_nothing_heavy(self) -> None:
        code = "import sys, brim.data; print([m for m in ('pooch', 'requests', 'pandas', 'torch') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        assert done.stdout.strip() == "[]"

    def test_checksums_are_of_all_four_files(self) -> None:
        for source in (sources.MNIST, sources.FASHION_MNIST):
            assert list(source.md5) == [f"{name}.gz" for name in NAMES]
            assert all(len(bytes.fromhex(md5)) == 16 for md5 in source.md5.values())
            assert all(url.startswith(("https://", "http://")) and url.endswith("/") for url in source.urls)


class TestLoad:
    def test_names(self, tmp_path: Path) -> None:
        assert sorted(DATASETS) == ["digits", "fashion-mnist", "mnist"]
        assert [len(part) for part in load("digits")] == [1437, 360]
        write_mnist(tmp_path / "mnist", [1, 2])
        assert [len(part) for part in load("mnist", tmp_path)] == [2, 3]
        with pytest.raises(DataError, match="Fashion-MNIST was not found"):
            load("fashion-mnist", tmp_path, download=False)

    @pytest.mark.parametrize(
        ("name", "guess"), [("fashion_mnist", "fashion-mnist"), ("digit", "digits"), ("MNIST", "mnist")]
    )
    def test_unknown_names_list_the_known(self, name: str, guess: str) -> None:
        with pytest.raises(
            DataError, match=f"unknown data set '{name}'. Did you mean '{guess}'.* digits, fashion-mnist"
        ):
            load(name)

    def test_unknown_names_without_a_guess_and_files_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"unknown data set 'q'. Known are digits, fashion-mnist, mnist"):
            load("q")
        with pytest.raises(DataError, match=r"no such file: table.csv nor .*table.csv"):
            load("table.csv", tmp_path)
        with pytest.raises(DataError, match=r"no such file: .*gone"):
            load(tmp_path / "gone")
        with pytest.raises(DataError, match=r"model.pkl: brim reads .csv"):
            load(write(tmp_path / "model.pkl", "x"))

    def test_csv_holds_out_a_stratified_share(self, tmp_path: Path) -> None:
        write(tmp_path / "t.csv", "".join(f"{i},{'yes' if i % 5 else 'no'}\n" for i in range(100)))
        train, test = load("t.csv", tmp_path, held_out=0.3, seed=4)
        assert (len(train), len(test), train.classes) == (70, 30, ("no", "yes"))
        assert np.bincount(test.field(1)).tolist() == [6, 24]
        assert load(tmp_path / "t.csv", held_out=0.3, seed=4)[1].indices.tolist() == test.indices.tolist()
        assert load(tmp_path / "t.csv", held_out=0.3, seed=5)[1].indices.tolist() != test.indices.tolist()
        assert test[0][0].dtype == np.float32

    def test_standardize_uses_the_training_part_alone(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).normal((5, -300), (2, 40), (50, 2))
        np.savetxt(tmp_path / "t.csv", np.hstack([values, values[:, :1]]), delimiter=",")
        train, test = load(tmp_path / "t.csv", standardize=True)
        got = train.batch(np.arange(len(train)))[0]
        np.testing.assert_allclose(got.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(got.std(0), 1, atol=1e-5)
        assert test.transforms == train.transforms
        assert abs(test.batch(np.arange(len(test)))[0].mean(0)).max() > 1e-3

    def test_npz(self, tmp_path: Path) -> None:
        images = np.full((20, 4, 4), 255, np.uint8)
        np.savez(tmp_path / "a.npz", x=images, y=np.arange(20) % 2)
        train, test = load(tmp_path / "a.npz")
        assert (len(train), len(test), train.num_classes) == (16, 4, 2)
        assert train[0][0].max() == 1
        np.savez(tmp_path / "b.npz", x=np.zeros((20, 2), np.float64), y=np.zeros(20, np.float32))
        assert str(load(tmp_path / "b.npz")[0].spec[0]) == "float32[2]"
        np.savez(tmp_path / "c.npz", x=np.zeros((20, 2), np.int64), y=np.zeros(20, np.float32))
        assert str(load(tmp_path / "c.npz")[0].spec[0]) == "int64[2]"

    def test_npz_with_its_own_test_part(self, tmp_path: Path) -> None:
        parts = {"x_train": np.zeros((6, 3)), "y_train": np.arange(6) % 3, "x_test": np.ones((2, 3))}
        np.savez(tmp_path / "a.npz", **parts, y_test=np.array([0, 1], np.uint8))
        train, test = load(tmp_path / "a.npz")
        assert (len(train), len(test), test.num_classes, test.arrays[1].dtype) == (6, 2, 3, np.dtype("int64"))
        assert test[0][0].tolist() == [1, 1, 1]
        np.savez(tmp_path / "b.npz", **parts, y_test=np.array([0, 3]))
        with pytest.raises(DataError, match="y_test holds values that are not classes from 0 to 2"):
            load(tmp_path / "b.npz")
        np.savez(tmp_path / "c.npz", **parts | {"x_test": np.ones((2, 4))}, y_test=np.array([0, 1]))
        with pytest.raises(DataError, match="different shapes"):
            load(tmp_path / "c.npz")

    def test_a_loader_over_the_digits(self) -> None:
        train, _ = load("digits")
        got = np.concatenate([labels for _, labels in DataLoader(train, 100, shuffle=True, to_tensor=False)])
        assert np.bincount(got).tolist() == np.bincount(train.field(1)).tolist()


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ([0, 1, 1], 2),
        ([2, 0, 1, 0], 3),
        ([0, 1], None),
        ([0, 0], None),
        ([0, 2, 2], None),
        ([1, 2, 2], None),
        ([], None),
        ([0.0, 1.0, 1.0], None),
        ([[0], [1], [1]], None),
        ([0, 10**12, 0], None),
    ],
)
def test_count_classes(targets: list[Any], want: int | None) -> None:
    assert count_classes(np.array(targets)) == want


def test_real_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # this one wants what the machine has
    files, _ = sources.find(sources.FASHION_MNIST)
    if not files:
        pytest.skip("Fashion-MNIST is in no place that brim looks in; BRIM_DATA can name a folder that has it")
    train, test = load_fashion_mnist()
    assert (len(train), len(test)) == (60000, 10000)
    assert np.bincount(train.field(1)).tolist() == [6000] * 10
    assert np.bincount(test.field(1)).tolist() == [1000] * 10
    assert isinstance(train, ArrayDataset)
    pixels = train.arrays[0]
    assert pixels.mean() / 255 == pytest.approx(sources.FASHION_MNIST.mean, abs=1e-4)
    assert pixels.std() / 255 == pytest.approx(sources.FASHION_MNIST.std, abs=1e-4)
    for part, first in zip((train, test), sources.FASHION_MNIST.first_labels):
        assert part.field(1)[:10].tolist() == list(first)
