"""The JSON of a memory plan, schema 1: what its fields mean, what follows from what, and the check that it all holds.

``docs/plan-schema.md`` describes every field. ``timeline``, ``layer_rows`` and ``peak_by_kind`` compute what follows
from the blocks; ``validate`` computes it once more and compares, so a plan that contradicts itself is never written.
Times are instruction numbers from -1 (before the first) through n (after the last of n); arrays over time have n + 2
entries, entry t + 1 for time t.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, get_args

import numpy as np

from brim.errors import DataError
from brim.memory.report import KINDS, Exactness

__all__ = ["LAYER_KINDS", "SCHEMA", "layer_rows", "peak_by_kind", "timeline", "validate"]

SCHEMA = 1
"""Version of the layout: changed when a field changes its meaning, goes away, or a new one must be understood."""

LAYER_KINDS = ("params", "buffers", "grads", "optimizer", "activations", "temps", "inputs", "workspace")
"""Kinds that belong to a layer; rounding, holes, overhead and foreign memory belong to none."""

_TIMED_KINDS = tuple(kind for kind in KINDS if kind != "holes")
_FIGURES = ("peak", "arena", "budget", *KINDS)
_CLASSES = get_args(Exactness)
_PHASES = ("forward", "backward", "update")

_Ints = np.ndarray[Any, np.dtype[np.int64]]


# ---- what follows from the blocks ----


def timeline(
    instruction_count: int, blocks: Iterable[Mapping[str, Any]], resident: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Bytes alive at each time: ``{"total": [...], "by_kind": {kind: [...]}}``, n + 2 entries each.

    Arguments:
        instruction_count: n, the number of instructions.
        blocks: ``kind``, ``nbytes``, ``first``, ``last`` and, if any, ``rounding_bytes`` of each block of the arena.
        resident: ``kind``, ``nbytes`` and, if any, ``rounding_bytes`` of each block that is there all the time.

    Returns:
        The ``timeline`` of a program; kinds that never have a byte are left out.
    """
    changes = _changes(instruction_count, blocks, resident)
    by_kind = {kind: np.cumsum(change)[:-1] for kind, change in changes.items() if change.any()}
    total = sum(by_kind.values(), np.zeros(instruction_count + 2, np.int64))
    return {"total": total.tolist(), "by_kind": {kind: values.tolist() for kind, values in by_kind.items()}}


def _changes(
    instruction_count: int, blocks: Iterable[Mapping[str, Any]], resident: Iterable[Mapping[str, Any]]
) -> dict[str, _Ints]:
    changes = {kind: np.zeros(instruction_count + 3, np.int64) for kind in _TIMED_KINDS}
    for block in resident:
        changes[block["kind"]][0] += block["nbytes"]
        changes["rounding"][0] += block.get("rounding_bytes", 0)
    for block in blocks:
        begin, end = block["first"] + 1, block["last"] + 2
        for kind, nbytes in ((block["kind"], block["nbytes"]), ("rounding", block.get("rounding_bytes", 0))):
            changes[kind][begin] += nbytes
            changes[kind][end] -= nbytes
    return changes


def peak_by_kind(program: Mapping[str, Any], peak_bytes: int) -> dict[str, int]:
    """Bytes by kind at a program's peak; what ``peak_bytes`` holds beyond the live ones is holes.

    Arguments:
        program: entry of ``programs`` with the highest ``peak_bytes``; reads ``timeline`` and ``peak_at``.
        peak_bytes: of the whole plan: resident blocks and the arena.
    """
    at = program["peak_at"] + 1
    found = {kind: values[at] for kind, values in program["timeline"]["by_kind"].items()}
    found["holes"] = peak_bytes - sum(found.values())
    return {kind: found[kind] for kind in KINDS if found.get(kind)}


def layer_rows(
    program: Mapping[str, Any], resident: Iterable[Mapping[str, Any]], peak_bytes: int
) -> list[dict[str, Any]]:
    """The rows of ``by_layer``: what each layer holds at a program's peak, largest first.

    Arguments:
        program: entry of ``programs`` with the highest ``peak_bytes``; reads ``blocks`` and ``peak_at``.
        resident: blocks that are there all the time.
        peak_bytes: of the whole plan; shares refer to it.
    """
    at = program["peak_at"]
    rows: dict[str, dict[str, Any]] = {}
    for block in (*resident, *(b for b in program["blocks"] if b["first"] <= at <= b["last"])):
        if block["kind"] in LAYER_KINDS and block["nbytes"]:
            row = rows.setdefault(block["layer"], {"layer": block["layer"], **dict.fromkeys(LAYER_KINDS, 0)})
            row[block["kind"]] += block["nbytes"]
    for row in rows.values():
        row["share"] = _layer_bytes(row) / peak_bytes if peak_bytes else 0.0
    return sorted(rows.values(), key=lambda row: (-_layer_bytes(row), row["layer"]))


def _layer_bytes(row: Mapping[str, Any]) -> int:
    return sum(row[kind] for kind in LAYER_KINDS)


# ---- the check ----


def validate(document: Any) -> None:
    """Check that a document is a plan of schema 1 and agrees with itself; unknown fields are refused.

    Arguments:
        document: what ``json.load`` gave, or what is about to be written.

    Raises:
        DataError: naming the path of what is wrong, e.g. ``programs[0].blocks[17].offset_bytes``.
    """
    if not isinstance(document, Mapping):
        _fail("", "an object", document)
    if document.get("schema") != SCHEMA or isinstance(document.get("schema"), bool):
        got = document.get("schema")
        raise DataError(f"schema: expected {SCHEMA}, got {got!r}; this version of brim reads plans of schema {SCHEMA}")
    _fields("", document, _DOCUMENT)
    _fields("device", document["device"], {"name": _text, "profile": _text_or_null, "estimated": _flag})
    _kind_map("peak_by_kind", document["peak_by_kind"], KINDS)
    for name, degree in document["exactness"].items():
        if name not in _FIGURES:
            _fail(f"exactness.{name}", f"one of {', '.join(_FIGURES)} as a name", name)
        if degree not in _CLASSES:
            _fail(f"exactness.{name}", f"one of {', '.join(_CLASSES)}", degree)
    for path, block in _entries("resident", document["resident"]):
        _fields(path, block, _RESIDENT, _ROUNDING)
        _known_kind(f"{path}.kind", block["kind"])
    for path, row in _entries("by_layer", document["by_layer"]):
        _fields(path, row, _LAYER)
    if not document["programs"]:
        _fail("programs", "at least one program", [])
    for path, program in _entries("programs", document["programs"]):
        _check_program(path, program, document)
    _check_sums(document)


def _check_program(path: str, program: Any, document: Mapping[str, Any]) -> None:
    _fields(path, program, _PROGRAM, {"traffic": _mapping})
    count = len(program["instructions"])
    for number, (where, instruction) in enumerate(_entries(f"{path}.instructions", program["instructions"])):
        _fields(where, instruction, _INSTRUCTION, dict.fromkeys(_MOVED, _count))
        _equal(f"{where}.index", instruction["index"], number, "its position")
        if instruction["phase"] not in _PHASES:
            _fail(f"{where}.phase", f"one of {', '.join(_PHASES)}", instruction["phase"])
        for out_path, out in _entries(f"{where}.outs", instruction["outs"]):
            _fields(out_path, out, {"shape": _shape, "dtype": _text})
    seen: set[int] = set()
    for where, block in _entries(f"{path}.blocks", program["blocks"]):
        _fields(where, block, _BLOCK, _ROUNDING)
        _known_kind(f"{where}.kind", block["kind"])
        if block["id"] in seen:
            _fail(f"{where}.id", "a number that no other block of this program has", block["id"])
        seen.add(block["id"])
        if not -1 <= block["first"] <= count:
            _fail(f"{where}.first", f"a time from -1 through {count}", block["first"])
        if not block["first"] <= block["last"] <= count:
            _fail(f"{where}.last", f"a time from {block['first']} (its first) through {count}", block["last"])
        end = block["offset_bytes"] + _reserved(block)
        if end > document["arena_bytes"]:
            _fail(f"{where}.offset_bytes", f"a block within the arena of {document['arena_bytes']} bytes", f"end {end}")
    _check_overlap(path, program["blocks"])
    _check_traffic(path, program)
    _check_timeline(path, program, count, document["resident"])


def _check_traffic(path: str, program: Mapping[str, Any]) -> None:
    """What a program moves, where it is told, is what its instructions move together, and not below the least."""
    if (traffic := program.get("traffic")) is None:
        return
    path = f"{path}.traffic"
    _fields(path, traffic, _TRAFFIC)
    for name in _MOVED:
        right = sum(instruction.get(name, 0) for instruction in program["instructions"])
        _equal(f"{path}.{name}", traffic[name], right, "what the instructions add up to")
    nbytes = traffic["read_bytes"] + traffic["written_bytes"]
    if traffic["least_bytes"] > nbytes:
        _fail(f"{path}.least_bytes", f"at most the {nbytes} bytes that are read and written", traffic["least_bytes"])


def _check_timeline(path: str, program: Mapping[str, Any], count: int, resident: Sequence[Mapping[str, Any]]) -> None:
    """The arrays are what blocks and resident blocks add up to, and the peak is their highest point."""
    given = program["timeline"]
    _fields(f"{path}.timeline", given, {"total": _int_array, "by_kind": _mapping})
    expected = timeline(count, program["blocks"], resident)
    arrays = {f"by_kind.{kind}": values for kind, values in given["by_kind"].items()}
    for name, values in (("total", given["total"]), *arrays.items()):
        where = f"{path}.timeline.{name}"
        kind = name.partition(".")[2]
        if kind and kind not in _TIMED_KINDS:
            _fail(where, f"one of {', '.join(_TIMED_KINDS)} as a kind", kind)
        _int_array(where, values)
        if len(values) != count + 2:
            _fail(where, f"{count + 2} entries ({count} instructions and the times before and after)", len(values))
        right = expected["by_kind"].get(kind, [0] * (count + 2)) if kind else expected["total"]
        if list(values) != right:
            entry = next(entry for entry, value in enumerate(right) if values[entry] != value)
            _equal(f"{where}[{entry}]", values[entry], right[entry], "what the blocks alive then add up to")
    if missing := set(expected["by_kind"]) - set(given["by_kind"]):
        _fail(
            f"{path}.timeline.by_kind", f"also {', '.join(sorted(missing))}, which blocks have", list(given["by_kind"])
        )
    _equal(f"{path}.peak_bytes", program["peak_bytes"], max(expected["total"]), "the highest entry of timeline.total")
    at = program["peak_at"]
    if not -1 <= at <= count:
        _fail(f"{path}.peak_at", f"a time from -1 through {count}", at)
    _equal(f"{path}.peak_at", expected["total"][at + 1], program["peak_bytes"], "the peak's bytes at that time")
    if (actual := program["actual"]) is not None:
        _int_array(f"{path}.actual", actual)
        if len(actual) != count + 2:
            _fail(f"{path}.actual", f"{count + 2} entries, or null", len(actual))


def _check_overlap(path: str, blocks: Sequence[Mapping[str, Any]]) -> None:
    """No two blocks that are alive at one time share a byte: a sweep over time beside a list sorted by offset."""
    numbers = [number for number, block in enumerate(blocks) if _reserved(block)]
    ends: dict[int, list[int]] = {}
    for number in numbers:
        ends.setdefault(blocks[number]["last"] + 1, []).append(number)
    alive: list[tuple[int, int, int]] = []  # start, end, position in blocks
    times = iter(sorted(ends))
    upcoming = next(times, math.inf)
    for number in sorted(numbers, key=lambda number: blocks[number]["first"]):
        block = blocks[number]
        while upcoming <= block["first"]:
            for gone in ends[int(upcoming)]:
                start = blocks[gone]["offset_bytes"]
                alive.pop(bisect.bisect_left(alive, (start, start + _reserved(blocks[gone]), gone)))
            upcoming = next(times, math.inf)
        entry = (block["offset_bytes"], block["offset_bytes"] + _reserved(block), number)
        spot = bisect.bisect_left(alive, entry)
        for other in alive[max(0, spot - 1) : spot + 1]:
            if other[0] < entry[1] and entry[0] < other[1]:
                twin = f"{path}.blocks[{other[2]}]"
                _fail(f"{path}.blocks[{number}].offset_bytes", f"bytes that {twin} does not use then", entry[0])
        alive.insert(spot, entry)


def _check_sums(document: Mapping[str, Any]) -> None:
    """Figures of the whole plan follow from the resident blocks, the arena, and the program with the highest peak."""
    peak_bytes = document["peak_bytes"]
    resident_bytes = sum(map(_reserved, document["resident"]))
    _equal("peak_bytes", peak_bytes, resident_bytes + document["arena_bytes"], "resident blocks plus arena_bytes")
    highest = max(document["programs"], key=lambda program: program["peak_bytes"])
    expected = peak_by_kind(highest, peak_bytes)
    for kind in KINDS:
        right = f"what {kind} hold at the peak of program {highest['name']!r}"
        _equal(f"peak_by_kind.{kind}", document["peak_by_kind"].get(kind, 0), expected.get(kind, 0), right)
    rows = {row["layer"]: row for row in layer_rows(highest, document["resident"], peak_bytes)}
    for number, row in enumerate(document["by_layer"]):
        right_row = rows.pop(row["layer"], None)
        if right_row is None:
            _fail(f"by_layer[{number}].layer", "a layer that holds memory at the peak, once", row["layer"])
        for kind in LAYER_KINDS:
            _equal(f"by_layer[{number}].{kind}", row[kind], right_row[kind], "what its blocks hold at the peak")
        if abs(row["share"] - right_row["share"]) > 1e-6:
            _fail(f"by_layer[{number}].share", f"{right_row['share']:.6f}, its part of peak_bytes", row["share"])
    if rows:
        _fail("by_layer", f"also a row for {next(iter(rows))!r}", f"{len(document['by_layer'])} rows")


def _reserved(block: Mapping[str, Any]) -> int:
    return int(block["nbytes"]) + int(block.get("rounding_bytes", 0))


# ---- checks of one value: (path, value), raise or return ----


def _fail(path: str, expected: str, got: object) -> NoReturn:
    text = repr(got)
    text = text if len(text) <= 80 else text[:77] + "..."
    raise DataError(f"{path or 'document'}: expected {expected}, got {text}")


def _equal(path: str, got: object, expected: object, why: str) -> None:
    if got != expected:
        _fail(path, f"{expected} ({why})", got)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int(path: str, value: object) -> None:
    if not _is_int(value):
        _fail(path, "an integer", value)


def _count(path: str, value: object) -> None:
    if not _is_int(value) or value < 0:  # type: ignore[operator]
        _fail(path, "an integer of 0 or more", value)


def _count_or_null(path: str, value: object) -> None:
    if value is not None:
        _count(path, value)


def _fraction(path: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        _fail(path, "a number from 0 through 1", value)


def _text(path: str, value: object) -> None:
    if not isinstance(value, str):
        _fail(path, "a string", value)


def _text_or_null(path: str, value: object) -> None:
    if value is not None:
        _text(path, value)


def _flag(path: str, value: object) -> None:
    if not isinstance(value, bool):
        _fail(path, "true or false", value)


def _list(path: str, value: object) -> None:
    if not isinstance(value, list | tuple):
        _fail(path, "a list", value)


def _mapping(path: str, value: object) -> None:
    if not isinstance(value, Mapping):
        _fail(path, "an object", value)


def _shape(path: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not all(_is_int(extent) and extent >= 0 for extent in value):
        _fail(path, "a list of integers of 0 or more", value)


def _int_array(path: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not all(map(_is_int, value)):
        _fail(path, "a list of integers", value)


def _known_kind(path: str, value: object) -> None:
    if value not in _TIMED_KINDS or value == "rounding":
        known = ", ".join(kind for kind in _TIMED_KINDS if kind != "rounding")
        _fail(path, f"one of {known}", value)


def _kind_map(path: str, value: Mapping[str, Any], kinds: Sequence[str]) -> None:
    for kind, nbytes in value.items():
        if kind not in kinds:
            _fail(f"{path}.{kind}", f"one of {', '.join(kinds)} as a kind", kind)
        _count(f"{path}.{kind}", nbytes)


_Check = Callable[[str, object], None]


def _fields(
    path: str, value: Any, required: Mapping[str, _Check], optional: Mapping[str, _Check] | None = None
) -> None:
    """An object that has the required fields, perhaps the optional ones, and no others."""
    _mapping(path, value)
    prefix = f"{path}." if path else ""
    for name, check in required.items():
        if name not in value:
            raise DataError(f"{prefix}{name}: missing")
        check(f"{prefix}{name}", value[name])
    for name in value:
        if name not in required:
            if name not in (optional or {}):
                raise DataError(f"{prefix}{name}: schema {SCHEMA} has no such field; known are {', '.join(required)}")
            (optional or {})[name](f"{prefix}{name}", value[name])


def _entries(path: str, values: Sequence[Any]) -> Iterable[tuple[str, Any]]:
    return ((f"{path}[{number}]", value) for number, value in enumerate(values))


_DOCUMENT: Mapping[str, _Check] = {
    "schema": _int,
    "brim": _text,
    "what": _text,
    "device": _mapping,
    "budget_bytes": _count_or_null,
    "peak_bytes": _count,
    "peak_by_kind": _mapping,
    "by_layer": _list,
    "arena_bytes": _count,
    "resident": _list,
    "exactness": _mapping,
    "programs": _list,
}
_LAYER: Mapping[str, _Check] = {"layer": _text, **dict.fromkeys(LAYER_KINDS, _count), "share": _fraction}
_ROUNDING: Mapping[str, _Check] = {"rounding_bytes": _count}
_RESIDENT: Mapping[str, _Check] = {
    "name": _text, "layer": _text, "kind": _text, "shape": _shape, "dtype": _text, "nbytes": _count
}  # fmt: skip
_PROGRAM: Mapping[str, _Check] = {
    "name": _text, "peak_bytes": _count, "peak_at": _int, "hash": _text, "instructions": _list, "blocks": _list,
    "timeline": _mapping, "actual": lambda path, value: None if value is None else _list(path, value),
}  # fmt: skip
_INSTRUCTION: Mapping[str, _Check] = {
    "index": _count, "op": _text, "layer": _text, "site": _text, "phase": _text, "outs": _list
}  # fmt: skip
_MOVED = ("launches", "read_bytes", "written_bytes", "scratch_bytes", "flops")
_TRAFFIC: Mapping[str, _Check] = dict.fromkeys((*_MOVED, "least_launches", "least_bytes"), _count)
_BLOCK: Mapping[str, _Check] = {
    "id": _int, "op": _text, "layer": _text, "kind": _text, "shape": _shape, "dtype": _text, "nbytes": _count,
    "offset_bytes": _count, "first": _int, "last": _int, "site": _text,
}  # fmt: skip
