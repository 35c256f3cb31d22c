"""Imports point one way, files stay small, ``import brim`` stays light: read from the source by AST, and tried.

``LAYERS`` below is the one table to change when a module is added or moved.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up. A module may import the rows above its own and the inside of its own entry, never another entry
# of its own row. An entry stands for everything inside it ("memory" for brim.memory.pool); a dotted entry such as
# "memory.report" takes a part out and gives it a place of its own. "" is brim/__init__.py.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "units", "context"),
    ("spec", "expr"),
    ("op", "random", "interop", "precision", "autocast"),
    ("backend", "io"),
    ("memory",),
    ("device",),
    ("accounting", "threads"),
    ("ops",),
    ("autograd",),
    ("tensor_methods",),
    ("tensor",),
    ("eager", "creation", "gathered"),
    ("program", "data", "nn", "optim"),
    ("train", "models"),
    ("",),
    ("check",),
    ("cli",),
    ("__main__",),
)

# All that a backend may import of brim: the protocol, and how to refuse (errors, and sizes in their messages).
BACKEND_API = ("errors", "units", "spec", "op", "backend", "expr", "random")

# The framework never names these; backends are found by their entry points.
NEVER_IN_SRC = ("cudnn", "cupy", "cupyx", "brim_cpu", "brim_cuda")

# Named only by commands, when they run. A benchmark is a user of the framework: it may import all of brim that a user
# may, and no backend.
BENCHMARKS = "brim_bench"

# Other frameworks, to compare with: loaded where a side of their own is, or inside a function.
PEERS = ("jax", "mlx", "tinygrad", "torch")

# A peer's process loads these and must stay clean of brim, which would lend it memory, threads and a slow start.
BENCHMARKS_OF_ALL_SIDES = (
    "brim_bench",
    "brim_bench.child",
    "brim_bench.digest",
    "brim_bench.sides",
    "brim_bench.sides.base",
    "brim_bench.sides.torch_side",
    "brim_bench.timing",
    "brim_bench.workload",
    "brim_bench.workloads",
)

# May be imported inside a function: optional, or too slow for `import brim`.
LAZY_LIBRARIES = (
    "cuda",
    "cudnn",
    "cupy",
    "cupyx",
    "cyclopts",
    "importlib",
    "matplotlib",
    "opt_einsum",
    "pooch",
    "psutil",
    "rich",
    "safetensors",
    "tensorboardX",
)

# Entries whose functions may import brim's own modules, so that `brim --help` starts fast.
LAZY_ENTRIES = ("cli",)

# What `import brim` must not pull in.
HEAVY_LIBRARIES = ("cupy", "cyclopts", "importlib.metadata", "opt_einsum", "psutil", "rich", "safetensors", "torch")

LINES_MAX = 520
SOURCE_SUFFIXES = (".py", ".pyi", ".cpp", ".hpp", ".c", ".h", ".cu", ".cuh")


@dataclass(frozen=True)
class Import:
    """One imported module: its full name, the line, and whether the import stands inside a function."""

    module: str
    line: int
    local: bool


class _ImportVisitor(ast.NodeVisitor):
    """Collects imports; those under ``if TYPE_CHECKING:`` are left out, because they never run."""

    def __init__(self, package: str) -> None:
        self.package = package  # against which relative imports are resolved
        self.found: list[tuple[str, str | None, int, bool]] = []  # module, name imported from it, line, local
        self.functions = 0

    def _visit_function(self, node: ast.AST) -> None:
        self.functions += 1
        self.generic_visit(node)
        self.functions -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.found.append((alias.name, None, node.lineno, self.functions > 0))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            parts = self.package.split(".")
            base = parts[: len(parts) - node.level + 1]
            module = ".".join([*base, module] if module else base)
        for alias in node.names:
            self.found.append((module, alias.name, node.lineno, self.functions > 0))

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self.found.append((str(node.args[0].value), None, node.lineno, self.functions > 0))
        self.generic_visit(node)


def module_name(path: Path, root: Path) -> str:
    """``root/brim/nn/__init__.py`` is ``brim.nn``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(path: Path, root: Path, modules: set[str]) -> list[Import]:
    """The imports of a file; ``from a import b`` counts as ``a.b`` where that is a module."""
    name = module_name(path, root)
    visitor = _ImportVisitor(name if path.name == "__init__.py" else name.rpartition(".")[0])
    visitor.visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return [
        Import(f"{module}.{member}" if f"{module}.{member}" in modules else module, line, local)
        for module, member, line, local in visitor.found
    ]


def entry_of(module: str) -> str | None:
    """The longest entry of LAYERS that holds a module of brim; None if the table has none."""
    inside = module.partition(".")[2]
    candidates = [e for row in LAYERS for e in row if inside == e or (e and inside.startswith(f"{e}."))]
    return max(candidates, key=len, default=None)


RANK = {entry: rank for rank, row in enumerate(LAYERS) for entry in row}


def framework_violations(src: Path) -> Iterator[str]:
    """What breaks the rules of imports in ``src/brim``, one sentence each."""
    files = sorted((src / "brim").rglob("*.py"))
    modules = {module_name(path, src) for path in files} | {f"brim.{entry}" for entry in RANK}
    for path in files:
        name = module_name(path, src)
        entry = entry_of(name)
        if entry is None:
            yield f"{name} has no place in LAYERS of tests/test_layering.py"
            continue
        for found in read_imports(path, src, modules):
            where = f"{path.relative_to(src)}:{found.line}: {name} imports {found.module}"
            top = found.module.partition(".")[0]
            if top in NEVER_IN_SRC:
                yield f"{where}: the framework never names a backend or its library"
            elif top == "brim":
                target = entry_of(found.module)
                if target is None:
                    yield f"{where}, which has no place in LAYERS"
                elif target != entry and RANK[target] >= RANK[entry]:
                    yield f"{where}: that is not below it in LAYERS"
                elif found.local and entry not in LAZY_ENTRIES:
                    yield f"{where} inside a function"
            elif top == BENCHMARKS:
                if entry not in LAZY_ENTRIES or not found.local:
                    yield f"{where}: only a command may, when it runs"
            elif found.local and top not in LAZY_LIBRARIES:
                yield f"{where} inside a function; only optional or slow libraries may be"


def backend_violations(backends: Path) -> Iterator[str]:
    """What breaks the rules of imports in ``backends``, one sentence each."""
    files = sorted(backends.rglob("*.py"))
    modules = {module_name(path, backends) for path in files} | {f"brim.{name}" for name in BACKEND_API}
    packages = {path.parent.name for path in backends.glob("*/__init__.py")}
    for path in files:
        name = module_name(path, backends)
        own = name.partition(".")[0]
        for found in read_imports(path, backends, modules):
            where = f"{path.relative_to(backends)}:{found.line}: {name} imports {found.module}"
            top = found.module.partition(".")[0]
            if top == "brim":
                if found.module not in modules:
                    yield f"{where}; of brim a backend may import only {', '.join(BACKEND_API)}"
            elif top in packages and top != own:
                yield f"{where}: backends do not know each other"
            if found.local and top not in LAZY_LIBRARIES:
                yield f"{where} inside a function; only optional or slow libraries may be"


def benchmark_violations(benchmarks: Path) -> Iterator[str]:
    """What breaks the rules of imports in ``benchmarks``, one sentence each."""
    files = sorted(benchmarks.rglob("*.py"))
    modules = {module_name(path, benchmarks) for path in files}
    for path in files:
        name = module_name(path, benchmarks)
        for_all = name in BENCHMARKS_OF_ALL_SIDES or name.startswith(f"{BENCHMARKS}.workloads.")
        for found in read_imports(path, benchmarks, modules):
            where = f"{path.relative_to(benchmarks)}:{found.line}: {name} imports {found.module}"
            top = found.module.partition(".")[0]
            own_side = name == f"{BENCHMARKS}.sides.{top}_side"
            if top in NEVER_IN_SRC:
                yield f"{where}: a benchmark knows backends no more than a user does"
            elif top in PEERS and not (own_side or found.local):
                yield f"{where}: peers are optional; only their own side imports them"
            elif for_all and top == "brim":
                yield f"{where}: the processes of peers load this module, and nothing of brim"
            elif found.local and top == BENCHMARKS:
                yield f"{where} inside a function"


def package_violations(roots: list[Path]) -> Iterator[str]:
    """Folders with Python files that no wheel would contain, and files that are too long."""
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.suffix in SOURCE_SUFFIXES):
            lines = path.read_text(encoding="utf-8").count("\n")
            if lines > LINES_MAX:
                yield f"{path.relative_to(root)} has {lines} lines, more than {LINES_MAX}: a file is one idea"
            if path.suffix == ".py" and not (path.parent / "__init__.py").exists():
                yield f"{path.relative_to(root)}: its folder has no __init__.py, so it would not be installed"


# ---- the repository ----


def test_the_framework_is_there() -> None:
    assert list((ROOT / "src" / "brim").glob("*.py")), "src/brim is empty: the tests below would prove nothing"


def test_the_table_names_every_entry_once() -> None:
    assert len(RANK) == sum(len(row) for row in LAYERS)


def test_arrows_of_the_framework() -> None:
    found = list(framework_violations(ROOT / "src"))
    assert not found, "\n".join(found)


def test_arrows_of_the_backends() -> None:
    found = list(backend_violations(ROOT / "backends"))
    assert not found, "\n".join(found)


def test_arrows_of_the_benchmarks() -> None:
    assert (ROOT / "benchmarks" / BENCHMARKS / "child.py").exists()
    found = list(benchmark_violations(ROOT / "benchmarks"))
    assert not found, "\n".join(found)


def test_files_are_short_and_installed() -> None:
    found = list(package_violations([ROOT / "src", ROOT / "backends", ROOT / "benchmarks"]))
    assert not found, "\n".join(found)


def test_import_brim_is_light() -> None:
    code = "import json, sys, brim; print(json.dumps([brim.__file__, sorted(sys.modules)]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("src", "backends"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    file, modules = json.loads(done.stdout)
    assert file == str(ROOT / "src" / "brim" / "__init__.py")
    assert "numpy" in modules
    assert [name for name in HEAVY_LIBRARIES if name in modules] == []
    assert [name for name in modules if name.startswith("brim_")] == [], "a backend loads when a device is first used"


# ---- the checks themselves: a planted violation is found ----


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write ``files`` (path: source) under ``root``."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


CLEAN = {
    "brim/__init__.py": "from brim import nn\nfrom brim.tensor import Tensor\n",
    "brim/spec.py": "import numpy\nif TYPE_CHECKING:\n    from brim.tensor import Tensor\n",
    "brim/tensor.py": "from brim import spec\nfrom .spec import Spec\n",
    "brim/nn/__init__.py": "from brim.nn.linear import Linear\n",
    "brim/nn/linear.py": "from ..tensor import Tensor\nfrom . import functional\ndef f():\n    import opt_einsum\n",
    "brim/nn/functional.py": "",
    "brim/cli/__init__.py": "def main():\n    from brim import nn\n    import rich\n    import brim_bench.command\n",
}


def test_a_clean_tree_has_no_violation(tmp_path: Path) -> None:
    assert list(framework_violations(plant(tmp_path, CLEAN))) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("brim/spec.py", "from brim.tensor import Tensor\n", "brim.spec imports brim.tensor: that is not below"),
        ("brim/spec.py", "from brim import tensor\n", "brim.spec imports brim.tensor: that is not below"),
        ("brim/spec.py", "from .nn import linear\n", "brim.spec imports brim.nn.linear: that is not below"),
        ("brim/spec.py", "import brim.nn.linear as l\n", "brim.spec imports brim.nn.linear: that is not below"),
        ("brim/tensor.py", "import brim\n", "brim.tensor imports brim: that is not below"),
        ("brim/nn/linear.py", "from .. import optim\n", "brim.nn.linear imports brim.optim: that is not below"),
        ("brim/nn/linear.py", "def f():\n    from brim.spec import Spec\n", "imports brim.spec inside a function"),
        ("brim/nn/linear.py", "f = lambda: __import__('math')\n", "imports math inside a function"),
        ("brim/nn/linear.py", "class A:\n    def f(self):\n        import math\n", "imports math inside a function"),
        ("brim/device.py", "def f():\n    import cupy\n", "imports cupy: the framework never names"),
        ("brim/device.py", "from brim_cpu.kernels import add\n", "imports brim_cpu.kernels: the framework never"),
        ("brim/device.py", "import importlib\nimportlib.import_module('brim_cuda')\n", "imports brim_cuda: the"),
        ("brim/cli/__init__.py", "def main():\n    import math\n", "imports math inside a function"),
        ("brim/surprise.py", "", "brim.surprise has no place in LAYERS"),
        ("brim/nn/linear.py", "def f():\n    import brim_bench\n", "imports brim_bench: only a command may"),
        ("brim/cli/__init__.py", "from brim_bench import command\n", "imports brim_bench: only a command may"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, source: str, expected: str) -> None:
    files = {**CLEAN, "brim/optim/__init__.py": "", name: source}
    (found,) = framework_violations(plant(tmp_path, files))
    assert expected in found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from brim.tensor import Tensor\n", "imports brim.tensor; of brim a backend may import only"),
        ("import brim\n", "imports brim; of brim a backend may import only"),
        ("from brim import device\n", "imports brim; of brim a backend may import only"),
        ("import brim_cuda.kernels\n", "backends do not know each other"),
        ("def f():\n    import ctypes\n", "imports ctypes inside a function"),
        ("from brim.op import Op\nfrom brim import errors, spec\nfrom brim_cpu import other\nimport numpy\n", None),
    ],
)
def test_backends_know_only_the_protocol(tmp_path: Path, source: str, expected: str | None) -> None:
    files = {"brim_cpu/__init__.py": source, "brim_cpu/other.py": "", "brim_cuda/__init__.py": ""}
    found = list(backend_violations(plant(tmp_path, files)))
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert expected in found[0]


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("brim_bench/limits.py", "import brim_cpu\n", "a benchmark knows backends no more than a user does"),
        ("brim_bench/limits.py", "import torch\n", "only their own side imports them"),
        ("brim_bench/sides/brim_side.py", "import torch\n", "only their own side imports them"),
        ("brim_bench/sides/torch_side.py", "import torch\nimport brim\n", "nothing of brim"),
        ("brim_bench/workloads/mlp.py", "from brim import nn\n", "nothing of brim"),
        ("brim_bench/limits.py", "def f():\n    from brim_bench import child\n", "inside a function"),
        ("brim_bench/sides/torch_side.py", "import torch\n", None),
        ("brim_bench/limits.py", "import brim\nfrom brim.nn import Linear\ndef f():\n    import torch\n", None),
    ],
)
def test_benchmarks_are_users(tmp_path: Path, name: str, source: str, expected: str | None) -> None:
    found = list(benchmark_violations(plant(tmp_path, {"brim_bench/child.py": "", name: source})))
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert expected in found[0]


def test_long_and_lost_files_are_found(tmp_path: Path) -> None:
    files = {
        "a/__init__.py": "\n" * LINES_MAX,
        "a/long.py": "\n" * (LINES_MAX + 1),
        "a/native/long.cpp": "\n" * (LINES_MAX + 1),
        "a/lost/x.py": "",
    }
    found = list(package_violations([plant(tmp_path, files)]))
    assert len(found) == 3
    assert f"has {LINES_MAX + 1} lines" in found[0]
    assert "would not be installed" in found[1]
    assert "long.cpp" in found[2]
