"""Reader of CSV and similar text tables: delimiter and header are detected, every bad row is named."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from brim.data.dataset import ArrayDataset, count_classes
from brim.data.idx import open_maybe_gzip
from brim.data.transforms import Array, Transform
from brim.errors import DataError, DTypeError
from brim.spec import as_dtype

__all__ = ["read_csv"]

_DELIMITERS = ("\t", ";", ",", "|", " ")  # in this order: "1,5;2,5" is two decimal commas, not three fields
_LISTED = 5  # bad rows named in an error
_SHOWN = 80  # characters of a bad row that are shown


def read_csv(
    path: str | os.PathLike[str],
    target: str | int | None = "last",
    dtype: Any = np.float32,
    delimiter: str | None = None,
    *,
    header: bool | None = None,
    classes: bool | None = None,
    transform: Transform | Sequence[Transform | None] | None = None,
) -> ArrayDataset:
    """A dataset from a text table of numbers, gzipped or not, one sample a line.

    Arguments:
        path: the file; UTF-8.
        target: the column to predict: ``"last"``, a name from the header, an index, or None for no targets.
        dtype: of the features.
        delimiter: between fields; None finds out: tab, semicolon, comma, bar or blanks.
        header: whether the first line names the columns; None: it does if none of its fields is a number.
        classes: whether the targets are classes; None: they are if none is a number, or if they are the integers from 0
            (or 1) to some K, each of them present and not all just once. Classes become int64 indices in the sorted
            order of their names, which ``dataset.classes`` lists. Other targets become float32.
        transform: as in ArrayDataset.

    Returns:
        ``ArrayDataset(features)`` or ``ArrayDataset(features, targets)``, shapes (N, columns) and (N,).

    Raises:
        DataError: naming the file, the lines that cannot be read and what they hold: another number of fields,
            something empty, not a number, not finite or out of the dtype's range.
    """
    path = Path(path)
    dtype = as_dtype(dtype)
    if dtype.kind not in "fiu":
        raise DTypeError(f"read_csv reads real numbers, not {dtype}")
    try:
        table = _describe(path, delimiter, header)
        column = _target_column(table, target)
        if table.width == 1 and column is not None:
            raise DataError(f"{path} has one column, which is the target; for features alone pass target=None")
        features, texts = _parse(table, column, dtype)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or truncated (gzip: {error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a text table in UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if column is None:
        return ArrayDataset(features, transform=transform)
    targets, names = _targets(table, column, texts, classes)
    return ArrayDataset(features, targets, transform=transform, class_names=names)


@dataclass(frozen=True)
class _Table:
    path: Path
    delimiter: str
    names: list[str] | None  # from the header
    skip: int  # lines before the data
    width: int  # fields in a row

    def lines(self) -> io.TextIOWrapper:
        file = _text(self.path)
        for _ in range(self.skip):
            file.readline()
        return file

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and fields of each data row: slow, for messages."""
        with self.lines() as file:
            yield from _split(file, self.delimiter, self.skip)

    def label(self, column: int) -> str:
        return f"column {column}" + (f" ({self.names[column]!r})" if self.names else "")


def _text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_maybe_gzip(path), encoding="utf-8-sig", newline="")


def _split(file: io.TextIOWrapper, delimiter: str, skipped: int = 0) -> Iterator[tuple[int, list[str]]]:
    if delimiter == " ":
        rows = ((number, line.split()) for number, line in enumerate(file, 1))
    else:
        reader = csv.reader(file, delimiter=delimiter)
        rows = ((reader.line_num, fields) for fields in reader)
    for number, fields in rows:
        if fields:
            yield number + skipped, [field.strip() for field in fields]


def _head(path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    with _text(path) as file:
        return list(islice(_split(file, delimiter), 2))


def _describe(path: Path, delimiter: str | None, header: bool | None) -> _Table:
    if delimiter is None:
        heads = {candidate: _head(path, candidate) for candidate in _DELIMITERS}
        widths = {candidate: [len(fields) for _, fields in head] for candidate, head in heads.items()}
        several = [candidate for candidate in _DELIMITERS if widths[candidate] and widths[candidate][0] > 1]
        even = [candidate for candidate in several if len(set(widths[candidate])) == 1]
        delimiter = (even or several or [","])[0]
    elif len(delimiter) != 1:
        raise ValueError(f"delimiter is one character or None, not {delimiter!r}")
    head = _head(path, delimiter)
    if not head:
        raise DataError(f"{path} is empty: expected a table of numbers, one sample a line")
    line, fields = head[0]
    if header is None:
        header = not any(_is_number(field) for field in fields) and any(fields)
    if header and len(head) == 1:
        raise DataError(f"{path} has a header line, but no data after it")
    return _Table(path, delimiter, fields if header else None, line if header else 0, len(fields))


def _target_column(table: _Table, target: str | int | None) -> int | None:
    if target is None:
        return None
    if target == "last":
        return table.width - 1
    if isinstance(target, str):
        if table.names is None:
            raise DataError(f"{table.path} has no header line, so no column {target!r}; name the target by its index")
        if target not in table.names:
            raise DataError(f"{table.path} has no column {target!r}; its columns are {', '.join(table.names)}")
        return table.names.index(target)
    if not -table.width <= target < table.width:
        raise DataError(f"{table.path} has {table.width} columns, so no column {target}")
    return target % table.width


def _parse(table: _Table, column: int | None, dtype: np.dtype[Any]) -> tuple[Array, list[str]]:
    """Features as an array and targets as texts, by NumPy's fast reader; row by row only to explain a failure."""
    texts: list[str] = []

    def keep(text: str) -> float:
        texts.append(text.strip())
        return 0

    try:
        with table.lines() as file, warnings.catch_warnings():
            warnings.simplefilter("error")  # integers read through floats, no data, ...
            values = np.loadtxt(
                file,
                dtype=dtype,
                comments=None,
                delimiter=None if table.delimiter == " " else table.delimiter,
                converters=None if column is None else {column: keep},
                ndmin=2,
                encoding=None,
                quotechar='"',
            )
    except (ValueError, OverflowError, Warning) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DataError(_explain(table, column, dtype) or f"{table.path} cannot be read: {error}") from error
    if values.shape[1] != table.width or not np.isfinite(values).all() or "" in texts:
        raise DataError(_explain(table, column, dtype) or f"{table.path} does not have {table.width} columns")
    return (values if column is None else np.delete(values, column, axis=1)), texts


def _explain(table: _Table, column: int | None, dtype: np.dtype[Any]) -> str:
    """The message that names the bad rows; empty if there are none."""
    listed: list[str] = []
    count = 0
    for line, fields in table.rows():
        problem = _problem(table, fields, column, dtype)
        if problem:
            count += 1
            if len(listed) < _LISTED:
                listed.append(f"  line {line}: {problem}: {_shown(table.delimiter.join(fields))}")
    if not count:
        return ""
    more = [f"  and {count - _LISTED:,} more"] if count > _LISTED else []
    hint = ""
    if table.skip == 0 and count == 1 and listed[0].startswith("  line 1:"):
        hint = "\nIf the first line names the columns, pass header=True."
    plural = "row" if count == 1 else "rows"
    return f"{table.path} has {count:,} {plural} that cannot be read as {dtype}\n" + "\n".join(listed + more) + hint


def _problem(table: _Table, fields: list[str], column: int | None, dtype: np.dtype[Any]) -> str:
    if len(fields) != table.width:
        return f"{len(fields)} fields, expected {table.width}"
    for index, field in enumerate(fields):
        if field == "":
            return f"{table.label(index)} is empty"
        if index == column:
            continue
        if not _is_number(field):
            return f"{table.label(index)} is not a number"
        if dtype.kind == "f":
            if not math.isfinite(float(field)) or abs(float(field)) > float(np.finfo(dtype).max):
                return f"{table.label(index)} is not a finite {dtype}"
        else:
            limits = np.iinfo(dtype)
            if not _is_number(field, int) or not limits.min <= int(field) <= limits.max:
                return f"{table.label(index)} is not an integer from {limits.min} to {limits.max}"
    return ""


def _targets(table: _Table, column: int, texts: list[str], classes: bool | None) -> tuple[Array, list[str] | None]:
    numeric = [_is_number(text) for text in texts]
    where = f"{table.path}: the target, {table.label(column)},"

    def shown(row: int) -> str:
        line = next(islice(table.rows(), row, None))[0]
        return f"line {line}: {_shown(texts[row])}"

    if classes is None and any(numeric) and not all(numeric):
        rarer = numeric.index(sum(numeric) * 2 < len(numeric))
        raise DataError(
            f"{where} holds {sum(numeric):,} numbers and {len(texts) - sum(numeric):,} other values, the first of the "
            f"rarer kind in {shown(rarer)}. Correct the file, or pass header=True if that line names the columns, or "
            f"classes=True if all of them are names of classes"
        )
    if classes is False and not all(numeric):
        raise DataError(f"{where} is not a number in {shown(numeric.index(False))}")
    if classes is False or (classes is None and all(numeric) and not _are_indices(texts)):
        with np.errstate(over="ignore"):
            out = np.array([float(text) for text in texts]).astype(np.float32)
        if not np.isfinite(out).all():
            raise DataError(f"{where} is not a finite float32 in {shown(int(np.isfinite(out).argmin()))}")
        return out, None
    names = sorted(set(texts))
    if all(numeric):
        names.sort(key=float)
    position = {name: index for index, name in enumerate(names)}
    return np.array([position[text] for text in texts], dtype=np.int64), names


def _are_indices(texts: list[str]) -> bool:
    """Whether numbers are class indices, counted from 0 or from 1."""
    if not all(_is_number(text, int) for text in set(texts)):
        return False
    values = [int(text) for text in texts]
    lowest, highest = min(values), max(values)
    if lowest not in (0, 1) or highest > len(values):
        return False
    return count_classes(np.array(values) - lowest) is not None


def _is_number(text: str, kind: Callable[[str], Any] = float) -> bool:
    if "_" in text:  # Python reads 1_000, files do not mean it
        return False
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")
