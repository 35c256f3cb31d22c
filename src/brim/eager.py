"""The eager interpreter: runs an op at once. Takes outputs from the device's pool, runs the kernel, records the tape.

What an op needs on certain specs (output specs, kernel, scratch) is worked out once and kept; a call is then one
dictionary look-up, the allocation and the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.autocast import suspended
from brim.autograd import record
from brim.backend import BoundKernel
from brim.context import context, set_grad_enabled
from brim.device import META, Device, device
from brim.errors import DeviceError, DTypeError, ShapeError
from brim.op import Op, set_eager_interpreter
from brim.spec import Scalar, Spec, as_dtype
from brim.tensor import Tensor, empty, from_host

__all__ = ["Eager", "check_out"]

_SCALARS = (bool, int, float, complex)
_KEPT_PLANS = 8192


class _Plan:
    """What one op does on one combination of specs."""

    __slots__ = ("copies", "kernel", "out_specs", "view_offset")

    def __init__(self, out_specs: tuple[Spec, ...], kernel: BoundKernel | None, view_offset: int | None) -> None:
        self.out_specs, self.kernel, self.view_offset = out_specs, kernel, view_offset
        self.copies = kernel is not None and (any(kernel.contiguous) or kernel.aligned_bytes > 1)


class Eager:
    """Interpreter of ops that are run at once."""

    def __init__(self) -> None:
        self._plans: dict[Any, _Plan] = {}
        self._inferred: dict[Any, tuple[Spec, ...]] = {}

    def apply(self, op: Op, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> Any:
        """Run ``op``; see ``Op.__call__`` and ``Op.into``."""
        if op.arity is None:
            args = tuple(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else args
        elif len(args) != op.arity:
            raise TypeError(f"{op.name} takes {op.arity} inputs, got {len(args)}")
        place, wants_grad = None, False
        key: list[Any] = [op]
        for arg in args:
            if isinstance(arg, Tensor):
                if place is None:
                    place = arg.device
                elif arg.device is not place:
                    raise _device_mismatch(op, args)
                wants_grad |= arg.requires_grad
                key.append(arg.spec)
            elif type(arg) in _SCALARS:
                key.append(type(arg))
            elif (kind := self._scalar_kind(arg)) is not None:
                key.append(kind)
            else:
                return self.apply(op, _as_operands(op, args), params, out)
        if place is None:
            place = device(params.get("device"))  # ops that make tensors from numbers name theirs
        key.append(place.kind)
        key.extend(params.items())
        cache_key = tuple(key)
        plan = self._plans.get(cache_key)
        if plan is None:
            plan = self._plan(op, args, params, place)
            if len(self._plans) >= _KEPT_PLANS:
                self._plans.clear()
            self._plans[cache_key] = plan
        recording = wants_grad and context.grad_enabled
        if plan.view_offset is not None:
            outputs: tuple[Tensor, ...] = (self._view(plan, args[0]),)
        elif plan.out_specs and not (recording and op.vjp is None and op.kind == "composite" and out is None):
            outputs = self._run(op, plan, args, params, place, out)
        elif op.vjp is None and out is None:
            with suspended():
                return op.body(*args, **params)  # type: ignore[misc]  # its own ops record themselves
        else:
            outputs = self._run_body(op, args, params, out)
        if recording and op.vjp is not None:
            record(op, params, args, outputs)
        return outputs[0] if op.outputs == 1 else outputs

    def has_kernel(self, op: Op, place: Device, ins: Sequence[Any], params: dict[str, Any]) -> bool:
        """Whether a composite would be run by a kernel of its own; see ``Op.has_kernel``."""
        specs = [x.spec if isinstance(x, Tensor) else x for x in ins]
        kinds = (x if isinstance(x, Spec) else self._scalar_kind(x) or type(x) for x in specs)
        key = (op, *kinds, place.kind, *params.items())  # the same as in apply, which will want this plan
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(op, specs, params, place)
        return plan.kernel is not None

    def infer(self, op: Op, ins: Sequence[Spec | Scalar], params: dict[str, Any]) -> tuple[Spec, ...]:
        """Output specs of a composite: its body is run on tensors without memory."""
        key = (op, *(i if isinstance(i, Spec) else type(i) for i in ins), *params.items())
        found = self._inferred.get(key)
        if found is None:
            meta = device(META)
            args = [Tensor(i, meta) if isinstance(i, Spec) else i for i in ins]
            with set_grad_enabled(False), suspended():
                outputs = op.body(*args, **params)  # type: ignore[misc]
            found = tuple(o.spec for o in (outputs if op.outputs > 1 else (outputs,)))
            if len(self._inferred) >= _KEPT_PLANS:
                self._inferred.clear()
            self._inferred[key] = found
        return found

    def _scalar_kind(self, arg: Any) -> type | None:
        """The Python type that an operand stands for which is no number yet; None for anything else."""
        return None

    def _plan(self, op: Op, args: Sequence[Any], params: dict[str, Any], place: Device) -> _Plan:
        ins = [arg.spec if isinstance(arg, Tensor) else arg for arg in args]
        if op.kind == "view":
            assert op.view_rule is not None
            found = op.view_rule(ins[0], **params)
            if found is not None:
                return _Plan((found[0],), None, found[1])
            spec, offset = op.view_rule(Spec(ins[0].shape, ins[0].dtype), **params)
            plan = _Plan((spec,), None, offset)
            plan.copies = True
            return plan
        if place.is_meta:
            return _Plan(tuple(Spec(s.shape, s.dtype) for s in op.infer(ins, params)), None, None)
        kernel = None
        if op.kind != "composite":
            out_specs = op.infer(ins, params)
            try:
                kernel = place.backend.bind(op, ins, out_specs, params)
            except KeyError:
                operands = ", ".join(str(i) if isinstance(i, Spec) else type(i).__name__ for i in ins)
                raise DeviceError(
                    f"the {place.kind} backend has no kernel for {op.name}({operands}); convert its inputs with "
                    "astype(), or run it with device='cpu'"
                ) from None
            return _Plan(out_specs, kernel, None)
        try:
            out_specs = op.infer(ins, params)
            kernel = place.backend.bind(op, ins, out_specs, params)
        except KeyError:
            return _Plan((), None, None)
        return _Plan(out_specs, kernel, None)

    def _view(self, plan: _Plan, x: Tensor) -> Tensor:
        if plan.copies:
            x = x.copy()
        assert plan.view_offset is not None
        return Tensor(plan.out_specs[0], x.device, x._block, x.offset + plan.view_offset)

    def _run(
        self, op: Op, plan: _Plan, args: Sequence[Any], params: dict[str, Any], place: Device, out: Any
    ) -> tuple[Tensor, ...]:
        given = () if out is None else out if isinstance(out, tuple) else (out,)
        if given:
            check_out(op, plan.out_specs, given, args)
            plan = _for_layout(op, plan, given, args, params)
        kernel = plan.kernel
        # A plain loop: the frame of a generator expression would keep the inputs alive in a refusal's traceback.
        made: list[Tensor] = []
        for i, spec in enumerate(plan.out_specs):
            target = given[i] if given else None
            if target is None or (kernel is not None and not _writable_directly(plan, target, args)):
                target = empty(spec.shape, dtype=spec.dtype, device=place, op=op.name)
            made.append(target)
        outputs = tuple(made)
        if kernel is None:
            for target in given:
                if target is not None:
                    target.bump_version()
            return outputs
        if plan.copies:
            if any(_is_off(arg, kernel.aligned_bytes) for arg in args):
                args = [arg.copy() if _is_off(arg, kernel.aligned_bytes) else arg for arg in args]
                kernel = self._plan(op, args, params, place).kernel
                assert kernel is not None
            args = [
                arg.copy() if need and isinstance(arg, Tensor) and not arg.spec.contiguous else arg
                for arg, need in zip(args, kernel.contiguous, strict=False)
            ] + list(args[len(kernel.contiguous) :])
        arrays = [arg.array if isinstance(arg, Tensor) else arg for arg in args]
        scratch = None
        if kernel.scratch_bytes or kernel.library_bytes:
            block = place.memory.allocate(kernel.scratch_bytes + kernel.library_bytes, "workspace", op.name)
            scratch = place.backend.view(
                block.buffer, block.offset_bytes, Spec((kernel.scratch_bytes,), np.dtype("u1"))
            )
        written = outputs[0].array if op.outputs == 1 else tuple(o.array for o in outputs)
        with place.backend.running(place.index):
            kernel.run(written, *arrays, scratch=scratch, **params)
        if given:
            outputs = tuple(_deliver(result, want) for result, want in zip(outputs, given, strict=True))
        return outputs

    def _run_body(self, op: Op, args: Sequence[Any], params: dict[str, Any], out: Any) -> tuple[Tensor, ...]:
        with set_grad_enabled(False), suspended():
            result = op.body(*args, **params)  # type: ignore[misc]
        outputs = result if op.outputs > 1 else (result,)
        if out is None:
            return tuple(o.detach() if any(o is a for a in args) else o for o in outputs)
        given = out if isinstance(out, tuple) else (out,)
        check_out(op, tuple(o.spec for o in outputs), given, args)
        return tuple(_deliver(made, want) for made, want in zip(outputs, given, strict=True))


def _deliver(made: Tensor, want: Tensor | None) -> Tensor:
    if want is None or made is want:
        if want is not None:
            want.bump_version()
        return made
    want.write(made)
    return want


def _for_layout(
    op: Op, plan: _Plan, given: Sequence[Tensor | None], args: Sequence[Any], params: dict[str, Any]
) -> _Plan:
    """The plan to write into a view with gaps. Kernels of the host look at the array, others are chosen by its spec."""
    target = given[0]
    if (
        target is None
        or plan.kernel is None
        or op.kind != "elementwise"
        or target.spec.contiguous
        or target.device.backend.shares_host_memory
    ):
        return plan
    ins = [arg.spec if isinstance(arg, Tensor) else arg for arg in args]
    laid_out = _Plan((target.spec,), target.device.backend.bind(op, ins, [target.spec], params), None)
    return laid_out if _writable_directly(laid_out, target, args) else plan


def _writable_directly(plan: _Plan, target: Tensor, args: Sequence[Any]) -> bool:
    """True when a kernel may write into ``target``: it is no input, or the kernel allows the same elements in place."""
    exact = plan.kernel is not None and plan.kernel.exact_outputs
    any_layout = target.device.backend.shares_host_memory and not exact
    if not (target.spec.contiguous or target.spec in plan.out_specs or any_layout):
        return False
    if plan.kernel is not None and _is_off(target, plan.kernel.aligned_bytes):
        return False
    for arg in args:
        if isinstance(arg, Tensor) and arg._block is target._block and arg._block is not None:
            same = arg.spec == target.spec and arg.offset == target.offset
            if not (same and plan.kernel is not None and plan.kernel.aliasing):
                return False
    return True


def _is_off(x: Any, aligned_bytes: int) -> bool:
    """True for a tensor that starts inside of its memory where a kernel cannot read or write it."""
    return isinstance(x, Tensor) and x.offset * x.dtype.itemsize % aligned_bytes != 0


def check_out(op: Op, specs: Sequence[Spec], given: Sequence[Tensor | None], args: Sequence[Any]) -> None:
    if len(given) != len(specs):
        raise ShapeError(f"{op.name} has {len(specs)} outputs, got {len(given)} tensors to write into")
    for spec, target in zip(specs, given, strict=True):
        if target is not None and (target.shape != spec.shape or target.dtype != spec.dtype):
            raise ShapeError(f"{op.name} gives {Spec(spec.shape, spec.dtype)}, cannot be written into {target.spec}")


def _as_operands(op: Op, args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn NumPy arrays and scalars among the inputs into tensors on the device of the others, and Python scalars."""
    place = next((a.device for a in args if isinstance(a, Tensor)), None)
    out: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor) or type(arg) in _SCALARS:
            out.append(arg)
        elif isinstance(arg, np.generic):
            out.append(arg.item() if type(arg.item()) in _SCALARS else from_host(np.asarray(arg), place))
        elif isinstance(arg, np.ndarray):
            as_dtype(arg.dtype)
            out.append(from_host(arg, place))
        elif isinstance(arg, int | float):  # bool, int and float subclasses: a scheduled learning rate, an enum
            out.append(bool(arg) if isinstance(arg, bool) else int(arg) if isinstance(arg, int) else float(arg))
        else:
            raise DTypeError(
                f"{op.name} works on brim tensors, NumPy arrays and Python numbers, got {type(arg).__name__}; "
                "make a tensor with brim.asarray(...)"
            )
    return tuple(out)


def _device_mismatch(op: Op, args: Sequence[Any]) -> DeviceError:
    places = " and ".join(dict.fromkeys(str(a.device) for a in args if isinstance(a, Tensor)))
    return DeviceError(f"{op.name} got tensors on {places}; move them to one device with x.to(device)")


set_eager_interpreter(Eager())
