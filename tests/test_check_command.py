"""``brim check``, the command: environment, tables, JSON, exit codes; nothing that a check raises ends it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
import brim.op
from brim.check import environment, report, run
from brim.check.compare import Worst
from brim.check.result import Result
from brim.check.table import all_rows
from brim.cli import main
from brim.io import read_json
from second_device import SecondBackend, double, results_of

CPU = brim.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_kernels")


# ---------------------------------------------------------------- environment


def test_environment(second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device, backend = second
    backend.facts = lambda index: {"driver": f"1.2 of {index}"}
    known = environment.facts(device)
    assert known["brim"] == brim.__version__
    assert known["driver"] == "1.2 of 0"
    assert known["overhead"] == "1.0 MiB (exact)"
    for place in (CPU, device):
        assert {r.outcome for r in results_of(environment.checks(place)).values()} == {"passed"}
    upload = SecondBackend.upload

    def losing_a_bit(self: Any, array: Any, host: Any) -> None:
        upload(self, array, host)
        array.view(np.uint8).reshape(-1)[:1] ^= 1

    monkeypatch.setattr(SecondBackend, "upload", losing_a_bit)
    monkeypatch.setitem(environment.NEEDED, "numpy", (99, 1))
    found = results_of(environment.checks(device))
    assert found["versions"].reason.startswith("brim needs numpy 99.1 or newer, this is ")
    assert "differ in their bits" in found["copies to the device and back"].reason


# ---------------------------------------------------------------- report and command


def made_results() -> list[Result]:
    return [
        Result("ops", "view ops", "slice[3]", "passed", "the CPU, float32", "", Worst(1e-7, 0.5), {}, 0.25),
        Result("ops", "view ops", "flip[3]", "passed", "the CPU, int64", "", Worst(), {}, 0.5),
        Result("ops", "view ops", "tile[3]", "failed", "", "broken\nby much", Worst(1.0, 7.0), {}, 0.1),
        Result("memory", "", "overhead", "skipped", "", "nobody tells", None, {}, 0.0),
        Result("memory", "", "budget", "passed", "held", "", None, {"held_bytes": 3}, 61.0),
    ]


def test_text_of_a_section() -> None:
    text = report.section_text("ops", made_results()[:3])
    lines = text.splitlines()
    assert lines[0] == "ops"
    assert lines[2].split("  ")[1:3] == ["view ops", "2 passed"]
    assert "1.0e-07 (50% of allowed)" in lines[2]
    assert "the CPU" in lines[2]
    assert lines[4] == "  tile[3]: failed: broken"
    assert "slice[3]" not in text
    assert "slice[3]" in report.section_text("ops", made_results()[:3], all_rows=True)
    assert report.summary(made_results(), 61.85) == "3 passed, 1 failed, 1 skipped in 1 min 02 s"


def test_table_on_a_terminal() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system=None)
    report.show_section(console, "ops", made_results())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("view ops", "2 passed", "tile[3]: failed: broken", "overhead: skipped: nobody tells", "1 min 01 s"):
        assert words in shown


def test_schema_of_the_document() -> None:
    document = report.document("cpu", {"brim": "1"}, made_results(), quick=True, elapsed_s=2.0)
    assert document["schema"] == 1
    assert list(document) == ["schema", "device", "quick", "environment", "counts", "elapsed_s", "results"]
    assert document["counts"] == {"passed": 3, "failed": 1, "skipped": 1}
    assert document["results"][0] == {
        "section": "ops",
        "group": "view ops",
        "name": "slice[3]",
        "outcome": "passed",
        "compared": "the CPU, float32",
        "reason": "",
        "worst_difference": 1e-7,
        "worst_share_of_tolerance": 0.5,
        "figures": {},
        "elapsed_s": 0.25,
    }
    assert document["results"][3]["worst_difference"] is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "check.json"
    assert main(["check", "--only", "ops,environment", "--quick", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.index("\nops\n") < said.index("\nenvironment\n")
    assert "elementwise ops" in said
    assert "networks" not in said
    document = read_json(file)
    assert document["counts"]["failed"] == document["counts"]["skipped"] == 0
    assert document["counts"]["passed"] == len(document["results"]) == len(all_rows()) + 3
    assert document["quick"] is True
    assert said.splitlines()[-1].startswith(f"{document['counts']['passed']} passed, 0 failed, 0 skipped in ")


def test_the_command_fails_where_a_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second: Any
) -> None:
    second[1].spoilt["exp"] = double
    file = tmp_path / "check.json"
    assert main(["check", "--device", "second", "--only", "ops", "--quick", "--json", str(file), "--verbose"]) == 1
    said = capsys.readouterr().out
    assert "exp[3x4]: failed: " in said
    assert "tanh[3x4]" in said  # each row a line
    failed = [row["name"] for row in read_json(file)["results"] if row["outcome"] == "failed"]
    assert "exp[3x4]" in failed
    assert "tanh[3x4]" not in failed

    def raising(*args: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(environment, "_versions", raising)
    assert main(["check", "--only", "environment"]) == 1
    assert "versions: failed: ZeroDivisionError: by nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--only", "opps"],
        ["--only", ""],
        ["--device", "abacus"],
        ["--device", "meta"],
        ["--json", "no/such/folder/check.json"],
        ["--json", "."],
        ["--nonsense"],
        ["cuda"],
    ],
    ids=" ".join,
)
def test_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("brim: ")
    assert not said.out


def test_help_and_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    said = capsys.readouterr().out
    for words in (*run.SECTIONS, "--device", "--json", "--quick", "--verbose"):
        assert words in said
    assert main(["--help"]) == 0
    assert "check" in capsys.readouterr().out
    with pytest.raises(ValueError, match="environment, ops, networks, memory"):
        run.checks("speed", CPU)


def test_import_brim_leaves_the_checks_out() -> None:
    code = "import sys, brim; print([m for m in sys.modules if m.startswith('brim.check')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
