"""The evaluator of elementwise formulas: an expression tree becomes a short list of NumPy calls.

A formula of one call runs as that NumPy function with ``out=``. Anything longer, and anything whose operands are of
another dtype than the formula computes in, runs block by block in registers cut from the scratch that is declared here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brim.backend import BoundKernel
from brim.expr import Arg, Call, Const, Expr, postorder
from brim.op import Op, is_plain_call
from brim.spec import Scalar, Spec
from brim_cpu.blocks import BLOCK_ELEMENTS, as_float32, blocks
from brim_cpu.scalars import EXTRA_REGISTERS, SCALARS, UFUNCS

__all__ = ["bind_elementwise"]

Array = np.ndarray[Any, Any]


def bind_elementwise(op: Op, ins: Sequence[Spec | Scalar], out: Spec, params: dict[str, Any]) -> BoundKernel:
    """The kernel of an elementwise op on operands of these specs."""
    declared, _ = op.dtypes(ins, params)
    compute = as_float32(declared)
    assert op.formula is not None
    direct = _direct(op, ins, out, compute)
    if direct is not None:
        return BoundKernel(direct, aliasing=True)
    program = _Program(op.formula, ins, out, compute, op.promoted)
    return BoundKernel(program.run, scratch_bytes=program.scratch_bytes, aliasing=True)


def _scalar(value: Scalar, dtype: np.dtype[Any]) -> Any:
    """A Python number as a NumPy scalar; an integer that does not fit its dtype raises OverflowError."""
    return dtype.type(value)


def _direct(op: Op, ins: Sequence[Spec | Scalar], out: Spec, compute: np.dtype[Any]) -> Callable[..., None] | None:
    """One NumPy call on the whole arrays, when every operand has the dtype that the call computes in."""
    assert op.formula is not None
    if not (isinstance(op.formula, Call) and is_plain_call(op.formula)):
        return None
    fn = op.formula.fn
    if fn == "identity" and isinstance(ins[0], Spec):

        def copy(out: Array, x: Any, *, scratch: Any = None, **params: Any) -> None:
            np.copyto(out, x, casting="unsafe")

        return copy
    if fn not in UFUNCS or SCALARS[fn] is not UFUNCS[fn]:
        return None
    if any(isinstance(i, Spec) and i.dtype != compute for i in ins):
        return None
    result = np.dtype("bool") if op.formula.kind == "bool" else compute
    if out.dtype != result and op.returns != "real":  # "real": the absolute value of complex numbers
        return None
    ufunc = UFUNCS[fn]
    scalars = tuple(not isinstance(i, Spec) for i in ins)
    if not any(scalars):

        def run(out: Array, *args: Any, scratch: Any = None) -> None:
            ufunc(*args, out=out)

        return run

    def run_with_scalars(out: Array, *args: Any, scratch: Any = None) -> None:
        ufunc(*(_scalar(a, compute) if s else a for a, s in zip(args, scalars, strict=True)), out=out)

    return run_with_scalars


class _Program:
    """A formula as a list of (function, operand slots, result slot) over block registers."""

    def __init__(
        self,
        formula: Expr,
        ins: Sequence[Spec | Scalar],
        out: Spec,
        compute: np.dtype[Any],
        promoted: tuple[int, ...] | None,
    ) -> None:
        self.out, self.compute, self.shape = out, compute, out.shape
        self.block = min(BLOCK_ELEMENTS, max(1, out.size))
        self.input_dtypes = [
            compute if promoted is None or index in promoted else np.dtype("bool") for index in range(len(ins))
        ]
        self.is_array = [isinstance(i, Spec) for i in ins]
        nodes = list(postorder(formula))
        users: dict[Expr, int] = {}
        for node in nodes:
            if isinstance(node, Call):
                for arg in node.args:
                    users[arg] = users.get(arg, 0) + 1
        self.register_dtypes: list[np.dtype[Any]] = []
        free: dict[np.dtype[Any], list[int]] = {}

        def take(dtype: np.dtype[Any]) -> int:
            if free.get(dtype):
                return free[dtype].pop()
            self.register_dtypes.append(dtype)
            return len(self.register_dtypes) - 1

        # Inputs in another dtype than the formula's are converted, block by block, into a register.
        self.loads: dict[int, int] = {}
        for index, operand in enumerate(ins):
            if isinstance(operand, Spec) and operand.dtype != self.input_dtypes[index]:
                self.loads[index] = take(self.input_dtypes[index])
        slots: dict[Expr, tuple[str, Any]] = {}
        self.steps: list[tuple[str, list[tuple[str, Any]], int, list[int]]] = []
        for node in nodes:
            if isinstance(node, Arg):
                slots[node] = ("r", self.loads[node.index]) if node.index in self.loads else ("a", node.index)
            elif isinstance(node, Const):
                slots[node] = ("c", node.value)
            elif isinstance(node, Call):
                dtype = np.dtype("bool") if node.kind == "bool" else compute
                result = take(dtype)
                extra = [take(compute) for _ in range(EXTRA_REGISTERS.get(node.fn, 0))]
                self.steps.append((node.fn, [slots[arg] for arg in node.args], result, extra))
                for register in extra:
                    free.setdefault(compute, []).append(register)
                for arg in node.args:
                    users[arg] -= 1
                    if users[arg] == 0 and isinstance(arg, Call):
                        register = slots[arg][1]
                        free.setdefault(self.register_dtypes[register], []).append(register)
                slots[node] = ("r", result)
        self.result = slots[formula]
        self.scratch_bytes = sum(self._register_bytes(dtype) for dtype in self.register_dtypes)

    def _register_bytes(self, dtype: np.dtype[Any]) -> int:
        return -(-self.block * dtype.itemsize // 64) * 64

    def run(self, out: Array, *args: Any, scratch: Array | None = None, **params: Any) -> None:
        """Evaluate into ``out``; inputs broadcast, Python scalars are converted once."""
        if out.size == 0:
            return
        registers, at = [], 0
        for dtype in self.register_dtypes:
            assert scratch is not None
            registers.append(scratch[at : at + self.block * dtype.itemsize].view(dtype))
            at += self._register_bytes(dtype)
        operands: list[Any] = []
        for arg, dtype, is_array in zip(args, self.input_dtypes, self.is_array, strict=True):
            if is_array:
                operands.append(arg if arg.shape == self.shape else np.broadcast_to(arg, self.shape))
            else:
                operands.append(_scalar(arg, dtype))
        for index in blocks(self.shape, self.block):
            target = out[index] if index else out
            self._run_block(
                target,
                [o[index] if array and index else o for o, array in zip(operands, self.is_array, strict=True)],
                registers,
            )

    def _run_block(self, target: Array, operands: list[Any], registers: list[Array]) -> None:
        shape, size = target.shape, target.size
        views = [register[:size].reshape(shape) for register in registers]
        for index, register in self.loads.items():
            np.copyto(views[register], operands[index], casting="unsafe")

        def value(slot: tuple[str, Any]) -> Any:
            kind, which = slot
            if kind == "r":
                return views[which]
            return operands[which] if kind == "a" else self.compute.type(which)

        last = len(self.steps) - 1
        for number, (fn, slots, result, extra) in enumerate(self.steps):
            # The last step writes the output itself where the dtypes agree and no operand can be overwritten early.
            direct = number == last and target.dtype == self.register_dtypes[result] and fn in UFUNCS
            place = target if direct else views[result]
            arguments = [value(slot) for slot in slots]
            if extra:
                SCALARS[fn](*arguments, place, [views[register] for register in extra])
            elif SCALARS[fn] is UFUNCS.get(fn):
                SCALARS[fn](*arguments, out=place)
            else:
                SCALARS[fn](*arguments, place)
            if direct:
                return
        np.copyto(target, value(self.result), casting="unsafe")
