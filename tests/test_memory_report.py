"""The report of a refusal: its text adds up and stays short, and the error travels without any array."""

from __future__ import annotations

import gc
import json
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.errors import BrimError, BudgetExceeded, DataError, SwapDetected
from brim.memory.budget import parse_budget
from brim.memory.report import KINDS, LiveBlock, MemoryReport, budget_exceeded, render
from brim.units import format_bytes

KIB, MIB, GIB = 2**10, 2**20, 2**30


def eager(held: int, requested: int, budget: int | None, **rest: Any) -> MemoryReport:
    """One allocation: everything held is temps, the request is an activation."""
    values: dict[str, Any] = {
        "device": "cpu",
        "what": "relu output",
        "phase": "eager",
        "budget_bytes": budget,
        "budget_text": "off" if budget is None else f"{budget}B",
        "needed_bytes": held + requested,
        "live_bytes": held,
        "requested_bytes": requested,
        "by_kind": {"temps": held, "activations": requested},
    }
    return MemoryReport(**(values | rest))


def plan(**rest: Any) -> MemoryReport:
    """A training step as a later planner would report it."""
    by_kind = {
        "activations": 5120 * MIB,
        "temps": 768 * MIB,
        "optimizer": 487 * MIB,
        "overhead": 412 * MIB,
        "params": 243 * MIB,
        "grads": 243 * MIB,
        "holes": 96 * MIB,
        "inputs": 37 * MIB,
        "workspace": 8 * MIB,
        "rounding": 205 * KIB,
        "buffers": 0,
    }
    values: dict[str, Any] = {
        "device": "cuda:0",
        "what": "training step",
        "phase": "plan",
        "budget_bytes": 6 * GIB,
        "budget_text": "6GiB",
        "needed_bytes": sum(by_kind.values()),
        "live_bytes": 0,
        "requested_bytes": 0,
        "by_kind": by_kind,
        "by_layer": [(f"net.stage{i}", (2000 - 200 * i) * MIB) for i in range(9)],
        "largest": [
            LiveBlock("conv2d", f"net.stage{i}.conv1", (64, 256, 112, 112), "float32", 784 * MIB, 3, "resnet.py:41")
            for i in range(9)
        ],
        "peak_at": "backward of net.stage3.block2.conv1 (train step 2, event 1843)  models/resnet.py:88",
        "remedies": [f"batch {i} instead of 64    -> {i}.0 GiB" for i in range(9)],
        "notes": [f"note {i}" for i in range(9)],
        "exactness": {"overhead": "measured"},
    }
    return MemoryReport(**(values | rest))


def parse_bytes(text: str) -> float:
    number, unit = text.replace(",", "").split()
    return float(number) * {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 2**40, "PiB": 2**50}[unit]


SIZE = r"[\d,.]+ (?:B|[KMGTP]iB)"


def section(text: str, label: str) -> list[str]:
    """Lines under a label, without it."""
    lines: list[str] = []
    current = ""
    for line in text.splitlines()[1:]:
        current = line[2:12].strip() or current
        if current == label:
            lines.append(line[12:])
    return lines


# --- the first line ---------------------------------------------------------------------------------------------------


def test_first_line_says_it_all() -> None:
    report = eager(int(19.2 * MIB), int(21.6 * MIB) - int(19.2 * MIB), 20 * MIB, budget_text="20MiB")
    assert render(report).splitlines()[0] == (
        "eager allocation of relu output needs 2.4 MiB more on cpu: 19.2 MiB held + 2.4 MiB > budget 20.0 MiB: "
        "1.6 MiB (8.0 %) too much. Nothing was allocated."
    )


def test_first_line_of_a_planned_step() -> None:
    assert render(plan()).splitlines()[0] == (
        "training step needs 7.2 GiB on cuda:0, budget 6.0 GiB: 1.2 GiB (20.7 %) too much. Nothing was run."
    )
    bound = render(plan(exactness={"needed": "bound"}, budget_text="80%")).splitlines()[0]
    assert "needs at most 7.2 GiB on cuda:0, budget 6.0 GiB (80%): 1.2 GiB" in bound
    assert "needs about 7.2 GiB" in render(plan(exactness={"needed": "estimated"}))


@pytest.mark.parametrize(
    ("written", "shown"), [("80%", "(80%)"), ("auto", "(auto)"), ("20MiB", None), ("1.5 GiB", None)]
)
def test_declared_budget_is_shown_where_it_is_not_the_figure_itself(written: str, shown: str | None) -> None:
    first = render(eager(20 * MIB, MIB, 20 * MIB, budget_text=str(parse_budget(written)))).splitlines()[0]
    assert (shown in first) if shown else ("(20" not in first and "(1536" not in first)


@pytest.mark.parametrize(
    ("held", "requested", "budget"),
    [(20 * MIB - 60, 64, 20 * MIB), (20 * MIB, 64, 20 * MIB), (6 * GIB - 10 * MIB, 11 * MIB, 6 * GIB)],
)
def test_figures_that_would_look_alike_are_exact(held: int, requested: int, budget: int) -> None:
    first = render(eager(held, requested, budget)).splitlines()[0]
    assert f"{held:,} B held + {requested:,} B > budget {budget:,} B: {held + requested - budget:,} B" in first


@given(st.integers(0, 2**44), st.integers(1, 2**44), st.integers(1, 2**44))
def test_the_sum_of_the_first_line_can_be_checked_by_the_reader(held: int, requested: int, budget: int) -> None:
    report = eager(held, requested, budget)
    first = render(report).splitlines()[0]
    if held + requested <= budget:
        assert first.endswith("it fits.")
        assert report.excess_bytes <= 0
        return
    found = re.search(rf"({SIZE}) held \+ ({SIZE}) > budget ({SIZE}): ({SIZE}) \(", first)
    assert found is not None
    figures = [parse_bytes(text) for text in found.groups()]
    for shown, exact in zip(figures, (held, requested, budget, report.excess_bytes), strict=True):
        assert abs(shown - exact) <= max(0.051 * exact, 1)
    assert found[1] != found[3] or held == budget  # not "20.0 MiB + a little > 20.0 MiB" for different numbers
    assert first.endswith("Nothing was allocated.")


def test_a_device_that_has_less_than_the_budget_allows() -> None:
    report = eager(GIB, 4 * GIB, 20 * GIB, available_bytes=3 * GIB, available_text="cgroup v2 /a: limit less use")
    assert report.shortage_bytes == GIB
    assert render(report).splitlines()[0] == (
        "eager allocation of relu output needs 4.0 GiB more on cpu, only 3.0 GiB available "
        "(cgroup v2 /a: limit less use): 1.0 GiB (33.3 %) too much; 1.0 GiB held, budget 20.0 GiB. "
        "Nothing was allocated."
    )
    assert render(eager(GIB, 4 * GIB, 20 * GIB, available_bytes=4 * GIB)).splitlines()[0].endswith("it fits.")
    unlimited = render(eager(GIB, 4 * GIB, None, available_bytes=3 * GIB)).splitlines()[0]
    assert "only 3.0 GiB available: 1.0 GiB (33.3 %) too much; 1.0 GiB held, no budget." in unlimited
    step = render(plan(budget_bytes=9 * GIB, available_bytes=7 * GIB, live_bytes=100 * MIB)).splitlines()[0]
    assert step.startswith("training step needs 7.2 GiB on cuda:0, only 7.0 GiB available: ")
    assert step.endswith("too much; 100.0 MiB held, budget 9.0 GiB. Nothing was run.")


def test_nothing_requested_is_a_plain_status() -> None:
    assert render(eager(12 * MIB, 0, 20 * MIB, what="this process")).splitlines()[0] == (
        "this process holds 12.0 MiB on cpu, budget 20.0 MiB: 8.0 MiB left."
    )
    assert render(eager(12 * MIB, 0, None)).splitlines()[0] == "relu output holds 12.0 MiB on cpu, no budget."
    assert render(plan(budget_bytes=9 * GIB)).splitlines()[0].endswith("budget 9.0 GiB: it fits.")


# --- full or fragmented -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "free", "hole", "room"),
    [
        (4 * MIB, 5 * MIB, 3 * MIB, "fragmented"),
        (4 * MIB, 4 * MIB, 4 * MIB - 1, "fragmented"),
        (4 * MIB, 3 * MIB, 3 * MIB, "full"),
        (4 * MIB, 0, 0, "full"),
        (4 * MIB, 5 * MIB, 4 * MIB, "enough"),
        (4 * MIB, None, None, "unknown"),
    ],
)
def test_fragmented_is_told_from_full(requested: int, free: int | None, hole: int | None, room: str) -> None:
    by_kind = {"temps": 20 * MIB - (free or 0), "holes": free or 0, "activations": requested}
    report = eager(20 * MIB, requested, 20 * MIB, by_kind=by_kind, total_free_bytes=free, largest_hole_bytes=hole)
    text = render(report)
    assert report.room == room
    assert ("fragmented" in text) == (room == "fragmented")
    assert ("full" in text) == (room == "full")
    assert ("fragmented" in text.splitlines()[0]) == (room == "fragmented")
    assert bool(section(text, "free")) == (free is not None)
    if room == "fragmented" and hole == 4 * MIB - 1:
        assert "largest hole 4,194,303 B" in text
        assert "no hole for 4,194,304 B" in text


def test_fragmented_within_the_budget() -> None:
    report = eager(15 * MIB, 4 * MIB, 20 * MIB, total_free_bytes=5 * MIB, largest_hole_bytes=3 * MIB)
    assert render(report).splitlines()[0] == (
        "eager allocation of relu output needs 4.0 MiB more on cpu: 15.0 MiB held + 4.0 MiB within budget 20.0 MiB, "
        "but the largest hole is 3.0 MiB (fragmented). Nothing was allocated."
    )


# --- the rest of the text ---------------------------------------------------------------------------------------------


def test_kinds_add_up_in_the_text() -> None:
    report = plan()
    text = render(report)
    items = " | ".join(section(text, "by kind")).split(" | ")
    shown = {item.split(" ", 1)[0]: parse_bytes(re.search(SIZE, item)[0]) for item in items}  # type: ignore[index]
    assert list(shown) == [kind for kind in KINDS if report.by_kind.get(kind)]
    for kind, nbytes in shown.items():
        assert abs(nbytes - report.by_kind[kind]) <= 0.05 * GIB
    assert abs(sum(shown.values()) - report.needed_bytes) <= 0.01 * report.needed_bytes
    assert "overhead 412.0 MiB (measured)" in text
    assert "buffers" not in text  # no byte, no entry


def test_order_of_kinds() -> None:
    assert KINDS == (
        "params", "buffers", "grads", "optimizer", "activations", "temps", "inputs", "workspace", "arena", "rounding",
        "holes", "overhead", "unattributed",
    )  # fmt: skip


def test_layers_add_up_in_the_text() -> None:
    report = plan()
    items = " · ".join(section(render(report), "by layer")).split(" · ")
    total = sum(parse_bytes(re.search(SIZE, item)[0]) for item in items)  # type: ignore[index]
    assert len(items) == 6
    assert items[-1].startswith("rest ")
    assert abs(total - sum(nbytes for _, nbytes in report.by_layer)) <= 0.3 * GIB
    assert items[0] == "net.stage0 2.0 GiB (27.0 %)"


def test_blocks_remedies_notes() -> None:
    text = render(plan())
    assert section(text, "largest")[0] == (
        "net.stage0.conv1 conv2d float32[64,256,112,112] 784.0 MiB  resnet.py:41  (3 of this size)"
    )
    assert len(section(text, "largest")) == 3
    assert section(text, "largest")[-1].endswith("(+6 more in .report)")
    assert section(text, "remedies")[0] == "batch 0 instead of 64    -> 0.0 GiB"
    assert section(text, "remedies")[-1].endswith("(+2 more in .report)")
    assert section(text, "notes")[0] == "note 0"
    assert section(text, "peak at") == [plan().peak_at]
    assert section(render(eager(0, 2, 1, peak_at="relu  a.py:1")), "at") == ["relu  a.py:1"]


def test_empty_lists_print_nothing() -> None:
    text = render(eager(20 * MIB, MIB, 20 * MIB))
    for label in ("remedies", "notes", "largest", "by layer", "free", "peak at"):
        assert label not in text
    assert len(text.splitlines()) == 3


def test_each_figure_has_its_class() -> None:
    line = section(render(plan()), "exactness")
    assert line == ["exact: budget, needed, held; kinds exact but where marked"]
    report = eager(MIB, MIB, MIB, available_bytes=9, exactness={"held": "measured", "needed": "bound"})
    assert section(render(report), "exactness") == [
        "exact: budget, requested; bound: needed; measured: held, available; kinds exact"
    ]


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
sizes = st.integers(0, 2**50)


@given(
    by_kind=st.dictionaries(st.sampled_from(KINDS), sizes),
    layers=st.lists(st.tuples(names, sizes), max_size=12),
    blocks=st.lists(
        st.builds(LiveBlock, names, names, st.lists(sizes, max_size=5).map(tuple), st.just("float32"), sizes),
        max_size=6,
    ),
    lines=st.lists(names, max_size=12),
    classes=st.dictionaries(st.sampled_from(KINDS), st.sampled_from(["exact", "bound", "measured", "estimated"])),
    budget=st.none() | sizes,
    free=st.none() | sizes,
)
def test_never_more_than_20_lines(
    by_kind: dict[str, int],
    layers: list[tuple[str, int]],
    blocks: list[LiveBlock],
    lines: list[str],
    classes: dict[str, Any],
    budget: int | None,
    free: int | None,
) -> None:
    report = plan(
        by_kind=by_kind, needed_bytes=sum(by_kind.values()), by_layer=layers, largest=blocks, remedies=lines,
        notes=lines, exactness=classes, budget_bytes=budget, total_free_bytes=free, largest_hole_bytes=free,
        peak_at=lines[0] if lines else "", what=lines[-1] if lines else "",
    )  # fmt: skip
    text = render(report)
    assert len(text.splitlines()) <= 20
    assert max(len(line) for line in text.split("\n")[1:]) <= 320
    assert MemoryReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_names_stay_on_one_line_and_keep_both_ends() -> None:
    long_name = "begin." + "x" * 500 + ".end"
    report = eager(20 * MIB, MIB, 20 * MIB, what="a\nb\u2028c\td", by_layer=[(long_name, MIB)], notes=[long_name])
    lines = render(report).splitlines()
    assert lines[0].startswith("eager allocation of a b c d needs")
    assert len(lines) == 5
    assert max(len(line) for line in lines[1:]) <= 120
    for label in ("by layer", "notes"):
        (line,) = section("\n".join(lines), label)
        assert re.match(r"begin\.x+…x+\.end", line)


def test_longest_report_has_20_lines_and_keeps_the_remedies() -> None:
    report = plan(total_free_bytes=MIB, largest_hole_bytes=KIB)
    text = render(report)
    assert 16 <= len(text.splitlines()) <= 20
    assert len(section(text, "remedies")) == 7


# --- what cannot be reported ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"by_kind": {"temps": 1}}, "add up to 1 B"),
        ({"by_kind": {"snacks": 3}}, "snacks"),
        ({"needed_bytes": 4, "by_kind": {"temps": 4}}, "1 B held"),
        ({"phase": "later"}, "later"),
        ({"exactness": {"needed": "sure"}}, "sure"),
        ({"exactness": {"color": "exact"}}, "color"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        eager(1, 2, 2, **wrong)


def test_from_dict_refuses_what_is_no_report() -> None:
    values = plan().to_dict()
    assert MemoryReport.from_dict(values) == plan()
    for broken in (
        {},
        values | {"schema": 99},
        values | {"extra": 1},
        {name: value for name, value in values.items() if name != "device"},
        {name: value for name, value in values.items() if name != "largest"},
        values | {"needed_bytes": 1},
        values | {"largest": [{"op": "x"}]},
    ):
        with pytest.raises(DataError):
            MemoryReport.from_dict(broken)


# --- the error --------------------------------------------------------------------------------------------------------


def test_error_is_a_memory_error_with_its_report() -> None:
    report = plan()
    error = budget_exceeded(report)
    assert isinstance(error, MemoryError)
    assert isinstance(error, BrimError)
    assert str(error) == render(report)
    assert error.report is report
    assert BudgetExceeded("text").report is None
    assert BudgetExceeded.__mro__[1:] == (BrimError, MemoryError, Exception, BaseException, object)  # not CuPy's


@pytest.mark.parametrize(
    "error",
    [budget_exceeded(plan()), BudgetExceeded("plain"), SwapDetected("swapped", None, 4096)],
    ids=lambda e: str(e)[:8],
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_error_survives_pickle(error: BudgetExceeded, protocol: int) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.report == error.report
    assert getattr(copy, "swapped_bytes", 0) == getattr(error, "swapped_bytes", 0)


def test_error_travels_between_processes() -> None:
    code = (
        "import pickle, sys\n"
        "error = pickle.load(sys.stdin.buffer)\n"
        "assert isinstance(error, MemoryError)\n"
        "error.report.notes.append('seen by the child')\n"
        "try:\n"
        "    raise error\n"
        "except MemoryError as caught:\n"
        "    pickle.dump(caught, sys.stdout.buffer)\n"
    )
    error = budget_exceeded(plan())
    result = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(error), capture_output=True, timeout=60, check=True
    )
    back = pickle.loads(result.stdout)
    assert type(back) is BudgetExceeded
    assert str(back) == str(error)
    assert back.report == plan(notes=[*plan().notes, "seen by the child"])


def test_error_holds_no_array() -> None:
    """NumPy scalars are what a careless caller passes; they would keep their array's base alive and are no JSON."""
    shape = np.array([64, 10])
    report = MemoryReport(
        "cpu", "x", "eager", np.int64(64), "64B", np.int64(96), np.int64(32), np.int64(64), {"temps": np.int64(96)},
        [("net", np.int64(96))], [LiveBlock("relu", "net", shape, np.dtype("float32"), np.int64(2560), np.int64(1))],
    )  # fmt: skip
    error = budget_exceeded(report)
    seen: set[int] = set()
    queue: list[Any] = [error, error.args, error.report]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, np.ndarray | np.generic), thing
        queue += [other for other in gc.get_referents(thing) if not callable(other)]
    assert len(seen) > 10
    assert json.loads(json.dumps(report.to_dict()))["needed_bytes"] == 96
    assert "float32[64,10]" in str(error)
    assert len(pickle.dumps(error)) < 4000


def test_exact_bytes_format() -> None:
    assert format_bytes(20 * MIB + 4) == "20.0 MiB"
    assert format_bytes(20 * MIB + 4, exact=True) == "20,971,524 B"
