"""GPUs that were measured once: their rates out of the JSON of ``brim bench gpu``, for ``brim bench machinery``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from brim.errors import BrimError
from brim_bench.machinery import Measured
from brim_bench.results import read_document

__all__ = ["RESULTS", "measured_gpus"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Where a checkout keeps its measurements; an installed brim has none."""

_TRAINING = ("gpu_gpt2_b8_bf16", "gpu_lm_b32_fp32")
"""Whole training steps that tell a rate, the better one first."""


def measured_gpus(path: Path | None = None) -> list[Measured]:
    """The rates of each card, of its latest run: products of each kind, and training steps of a transformer.

    Arguments:
        path: the JSON of a run, or a folder of them; the checkout's results when None.

    Raises:
        BrimError: a file that was named, not found in a folder, cannot be read or is no run.
        ValueError: a file that was named is no run on a GPU.
    """
    if path is not None and not path.is_dir():
        named = read_document(path)
        if not _on_gpu(named):
            raise ValueError(f"{path}: expected the JSON of a run on a GPU that is no rehearsal (`brim bench gpu`)")
        return _rates(named, path.name)
    latest: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    for name, document in _documents(RESULTS if path is None else path):
        if _on_gpu(document):
            one = (document["environment"].get("time", ""), name, document)
            card = document["card"]["name"]
            latest[card] = max(latest.get(card, one), one, key=lambda found: found[:2])
    return [rate for _, (_, name, document) in sorted(latest.items()) for rate in _rates(document, name)]


def _documents(folder: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            yield path.name, read_document(path)
        except BrimError:
            continue  # other measurements lie there, too


def _on_gpu(document: Mapping[str, Any]) -> bool:
    """Whether there is what ``_rates`` needs, and no rehearsal."""
    known = {"name", "total_bytes"} <= set(document.get("card", {})) and (document.get("limits") or {})
    return bool(known and known.get("product_rates")) and not document["options"].get("tiny")


def _rates(document: Mapping[str, Any], file: str) -> list[Measured]:
    card = document["card"]
    day = document["environment"].get("time", "")[:10]
    memory_bytes = float(card["total_bytes"])
    found = [
        Measured(card["name"], rate, kind, memory_bytes, f"brim's matrix products on {day}, {file}")
        for kind, rate in document["limits"]["product_rates"].items()
    ]
    rows = {row["workload"]: row for row in document["rows"]}
    for name in _TRAINING:
        row = rows.get(name, {})
        own = row.get("sides", {}).get("brim", {})
        if own.get("status") == "ok" and own.get("median") and row.get("status") != "too noisy":
            dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(row.get("precision", ""), row.get("precision", ""))
            how = f"brim's training steps of {name} on {day}, {file}"
            found.append(Measured(f"{card['name']}, training", row["flops"] / own["median"], dtype, memory_bytes, how))
            break
    return found
