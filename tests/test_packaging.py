"""What gets installed and the scripts that install it: versions agree, extras exist, nothing foreign is removed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import brim

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_versions_agree() -> None:
    assert brim.__version__ == PYPROJECT["project"]["version"]


def test_every_backend_entry_point_gives_a_backend() -> None:
    points = PYPROJECT["project"]["entry-points"]["brim.backends"]
    assert "cpu" in points
    for kind, target in points.items():
        module, _, attribute = target.partition(":")
        assert getattr(import_module(module), attribute)().kind == kind


def test_the_script_and_python_m_are_the_same_program() -> None:
    module, _, attribute = PYPROJECT["project"]["scripts"]["brim"].partition(":")
    assert callable(getattr(import_module(module), attribute))
    assert f"from {module} import {attribute}" in (ROOT / "src" / "brim" / "__main__.py").read_text(encoding="utf-8")


def test_extras_named_in_messages_exist() -> None:
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("backends/**/*.py"), ROOT / "README.md"]
    named = {extra for path in files for extra in re.findall(r"brim\[(\w+)\]", path.read_text(encoding="utf-8"))}
    assert named - extras == set()


def test_the_tests_have_what_the_data_extra_has() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(extras["data"]) <= set(extras["dev"])


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_says_that_python_is_missing(target: str) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make not installed")
    command = [make, "-C", str(ROOT), target, "PYTHON=no-such-python"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert 'brim needs Python 3.11 or newer, and "no-such-python" was not found' in done.stderr
    assert f"make PYTHON=python3.12 {target}" in done.stderr


def test_an_environment_made_by_someone_else_is_not_removed(tmp_path: Path) -> None:
    script = tmp_path / "tools" / "make_venv.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "tools" / "make_venv.py", script)
    mine = tmp_path / ".venv" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "was not made by this script, so it stays as it is" in done.stderr
    assert mine.read_text() == "precious"
