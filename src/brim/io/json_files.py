"""JSON files and JSON lines: plain values only, lossless, standard, and safe to write at any moment.

JSON has no infinity and no NaN. They are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which
every JSON reader accepts, and are floats again when read here; so that this is lossless, a *string* of that spelling is
refused.
NumPy scalars become numbers, tuples become lists. Keys that are not strings are refused: JSON would turn them into
strings without a word.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from brim.errors import CheckpointError
from brim.io.atomic import StrPath, atomic_write

__all__ = [
    "append_jsonl",
    "json_text",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_jsonl",
    "truncate_jsonl",
    "unique_names",
    "write_json",
]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BLOCK_BYTES = 1 << 16


def write_json(path: StrPath, obj: Any) -> None:
    """Write `obj` to `path` as indented JSON, atomically.

    Arguments:
        path: the file to create or replace.
        obj: dicts with string keys, lists, tuples, strings, numbers, NumPy scalars, booleans, None.

    Raises:
        TypeError, ValueError: something that JSON cannot hold, named by its place in `obj`. Nothing was written.
        OSError: the file could not be written; the old one is untouched.
    """
    text = json_text(obj, indent=2)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def read_json(path: StrPath) -> Any:
    """Read a JSON file as `write_json` writes it.

    Raises:
        CheckpointError: no such file, not readable, or not JSON (with line and column).
    """
    return parse_json(read_bytes(path), os.fspath(path))


def append_jsonl(path: StrPath, record: Mapping[str, Any]) -> None:
    """Add one record to a JSON-lines file, by a single write of the line with its end.

    A half line that a killed process left at the end is removed first. The line survives a kill of this process at
    once, a power cut only after the system has written it out. One process at a time may append to a file.

    Arguments:
        path: the file; created when missing.
        record: a dict with string keys, as `write_json` takes it.

    Raises:
        TypeError, ValueError: something that JSON cannot hold. Nothing was written.
        OSError: the line could not be written whole; the file holds the earlier lines.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"record: expected a dict, got {type(record).__name__}; one line holds one JSON object")
    line = json_text(record).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        keep_bytes = _end_of_last_line(handle)
        if keep_bytes != os.fstat(handle).st_size:
            os.ftruncate(handle, keep_bytes)
        if os.write(handle, line) != len(line):
            os.ftruncate(handle, keep_bytes)
            raise OSError(errno.ENOSPC, "No space left for the whole line", os.fspath(path))
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        os.close(handle)


def _end_of_last_line(handle: int) -> int:
    """The size in bytes of the part of an open file that ends with its last line end."""
    end = os.fstat(handle).st_size
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        os.lseek(handle, begin, os.SEEK_SET)
        newline = os.read(handle, end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def read_jsonl(path: StrPath) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file; a last line without its end (its writer was killed) is left out.

    Raises:
        CheckpointError: no such file, not readable, or a line that is not a JSON object (with its number).
    """
    *lines, _unfinished = read_bytes(path).split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_json(line, os.fspath(path), first_line=number)
        if not isinstance(record, dict):
            raise CheckpointError(
                f"{os.fspath(path)}: line {number}: expected a JSON object, got {type(record).__name__}; "
                "remove or repair the line"
            )
        records.append(record)
    return records


def truncate_jsonl(path: StrPath, keep: int) -> int:
    """Cut a JSON-lines file after its first `keep` records: a resumed run then writes what followed anew.

    Arguments:
        path: the file; a missing one counts as empty.
        keep: how many records stay, 0 or more.

    Returns:
        How many records the file has now: `keep`, or fewer where it had fewer.
    """
    if keep < 0:
        raise ValueError(f"keep: expected 0 or more records, got {keep}")
    if not os.path.exists(path):
        return 0
    data = read_bytes(path)
    kept, end = 0, 0
    while kept < keep and (newline := data.find(b"\n", end)) >= 0:
        kept, end = kept + 1, newline + 1
    if end != len(data):
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return kept


def json_text(obj: Any, indent: int | None = None) -> str:
    """`obj` as ASCII JSON text without a line end; raises TypeError or ValueError naming the place of a bad value."""
    try:
        return json.dumps(_to_plain(obj, ""), indent=indent, allow_nan=False)
    except RecursionError:
        raise ValueError("too deeply nested for JSON, or it contains itself; flatten it") from None


def _to_plain(value: Any, place: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        if value in _NON_FINITE:
            raise ValueError(
                f"{place or 'value'}: the string {value!r} stands for a float in these files; spell it otherwise"
            )
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"{place or 'value'}: expected string keys, got {key!r} ({type(key).__name__}); write str(key) "
                    "and convert it back after reading"
                )
        return {str(key): _to_plain(item, f"{place}.{key}" if place else key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    hint = "arrays belong in a safetensors file (save_arrays)" if isinstance(value, np.ndarray) else "convert it first"
    raise TypeError(
        f"{place or 'value'}: expected a dict, list, string, number, boolean or None, "
        f"got {type(value).__name__}; {hint}"
    )


def parse_json(data: bytes, source: str, first_line: int = 1) -> Any:
    """Parse JSON that `json_text` wrote; `source` (a path) and the line are named in the error.

    Raises:
        CheckpointError: not UTF-8, not JSON, a name twice in one object, or nested too deeply.
    """
    try:
        return _from_plain(
            json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_names, parse_constant=_refuse_constant)
        )
    except json.JSONDecodeError as error:
        what = "the file is empty" if not data.strip() else error.msg
        where = f"line {first_line + error.lineno - 1} column {error.colno}"
        raise CheckpointError(
            f"{source}: not valid JSON at {where}: {what}; restore the file from a copy, or delete it"
        ) from None
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise CheckpointError(
            f"{source}: not valid JSON at line {line}: byte {error.start} is not UTF-8 text; "
            "restore the file from a copy"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: line {first_line} and on: not acceptable JSON: {error}") from None


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads`, which by itself keeps the last of equal names without a word."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} occurs twice in one object")
        result[name] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f'{name} is not JSON; write "{name}", in quotes')


def _from_plain(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    return value


def read_bytes(path: StrPath) -> bytes:
    """The whole content of a file; CheckpointError, naming it, where that cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read: {error.strerror}; check the path") from error
