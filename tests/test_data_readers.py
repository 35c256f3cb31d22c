"""Readers: idx, CSV and .npz files written here, good and damaged; the packaged digits; where data are looked for."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import pickle
import struct
import subprocess
import sys
import zipfile
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
    Normalize,
    load,
    load_digits,
    load_fashion_mnist,
    load_mnist,
    read_csv,
    read_idx,
    read_npz,
    sources,
)
from brim.data.dataset import count_classes
from brim.errors import DataError, DTypeError

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


class TestCsv:
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " "])
    @pytest.mark.parametrize("header", [False, True])
    def test_delimiter_and_header_are_found(self, tmp_path: Path, delimiter: str, header: bool) -> None:
        rows = [["1.5", "2", "0.5"], ["-3", "4e1", "2.5"]]
        lines = [["a", "b", "c"], *rows] if header else rows
        data = read_csv(write(tmp_path / "t.csv", "\n".join(delimiter.join(line) for line in lines) + "\n"))
        assert data.arrays[0].tolist() == [[1.5, 2], [-3, 40]]
        assert data.arrays[1].tolist() == [0.5, 2.5]
        assert [array.dtype.name for array in data.arrays] == ["float32", "float32"]
        assert data.num_classes is None

    def test_gzip_byte_order_mark_quotes_blank_lines_and_windows_line_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "t.csv.gz"
        text = '\ufeff"first, of two",second\r\n\r\n"1", 2 \r\n3,4\r\n\r\n'
        path.write_bytes(gzip.compress(text.encode()))
        assert read_csv(path, target="first, of two").arrays[0].tolist() == [[2], [4]]

    def test_targets_by_name_index_and_none(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", "a,b,c\n1,2,3\n4,5,6\n")
        assert read_csv(path).arrays[1].tolist() == [3, 6]
        assert read_csv(path, target="b").arrays[1].tolist() == [2, 5]
        assert read_csv(path, target=0).arrays[0].tolist() == [[2, 3], [5, 6]]
        assert read_csv(path, target=-2).arrays[0].tolist() == [[1, 3], [4, 6]]
        assert len(read_csv(path, target=None).arrays) == 1
        with pytest.raises(DataError, match="no column 'd'; its columns are a, b, c"):
            read_csv(path, target="d")
        with pytest.raises(DataError, match="has 3 columns, so no column 3"):
            read_csv(path, target=3)
        with pytest.raises(DataError, match="no header line, so no column 'b'"):
            read_csv(write(tmp_path / "u.csv", "1,2,3\n"), target="b")

    def test_names_become_classes(self, tmp_path: Path) -> None:
        data = read_csv(write(tmp_path / "iris.csv", "5.1,setosa\n6.2,virginica\n5.0, setosa\n5.9,versicolor\n"))
        assert data.classes == ("setosa", "versicolor", "virginica")
        assert data.arrays[1].tolist() == [0, 2, 0, 1]
        assert data.arrays[1].dtype == np.int64
        assert data.num_classes == 3

    @pytest.mark.parametrize(
        ("targets", "classes", "want", "names"),
        [
            ("0 1 2 1", None, [0, 1, 2, 1], ("0", "1", "2")),
            ("2 1 3 1", None, [1, 0, 2, 0], ("1", "2", "3")),
            ("0 1 3 1", None, [0, 1, 3, 1], None),  # 2 is missing: counts, not classes
            ("0 1 2 3", None, [0, 1, 2, 3], None),  # all once: row numbers
            ("0 1.0 1 0", None, [0, 1, 1, 0], None),  # not written as integers
            ("5 5 5 5", None, [5, 5, 5, 5], None),
            ("-1 0 1 1", None, [-1, 0, 1, 1], None),
            ("0 1 2 1", False, [0, 1, 2, 1], None),
            ("30 4 30 4", True, [1, 0, 1, 0], ("4", "30")),
            ("x 4 x 4", True, [1, 0, 1, 0], ("4", "x")),
        ],
    )
    def test_when_numbers_are_classes(
        self, tmp_path: Path, targets: str, classes: bool | None, want: list[int], names: tuple[str, ...] | None
    ) -> None:
        path = write(tmp_path / "t.csv", "".join(f"7,{target}\n" for target in targets.split()))
        data = read_csv(path, classes=classes, header=False)
        assert data.arrays[1].tolist() == want
        assert data.arrays[1].dtype == (np.int64 if names else np.float32)
        assert data.class_names == names

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("1,2", "2 fields, expected 3: '1,2'"),
            ("1,2,3,4", "4 fields, expected 3: '1,2,3,4'"),
            ("1,,3", "column 1 ('b') is empty: '1,,3'"),
            ("1,2,", "column 2 ('c') is empty"),
            ("1,two,3", "column 1 ('b') is not a number: '1,two,3'"),
            ("1_000,2,3", "column 0 ('a') is not a number"),
            ("nan,2,3", "column 0 ('a') is not a finite float32"),
            ("1,1e39,3", "column 1 ('b') is not a finite float32"),
        ],
    )
    def test_bad_rows_are_named(self, tmp_path: Path, row: str, problem: str) -> None:
        path = write(tmp_path / "t.csv", f"a,b,c\n1,2,3\n\n{row}\n4,5,6\n")
        with pytest.raises(DataError) as caught:
            read_csv(path)
        assert str(caught.value).startswith(f"{path} has 1 row that cannot be read as float32\n  line 4: {problem}")

    def test_many_bad_rows_are_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", "1,2\n" + "x,2\n" * 9 + "y" * 500 + ",2\n")
        with pytest.raises(DataError) as caught:
            read_csv(path)
        lines = str(caught.value).splitlines()
        assert "has 10 rows" in lines[0]
        assert [line.split(":")[0] for line in lines[1:6]] == [f"  line {number}" for number in range(2, 7)]
        assert lines[6] == "  and 5 more"
        assert max(map(len, lines[1:])) < 200

    def test_a_header_that_looks_like_data_is_pointed_at(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", "0,1,x\n5,6,7\n5,6,8\n")
        with pytest.raises(DataError, match=r"2 numbers and 1 other values.*line 1: 'x'.*header=True"):
            read_csv(path)
        assert read_csv(path, header=True).arrays[1].tolist() == [7, 8]
        path = write(tmp_path / "u.csv", "0,x,1\n5,6,7\n5,6,8\n")
        with pytest.raises(DataError, match=r"line 1: column 1 is not a number(.|\n)*header=True"):
            read_csv(path)

    def test_a_misspelt_target_is_not_taken_for_a_class(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", "h,t\n1,2.5\n1,3.5\n1,4.S\n")
        with pytest.raises(DataError, match=r"column 1 \('t'\), holds 2 numbers and 1 other values.*line 4: '4.S'"):
            read_csv(path)
        with pytest.raises(DataError, match=r"is not a number in line 4: '4.S'"):
            read_csv(path, classes=False)
        with pytest.raises(DataError, match=r"not a finite float32 in line 3: 'inf'"):
            read_csv(write(tmp_path / "u.csv", "h,t\n1,2.5\n1,inf\n"))

    def test_integers(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", "0,255,0.5\n7,8,1.5\n")
        assert read_csv(path, dtype=np.uint8).arrays[0].tolist() == [[0, 255], [7, 8]]
        for bad in ("256", "-1", "1.5", "1.0"):
            with pytest.raises(DataError, match=r"line 2: column 0 is not an integer from 0 to 255"):
                read_csv(write(tmp_path / "u.csv", f"0,1,2\n{bad},1,2\n"), dtype="uint8")
        with pytest.raises(DTypeError, match="real numbers, not complex64"):
            read_csv(path, dtype="complex64")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"\n\n", "is empty"),
            (b"a,b\n", "header line, but no data"),
            (b"1\n2\n", "one column, which is the target"),
            (b"\xff\xfe1,2\n", "not a text table in UTF-8"),
            # A fixed modification time: the test's name must not depend on the second in which it was collected.
            (gzip.compress(b"1,2\n" * 1000, mtime=0)[:-9], "damaged or truncated"),
        ],
    )
    def test_files_that_are_no_tables(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "odd.csv"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"odd.csv.*{message}"):
            read_csv(path)

    def test_settings(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone.csv cannot be read: No such file"):
            read_csv(tmp_path / "gone.csv")
        path = write(tmp_path / "t.csv", "1,2;3,4\n5,6;7,8\n")
        with pytest.raises(ValueError, match="one character"):
            read_csv(path, delimiter="::")
        with pytest.raises(DataError, match="cannot be read as float32"):
            read_csv(path, target=None)  # decimal commas are not guessed at
        assert read_csv(write(tmp_path / "u.csv", "3\n4\n"), target=None).arrays[0].tolist() == [[3], [4]]
        data = read_csv(write(tmp_path / "v.csv", "1,2,9\n3,4,8\n"), transform=Normalize(1))
        assert data[0][0].tolist() == [0, 1]

    @given(st.integers(1, 8), st.integers(1, 5), st.randoms(use_true_random=False), st.booleans())
    def test_numpy_writes_brim_reads(
        self, tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, random: Any, header: bool
    ) -> None:
        values = np.array([[random.uniform(-1e6, 1e6) for _ in range(columns)] for _ in range(rows)])
        path = tmp_path_factory.getbasetemp() / "round.csv"
        names = ",".join(f"c{column}" for column in range(columns)) if header else ""
        np.savetxt(path, values, delimiter=",", header=names, comments="")
        got = read_csv(path, target=None, dtype="float64").arrays[0]
        np.testing.assert_array_equal(got, values)


class TestNpz:
    def test_order_of_arrays(self, tmp_path: Path) -> None:
        x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 1, 0], np.uint8)
        np.savez(tmp_path / "a.npz", labels=y, images=x)
        data = read_npz(tmp_path / "a.npz")
        assert [array.shape for array in data.arrays] == [(4, 4), (4,)]
        assert (data.num_classes, data.arrays[1].dtype) == (2, np.dtype("int64"))
        np.savez_compressed(tmp_path / "b.npz", first=x, extra=np.zeros(9), second=np.array([0.5, 1, 2, 3]))
        data = read_npz(tmp_path / "b.npz", ["second", "first"], transform=Normalize(0.5))
        assert data[0][0] == 0
        assert data.num_classes is None
        np.savez(tmp_path / "c.npz", x, y)
        assert read_npz(str(tmp_path / "c.npz")).arrays[0].shape == (4, 4)

    def test_what_is_in_it_is_listed(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((4, 2)), z=np.zeros(3, np.int32))
        listing = r"float64\[4x2\], z int32\[3\]"
        with pytest.raises(DataError, match=rf"a.npz has no array 'y', 'q'; it contains x {listing}"):
            read_npz(tmp_path / "a.npz", ["x", "y", "q"])
        with pytest.raises(DataError, match=rf"lengths 4, 3. It contains x {listing}; choose with keys="):
            read_npz(tmp_path / "a.npz")
        with pytest.raises(TypeError, match=r"such as \['x'\]"):
            read_npz(tmp_path / "a.npz", "x")

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        marker = tmp_path / "marker"

        class Bomb:
            def __reduce__(self) -> Any:
                return (Path.touch, (marker,))

        np.savez(tmp_path / "a.npz", x=np.array([Bomb(), Bomb()], dtype=object))
        with pytest.raises(DataError, match=r"a.npz: array 'x' holds Python objects.*unpickling"):
            read_npz(tmp_path / "a.npz")
        (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DataError, match=r"b.npz is not a readable .npz file"):
            read_npz(tmp_path / "b.npz")
        assert not marker.exists()

    def test_a_header_that_promises_too_much_allocates_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "huge.npz"
        with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**4)}
            )
            file.write(b"8 bytes.")
        with pytest.raises(DataError, match=r"array 'x' .* should hold 80,000,000,000,000 bytes .* but holds 8"):
            read_npz(path)

    @given(cut=st.integers(1, 10**9))
    def test_any_truncation_is_noticed(self, tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
        path = tmp_path_factory.getbasetemp() / "cut.npz"
        np.savez(path, x=np.arange(30.0), y=np.arange(30))
        content = path.read_bytes()
        path.write_bytes(content[: cut % len(content)])
        with pytest.raises(DataError, match=r"cut\.npz"):
            read_npz(path)

    def test_a_flipped_bit_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "flip.npz"
        np.savez(path, x=np.arange(300.0))
        content = bytearray(path.read_bytes())
        content[1500] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"flip\.npz .*damaged"):
            read_npz(path)

    def test_other_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone.npz cannot be read: No such file"):
            read_npz(tmp_path / "gone.npz")
        with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(DataError, match=r"not an .npz file: it contains 'readme.txt'"):
            read_npz(tmp_path / "zip.npz")
        np.savez(tmp_path / "none.npz")
        with pytest.raises(DataError, match="holds no arrays"):
            read_npz(tmp_path / "none.npz")
        np.savez(tmp_path / "text.npz", x=np.array(["a", "b"]))
        with pytest.raises(DataError, match=r"text.npz: array 'x': dtype <U1"):
            read_npz(tmp_path / "text.npz")
        np.savez(tmp_path / "number.npz", x=np.float32(3))
        with pytest.raises(DataError, match=r"number.npz: array 0 .* single number"):
            read_npz(tmp_path / "number.npz")


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
