"""Rewrites of programs, one idea a file, each a function ``Program -> Program`` that can be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any

from brim.program.ir import HostScalar, Instruction, Program, Ref
from brim.program.passes.common import common
from brim.program.passes.copies import copies
from brim.program.passes.dead_code import dead_code
from brim.program.passes.early_casts import early_casts
from brim.program.passes.epilogue import epilogue
from brim.program.passes.fold_norm import fold_norm
from brim.program.passes.fuse import fuse
from brim.program.passes.join_norms import join_norms
from brim.program.passes.join_slices import join_slices
from brim.program.passes.keep_powers import keep_powers
from brim.program.passes.layout import layout
from brim.program.passes.loss_gradient import loss_gradient
from brim.program.passes.schedule import schedule
from brim.program.passes.side_by_side import ARRAY_BYTES_MAX, side_by_side
from brim.program.passes.simplify import simplify

__all__ = ["default_passes"]


def default_passes(
    backend: Any,
    peak: Callable[[Program], int] | None = None,
    scratch_bytes: Callable[[Instruction], int] | None = None,
) -> Sequence[Callable[[Program], Program]]:
    """The passes that every step goes through, in their order.

    Arguments:
        backend: of the device that the step is for.
        peak: the planned peak of a program in bytes, and
        scratch_bytes: the working memory of an instruction, for passes that would trade memory for time; without them
            those go by estimates.
    """
    return (
        dead_code,  # first, so that the others see only what is needed
        common,  # the same computed twice
        join_slices,  # gradients of slices that make up a whole
        copies,  # what may be read where it is
        fold_norm,  # evaluation only: batch norm becomes part of weights
        simplify,  # casts and copies that change nothing
        fuse,  # elementwise chains become one pass over memory
        *_wanted_by(backend),
        schedule,  # an order that keeps fewer bytes alive
        *_around_norms(backend, peak),  # what is next to a norm becomes part of it
        *_keeping(backend, peak),  # what a loss and its gradient share, where that order has room for it
        *_joining(backend, peak, scratch_bytes),  # last: as far as that order's peak allows
    )


def _wanted_by(backend: Any) -> list[Callable[[Program], Program]]:
    """The passes that only pay on some devices, each if the backend says which ops it is for."""
    found: list[Callable[[Program], Program]] = []
    joins = getattr(backend, "joins_epilogue", None)
    if joins is not None:
        found.append(update_wrapper(partial(epilogue, accepts=partial(_is_accepted, joins)), epilogue))
    prefers: frozenset[str] = getattr(backend, "prefers_channels_last", frozenset())
    if prefers:
        narrower = getattr(backend, "gains_channels_last", None)
        gains = None if narrower is None else partial(_is_accepted, narrower)
        found.append(update_wrapper(partial(layout, prefers=prefers, gains=gains), layout))
    return found


def _is_accepted(accepts: Callable[..., bool], i: Instruction) -> bool:
    """What a backend's function of op, Specs and numbers, output Specs and params says of an instruction."""
    ins = [x.spec if isinstance(x, Ref) else x.kind(1) if isinstance(x, HostScalar) else x for x in i.ins]
    return bool(accepts(i.op, ins, [out.spec for out in i.outs], i.params))


def _around_norms(backend: Any, peak: Callable[[Program], int] | None) -> list[Callable[[Program], Program]]:
    """The pass that joins norms with the groups around them, if the backend has kernels for it."""
    joins = getattr(backend, "joins_norms", None)
    if joins is None:
        return []
    return [update_wrapper(partial(join_norms, accepts=partial(_is_accepted, joins), peak=peak), join_norms)]


def _keeping(backend: Any, peak: Callable[[Program], int] | None) -> list[Callable[[Program], Program]]:
    """The passes that compute losses together with their gradients, or keep powers for these, if there are kernels."""
    together = getattr(backend, "joins_loss_gradient", None)
    if together is not None:
        return [
            update_wrapper(partial(loss_gradient, accepts=partial(_is_accepted, together), peak=peak), loss_gradient)
        ]
    keeps = getattr(backend, "keeps_powers", None)
    if keeps is None:
        return []
    return [update_wrapper(partial(keep_powers, accepts=partial(_is_accepted, keeps), peak=peak), keep_powers)]


def _joining(
    backend: Any,
    peak: Callable[[Program], int] | None,
    scratch_bytes: Callable[[Instruction], int] | None,
) -> list[Callable[[Program], Program]]:
    """The passes that join small instructions, if each one costs a launch on this backend."""
    keeps_bytes: int = getattr(backend, "joins_side_by_side", 0)
    if not keeps_bytes:
        return []
    within: dict[str, Any] = {
        "keeps_bytes": keeps_bytes,
        "alignment_bytes": backend.alignment_bytes,
        "scratch_bytes": scratch_bytes,
        "peak": peak,
        "array_bytes": getattr(backend, "joins_arrays_of", ARRAY_BYTES_MAX),
    }
    joined = partial(side_by_side, update_bytes=getattr(backend, "joins_updates", ARRAY_BYTES_MAX), **within)
    found: list[Callable[[Program], Program]] = []
    found += [update_wrapper(joined, side_by_side)] * 2  # again: what updates read may join once they have
    if getattr(backend, "joins_early", False):
        found.append(update_wrapper(partial(early_casts, **within), early_casts))
    return found
