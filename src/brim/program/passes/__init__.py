"""Rewrites of programs, one idea a file, each a function ``Program -> Program`` that can be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from brim.program.ir import Program
from brim.program.passes.common import common
from brim.program.passes.copies import copies
from brim.program.passes.dead_code import dead_code
from brim.program.passes.fold_norm import fold_norm
from brim.program.passes.fuse import fuse
from brim.program.passes.schedule import schedule
from brim.program.passes.simplify import simplify

__all__ = ["default_passes"]


def default_passes(backend: Any) -> Sequence[Callable[[Program], Program]]:
    """The passes that every step goes through, in their order."""
    return (
        dead_code,  # first, so that the others see only what is needed
        common,  # the same computed twice
        copies,  # what may be read where it is
        fold_norm,  # evaluation only: batch norm becomes part of weights
        simplify,  # casts and copies that change nothing
        fuse,  # elementwise chains become one pass over memory
        schedule,  # last: an order that keeps fewer bytes alive
    )
