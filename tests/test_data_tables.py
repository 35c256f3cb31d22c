"""Readers of tables: CSV and .npz files written here, good and damaged."""

from __future__ import annotations

import gzip
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.data import (
    Normalize,
    read_csv,
    read_npz,
)
from brim.errors import DataError, DTypeError

Array = np.ndarray[Any, Any]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


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
