"""How a step trades arithmetic or precision for memory, and the passes that do it, which run before all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from brim.program.ir import Program
from brim.program.passes.dead_code import dead_code
from brim.program.passes.exact_convolutions import exact_convolutions
from brim.program.passes.half_activations import half_activations
from brim.program.passes.recompute import recompute as recompute_pass

__all__ = ["NO_OPTIONS", "Options", "option_passes"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a step trades arithmetic or precision for memory.

    Attributes:
        recompute: layers whose activations are made again in the backward pass: see ``passes/recompute.py``.
        activations: "bfloat16" keeps activations in half: see ``passes/half_activations.py``; None keeps them as is.
        exact_convolutions: without the working memory of the fast algorithm.
    """

    recompute: tuple[str, ...] = ()
    activations: str | None = None
    exact_convolutions: bool = False


NO_OPTIONS = Options()
"""A step as it was traced."""


def option_passes(options: Options) -> tuple[Callable[[Program], Program], ...]:
    """What options ask for, as passes that run before all others."""
    found: list[Callable[[Program], Program]] = [dead_code]
    if options.recompute:
        found.append(partial(recompute_pass, layers=options.recompute))
    if options.activations is not None:
        found.append(half_activations)
    if options.exact_convolutions:
        found.append(exact_convolutions)
    return tuple(found) if len(found) > 1 else ()
