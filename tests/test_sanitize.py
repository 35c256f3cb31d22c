"""The sanitizers that watch the native kernels: what does wrong is found, what does right is not, and where none is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brim_cpu import native_build
from poison import only

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import sanitize  # noqa: E402  # a script, in no package

FOUND = {"probe_read": "heap-buffer-overflow", "probe_shift": "shift exponent", "probe_race": "data race"}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in sanitize.PROBES for name in sanitize.PROBES[kind]])
def test_what_a_kernel_does_wrong_is_reported(kind: str, name: str, tmp_path: Path) -> None:
    try:
        library = sanitize.build_probe(kind, tmp_path)
        right = sanitize.call_probe(kind, library, name, wrong=False)
    except native_build.BuildError as error:
        pytest.skip(str(error))
    if right.returncode:
        pytest.skip(f"no process runs under it here: {right.stderr.strip()[:200]}")
    assert right.stdout == "returned\n"
    wrong = sanitize.call_probe(kind, library, name, wrong=True)
    assert wrong.returncode != 0
    assert FOUND[name] in wrong.stderr


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    assert sanitize.reason_to_skip("address", tmp_path) == "only with GCC on Linux"
    assert sanitize.main(["thread"]) == 0


def test_a_compiler_without_sanitizers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho ${1#-print-file-name=}\n")  # what GCC does with a library that it has not
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    if sys.platform == "linux":
        (tmp_path / "probe").mkdir()
        with pytest.raises(native_build.BuildError, match=r"has no libasan\.so"):
            sanitize.environment("address")


def test_a_probe_that_is_missed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, "returned\n", "")
    monkeypatch.setattr(sanitize, "build_probe", lambda kind, folder: folder)
    monkeypatch.setattr(sanitize, "call_probe", lambda *_, **__: done)
    with pytest.raises(SystemExit, match="probe_read does wrong, and nothing was reported"):
        sanitize.reason_to_skip("address", tmp_path)


def test_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitize.main(["everything"]) == 2
    with pytest.raises(native_build.BuildError, match="address or thread, not 'everything'"):
        native_build.sanitizer({"BRIM_NATIVE_SANITIZE": "everything"})


def test_a_watched_library_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = native_build.runnable()[0]
    monkeypatch.delenv("BRIM_NATIVE_SANITIZE", raising=False)
    plain = native_build.digest(variant)
    for kind in native_build.SANITIZERS:
        monkeypatch.setenv("BRIM_NATIVE_SANITIZE", kind)
        assert native_build.digest(variant) != plain
        assert native_build.prebuilt(variant) is None


def test_without_a_sanitizer_all_memory_is_free_to_touch() -> None:
    whole = np.arange(10.0)
    with only(whole[2:5], None, 3):
        assert whole.sum() == 45
