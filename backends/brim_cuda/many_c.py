"""CUDA C++ printed from a fused formula that one launch applies to many groups of arrays: the updates of an optimizer.

What differs by group (addresses, sizes, some scalars) lies in a struct that is passed by value, so nothing is copied to
the device before a launch. Blocks are numbered through; each finds its group by the first blocks of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.expr import FusedFormula
from brim.spec import DTYPES
from brim_cuda.cuda_c import INCLUDES, ScalarUse, slot_places, typed_body, vector_length
from brim_cuda.launch import BLOCK, C_TYPES, Kernel, Param, named_kernel, pointer

__all__ = ["PARAMETER_BYTES_MAX", "ManyKernel", "ManySlots", "ScalarParam", "many_kernel"]

PARAMETER_BYTES_MAX = 4096
"""What the parameters of a launch may take with every driver and on every GPU (CUDA C++ Programming Guide)."""

_INT, _U64 = DTYPES["int32"], DTYPES["uint64"]


@dataclass(frozen=True, slots=True)
class ScalarParam:
    """A scalar of the formula: parameter or field ``name`` holds input ``which``; ``by_part`` where parts differ."""

    name: str
    which: int
    by_part: bool


@dataclass(frozen=True, slots=True)
class ManyKernel:
    """A kernel for up to a certain number of parts.

    Attributes:
        kernel: its parameters: x.. (arrays of one element that all parts read), s.. (scalars that all parts read),
            parts (how many there are) and table (the struct).
        table: dtype of the struct, fields by part: at (addresses, by operand first), s.. (scalars), size (elements) and
            first (number of the first block).
        single: the inputs that x.. are.
        arrays: the inputs whose addresses the struct holds; those of the outputs follow.
        scalars: in the order of the parameters.
        step: elements that a thread takes.
        parts: how many parts the struct has room for.
    """

    kernel: Kernel
    table: np.dtype[Any]
    single: tuple[int, ...]
    arrays: tuple[int, ...]
    scalars: tuple[ScalarParam, ...]
    step: int
    parts: int


@dataclass(frozen=True, slots=True)
class ManySlots:
    """Where scalars lie in device memory, in pieces of eight bytes: those that all parts read, then part by part.

    Attributes:
        scalars: (number of the use, number of the input, dtype, place, whether parts differ); the place counts from the
            start, or from the start of each part's.
        start: where the first part's begin.
        width: pieces of each part.
    """

    scalars: tuple[tuple[int, int, np.dtype[Any], int, bool], ...]
    start: int
    width: int

    @classmethod
    def of(cls, uses: Sequence[ScalarUse], shared: int) -> ManySlots:
        """The places for the uses of a formula whose first ``shared`` inputs are those of all parts."""
        ends, found = [0, 0], []
        for number, (which, dtype) in enumerate(uses):
            by_part = which >= shared
            found.append((number, which, dtype, ends[by_part], by_part))
            ends[by_part] += slot_places([(which, dtype)])[-1]
        return cls(tuple(found), *ends)


def many_kernel(
    formula: FusedFormula,
    ins: Sequence[np.dtype[Any] | None],
    outs: Sequence[np.dtype[Any]],
    shared: int,
    parts: int,
    slots: bool = False,
    ones: Sequence[int] = (),
) -> ManyKernel:
    """The kernel for parts whose arrays are row-major.

    Arguments:
        formula: what each part computes.
        ins: dtypes of a part's inputs, None for a scalar.
        outs: dtypes of a part's outputs.
        shared: how many of the inputs, the first ones, are the same for all parts: scalars and arrays of one element.
        parts: how many parts there are; the kernel has room for as many, or for as many as one launch can take.
        slots: whether scalars are read from the parameter ``slots`` (device memory, as ``ManySlots`` says) instead of
            being passed; the struct then has the field slot, the number of the part there.
        ones: inputs of the parts' own that are one element for all of a part.
    """
    body = typed_body(formula, ins, outs)
    single = tuple(n for n in body.arrays if n < shared)
    arrays = tuple(n for n in body.arrays if n >= shared)
    scalars = tuple(ScalarParam(f"s{n}", which, which >= shared) for n, (which, _) in enumerate(body.uses))
    dtypes = [dtype for _, dtype in body.uses]
    own = [(scalar, dtype) for scalar, dtype in zip(scalars, dtypes, strict=True) if scalar.by_part]
    step = vector_length([*(ins[n] for n in arrays if n not in ones), *outs], False)
    operands = len(arrays) + len(outs)

    fixed_bytes = 8 * (len(single) + len(scalars) - len(own) + 2)  # and what aligning the struct may take
    passed = [] if slots else own
    part_bytes = 8 * operands + sum(dtype.itemsize for _, dtype in passed) + (3 if slots else 2) * _INT.itemsize
    room = (PARAMETER_BYTES_MAX - fixed_bytes) // part_bytes // 4 * 4  # of four, no field needs padding
    parts = max(4, min(room, 1 << (parts - 1).bit_length()))

    fields: list[tuple[str, Any, tuple[int, ...]]] = [("at", _U64, (operands, parts))]
    fields += [(scalar.name, dtype, (parts,)) for scalar, dtype in passed]
    fields += [(name, _INT, (parts,)) for name in ("size", "first", *(("slot",) if slots else ()))]
    fields.sort(key=lambda one: -one[1].itemsize)  # the largest first: no gaps
    table = np.dtype(fields, align=True)
    members = "\n".join(f"    {C_TYPES[d]} {name}{''.join(f'[{n}]' for n in dims)};" for name, d, dims in fields)

    params = [pointer(f"x{n}", ins[n], const=True) for n in single]
    if slots:
        params += [pointer("slots", _U64, const=True)] if scalars else []
        reads = _slot_reads(ManySlots.of(body.uses, shared))
    else:
        params += [Param(s.name, dtype) for s, dtype in zip(scalars, dtypes, strict=True) if not s.by_part]
        reads = [f"const {C_TYPES[dtype]} {s.name} = table.{s.name}[part];" for s, dtype in own]
    params += [Param("parts", _INT), Param("table", table, ctype="const __grid_constant__ NAME_table")]
    # A grid constant stays in the parameters: others the compiler may copy to local memory, where indices vary.
    text = f"""#ifdef BRIM_EMULATION
#define __grid_constant__
#endif
struct NAME_table {{
{members}
}};
{body.element()}
extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
    const i32 block = (i32)blockIdx.x;
    int part = 0;  // the last one whose first block is not after this one
#pragma unroll
    for (int half = {1 << (parts - 1).bit_length() - 1}; half > 0; half /= 2)
        if (part + half < parts && table.first[part + half] <= block) part += half;
    {_lines([*_addresses(ins, outs, arrays), *reads], 4)}
    const i32 n = table.size[part], i = ((block - table.first[part]) * {BLOCK} + (i32)threadIdx.x) * {step};
    {_work(body, ins, outs, [*single, *ones], [n for n in arrays if n not in ones], step)}
}}
"""
    return ManyKernel(named_kernel("many", params, text, INCLUDES), table, single, arrays, scalars, step, parts)


def _lines(lines: Sequence[str], indent: int) -> str:
    return ("\n" + " " * indent).join(lines)


def _addresses(ins: Sequence[Any], outs: Sequence[np.dtype[Any]], arrays: Sequence[int]) -> list[str]:
    """Statements that read where a part's arrays start."""
    ctypes = [(f"const {C_TYPES[ins[n]]}", f"x{n}") for n in arrays]
    ctypes += [(C_TYPES[dtype], f"y{n}") for n, dtype in enumerate(outs)]
    return [f"{ctype}* {name} = ({ctype}*)table.at[{at}][part];" for at, (ctype, name) in enumerate(ctypes)]


def _slot_reads(layout: ManySlots) -> list[str]:
    """Statements that read scalars from device memory."""
    lines = []
    for number, _, dtype, place, by_part in layout.scalars:
        at = f"{layout.start} + table.slot[part] * {layout.width} + {place}" if by_part else f"{place}"
        lines.append(f"const {C_TYPES[dtype]} s{number} = slot<{C_TYPES[dtype]}>(slots, {at});")
    return lines


def _work(
    body: Any,
    ins: Sequence[Any],
    outs: Sequence[np.dtype[Any]],
    single: Sequence[int],
    arrays: Sequence[int],
    step: int,
) -> str:
    """Statements for the elements of a thread, at once where all of them are there and every array is aligned."""

    def call(at_in: str, at_out: str) -> str:
        reads = [f"x{n}[0]" if n in single else at_in.format(n=n) for n in body.arrays]
        writes = [at_out.format(n=n) for n in range(len(outs))]
        return f"NAME_element({', '.join([*reads, *body.scalar_names(), *writes])});"

    aligned = [f"is_aligned<{C_TYPES[ins[n]]}, {step}>(x{n})" for n in arrays]
    aligned += [f"is_aligned<{C_TYPES[dtype]}, {step}>(y{n})" for n, dtype in enumerate(outs)]
    loads = [f"const auto a{n} = *(const Pack<{C_TYPES[ins[n]]}, {step}>*)(x{n} + i);" for n in arrays]
    loads += [f"Pack<{C_TYPES[dtype]}, {step}> b{n};" for n, dtype in enumerate(outs)]
    stores = [f"*(Pack<{C_TYPES[dtype]}, {step}>*)(y{n} + i) = b{n};" for n, dtype in enumerate(outs)]
    return f"""if (i + {step} <= n && {" && ".join(aligned)}) {{
        {_lines(loads, 8)}
#pragma unroll
        for (int k = 0; k < {step}; ++k) {call("a{n}.v[k]", "b{n}.v[k]")}
        {_lines(stores, 8)}
        return;
    }}
    for (i32 k = i; k < n && k < i + {step}; ++k) {call("x{n}[k]", "y{n}[k]")}"""
