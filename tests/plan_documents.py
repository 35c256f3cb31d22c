"""Memory plans made up for tests: training steps of a residual network, as a planner would describe them."""

from __future__ import annotations

import bisect
import math
from typing import Any

from brim.program.schema import layer_rows, peak_by_kind, timeline

ALIGNMENT_BYTES = 64


def residual_step(
    *,
    depth: int = 8,
    N: int = 32,
    channels: int = 64,
    budget_bytes: int | None = None,
    layer: str = "net.stage{stage}.block{block}.conv{conv}",
    programs: int = 3,
    overhead_bytes: int = 0,
) -> dict[str, Any]:
    """A valid document: activations grow in forward and are given back in backward, each parameter updated at once.

    Arguments:
        depth: number of layers; each makes about six instructions and blocks.
        N: batch size of the train step; the last batch has a third of it.
        channels: of the first stage; they double, and the image halves, from one of four stages to the next.
        layer: pattern of the layers' paths.
        programs: how many of train step, last batch and evaluation.
        overhead_bytes: booked as estimated.
    """
    sizes = [channels * 2 ** (4 * number // depth) for number in range(depth)]
    names = [
        layer.format(stage=4 * number // depth, block=number // 2, conv=number % 2, number=number)
        for number in range(depth)
    ]
    resident: list[dict[str, Any]] = []
    for name, size in zip(names, sizes):
        for kind, what in (("params", "weight"), ("optimizer", "momentum")):
            resident.append(_array(what, kind, (size, size, 3, 3)) | {"layer": name})
        resident.append(_array("running_mean", "buffers", (size,)) | {"layer": name})
    if overhead_bytes:
        context = {"name": "CUDA context", "layer": "", "kind": "overhead", "shape": [overhead_bytes]}
        resident.append({**context, "dtype": "uint8", "nbytes": overhead_bytes})
    steps = [("train step", N, True), ("last batch", N // 3, True), ("evaluation", 2 * N, False)][:programs]
    made = [_program(name, batch, names, sizes, training, resident) for name, batch, training in steps]
    arena_bytes = max(block["offset_bytes"] + _reserved(block) for program in made for block in program["blocks"])
    peak_bytes = arena_bytes + sum(map(_reserved, resident))
    highest = max(made, key=lambda program: program["peak_bytes"])
    return {
        "schema": 1,
        "brim": "0.1.0",
        "what": "training step",
        "device": {"name": "cpu", "profile": None, "estimated": bool(overhead_bytes)},
        "budget_bytes": budget_bytes,
        "peak_bytes": peak_bytes,
        "peak_by_kind": peak_by_kind(highest, peak_bytes),
        "by_layer": layer_rows(highest, resident, peak_bytes),
        "arena_bytes": arena_bytes,
        "resident": resident,
        "exactness": {"overhead": "estimated", "peak": "estimated"} if overhead_bytes else {},
        "programs": made,
    }


def _program(
    name: str, N: int, names: list[str], sizes: list[int], training: bool, resident: list[dict[str, Any]]
) -> dict[str, Any]:
    instructions: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []

    def run(op: str, layer: str, line: int, phase: str, *outs: tuple[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        """One instruction; its outputs die at once unless their ``last`` is set later."""
        now, site = len(instructions), f"models/resnet.py:{line}"
        instruction = {"index": now, "op": op, "layer": layer, "site": site, "phase": phase}
        made = []
        for kind, shape in outs:
            array = _array(op, kind, shape)
            array.pop("name")
            places = {"id": len(blocks), "op": op, "layer": layer, "site": site, "first": now, "last": now}
            blocks.append({**array, **places, "offset_bytes": 0})
            made.append(blocks[-1])
        specs = [{"shape": b["shape"], "dtype": b["dtype"]} for b in made if b["kind"] != "workspace"]
        instructions.append({**instruction, "outs": specs})
        return made

    images = {**_array("input", "inputs", (N, 3, 64, 64)), "op": "input", "layer": "", "site": "train.py:12"}
    images.pop("name")
    blocks.append({**images, "id": 0, "first": -1, "last": 0, "offset_bytes": 0})
    saved = []
    for number, (layer, size) in enumerate(zip(names, sizes)):
        extent = 64 * sizes[0] // size
        shape = (N, size, extent, extent)
        kind = "activations" if training else "temps"
        conv = run("conv2d", layer, 40 + number, "forward", (kind, shape), ("workspace", (N * 1024,)))[0]
        act = run("fused", layer, 41 + number, "forward", (kind, shape))[0]
        conv["last"] = act["first"]
        if saved:
            saved[-1][1]["last"] = max(saved[-1][1]["last"], conv["first"])
        blocks[0]["last"] = max(blocks[0]["last"], conv["first"] if not number else 0)
        saved.append((conv, act, layer, size, shape))
    loss = run("softmax_cross_entropy", "loss", 90, "forward", ("temps", (N,)))[0]
    loss["last"] = len(instructions)
    if training:
        gradient: dict[str, Any] | None = None
        for number, (conv, act, layer, size, shape) in reversed(list(enumerate(saved))):
            through = run("fused", layer, 41 + number, "backward", ("temps", shape))[0]
            act["last"] = through["first"]
            if gradient:
                gradient["last"] = through["first"]
            outs = (("grads", (size, size, 3, 3)), ("workspace", (N * 2048,)))
            weight = run("conv2d_grad_weight", layer, 40 + number, "backward", *outs)[0]
            conv["last"] = weight["first"]
            gradient = run("conv2d_grad_input", layer, 40 + number, "backward", ("temps", shape))[0]
            through["last"] = gradient["first"]
            weight["last"] = len(instructions)
            run("sgd", layer, 120, "update")
    _first_fit(blocks)
    count = len(instructions)
    for block in blocks:
        block["last"] = min(block["last"], count)
    along = timeline(count, blocks, resident)
    peak_bytes = max(along["total"])
    return {
        "name": name,
        "peak_bytes": peak_bytes,
        "peak_at": along["total"].index(peak_bytes) - 1,
        "hash": "3f9c0a7be1d4425c",
        "instructions": instructions,
        "blocks": blocks,
        "timeline": along,
        "actual": along["total"] if name == "train step" else None,
    }


def _array(name: str, kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    nbytes = 4 * math.prod(shape)
    entry = {"name": name, "kind": kind, "shape": list(shape), "dtype": "float32", "nbytes": nbytes}
    return entry | {"rounding_bytes": -nbytes % ALIGNMENT_BYTES}


def _first_fit(blocks: list[dict[str, Any]]) -> None:
    """Each block, in order of birth, at the lowest offset that is free."""
    alive: list[tuple[int, int, int]] = []  # offset, end, last
    for block in sorted(blocks, key=lambda block: (block["first"], -block["nbytes"])):
        alive = [other for other in alive if other[2] >= block["first"]]
        at = 0
        for offset, end, _ in alive:
            if at + _reserved(block) <= offset:
                break
            at = max(at, end)
        block["offset_bytes"] = at
        bisect.insort(alive, (at, at + _reserved(block), block["last"]))


def _reserved(block: dict[str, Any]) -> int:
    return int(block["nbytes"]) + int(block.get("rounding_bytes", 0))
