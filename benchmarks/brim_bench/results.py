"""The JSON of a run: what it must contain, and how two of them compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brim.errors import DataError
from brim.io.json_files import read_json
from brim_bench.limits import least_seconds
from brim_bench.stats import MAX_SPREAD

__all__ = ["SCHEMA", "compare", "make_document", "read_document", "validate"]

SCHEMA = "brim-bench/1"
_STATUSES = ("ok", "too noisy", "wrong result", "failed", "not supported")


def make_document(
    environment: Mapping[str, Any], options: Mapping[str, Any], sides: Mapping[str, Any],
    limits: Mapping[str, Any] | None, rows: list[dict[str, Any]], left_out: Sequence[Mapping[str, str]] = (),
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A document of schema 1; each row gets the fraction of the limit that its fastest possible time is of brim's.

    Arguments:
        environment, options, sides, limits: as recorded.
        rows: of the workloads that ran.
        left_out: "workload" and "why" of those that were to run, too.
        card: of the device, as of ``Side.card``.
    """
    for row in rows:
        own = row["sides"].get("brim", {})
        if limits is not None and "median" in own and row["unit"] == "s":
            least_s, by = least_seconds(row, limits)
            if least_s:
                row["limit"] = {"seconds": least_s, "by": by, "fraction": least_s / own["median"]}
    return {
        "schema": SCHEMA,
        "environment": dict(environment),
        "options": dict(options),
        "sides": dict(sides),
        "limits": None if limits is None else dict(limits),
        "rows": rows,
        **({"left_out": [dict(one) for one in left_out]} if left_out else {}),
        **({"card": dict(card)} if card else {}),
    }


def validate(document: Any) -> None:
    """Check what the reports rely on.

    Raises:
        DataError: not a document of schema 1, or one that contradicts itself; the text names the place.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise DataError(f"expected the JSON of `brim bench run` (schema {SCHEMA!r}), found {found!r}")
    for key, kind in (("environment", dict), ("options", dict), ("sides", dict), ("rows", list)):
        if not isinstance(document.get(key), kind):
            raise DataError(f"{key}: expected a {kind.__name__}, found {type(document.get(key)).__name__}")
    ran = {row.get("workload") for row in document["rows"]}
    for one in document.get("left_out", []):
        if not one.get("why") or one.get("workload") in ran:
            raise DataError(f"left out {one.get('workload')!r}: it ran, or nobody says why not")
    for row in document["rows"]:
        where = f"row {row.get('workload')!r}"
        if row.get("status") not in _STATUSES:
            raise DataError(f"{where}: status {row.get('status')!r} is none of {', '.join(_STATUSES)}")
        for name, ratio in row["ratios"].items():
            if (ratio.get("status") == "ok") != ("median" in ratio):
                raise DataError(f"{where}: the ratio to {name} must have a median exactly if its status is ok")
        for name, side in row["sides"].items():
            if side.get("status") not in _STATUSES or not isinstance(side.get("samples"), list):
                raise DataError(f"{where}: side {name} has no status or no samples")


def read_document(path: Path) -> dict[str, Any]:
    """Read and check.

    Raises:
        CheckpointError: the file cannot be read.
        DataError: it is not the JSON of a run.
    """
    document = read_json(path)
    try:
        validate(document)
    except (DataError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error
    return document


def compare(before: Mapping[str, Any], after: Mapping[str, Any], side: str = "brim") -> list[dict[str, Any]]:
    """What changed between two runs, for each workload in both.

    A change is "slower" or "faster" if the middle halves of both runs' rounds do not overlap and the medians are more
    than 5 % apart; "same" otherwise. Runs beside a common peer are compared by their ratios to it, which cancels what
    the machine did; without one by their times.

    Returns:
        For each workload: "workload", "basis" ("ratio to X" or "time"), "before", "after", "change" (after / before),
        "verdict" ("slower", "faster", "same", "no figure").
    """
    olds = {row["workload"]: row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        old = olds.get(row["workload"])
        if old is None:
            continue
        peer = next((p for p, r in row["ratios"].items() if _has(r) and _has(old["ratios"].get(p, {}))), None)
        a, b = (
            (old["ratios"][peer], row["ratios"][peer])
            if peer
            else (old["sides"].get(side, {}), row["sides"].get(side, {}))
        )
        line: dict[str, Any] = {"workload": row["workload"], "basis": f"ratio to {peer}" if peer else "time"}
        if not peer and row["unit"] == "B":
            line["basis"] = "bytes"
        if not (_has(a) and _has(b)) or any(one["spread"] > MAX_SPREAD for one in (a, b)):
            found.append({**line, "before": None, "after": None, "change": None, "verdict": "no figure"})
            continue
        change = b["median"] / a["median"]
        apart = b["q25"] > a["q75"] or b["q75"] < a["q25"]
        verdict = "same" if not apart or abs(change - 1) <= 0.05 else "slower" if change > 1 else "faster"
        found.append({**line, "before": a["median"], "after": b["median"], "change": change, "verdict": verdict})
    return found


def _has(figure: Mapping[str, Any]) -> bool:
    return figure.get("status") == "ok" and "median" in figure
