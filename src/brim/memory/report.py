"""The report of a device's memory, above all of a request that does not fit: plain numbers, and their text.

A report holds no array and no frame, so it can be pickled, written as JSON, and kept. Its text has at most 20 lines;
the first one says everything that matters, for logs that keep one line. Glossary:

- *held*: bytes that this process holds on the device now, holes included; *needed*: what it would hold with the
  request, or at the planned peak; *budget*: the most it may hold; *available*: what the machine could still give it.
- *full*: the request is larger than all holes together; *fragmented*: it is not, but than each single hole.
- *exact*: follows from shapes alone; *bound*: at most that much; *measured*: read from the system; *estimated*:
  may be off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from brim.errors import BudgetExceeded, DataError
from brim.memory.ledger import CATEGORIES
from brim.units import format_bytes

__all__ = ["KINDS", "Exactness", "LiveBlock", "MemoryReport", "budget_exceeded", "render"]

Exactness: TypeAlias = Literal["exact", "bound", "measured", "estimated"]

KINDS = (*CATEGORIES, "holes", "overhead", "unattributed")
"""The ledger's categories, then: holes: held but unused (fragmentation, blocks kept for reuse). Overhead: contexts,
library handles, modules. Unattributed: held by foreign code in this process."""

_FIGURES = ("budget", "needed", "held", "requested", "available", "free")
_SCHEMA = 1
_MAX_LINES = 20
_WIDTH = 116
_LABEL_WIDTH = 12
_NAME_WIDTH = 60


@dataclass
class LiveBlock:
    """One block, or several of the same make, as a report names it.

    Attributes:
        op: op that made it, or a parameter's name.
        layer: path of the layer, empty outside any.
        shape: shape in elements.
        dtype: name of the dtype.
        nbytes: bytes of one such block.
        count: how many there are.
        site: ``file:line`` of the user's code.
        kind: one of :data:`KINDS`, or empty.
    """

    op: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    count: int = 1
    site: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        self.op, self.layer, self.dtype = str(self.op), str(self.layer), str(self.dtype)
        self.shape = tuple(int(extent) for extent in self.shape)
        self.nbytes, self.count = int(self.nbytes), int(self.count)


@dataclass
class MemoryReport:
    """What a device holds, or would have to hold, against its budget.

    Attributes:
        device: e.g. ``cpu``, ``cuda:0``.
        what: who asks: ``relu output``, ``training step``.
        phase: ``eager``: one allocation, made now; ``plan``: the peak of a step that has not run.
        budget_bytes: the resolved limit; None for no limit.
        budget_text: the limit as declared (``80%``), or what set it (``cgroup v2 .../memory.max``).
        needed_bytes: held plus requested (eager), or the planned peak.
        live_bytes: held now, holes included.
        requested_bytes: what is asked for now; 0 for a plain status report.
        by_kind: bytes by :data:`KINDS`, the request included; adds up to ``needed_bytes``.
        by_layer: (layer, bytes), largest first.
        largest: largest blocks, largest first.
        peak_at: where the peak is, or where the request comes from: op, layer, source line.
        total_free_bytes: holes of the pool or arena (held, free); None where there is no such thing.
        largest_hole_bytes: the largest of them.
        available_bytes: what the machine could still give, whatever the budget; None where it was not asked.
        available_text: who says so, e.g. ``MemAvailable``.
        remedies: lines of text, each already checked by whoever wrote it; none is fine.
        notes: further lines of text.
        exactness: class of a figure (``budget``, ``needed``, ``held``, ``requested``, ``available``, ``free``) or of a
            kind; exact if absent, but ``available`` is measured.
    """

    device: str
    what: str
    phase: Literal["eager", "plan"]
    budget_bytes: int | None
    budget_text: str
    needed_bytes: int
    live_bytes: int
    requested_bytes: int
    by_kind: dict[str, int]
    by_layer: list[tuple[str, int]] = field(default_factory=list)
    largest: list[LiveBlock] = field(default_factory=list)
    peak_at: str = ""
    total_free_bytes: int | None = None
    largest_hole_bytes: int | None = None
    available_bytes: int | None = None
    available_text: str = ""
    remedies: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    exactness: dict[str, Exactness] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Plain Python values only, and sums that add up.

        Raises:
            ValueError: an unknown kind, phase or class, or figures that contradict each other.
        """
        if self.phase not in ("eager", "plan"):
            raise ValueError(f'phase {self.phase!r} is neither "eager" nor "plan"')
        for name in ("needed_bytes", "live_bytes", "requested_bytes"):
            setattr(self, name, int(getattr(self, name)))
        for name in ("budget_bytes", "total_free_bytes", "largest_hole_bytes", "available_bytes"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else int(value))
        if unknown := set(self.by_kind) - set(KINDS):
            raise ValueError(f"unknown kinds of memory {sorted(unknown)}; known are {', '.join(KINDS)}")
        self.by_kind = {kind: int(self.by_kind[kind]) for kind in KINDS if kind in self.by_kind}
        if sum(self.by_kind.values()) != self.needed_bytes:
            raise ValueError(f"kinds add up to {sum(self.by_kind.values())} B, but {self.needed_bytes} B are needed")
        if self.phase == "eager" and self.live_bytes + self.requested_bytes != self.needed_bytes:
            raise ValueError(
                f"{self.live_bytes} B held + {self.requested_bytes} B are not {self.needed_bytes} B needed"
            )
        for name, kind in self.exactness.items():
            if name not in (*_FIGURES, *KINDS) or kind not in get_args(Exactness):
                raise ValueError(f"exactness {name!r}: {kind!r} is not a known figure with a known class")
        self.by_layer = [(str(layer), int(nbytes)) for layer, nbytes in self.by_layer]

    @property
    def excess_bytes(self) -> int:
        """How much is needed over the budget; 0 or less fits, and so does every need without a budget."""
        return 0 if self.budget_bytes is None else self.needed_bytes - self.budget_bytes

    @property
    def shortage_bytes(self) -> int:
        """How much of what is needed beyond what is held the machine could not give; 0 or less is enough."""
        return 0 if self.available_bytes is None else self.needed_bytes - self.live_bytes - self.available_bytes

    @property
    def room(self) -> Literal["enough", "fragmented", "full", "unknown"]:
        """Whether one hole takes the request (enough), only all together (fragmented), or not even they (full)."""
        if self.total_free_bytes is None or self.largest_hole_bytes is None:
            return "unknown"
        if self.requested_bytes <= self.largest_hole_bytes:
            return "enough"
        return "fragmented" if self.requested_bytes <= self.total_free_bytes else "full"

    def class_of(self, name: str) -> Exactness:
        """Exactness class of a figure or kind. What a machine could still give is never known but by measuring."""
        return self.exactness.get(name, "measured" if name == "available" else "exact")

    def to_dict(self) -> dict[str, Any]:
        """Values that ``json.dumps`` writes; ``schema`` is the version of their layout."""
        return {"schema": _SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryReport:
        """The report that :meth:`to_dict` wrote, also after a trip through JSON.

        Raises:
            DataError: another schema, missing or unknown entries, or sums that do not add up.
        """
        fields = dict(values)
        schema = fields.pop("schema", None)
        if schema != _SCHEMA:
            raise DataError(f"memory report of schema {schema!r}: this version of brim reads schema {_SCHEMA}")
        try:
            fields["largest"] = [LiveBlock(**block) for block in fields["largest"]]
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is not a memory report as brim writes it: {error}") from error


def budget_exceeded(report: MemoryReport) -> BudgetExceeded:
    """The error to raise for a report: its text, with the report on it."""
    return BudgetExceeded(render(report), report)


def render(report: MemoryReport) -> str:
    """The report as text: the sentence that says it all, then details; 20 lines at most."""
    head = [_first_line(report)]
    if report.peak_at:
        label = "peak at" if report.phase == "plan" else "at"
        head += _labelled(label, [_short(report.peak_at, _WIDTH - _LABEL_WIDTH)])
    head += _labelled("by kind", _flow(_kind_items(report), " | "))
    tail = _labelled("free", _free_lines(report)) + _labelled("exactness", [_exactness_line(report)])
    room = _MAX_LINES - len(head) - len(tail)
    optional = [
        _labelled("by layer", _flow(_layer_items(report), " · ")[:2]),
        _labelled("largest", _first_of([_block_line(block) for block in report.largest], 3)),
        _labelled("remedies", _first_of([_short(line, _WIDTH - _LABEL_WIDTH) for line in report.remedies], 7)),
        _labelled("notes", _first_of([_short(line, _WIDTH - _LABEL_WIDTH) for line in report.notes], 3)),
    ]
    body: list[str] = []
    for lines in optional:
        body += lines[: max(0, room - len(body))]
    return "\n".join(head + body + tail)


def _first_line(report: MemoryReport) -> str:
    """Who needs how much on which device, the limit, and what is too much."""
    budget, device, what = report.budget_bytes, report.device, _short(report.what)
    pairs = [(report.needed_bytes, budget), (report.live_bytes, budget)]
    pairs += [(report.requested_bytes, report.largest_hole_bytes)] * (report.room == "fragmented")
    pairs += [(report.needed_bytes - report.live_bytes, report.available_bytes)]
    exact = any(_look_alike(one, other) for one, other in pairs)

    def text(count_bytes: int) -> str:
        return format_bytes(count_bytes, exact=exact)

    limit = "no budget" if budget is None else f"budget {text(budget)}"
    if report.budget_text and not re.fullmatch(r"[0-9.]+ ?[kKMGT]?i?B|off", report.budget_text):
        limit += f" ({_short(report.budget_text)})"
    over = ""
    if budget is not None and report.excess_bytes > 0:
        over = f": {text(report.excess_bytes)}{_percent(report.excess_bytes, budget)} too much"
        if report.room == "fragmented" and report.total_free_bytes is not None:
            over += f", though {text(report.total_free_bytes)} are free in pieces (fragmented)"
    short = ""
    if not over and report.available_bytes is not None and report.shortage_bytes > 0:
        source = f" ({_short(report.available_text)})" if report.available_text else ""
        percent = _percent(report.shortage_bytes, report.available_bytes)
        short = (
            f"only {text(report.available_bytes)} available{source}: {text(report.shortage_bytes)}{percent} too much"
        )

    if report.phase == "plan":
        degree = {"bound": "at most ", "estimated": "about "}.get(report.class_of("needed"), "")
        start = f"{what} needs {degree}{text(report.needed_bytes)} on {device}"
        if short:
            return f"{start}, {short}; {text(report.live_bytes)} held, {limit}. Nothing was run."
        return f"{start}, {limit}{over}. Nothing was run." if over else f"{start}, {limit}: it fits."
    if not report.requested_bytes:
        left = f": {text(-report.excess_bytes)} left" if budget is not None and not over else over
        return f"{what} holds {text(report.needed_bytes)} on {device}, {limit}{left}."
    start = f"eager allocation of {what} needs {text(report.requested_bytes)} more on {device}"
    held = f"{text(report.live_bytes)} held + {text(report.requested_bytes)}"
    if over:
        return f"{start}: {held} > {limit}{over}. Nothing was allocated."
    if short:
        return f"{start}, {short}; {text(report.live_bytes)} held, {limit}. Nothing was allocated."
    if report.room == "fragmented" and report.largest_hole_bytes is not None:
        hole = text(report.largest_hole_bytes)
        return f"{start}: {held} within {limit}, but the largest hole is {hole} (fragmented). Nothing was allocated."
    return f"{start}: {held} within {limit}: it fits."


def _look_alike(a: int, b: int | None) -> bool:
    """Two numbers that differ but would be printed alike."""
    return b is not None and a != b and format_bytes(a) == format_bytes(b)


def _percent(part: int, whole: int) -> str:
    if whole <= 0:
        return ""
    share = 100 * part / whole
    return f" ({share:.1f} %)" if share >= 0.05 else " (under 0.1 %)"


def _kind_items(report: MemoryReport) -> list[str]:
    """``temps 5.0 MiB``, in the fixed order; kinds without a byte are left out."""
    items = []
    for kind, nbytes in report.by_kind.items():
        degree = report.class_of(kind)
        if nbytes:
            items.append(f"{kind} {format_bytes(nbytes)}" + (f" ({degree})" if degree != "exact" else ""))
    return items


def _layer_items(report: MemoryReport) -> list[str]:
    """The five largest layers, and the rest in one figure."""
    items = [
        f"{_short(layer) or '(no layer)'} {format_bytes(nbytes)}{_percent(nbytes, report.needed_bytes)}"
        for layer, nbytes in report.by_layer[:5]
    ]
    rest_bytes = sum(nbytes for _, nbytes in report.by_layer[5:])
    return [*items, f"rest {format_bytes(rest_bytes)}"] if rest_bytes else items


def _block_line(block: LiveBlock) -> str:
    """``net.0 relu float32[64,256] 64.0 KiB activations  model.py:12  (3 of this size)``."""
    shape = ",".join(str(extent) for extent in block.shape)
    name = " ".join(part for part in (_short(block.layer), _short(block.op)) if part)
    line = f"{name} {block.dtype}[{shape}] {format_bytes(block.nbytes)}"
    line += f" {block.kind}" if block.kind else ""
    line += f"  {_short(block.site)}" if block.site else ""
    return line + (f"  ({block.count} of this size)" if block.count > 1 else "")


def _free_lines(report: MemoryReport) -> list[str]:
    if report.total_free_bytes is None or report.largest_hole_bytes is None:
        return []
    exact = _look_alike(report.requested_bytes, report.largest_hole_bytes)
    exact = exact or _look_alike(report.requested_bytes, report.total_free_bytes)
    total, hole, wanted = (
        format_bytes(count, exact=exact)
        for count in (report.total_free_bytes, report.largest_hole_bytes, report.requested_bytes)
    )
    verdict = {
        "fragmented": f": fragmented, enough in all but no hole for {wanted}",
        "full": f": full, not enough for {wanted}",
    }.get(report.room, "")
    return [f"{total} in all, largest hole {hole}{verdict}"]


def _exactness_line(report: MemoryReport) -> str:
    """Classes of the figures that are printed; kinds that differ carry theirs beside the number."""
    absent = {
        "budget": report.budget_bytes is None,
        "requested": not report.requested_bytes,
        "available": report.available_bytes is None,
        "free": report.total_free_bytes is None,
    }
    classes: dict[str, list[str]] = {}
    for figure in _FIGURES:
        if not absent.get(figure, False):
            classes.setdefault(report.class_of(figure), []).append(figure)
    others = [kind for kind, nbytes in report.by_kind.items() if nbytes and report.class_of(kind) != "exact"]
    text = "; ".join(f"{degree}: {', '.join(figures)}" for degree, figures in classes.items())
    return f"{text}; kinds exact{' but where marked' if others else ''}"


def _labelled(label: str, lines: list[str]) -> list[str]:
    """The label before the first line, blanks before the others; no line, no label."""
    return [f"  {label if number == 0 else '':<{_LABEL_WIDTH - 2}}{line}" for number, line in enumerate(lines)]


def _flow(items: Iterable[str], separator: str) -> list[str]:
    """Items side by side, as many to a line as fit."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(separator) + len(item) <= _WIDTH - _LABEL_WIDTH:
            lines[-1] += separator + item
        else:
            lines.append(item)
    return lines


def _first_of(lines: list[str], count: int) -> list[str]:
    """The first lines; the last one says how many more the report object has."""
    if len(lines) <= count:
        return lines
    return [*lines[: count - 1], f"{lines[count - 1]}  (+{len(lines) - count} more in .report)"]


def _short(text: str, width: int = _NAME_WIDTH) -> str:
    """On one line, and cut in the middle where it is too long: both ends of a path tell something."""
    text = " ".join(str(text).splitlines()).replace("\t", " ").strip()
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[: width - 1 - half]}…{text[-half:]}"
