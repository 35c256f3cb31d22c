"""The JSON of a plan and its HTML report: the schema's check, escaping, the vendored library, and a real browser."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
from brim.errors import DataError
from brim.memory.report import KINDS
from brim.program import html as report
from brim.program import schema
from brim.program.html import to_html
from brim.units import format_bytes
from plan_documents import residual_step

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(report.__file__).parent / "assets"
EVIL = "</script><script>document.documentElement.dataset.evil=1</script><img src=x onerror=alert(1)>&amp;'\"{number}"
MIB = 2**20


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return residual_step(depth=4, budget_bytes=1024 * MIB)


def embedded(page: str) -> dict[str, Any]:
    """The data that the page's code reads."""
    (text,) = re.findall(r'<script type="application/json" id="plan-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


# ---- the schema ----


def test_a_plan_of_schema_1_passes_also_after_a_trip_through_json(small: dict[str, Any]) -> None:
    schema.validate(small)
    schema.validate(json.loads(json.dumps(small)))
    schema.validate(residual_step(depth=2, programs=1, overhead_bytes=MIB))


def test_the_smallest_plan_passes() -> None:
    program = {"name": "step", "peak_bytes": 0, "peak_at": -1, "hash": "", "instructions": [], "blocks": []}
    program |= {"timeline": {"total": [0, 0], "by_kind": {}}, "actual": None}
    document = {"schema": 1, "brim": brim.__version__, "what": "step", "budget_bytes": None, "peak_bytes": 0}
    document |= {"device": {"name": "cpu", "profile": None, "estimated": False}, "peak_by_kind": {}, "by_layer": []}
    document |= {"arena_bytes": 0, "resident": [], "exactness": {}, "programs": [program]}
    schema.validate(document)
    assert "needs <b" in to_html(document)


def set_in(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """A change of a document: the entry at ``path`` becomes ``to``."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return change


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    """A change of a document: the entry at ``path`` is removed."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


def one_byte_more(*path: str | int) -> Callable[[dict[str, Any]], None]:
    """A change of a document: the number at ``path`` grows by one."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] += 1

    return change


def overlap(document: dict[str, Any]) -> None:
    """Two large blocks of the first program that are alive together get the same offset."""
    blocks = document["programs"][0]["blocks"]
    convolution, fused = (b for b in blocks if b["kind"] == "activations" and b["first"] in (0, 1))
    fused["offset_bytes"] = convolution["offset_bytes"]


BROKEN = {
    "schema-2": (set_in("schema", to=2), r"^schema: expected 1, got 2; this version of brim reads plans of schema 1"),
    "schema-true": (set_in("schema", to=True), r"^schema: expected 1, got True"),
    "missing": (drop("arena_bytes"), r"^arena_bytes: missing"),
    "unknown": (set_in("colour", to="red"), r"^colour: schema 1 has no such field"),
    "unknown-in-block": (
        set_in("programs", 0, "blocks", 3, "x", to=1),
        r"^programs\[0\]\.blocks\[3\]\.x: schema 1 has",
    ),
    "text-for-number": (set_in("peak_bytes", to="1"), r"^peak_bytes: expected an integer of 0 or more, got '1'"),
    "flag-for-number": (set_in("budget_bytes", to=True), r"^budget_bytes: expected an integer of 0 or more, got True"),
    "negative": (set_in("budget_bytes", to=-1), r"^budget_bytes: expected an integer of 0 or more, got -1"),
    "number-for-text": (set_in("what", to=3), r"^what: expected a string, got 3"),
    "device": (drop("device", "estimated"), r"^device\.estimated: missing"),
    "device-text": (set_in("device", to="cpu"), r"^device: expected an object, got 'cpu'"),
    "kind": (set_in("programs", 0, "blocks", 0, "kind", to="misc"), r"blocks\[0\]\.kind: expected one of params"),
    "holes-block": (set_in("resident", 0, "kind", to="holes"), r"^resident\[0\]\.kind: expected one of params"),
    "shape": (set_in("resident", 1, "shape", to=[2, -1]), r"^resident\[1\]\.shape: expected a list of integers"),
    "figure": (set_in("exactness", to={"mood": "exact"}), r"^exactness\.mood: expected one of peak"),
    "class": (set_in("exactness", to={"peak": "sure"}), r"^exactness\.peak: expected one of exact, bound"),
    "no-programs": (set_in("programs", to=[]), r"^programs: expected at least one program"),
    "index": (set_in("programs", 0, "instructions", 2, "index", to=7), r"instructions\[2\]\.index: expected 2"),
    "phase": (set_in("programs", 0, "instructions", 2, "phase", to="on"), r"instructions\[2\]\.phase: expected one of"),
    "id": (set_in("programs", 0, "blocks", 2, "id", to=1), r"blocks\[2\]\.id: expected a number that no other block"),
    "first": (set_in("programs", 0, "blocks", 1, "first", to=-2), r"blocks\[1\]\.first: expected a time from -1"),
    "last": (set_in("programs", 0, "blocks", 1, "last", to=-1), r"blocks\[1\]\.last: expected a time from 0"),
    "arena": (set_in("programs", 0, "blocks", 1, "offset_bytes", to=10**9), r"offset_bytes: expected a block within"),
    "overlap": (overlap, r"^programs\[0\]\.blocks\[\d+\]\.offset_bytes: expected bytes that programs\[0\]\.blocks\["),
    "total": (one_byte_more("programs", 1, "timeline", "total", 3), r"^programs\[1\]\.timeline\.total\[3\]: expected"),
    "series": (
        one_byte_more("programs", 0, "timeline", "by_kind", "temps", 5),
        r"^programs\[0\]\.timeline\.by_kind\.temps\[5\]: expected \d+ \(what the blocks alive then add up to\)",
    ),
    "no-series": (drop("programs", 0, "timeline", "by_kind", "temps"), r"timeline\.by_kind: expected also temps"),
    "short-series": (drop("programs", 0, "timeline", "total", 0), r"timeline\.total: expected 27 entries \(25 instr"),
    "program-peak": (one_byte_more("programs", 0, "peak_bytes"), r"^programs\[0\]\.peak_bytes: expected"),
    "peak-at": (set_in("programs", 0, "peak_at", to=0), r"^programs\[0\]\.peak_at: expected"),
    "peak-outside": (set_in("programs", 0, "peak_at", to=26), r"^programs\[0\]\.peak_at: expected a time from -1"),
    "actual": (set_in("programs", 0, "actual", to=[1, 2]), r"^programs\[0\]\.actual: expected 27 entries, or null"),
    "peak": (one_byte_more("peak_bytes"), r"^peak_bytes: expected \d+ \(resident blocks plus arena_bytes\)"),
    "by-kind": (one_byte_more("peak_by_kind", "params"), r"^peak_by_kind\.params: expected \d+ \(what params hold"),
    "by-layer": (one_byte_more("by_layer", 0, "activations"), r"^by_layer\[0\]\.activations: expected"),
    "no-layer": (drop("by_layer", 0), r"^by_layer: expected also a row for"),
    "twice-a-layer": (set_in("by_layer", 1, "layer", to="net"), r"^by_layer\[1\]\.layer: expected a layer that holds"),
    "share": (set_in("by_layer", 0, "share", to=0.01), r"^by_layer\[0\]\.share: expected 0\."),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_by_its_path(small: dict[str, Any], case: str) -> None:
    change, message = BROKEN[case]
    document = copy.deepcopy(small)
    change(document)
    with pytest.raises(DataError, match=message):
        schema.validate(document)
    with pytest.raises(DataError, match=message):
        to_html(document)


@pytest.mark.parametrize("document", [None, [], "plan", 1])
def test_what_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(DataError, match=r"^document: expected an object"):
        schema.validate(document)


def test_blocks_that_share_memory_at_different_times_pass(small: dict[str, Any]) -> None:
    blocks = small["programs"][0]["blocks"]
    pairs = [
        (a, b) for a in blocks for b in blocks if a["last"] < b["first"] and a["offset_bytes"] == b["offset_bytes"]
    ]
    assert pairs, "the made-up plan reuses no memory: the check for overlap would prove nothing"


def test_the_timeline_is_the_sum_of_the_blocks_alive(small: dict[str, Any]) -> None:
    program = small["programs"][0]
    for time in range(-1, len(program["instructions"]) + 1):
        alive = [b for b in program["blocks"] if b["first"] <= time <= b["last"]] + small["resident"]
        total = sum(b["nbytes"] + b.get("rounding_bytes", 0) for b in alive)
        grads = sum(b["nbytes"] for b in alive if b["kind"] == "grads")
        assert program["timeline"]["total"][time + 1] == total
        assert program["timeline"]["by_kind"]["grads"][time + 1] == grads
    assert sum(small["peak_by_kind"].values()) == small["peak_bytes"]


def test_the_documentation_names_every_field_and_no_other() -> None:
    text = (ROOT / "docs" / "plan-schema.md").read_text(encoding="utf-8")
    rows = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    tables = [schema._DOCUMENT, schema._LAYER, schema._RESIDENT, schema._ROUNDING, schema._PROGRAM, schema._TRAFFIC]
    fields = {name for table in [*tables, schema._INSTRUCTION, schema._BLOCK] for name in table}
    assert rows == fields | {"profile", "estimated", "traffic"}
    assert all(f"`{kind}`" in text for kind in KINDS)


def test_the_documented_example_runs(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "plan-schema.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for budget_bytes, fits in ((None, True), (small["peak_bytes"], True), (small["peak_bytes"] - 1, False)):
        Path("plan.json").write_text(json.dumps({**small, "budget_bytes": budget_bytes}), encoding="utf-8")
        names: dict[str, Any] = {}
        exec(example, names)
        assert names["fits"] is fits


# ---- the page without a browser ----


def headline(page: str) -> str:
    (found,) = re.findall(r"<h1>(.*?)</h1>", page)
    return html.unescape(re.sub(r"<[^>]+>", "", found))


def test_the_headline_is_the_verdict(small: dict[str, Any]) -> None:
    peak_bytes = small["peak_bytes"]
    peak = format_bytes(peak_bytes)
    assert headline(to_html(small)) == f"Training step needs {peak} of 1.0 GiB: fits"
    assert headline(to_html({**small, "budget_bytes": None})) == f"Training step needs {peak}, no budget given"
    over = to_html({**small, "budget_bytes": 100 * MIB})
    excess = format_bytes(peak_bytes - 100 * MIB)
    assert headline(over) == f"Training step needs {peak} of 100.0 MiB: does not fit, {excess} too much"
    assert '<header class="over">' in over
    close = headline(to_html({**small, "budget_bytes": peak_bytes - 1}))
    assert close == f"Training step needs {peak_bytes:,} B of {peak_bytes - 1:,} B: does not fit, 1 B too much"
    assert headline(to_html({**small, "budget_bytes": peak_bytes})).endswith(": fits")
    assert headline(to_html({**small, "what": "train_step"})).startswith("train_step needs ")
    bound = headline(to_html({**small, "exactness": {"peak": "bound"}}))
    assert bound == f"Training step needs at most {peak} of 1.0 GiB: fits"


def test_the_summary_needs_no_javascript(small: dict[str, Any]) -> None:
    page = re.sub(r"<script.*?</script>", "", to_html(small), flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for kind, nbytes in small["peak_by_kind"].items():
        assert re.search(rf"{kind}\s+{re.escape(format_bytes(nbytes))}\s", text), kind
    program = small["programs"][0]
    instruction = program["instructions"][program["peak_at"]]
    for part in (
        instruction["layer"],
        instruction["op"],
        instruction["site"],
        "train step",
        "last batch",
        "evaluation",
    ):
        assert part in text
    assert "<noscript>" in page


def test_layer_names_cannot_become_markup() -> None:
    document = residual_step(depth=4, layer=EVIL)
    document["what"] = document["brim"] = document["device"]["name"] = document["programs"][0]["name"] = EVIL
    document["programs"][0]["hash"] = "<b>"
    page = to_html(document)
    assert page.count("<script") == page.count("</script") == 2
    assert "<img" not in page
    assert "&lt;b&gt;" in page
    assert EVIL.replace("{number}", "0") in embedded(page)["strings"]


def test_placeholders_in_names_stay_what_they_are() -> None:
    page = to_html(residual_step(depth=2, layer="{{{{script}}}}-{{nothing}}"))
    assert "{{script}}-{nothing}" in embedded(page)["strings"]
    assert page.count("<script") == 2


def test_the_page_loads_nothing(small: dict[str, Any]) -> None:
    page = to_html(small)
    assert re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page.split("<script", 1)[0]) == ["data:,"]
    assert not re.search(r"@import|url\(", page.split("<body>", 1)[0])
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|importScripts|sendBeacon|\bimport\(", page)
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {"https://github.com/leeoniya/uPlot"}  # in a comment
    assert "default-src 'none'" in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (digest,) = re.findall(r"script-src 'sha256-([^']+)'", page)
    assert digest == base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def test_the_vendored_library_is_what_it_says() -> None:
    folder = ASSETS / "uplot"
    record = json.loads((folder / "VENDORED.json").read_text(encoding="utf-8"))
    assert set(record["sha256"]) | {"VENDORED.json"} == {path.name for path in folder.iterdir()}
    for name, expected in record["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name
    assert f"(v{record['version']})" in (folder / "uPlot.iife.min.js").read_text(encoding="utf-8")


def test_the_page_carries_the_licence(small: dict[str, Any]) -> None:
    page = to_html(small)
    assert "Copyright (c) 2022 Leon Sorokin" in page
    assert "Permission is hereby granted, free of charge" in page


def test_the_columns_are_the_plan(small: dict[str, Any]) -> None:
    data = embedded(to_html(small))
    packed, program = data["programs"][0], small["programs"][0]
    births = np.cumsum(packed["blocks"]["birth"]).tolist()
    got = {
        (first, first + span, offset * packed["unit"], nbytes, KINDS[kind], data["strings"][layer])
        for first, span, offset, nbytes, kind, layer in zip(
            births, *(packed["blocks"][name] for name in ("span", "offset", "nbytes", "kind", "layer"))
        )
    }
    keys = ("first", "last", "offset_bytes", "nbytes", "kind", "layer")
    assert got == {tuple(block[key] for key in keys) for block in program["blocks"]}
    assert [data["strings"][i] for i in packed["instructions"]["site"]] == [i["site"] for i in program["instructions"]]
    assert packed["actual"] == program["actual"]


def test_a_large_step_makes_a_small_file() -> None:
    document = residual_step(depth=840, N=6, channels=16)
    assert len(document["programs"][0]["instructions"]) > 5000
    assert len(to_html(document).encode("utf-8")) < 1.5e6


# ---- the page in a browser ----

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to draw the page")

# Everything that a reader can do, once; what the page says then goes where the test can read it.
VISIT = """
<script>setTimeout(() => {
  const root = document.documentElement;
  const over = document.querySelector(".u-over"), arena = document.querySelector("#arena");
  const at = (place, x, y) => {
    const box = place.getBoundingClientRect();
    return {bubbles: true, clientX: box.left + x * box.width, clientY: box.top + y * box.height};
  };
  const tip = () => document.querySelector("#tip").innerText;
  const seen = {legend: document.querySelector("#legend").innerText};
  over.dispatchEvent(new MouseEvent("mousemove", at(over, 1.5 / 27, .5)));
  seen.chart = tip();
  over.dispatchEvent(new MouseEvent("mousedown", at(over, 1.5 / 27, .5)));
  over.dispatchEvent(new MouseEvent("click", at(over, 1.5 / 27, .5)));
  seen.pinned = document.querySelector("#alive-title").innerText;
  over.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  seen.next = document.querySelector("#alive-title").innerText;
  document.querySelector("#to-peak").click();
  seen.peak = document.querySelector("#alive-title").innerText;
  arena.dispatchEvent(new MouseEvent("mousemove", at(arena, .4, .8)));
  seen.arena = tip();
  const column = n => [...document.querySelectorAll(`#alive tbody td:nth-child(${n})`)].map(cell => cell.innerText);
  document.querySelector("#alive th:nth-child(3) button").click();
  seen.layers = column(3);
  document.querySelector("#filter").value = "conv1 grad";
  document.querySelector("#filter").dispatchEvent(new Event("input"));
  seen.filtered = column(4);
  document.querySelector("#legend button").click();
  document.querySelector("#near").click();
  document.querySelector("#reset").click();
  document.querySelector("#programs button:nth-child(3)").click();
  seen.program = document.querySelector("#alive-title").innerText;
  dispatchEvent(new Event("resize"));
  root.dataset.seen = JSON.stringify(seen);
}, 200)</script></body>"""


def visit(page: str, folder: Path, *, dark: bool = False) -> tuple[dict[str, str], str, np.ndarray[Any, Any], str]:
    """Open a page offline in headless Chromium.

    Returns:
        What its code left on the root element (``data-...``), the body's elements, a screenshot (H, W, 3) at half size,
        and what the console said.
    """
    path, picture = folder / "plan.html", folder / "plan.png"
    path.write_text(page, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1300,1400",
    ]
    command += ["--force-device-scale-factor=0.5", "--virtual-time-budget=3000", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += [f"--screenshot={picture}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    head, body = done.stdout.split("<body>", 1)
    (root,) = re.findall(r"<html([^>]*)>", head)
    marks = {name: html.unescape(text) for name, text in re.findall(r'data-(\w+)="([^"]*)"', root)}
    return marks, body, read_png(picture.read_bytes()), console


def read_png(data: bytes) -> np.ndarray[Any, Any]:
    """Pixels (H, W, 3) of an 8-bit RGB or RGBA image that is not interlaced."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind = data[at + 4 : at + 8]
        chunks[kind] = chunks.get(kind, b"") + data[at + 8 : at + 8 + length]
        at += 12 + length
    W, H, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, interlaced) == (8, 0)
    step = {2: 3, 6: 4}[colour]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(H, 1 + W * step)
    above = bytearray(W * step)
    rows = []
    for line in lines:
        row, method = bytearray(line[1:].tobytes()), line[0]
        if method == 2:
            row = bytearray((line[1:] + np.frombuffer(bytes(above), np.uint8)).tobytes())
        elif method:
            for i in range(len(row)):
                left = row[i - step] if i >= step else 0
                up, corner = above[i], above[i - step] if i >= step else 0
                guess = left if method == 1 else (left + up) // 2
                if method == 4:
                    a, b, c = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
                    guess = left if a <= b and a <= c else up if b <= c else corner
                row[i] = (row[i] + guess) & 255
        rows.append(np.frombuffer(bytes(row), np.uint8))
        above = row
    return np.stack(rows).reshape(H, W, step)[:, :, :3]


def part_of(picture: np.ndarray[Any, Any], colour: str) -> float:
    """How much of a picture has (almost) a colour ``#rrggbb``, from 0 through 1."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(picture.astype(int) - wanted).max(axis=2) <= 6).mean())


def colours(dark: bool) -> dict[str, str]:
    """The custom properties of the page's style in one colour scheme."""
    style = (ASSETS / "report" / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[1 if dark else 0]))


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_drawn(tmp_path: Path, dark: bool) -> None:
    document = residual_step(depth=16, budget_bytes=520 * MIB)
    marks, _, picture, console = visit(to_html(document), tmp_path, dark=dark)
    assert marks == {"state": "drawn"}
    assert console == ""
    palette = colours(dark)
    assert part_of(picture, palette["k-activations"]) > 0.05, "the area of the activations is missing"
    assert part_of(picture, palette["k-params"]) > 0.01, "the area of the parameters is missing"
    assert part_of(picture, palette["card"]) > 0.2
    assert part_of(picture[:8], palette["page"]) > 0.9
    assert part_of(picture, colours(not dark)["page"]) < 0.05, "the other colour scheme"


@needs_chromium
def test_what_the_cursor_shows_is_the_plan(tmp_path: Path) -> None:
    document = residual_step(depth=4)
    page = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", to_html(document))
    marks, _, _, console = visit(page.replace("</body>", VISIT), tmp_path)
    assert console == ""
    assert set(marks) == {"state", "seen"}, marks
    seen = json.loads(marks["seen"])
    program = document["programs"][0]
    total, instruction = program["timeline"]["total"], program["instructions"][0]
    shape = ",".join(map(str, instruction["outs"][0]["shape"]))
    lines = [
        f"{instruction['layer']} {instruction['op']}",
        "instruction 0, forward",
        f"float32[{shape}]",
        instruction["site"],
    ]
    assert [re.sub(r"\s+", " ", line) for line in seen["chart"].splitlines()] == [
        *lines,
        f"{format_bytes(total[1])} alive",
    ]
    assert format_bytes(program["peak_bytes"]) in seen["legend"]
    for kind, nbytes in document["peak_by_kind"].items():
        assert kind == "holes" or re.search(rf"{kind}\s+{format_bytes(nbytes)}", seen["legend"]), kind
    assert seen["pinned"].startswith("Alive at instruction 0: ")
    assert seen["next"].startswith("Alive at instruction 1: ")
    assert seen["peak"].startswith(f"Alive at the peak, instruction {program['peak_at']}: ")
    assert re.search(r"float32\[[\d,]+\], \w+\nalive from \S+ through \d+, at offset", seen["arena"])
    assert seen["layers"] == sorted(seen["layers"])
    at = program["peak_at"]
    alive = [b for b in program["blocks"] if b["first"] <= at <= b["last"] and "conv1" in b["layer"]]
    made_by = sorted(b["op"] for b in alive if "grad" in b["op"] + b["kind"])
    assert made_by
    assert sorted(seen["filtered"]) == made_by
    evaluation = document["programs"][2]
    assert seen["program"].startswith(f"Alive at the peak, instruction {evaluation['peak_at']}: ")


@needs_chromium
def test_the_page_runs_no_script_but_its_own(tmp_path: Path) -> None:
    page = to_html(residual_step(depth=4, layer=EVIL))
    foreign = "<script>document.documentElement.dataset.evil = 2</script></body>"
    marks, body, _, console = visit(page.replace("</body>", foreign), tmp_path)
    assert marks == {"state": "drawn"}
    assert not re.search(r"<img\b", body)
    assert body.count("&lt;img src=x") > 10
    (refusal,) = console.splitlines()  # of the script that was put in afterwards; names make none
    assert "violates the following Content Security Policy directive" in refusal


@needs_chromium
def test_an_error_in_the_page_is_seen(tmp_path: Path) -> None:
    document = residual_step(depth=2, programs=1)
    page = to_html(document)
    broken = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", page).replace(
        "fillLayers();\n//", "fillLayer();\n//"
    )
    assert broken.count("fillLayer();") == 1
    marks, _, _, console = visit(broken, tmp_path)
    assert marks == {"error": "Uncaught ReferenceError: fillLayer is not defined"}
    assert "fillLayer is not defined" in console
