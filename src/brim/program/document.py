"""A plan as plain data (``docs/plan-schema.md``): what is written to JSON, and what the HTML report is made of."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from brim.memory.pool import round_up
from brim.program.ir import Value
from brim.program.schema import SCHEMA, layer_rows, peak_by_kind, timeline

__all__ = ["arena_blocks", "document"]


def document(plan: Any, version: str) -> dict[str, Any]:
    """The document of a plan.

    Arguments:
        plan: a ``brim.program.plan.Plan``.
        version: of brim, recorded in it.

    Returns:
        A dict of schema 1, which ``json.dumps`` writes and ``brim.program.schema.validate`` accepts.
    """
    resident = _resident(plan)
    programs = [_program(planned, resident) for planned in plan.programs]
    peak = max(programs, key=lambda program: program["peak_bytes"])
    budget = None if plan.budget is None else plan.limit_bytes(plan.budget)
    return {
        "schema": SCHEMA,
        "brim": version,
        "what": plan.what,
        "device": {"name": plan.device, "profile": plan.profile, "estimated": plan.estimated},
        "budget_bytes": budget,
        "peak_bytes": plan.peak_bytes,
        "peak_by_kind": peak_by_kind(peak, plan.peak_bytes),
        "by_layer": layer_rows(peak, resident, plan.peak_bytes),
        "arena_bytes": plan.arena_bytes,
        "resident": resident,
        "exactness": dict(plan.exactness),
        "programs": programs,
    }


def _resident(plan: Any) -> list[dict[str, Any]]:
    found = []
    for one in plan.residents:
        value = one.value
        found.append(_described(value.op, value.layer, value.category, value, one.reserved_bytes))
    if plan.results_bytes:
        found.append(_bytes("results handed out", "temps", plan.results_bytes))
    if plan.overhead_bytes:
        found.append(_bytes("contexts and libraries", "overhead", plan.overhead_bytes))
    return found


def _described(name: str, layer: str, kind: str, value: Value, reserved_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "layer": layer,
        "kind": kind,
        "shape": list(value.spec.shape),
        "dtype": str(value.spec.dtype),
        "nbytes": value.nbytes,
        "rounding_bytes": reserved_bytes - value.nbytes,
    }


def _bytes(name: str, kind: str, nbytes: int) -> dict[str, Any]:
    return {"name": name, "layer": "", "kind": kind, "shape": [nbytes], "dtype": "uint8", "nbytes": nbytes}


def _program(planned: Any, resident: list[dict[str, Any]]) -> dict[str, Any]:
    program = planned.prepared.program
    blocks = arena_blocks(planned)
    times = timeline(len(program.instructions), blocks, resident)
    traffic = planned.traffic()
    peak_bytes = max(times["total"])
    return {
        "name": planned.name,
        "peak_bytes": peak_bytes,
        "peak_at": times["total"].index(peak_bytes) - 1,
        "hash": planned.hash,
        "instructions": [
            {
                "index": number,
                "op": one.op.name,
                "layer": one.layer,
                "site": one.where,
                "phase": one.phase,
                "outs": [{"shape": list(out.spec.shape), "dtype": str(out.spec.dtype)} for out in one.outs],
                **asdict(count),
            }
            for number, (one, count) in enumerate(zip(program.instructions, traffic.counts, strict=True))
        ],
        "traffic": {
            **asdict(traffic.total),
            "least_launches": traffic.least.launches,
            "least_bytes": traffic.least.nbytes,
        },
        "blocks": blocks,
        "timeline": times,
        "actual": None,
    }


def arena_blocks(planned: Any) -> list[dict[str, Any]]:
    """What lies in the arena of one program, as the entries of ``blocks`` of its document."""
    memory, program = planned.prepared.memory, planned.prepared.program
    unit = planned.prepared.alignment_bytes
    # Of two values in the same memory, the earlier one ends where the later one begins.
    taken = {old: memory.lifetimes[new][0] for new, old in memory.shares.items()}
    blocks: list[dict[str, Any]] = []
    for value, (first, last) in memory.lifetimes.items():
        last = min(last, taken.get(value, last + 1) - 1)
        if value.nbytes and last >= first:
            entry = _described(value.op, value.layer, planned.kinds[value], value, round_up(value.nbytes, unit))
            del entry["name"]
            blocks.append(
                {
                    "id": len(blocks),
                    "op": value.op,
                    **entry,
                    "site": value.where,
                    "offset_bytes": memory.offset_bytes(value),
                    "first": first,
                    "last": last,
                }
            )
    for at, kernel in enumerate(planned.prepared.kernels):
        nbytes = kernel.scratch_bytes + kernel.library_bytes
        if nbytes:
            one = program.instructions[at]
            entry = _bytes(one.op.name, "workspace", nbytes)
            del entry["name"]
            entry["layer"] = one.layer
            blocks.append(
                {
                    "id": len(blocks),
                    "op": one.op.name,
                    **entry,
                    "rounding_bytes": round_up(nbytes, unit) - nbytes,
                    "site": one.where,
                    "offset_bytes": memory.scratch_offset_bytes(at),
                    "first": at,
                    "last": at,
                }
            )
    return blocks
