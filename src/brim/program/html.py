"""The HTML report of a plan: one file that needs no network, readable without JavaScript, drawn with it.

Python writes what stands still (the verdict, the peak by kind, programs, layers) and packs the rest into columns of
numbers; ``assets/report/*.js`` draw them with uPlot, which is part of the file. Every text is escaped here or set as
text there, and the page forbids itself, by its content security policy, to load anything or to run any other script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

from brim.memory.report import KINDS
from brim.program.schema import LAYER_KINDS, validate
from brim.units import format_bytes

__all__ = ["to_html"]

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("common", "chart", "arena", "tables", "page")
_STATIC_LAYERS = 20

_MEANINGS = {
    "params": "trainable parameters",
    "buffers": "running statistics, constants",
    "grads": "gradients of parameters",
    "optimizer": "state of the optimizer",
    "activations": "kept for the backward pass",
    "temps": "intermediate results",
    "inputs": "the batch",
    "workspace": "scratch of kernels",
    "rounding": "lost to alignment",
    "holes": "of the arena, unused at the peak",
    "overhead": "contexts, library handles",
    "unattributed": "held by other code",
}


def to_html(document: Mapping[str, Any]) -> str:
    """One self-contained HTML file that shows a plan.

    Arguments:
        document: a plan of schema 1, see ``docs/plan-schema.md``.

    Returns:
        The file's text; write it as UTF-8.

    Raises:
        DataError: the document is not a plan of schema 1, or contradicts itself.
    """
    validate(document)
    highest = max(document["programs"], key=lambda program: program["peak_bytes"])
    verdict, state = _verdict(document)
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    parts = {
        "policy": "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        "title": html.escape(f"brim plan: {document['what']} {format_bytes(document['peak_bytes'])}"),
        "style": _asset("uplot/uPlot.min.css") + "\n" + _asset("report/style.css"),
        "what": html.escape(document["what"]),
        "state": state,
        "verdict": verdict,
        "meta": _meta(document, highest),
        "tiles": _tiles(document),
        "bar": _bar(document),
        "kinds": _kinds_table(document),
        "peak": _peak(highest),
        "programs": _programs_table(document),
        "layers": _layers_table(document),
        "data": _embeddable(_columns(document, document["programs"].index(highest))),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report/page.html"))


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _script() -> str:
    """uPlot with its licence, then the page's own code as one function."""
    own = "\n".join(_asset(f"report/{name}.js") for name in _SCRIPTS)
    library = f"/*\n{_asset('uplot/LICENSE').strip()}\n*/\n{_asset('uplot/uPlot.iife.min.js')}"
    return f'{library}\n(() => {{\n"use strict";\n{own}}})();\n'


def _embeddable(value: object) -> str:
    """JSON that can stand in a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---- what stands still ----


def _verdict(document: Mapping[str, Any]) -> tuple[str, str]:
    """(the sentence that says it all as HTML, state: "fits", "over" or "unlimited")."""
    peak_bytes, budget_bytes = document["peak_bytes"], document["budget_bytes"]
    exact = budget_bytes not in (None, peak_bytes) and format_bytes(peak_bytes) == format_bytes(budget_bytes)

    def text(nbytes: int) -> str:
        return f'<b class="size">{format_bytes(nbytes, exact=exact)}</b>'

    degree = {"bound": "at most ", "estimated": "about "}.get(document["exactness"].get("peak", "exact"), "")
    what = document["what"]
    if re.match(r"[a-z]+( |$)", what):  # words, not the name of a function
        what = what[0].upper() + what[1:]
    start = f"{html.escape(what)} needs {degree}{text(peak_bytes)}"
    if budget_bytes is None:
        return f"{start}, no budget given", "unlimited"
    if peak_bytes <= budget_bytes:
        return f"{start} of {text(budget_bytes)}: <em>fits</em>", "fits"
    return f"{start} of {text(budget_bytes)}: <em>does not fit</em>, {text(peak_bytes - budget_bytes)} too much", "over"


def _meta(document: Mapping[str, Any], highest: Mapping[str, Any]) -> str:
    device = document["device"]
    name = device["name"]
    if device["profile"]:
        name += f" as {device['profile']}"
    if device["estimated"]:
        name += " (estimated)"
    count = sum(len(program["instructions"]) for program in document["programs"])
    several = len(document["programs"])
    items = [
        f"device {name}",
        f"{count:,} instructions" + (f" in {several} programs" if several > 1 else ""),
        f"plan {highest['hash'][:12]}" if highest["hash"] else "",
        f"brim {document['brim']}",
    ]
    return " · ".join(html.escape(item) for item in items if item)


def _tiles(document: Mapping[str, Any]) -> str:
    """The figures of the whole plan, each with its class."""
    peak_bytes, budget_bytes = document["peak_bytes"], document["budget_bytes"]
    classes = document["exactness"]
    resident_bytes = peak_bytes - document["arena_bytes"]
    tiles = [("Peak", format_bytes(peak_bytes), classes.get("peak", "exact"))]
    if budget_bytes is not None:
        tiles.append(("Budget", format_bytes(budget_bytes), classes.get("budget", "")))
        left, label = budget_bytes - peak_bytes, "Left" if peak_bytes <= budget_bytes else "Too much"
        percent = f"{100 * abs(left) / budget_bytes:.1f} % of the budget" if budget_bytes else ""
        tiles.append((label, format_bytes(abs(left)), percent))
    tiles.append(("Arena", format_bytes(document["arena_bytes"]), classes.get("arena", "exact")))
    tiles.append(("Resident", format_bytes(resident_bytes), f"{len(document['resident']):,} blocks"))
    return "".join(
        f'<div class="tile"><span>{label}</span><b>{value}</b><small>{html.escape(note)}</small></div>'
        for label, value, note in tiles
    )


def _bar(document: Mapping[str, Any]) -> str:
    """The peak as one bar against the budget, if that is not so far away that nothing would be seen."""
    peak_bytes, budget_bytes = document["peak_bytes"], document["budget_bytes"]
    whole = max(peak_bytes, budget_bytes or 0, 1)
    pieces = "".join(
        f'<i class="k-{kind}" style="width:{100 * nbytes / whole:.3f}%" title="{kind} {format_bytes(nbytes)}"></i>'
        for kind, nbytes in _by_kind(document)
    )
    limit = ""
    if budget_bytes is not None:
        limit = f'<u style="left:{100 * budget_bytes / whole:.3f}%" title="budget {format_bytes(budget_bytes)}"></u>'
    return pieces + limit


def _by_kind(document: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(kind, document["peak_by_kind"][kind]) for kind in KINDS if document["peak_by_kind"].get(kind)]


def _kinds_table(document: Mapping[str, Any]) -> str:
    peak_bytes = document["peak_bytes"]
    rows = []
    for kind, nbytes in _by_kind(document):
        degree = document["exactness"].get(kind, "exact")
        name = f'<span class="name"><i class="swatch k-{kind}"></i>{kind}</span>'
        about = f'<td class="quiet">{_MEANINGS[kind]}</td><td class="quiet">{degree}</td>'
        rows.append(f"<tr><td>{name}</td>{_size_cells(nbytes, peak_bytes)}{about}</tr>")
    rows.append(f'<tr class="sum"><td>together</td>{_size_cells(peak_bytes, peak_bytes)}<td></td><td></td></tr>')
    return _table(("Kind", "#At the peak", "#Share", "What it is", "Class"), rows)


def _peak(program: Mapping[str, Any]) -> str:
    """Where the peak is, as a list of terms."""
    at, count = program["peak_at"], len(program["instructions"])
    terms = [("Program", program["name"])]
    if 0 <= at < count:
        instruction = program["instructions"][at]
        outs = ", ".join(_spec_text(out) for out in instruction["outs"])
        terms += [("Instruction", f"{at:,} of {count:,} ({instruction['phase']})"), ("Layer", instruction["layer"])]
        terms += [("Op", instruction["op"]), ("Output", outs), ("Source", instruction["site"])]
    else:
        terms.append(("Instruction", "before the first one" if at < 0 else "after the last one"))
    return "".join(f"<dt>{term}</dt><dd>{html.escape(text)}</dd>" for term, text in terms if text)


def _programs_table(document: Mapping[str, Any]) -> str:
    """All programs, where there is more than one."""
    programs = document["programs"]
    if len(programs) < 2:
        return ""
    rows = [
        f"<tr><td>{html.escape(program['name'])}</td><td class=n>{len(program['instructions']):,}</td>"
        f"<td class=n>{format_bytes(program['peak_bytes'])}</td></tr>"
        for program in programs
    ]
    return "<h2>Programs</h2>" + _table(("Program", "#Instructions", "#Live at its peak"), rows)


def _layers_table(document: Mapping[str, Any]) -> str:
    """The largest layers; the page's code replaces it by a table of all that can be sorted."""
    rows = [
        f"<tr><td>{html.escape(row['layer'] or '(no layer)')}</td>"
        + _size_cells(sum(row[kind] for kind in LAYER_KINDS), document["peak_bytes"])
        + "</tr>"
        for row in document["by_layer"][:_STATIC_LAYERS]
    ]
    more = len(document["by_layer"]) - len(rows)
    if more > 0:
        rows.append(f'<tr><td class="quiet">and {more:,} more</td><td></td><td></td></tr>')
    return _table(("Layer", "#At the peak", "#Share"), rows)


def _size_cells(nbytes: int, whole: int) -> str:
    return f"<td class=n>{format_bytes(nbytes)}</td><td class=n>{html.escape(_percent(nbytes, whole))}</td>"


def _percent(part: int, whole: int) -> str:
    """``8.1 %``; what would read as nothing is under a tenth."""
    if not whole:
        return ""
    return "< 0.1 %" if 0 < part / whole < 0.0005 else f"{100 * part / whole:.1f} %"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    """A table; a ``#`` before a head says that the column holds numbers."""
    cells = "".join(f"<th class=n>{head[1:]}</th>" if head[0] == "#" else f"<th>{head}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _spec_text(spec: Mapping[str, Any]) -> str:
    return f"{spec['dtype']}[{','.join(map(str, spec['shape']))}]"


# ---- what the page's code draws ----


def _columns(document: Mapping[str, Any], highest: int) -> dict[str, Any]:
    """The plan as columns of numbers; texts are numbered by first use. The timeline follows from the blocks."""
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    packed = {
        "budget": document["budget_bytes"],
        "peak": document["peak_bytes"],
        "arena": document["arena_bytes"],
        "highest": highest,
        "kinds": KINDS,
        "layerKinds": LAYER_KINDS,
        "resident": _rows(
            document["resident"],
            op=lambda block: number(block["name"]),
            layer=lambda block: number(block["layer"]),
            kind=lambda block: KINDS.index(block["kind"]),
            spec=lambda block: number(_spec_text(block)),
            nbytes=lambda block: block["nbytes"],
            rounding=lambda block: block.get("rounding_bytes", 0),
        ),
        "layers": _rows(
            document["by_layer"],
            layer=lambda row: number(row["layer"]),
            bytes=lambda row: [row[kind] for kind in LAYER_KINDS],
        ),
        "programs": [_program_columns(program, number) for program in document["programs"]],
    }
    return {**packed, "strings": list(numbers)}


def _program_columns(program: Mapping[str, Any], number: Callable[[str], int]) -> dict[str, Any]:
    """One program; of blocks the distance to the last one's birth, the duration, and the offset in common units."""
    blocks = sorted(program["blocks"], key=lambda block: (block["first"], block["offset_bytes"]))
    unit = gcd(*(block["offset_bytes"] for block in blocks)) or 1
    births = [block["first"] for block in blocks]
    packed = _rows(
        blocks,
        op=lambda block: number(block["op"]),
        layer=lambda block: number(block["layer"]),
        site=lambda block: number(block["site"]),
        kind=lambda block: KINDS.index(block["kind"]),
        spec=lambda block: number(_spec_text(block)),
        nbytes=lambda block: block["nbytes"],
        rounding=lambda block: block.get("rounding_bytes", 0),
        offset=lambda block: block["offset_bytes"] // unit,
        span=lambda block: block["last"] - block["first"],
    )
    packed["birth"] = [birth - before for birth, before in zip(births, [0, *births])]
    instructions = _rows(
        program["instructions"],
        op=lambda instruction: number(instruction["op"]),
        layer=lambda instruction: number(instruction["layer"]),
        site=lambda instruction: number(instruction["site"]),
        phase=lambda instruction: number(instruction["phase"]),
        outs=lambda instruction: number(", ".join(map(_spec_text, instruction["outs"]))),
    )
    return {
        "name": program["name"],
        "peak": program["peak_bytes"],
        "peakAt": program["peak_at"],
        "count": len(program["instructions"]),
        "unit": unit,
        "actual": program["actual"],
        "blocks": packed,
        "instructions": instructions,
    }


def _rows(entries: Sequence[Mapping[str, Any]], **columns: Callable[[Mapping[str, Any]], Any]) -> dict[str, list[Any]]:
    """Entries as columns."""
    return {name: [value(entry) for entry in entries] for name, value in columns.items()}
