"""The Python blocks of README.md and of the pages in docs/ run, one after another, as a reader would type them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
PAGES = [page for page in sorted((README.parent / "docs").glob("*.md")) if page.stem != "plan-schema"]  # its own test


def test_python_blocks_of_the_readme_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    check = "x = brim.asarray([0.0, 1.0])\nassert lorentzian(x).tolist() == [1.0, 0.5]\n"
    check += (
        "assert Residual(nn.Identity())(x).tolist() == [0.0, 2.0]\nassert trainer.history[-1]['val_accuracy'] > 0.9\n"
    )
    code = "\n".join(blocks) + check
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "memory holds" in done.stdout
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    assert code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_commands_of_the_readme_exist() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)`?", text)) - {"PYTHON"}:
        assert f"\n{target}:" in makefile, f"README names 'make {target}', the Makefile has no such target"
    assert text.index("make demo") < text.index("## ")
