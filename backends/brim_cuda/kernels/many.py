"""One fused formula on many groups of arrays: as few launches as the parameters of one can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.expr import FusedFormula
from brim.spec import Scalar, Spec
from brim_cuda.cuda_c import scalar_uses
from brim_cuda.elementwise import fused_calls
from brim_cuda.launch import BLOCK, Call, Entry, In, Out, Table
from brim_cuda.many_c import ManyKernel, ManySlots, many_kernel
from brim_cuda.registry import Work, kernel

ELEMENTS_MAX = 2**24
"""A larger part is launched by itself: positions and blocks are counted in int32."""

__all__ = ["ELEMENTS_MAX", "many_calls", "many_slot_values"]

_Part = tuple[list[Any], list[Spec], list[In], list[Out]]


@kernel("fused_many")
def fused_many(
    ins: Sequence[Spec | Scalar], outs: Sequence[Spec], *, formula: FusedFormula, count: int, shared: int
) -> Work:
    """Parts that are alike but for their size share launches; others are launched one by one."""
    return Work(many_calls(formula, ins, outs, count, shared), aliasing=True)


def many_calls(
    formula: FusedFormula, ins: Sequence[Any], outs: Sequence[Spec], count: int, shared: int, slots: Any = None
) -> list[Call]:
    """The launches for ``count`` parts that share their first inputs.

    Arguments:
        formula, ins, outs, count, shared: as of ``fused_many``; what is no Spec stands for a scalar.
        slots: device array with ``many_slot_values``, which may be written anew before each launch (of a captured
            graph); None: scalars are passed by value.

    Raises:
        KeyError: there is no kernel for the formula; or with ``slots``, a part cannot be launched with others.
    """
    alike: dict[Any, list[tuple[int, _Part]]] = {}
    calls: list[Call] = []
    for n in range(count):
        operands, results, roles, places = part = _part(ins, outs, n, count, shared)
        key = _kind(formula, operands, results, shared)
        if key is not None and results[0].size:
            alike.setdefault(key, []).append((n, part))
        elif slots is None or not results[0].size:
            calls += fused_calls(formula, operands, results, roles=roles, results=places)
        else:
            raise KeyError("the CUDA backend has no kernel for many groups of such arrays with scalars in its memory")
    for (dtypes, out_dtypes, ones), members in alike.items():
        start = 0
        while start < len(members):
            made = many_kernel(formula, dtypes, out_dtypes, shared, len(members) - start, slots is not None, ones)
            calls.append(_call(made, members[start : start + made.parts], slots))
            start += made.parts
    return calls


def many_slot_values(
    formula: FusedFormula, ins: Sequence[Any], values: Sequence[Any], count: int, shared: int
) -> np.ndarray[Any, Any]:
    """What the slots of ``many_calls`` hold; ``values`` has a number for each scalar among the inputs."""
    own = (len(ins) - shared) // count
    uses = scalar_uses(formula, [x.dtype if isinstance(x, Spec) else None for x in ins[: shared + own]])
    layout = ManySlots.of(uses, shared)
    slots = np.zeros(layout.start + count * layout.width, np.uint64)
    for _, which, dtype, place, by_part in layout.scalars:
        for n in range(count if by_part else 1):
            at = layout.start + n * layout.width + place if by_part else place
            slots[at : at + -(-dtype.itemsize // 8)].view(dtype)[0] = dtype.type(values[which + n * own])
    return slots


def _part(ins: Sequence[Any], outs: Sequence[Spec], n: int, count: int, shared: int) -> _Part:
    """Inputs and outputs of part ``n``, and where they stand."""
    own, made = (len(ins) - shared) // count, len(outs) // count
    numbers = [*range(shared), *range(shared + n * own, shared + (n + 1) * own)]
    results = range(n * made, (n + 1) * made)
    return [ins[k] for k in numbers], [outs[k] for k in results], list(map(In, numbers)), list(map(Out, results))


def _kind(formula: FusedFormula, ins: Sequence[Any], outs: Sequence[Spec], shared: int) -> Any:
    """(dtypes of inputs, of outputs, which inputs of its own are one element for all) of a part that the kernel for
    many can do, else None."""
    size = outs[0].size
    ones = tuple(n for n, x in enumerate(ins) if n >= shared and isinstance(x, Spec) and x.size == 1 != size)
    arrays = [x for n, x in enumerate((*ins, *outs)) if n >= shared and n not in ones and isinstance(x, Spec)]
    dtypes = tuple([x.dtype if isinstance(x, Spec) else None for x in ins])
    out_dtypes = tuple([out.dtype for out in outs])
    fits = size <= ELEMENTS_MAX and all(x.contiguous and x.size == size for x in arrays)
    fits = fits and all(x.size == 1 for x in ins[:shared] if isinstance(x, Spec))
    plain = all(dtype is None or dtype.kind != "c" for dtype in (*dtypes, *out_dtypes))
    plain = plain and all(dtype.kind in "biuf" and dtype.itemsize >= 4 for _, dtype in scalar_uses(formula, dtypes))
    drawn = any(step.fn == "uniform" for step in formula.steps)
    return (dtypes, out_dtypes, ones) if fits and plain and not drawn else None


def _call(made: ManyKernel, members: Sequence[tuple[int, _Part]], slots: Any) -> Call:
    """The launch for these parts, each with its number."""
    values = np.zeros((), made.table)
    entries: list[Entry] = []
    blocks = 0
    for n, (number, (operands, results, roles, places)) in enumerate(members):
        values["size"][n], values["first"][n] = results[0].size, blocks
        blocks += -(-results[0].size // (BLOCK * made.step))
        at: list[tuple[In | Out, Any]] = [(roles[k], operands[k].dtype) for k in made.arrays]
        at += [(place, out.dtype) for place, out in zip(places, results, strict=True)]
        entries += [Entry("at", (k, n), place, dtype) for k, (place, dtype) in enumerate(at)]
        if slots is None:
            entries += [Entry(s.name, (n,), roles[s.which]) for s in made.scalars if s.by_part]
        else:
            values["slot"][n] = number
    scalars: list[Any] = [In(s.which) for s in made.scalars if not s.by_part]
    if slots is not None:
        scalars = [slots] if made.scalars else []
    alone = [In(k) for k in made.single]
    return Call(made.kernel, (blocks,), (*alone, *scalars, np.int32(len(members)), Table(values, tuple(entries))))
