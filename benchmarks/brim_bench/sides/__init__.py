"""The sides of a comparison: brim, and its peers. A side is a class; to add one, write a subclass of ``Side``.

``SIDES`` names the known ones. ``--vs module:Class`` takes one from anywhere.
"""

from __future__ import annotations

import importlib
import importlib.util

from brim_bench.sides.base import Side, Unsupported

__all__ = ["COMPILERS", "SIDES", "Side", "Unsupported", "find_side", "missing"]

SIDES = {
    "brim": "brim_bench.sides.brim_side:Brim",
    "torch": "brim_bench.sides.torch_side:Torch",
    "torch_fused": "brim_bench.sides.torch_side:TorchFused",
    "torch_compile": "brim_bench.sides.torch_side:TorchCompile",
    "torch_graphs": "brim_bench.sides.torch_side:TorchGraphs",
    "jax": "brim_bench.sides.jax_side:Jax",
    "mlx": "brim_bench.sides.mlx_side:Mlx",
    "tinygrad": "brim_bench.sides.tinygrad_side:Tinygrad",
}
COMPILERS = frozenset({"torch_compile", "torch_graphs"})
"""Sides that take their time before they begin."""

_PACKAGES = {
    "brim": "brim",
    "torch": "torch",
    "torch_fused": "torch",
    "torch_compile": "torch",
    "torch_graphs": "torch",
    "jax": "jax",
    "mlx": "mlx",
    "tinygrad": "tinygrad",
}


def missing(name: str) -> str:
    """Why a side cannot take part here, or an empty string.

    Raises:
        ValueError: there is no such side.
    """
    package = _PACKAGES.get(name) or (name.partition(":")[0] if ":" in name else "")
    if not package:
        raise ValueError(f"no peer is called {name!r}; there are {', '.join(sorted(SIDES))}, or module:Class")
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    return "" if found is not None else f"{package} is not installed"


def find_side(name: str) -> type[Side]:
    """The class of a side, by its name or as ``module:Class``; its library is imported.

    Raises:
        ValueError: there is no such side.
        ImportError: its library is not installed.
    """
    module, _, member = SIDES.get(name, name).partition(":")
    if not member:
        raise ValueError(f"no peer is called {name!r}; there are {', '.join(sorted(SIDES))}, or module:Class")
    found = getattr(importlib.import_module(module), member)
    if not (isinstance(found, type) and issubclass(found, Side)):
        raise ValueError(f"{name}: expected a subclass of brim_bench.sides.Side, got {found!r}")
    return found
