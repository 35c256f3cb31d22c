"""Rewrites of programs, one idea a file, each a function ``Program -> Program`` that can be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from brim.program.ir import Program

__all__ = ["default_passes"]


def default_passes(backend: Any) -> Sequence[Callable[[Program], Program]]:
    """The passes that every step goes through, in their order."""
    return ()
