"""What stands before and after a norm, printed in CUDA C: the functions that its kernels read and write through.

``kernels/norm.cuh`` has the norms themselves. They know elements by (line, position in it); where those lie in each
operand is said by ``Steps``, and operands that lie alike share theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.expr import FusedFormula
from brim.spec import DTYPES, Scalar, Spec
from brim_cuda.cuda_c import arithmetic, typed_body
from brim_cuda.kernels.rows import Steps, steps_param
from brim_cuda.launch import C_TYPES, In, Out, Param, pointer
from brim_cuda.layout import broadcast_strides, merged

__all__ = ["Argument", "Printed", "Side", "line_steps", "printed"]

Argument = tuple[Param, Any]
_U64 = DTYPES["uint64"]


def line_steps(
    spec: Spec, shape: tuple[int, ...], line_axes: Sequence[int], element_axes: Sequence[int]
) -> Steps | None:
    """Where the lines and elements of an array lie that is read as one of ``shape``; None where unevenly.

    Arguments:
        line_axes: the axes that number lines, in order.
        element_axes: the axes that number the elements of a line, in order.
    """
    strides = broadcast_strides(spec, shape)
    lines, line = merged(tuple(shape[a] for a in line_axes), [[strides[a] for a in line_axes]], keep_order=True)
    count, step = merged(tuple(shape[a] for a in element_axes), [[strides[a] for a in element_axes]], keep_order=True)
    if len(lines) > 2 or len(count) > 2:
        return None
    group = (lines[1], line[0][0]) if len(lines) == 2 else (0, 0)
    part = (count[1], step[0][0]) if len(count) == 2 else (0, 0)
    return Steps(line[0][-1], step[0][-1], *group, *part)


@dataclass(frozen=True, slots=True)
class Side:
    """An operand that is walked through element for element.

    Attributes:
        name: of its pointer in the kernel.
        dtype: of its elements.
        steps: where they lie.
        place: the argument.
        written: whether it is a result.
    """

    name: str
    dtype: np.dtype[Any]
    steps: Steps
    place: In | Out
    written: bool = False

    def dense(self, v: int) -> bool:
        """Whether the ``v`` elements of a unit lie side by side."""
        return v == 1 or (self.steps.step == 1 and self.steps.part % v == 0)

    def in_pieces(self, v: int) -> bool:
        """Whether every unit lies at a multiple of its size from the first: rows of views may be any number apart."""
        s = self.steps
        return self.dense(v) and not any(step % v for step in (s.line, s.group_step, s.part_step))

    def single(self, v: int) -> bool:
        """Whether all elements of a unit are one."""
        return v > 1 and self.steps.step == 0 and self.steps.part % v == 0


@dataclass(frozen=True, slots=True)
class Printed:
    """The text of functions that a norm's kernels read and write through.

    Attributes:
        elements: the formulas ``NAME_before`` and ``NAME_after`` for one element; NAME stands for the kernel's name.
        wide: whether units are read and written in one access, an expression.
        functions: ``first``, ``again``, ``last``: statements that define them.
        arguments: what these need, (parameter, argument) each.
    """

    elements: dict[str, str]
    wide: str
    functions: dict[str, str]
    arguments: list[Argument]

    def chosen(self, names: Sequence[str], also_wide: str = "") -> tuple[str, str, list[Argument]]:
        """What a kernel that takes some of the functions needs: text before it, its first statements, arguments.

        Arguments:
            also_wide: more of the condition that units are read in one access.
        """
        functions = "\n    ".join(self.functions[name] for name in names)
        inside = f"const bool wide = {self.wide or 'false'}{also_wide};\n    {functions}"
        words = set(re.findall(r"\w+", inside))
        text = "".join(text for name, text in self.elements.items() if name in words)
        return text, inside, [(param, given) for param, given in self.arguments if param.name in words]


class _Printer:
    def __init__(self, v: int, index: np.dtype[Any], logical: Steps) -> None:
        self.v, self.index, self.logical = v, index, logical
        self.steps: list[Steps] = []
        self.sides: dict[str, Side] = {}
        self.scalars: list[Argument] = []

    def at(self, steps: Steps) -> str:
        """The variable that holds a unit's place."""
        if steps not in self.steps:
            self.steps.append(steps)
        return f"at{self.steps.index(steps)}"

    def places(self, used: Sequence[Steps]) -> list[str]:
        itype = C_TYPES[self.index]
        names = dict.fromkeys(self.at(steps) for steps in used)
        return [f"const {itype} {at} = line_start(st{at[2:]}, line) + element(st{at[2:]}, j);" for at in names]

    def element_at(self, steps: Steps) -> str:
        """The place of element ``k`` of a unit that lies anyhow."""
        st = f"st{self.at(steps)[2:]}"
        return f"line_start({st}, line) + element({st}, j + k)"

    def wide(self, side: Side) -> str:
        """The condition under which a unit is read or written in one access."""
        return "wide" if side.in_pieces(self.v) else "false"

    def load(self, side: Side) -> str:
        """The statement that reads a unit of an operand; none where each element is read by itself."""
        self.sides[side.name] = side
        at = self.at(side.steps)
        if side.dense(self.v):
            return f"const auto a_{side.name} = taken<{self.v}>({side.name} + {at}, {self.wide(side)});"
        return f"const auto a_{side.name} = {side.name}[{at}];" if side.single(self.v) else ""

    def value(self, side: Side) -> str:
        """Element ``k`` of what ``load`` read."""
        if side.dense(self.v):
            return f"a_{side.name}.v[k]"
        return f"a_{side.name}" if side.single(self.v) else f"{side.name}[{self.element_at(side.steps)}]"

    def store(self, side: Side) -> str:
        """The statement that writes a unit of a result."""
        self.sides[side.name] = side
        if side.dense(self.v):
            return f"put<{self.v}>({side.name} + {self.at(side.steps)}, r_{side.name}, {self.wide(side)});"
        place = self.element_at(side.steps)
        return f"for (int k = 0; k < {self.v}; ++k) {side.name}[{place}] = r_{side.name}.v[k];"

    def element(
        self, body: Any, prefix: str, sides: dict[int, Side], values: dict[int, str], outs: Sequence[str]
    ) -> tuple[list[str], str]:
        """Statements before the loop over a unit, and the call for its element ``k``.

        Arguments:
            sides: input of the formula -> operand.
            values: input of the formula -> its text, for those that are no operand.
            outs: where the results go.
        """
        lines = [f"const {C_TYPES[dtype]} s{n} = {prefix}{n};" for n, (_, dtype) in enumerate(body.uses)]
        draws: list[str] = []
        if body.draws:
            at = self.at(self.logical)
            for n in range(len(body.draws)):
                if self.v == 8 and self.logical.part % 8 == 0:
                    lines.append(f"const Words w{n} = philox({body.stream(n)}, (u64)({at} >> 3));")
                    draws.append(f"uniform_in(w{n}, k)")
                else:
                    draws.append(f"uniform({body.stream(n)}, (u64)({self.element_at(self.logical)}))")
        reads = [values[n] if n in values else self.value(sides[n]) for n in body.arrays]
        return lines, ", ".join([*reads, *body.scalar_names(), *draws, *outs])


def printed(
    before: FusedFormula,
    after: FusedFormula,
    others: Sequence[Side | Scalar | None],
    places: Sequence[In],
    own: Side | None,
    made: Sequence[Side],
    kept: Sequence[Side],
    keeps_first: int | None,
    dtypes: tuple[np.dtype[Any], np.dtype[Any]],
    logical: Steps,
    v: int,
    index: np.dtype[Any],
    stores: bool = True,
) -> Printed:
    """The functions of one launch.

    Arguments:
        before, after: see ``brim.program.norm_groups``.
        others: operands of the formulas; anything but a ``Side`` is a scalar.
        places: the arguments that they stand for.
        own: the norm's x where it is a gradient.
        made, kept: results of ``after``, and of ``before`` but the first.
        keeps_first: which of ``kept`` is the norm's first input.
        dtypes: of the norm's first input and of its first result.
        logical: steps of row-major order, which random numbers are drawn in.
        v: elements of a unit.
        index: the type of positions.
        stores: whether ``first`` stores what is kept; there is no ``last`` without.
    """
    p = _Printer(v, index, logical)
    kinds = [x.dtype if isinstance(x, Side) else None for x in others]
    head = typed_body(before, kinds, [dtypes[0], *(side.dtype for side in kept)])
    tail = typed_body(after, [dtypes[1], *kinds], [side.dtype for side in made])
    compute, itype = C_TYPES[arithmetic(dtypes[0])], C_TYPES[index]
    for prefix, body, shift in (("sb", head, 0), ("sa", tail, 1)):
        for n, (which, dtype) in enumerate(body.uses):
            if prefix == "sb" or stores:
                p.scalars.append((Param(f"{prefix}{n}", dtype), places[which - shift]))
    loop = f"\n#pragma unroll\n        for (int k = 0; k < {v}; ++k) "
    functions = {
        name: _first(p, head, others, kept if stores else (), own, dtypes[0], compute, name, loop, len(kept))
        for name in (("first", "again") if keeps_first is None and stores else ("first",))
    }
    if keeps_first is not None and stores:
        functions["again"] = _again(p, kept[keeps_first], own, compute, loop)
    if stores:
        functions["last"] = _last(p, tail, others, made, dtypes[1], compute, loop)
    bodies = {"NAME_before": head, "NAME_after": tail}
    elements = {name: body.element().replace("NAME_element", name) for name, body in bodies.items()}
    sides = list(p.sides.values())
    aligned = [f"is_aligned<{C_TYPES[s.dtype]}, {v}>({s.name})" for s in sides if s.in_pieces(v)] if v > 1 else []
    arguments: list[Argument] = [(pointer(s.name, s.dtype, const=not s.written), s.place) for s in sides]
    arguments += p.scalars
    arguments += [(steps_param(f"st{n}", index), steps.packed(index)) for n, steps in enumerate(p.steps)]
    functions = {name: function.replace("INDEX", itype) for name, function in functions.items()}
    return Printed(elements, " && ".join(aligned), functions, arguments)


def _first(
    p: _Printer,
    body: Any,
    others: Sequence[Any],
    kept: Sequence[Side],
    own: Side | None,
    dtype: np.dtype[Any],
    compute: str,
    name: str,
    loop: str,
    results: int,
) -> str:
    """``first``, or ``again`` (which stores nothing) where it is computed once more."""
    sides = {n: others[n] for n in body.arrays}
    stored = kept if name == "first" else ()
    locals_ = [f"Pack<{C_TYPES[body.outs[n + 1]]}, {p.v}> " for n in range(results)]
    names = [side.name for side in stored] or [f"unused{n}" for n in range(results)]
    outs = ["y", *(f"r_{one}.v[k]" for one in names)]
    before, call = p.element(body, "sb", sides, {}, outs)
    used = [*(side.steps for side in sides.values()), *(side.steps for side in stored)]
    used += ([own.steps] if own else []) + ([p.logical] if body.draws else [])
    lines = [*p.places(used), *(p.load(side) for side in sides.values())]
    lines += [p.load(own)] if own else []
    lines += [f"{kind}r_{one};" for kind, one in zip(locals_, names, strict=True)]
    lines += before
    lines.append(f"{_result(own, compute, p.v)} made;")
    value = f"made.{'g' if own else 'v'}[k] = cast<{compute}>(y);"
    value += f" made.x[k] = cast<{compute}>({p.value(own)});" if own else ""
    lines.append(f"{loop.strip(chr(10))}{{ {C_TYPES[dtype]} y; NAME_before({call}); {value} }}")
    lines += [p.store(side) for side in stored]
    return _function(name, lines, "line, INDEX j", "return made;")


def _again(p: _Printer, stored: Side, own: Side | None, compute: str, loop: str) -> str:
    """``again`` where the norm's first input was stored: it is read back."""
    sides = [stored] + ([own] if own else [])
    lines = [*p.places([side.steps for side in sides]), *map(p.load, sides)]
    lines.append(f"{_result(own, compute, p.v)} made;")
    value = f"made.{'g' if own else 'v'}[k] = cast<{compute}>({p.value(stored)});"
    value += f" made.x[k] = cast<{compute}>({p.value(own)});" if own else ""
    lines.append(f"{loop.strip(chr(10))}{{ {value} }}")
    return _function("again", lines, "line, INDEX j", "return made;")


def _last(
    p: _Printer, body: Any, others: Sequence[Any], made: Sequence[Side], dtype: np.dtype[Any], compute: str, loop: str
) -> str:
    sides = {n: others[n - 1] for n in body.arrays if n > 0}
    result = f"cast<{C_TYPES[dtype]}>(values.v[k])"
    before, call = p.element(body, "sa", sides, {0: result}, [f"r_{side.name}.v[k]" for side in made])
    used = [*(side.steps for side in sides.values()), *(side.steps for side in made)]
    lines = [*p.places([*used, *([p.logical] if body.draws else [])]), *(p.load(side) for side in sides.values())]
    lines += [f"Pack<{C_TYPES[side.dtype]}, {p.v}> r_{side.name};" for side in made]
    lines += [*before, f"{loop.strip(chr(10))}NAME_after({call});", *(p.store(side) for side in made)]
    return _function("last", lines, f"line, INDEX j, const Values<{compute}, {p.v}>& values", "")


def _result(own: Side | None, compute: str, v: int) -> str:
    return f"{'Pairs' if own else 'Values'}<{compute}, {v}>"


def _function(name: str, lines: list[str], params: str, end: str) -> str:
    body = "\n        ".join(line for line in (*lines, end) if line)
    return f"const auto {name} = [&](INDEX {params}) {{\n        {body}\n    }};"
