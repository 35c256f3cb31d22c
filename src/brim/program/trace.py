"""Tracing: a training step is run once on shapes alone, and every op it calls becomes an instruction.

The tracer is an interpreter like the eager one, so the step's own Python code, layers, gradients and optimizers run
unchanged; only memory and kernels are missing. What the trace captures:

- arguments (tensors, NumPy arrays) are inputs;
- every tensor that existed before and is read is *state*: its storage is bound for good; a new value is written back;
- numbers that change from step to step come from ``brim.context.host_scalar`` and are read before each run;
- other Python side effects happen once, at the trace. Where that would surprise, TraceError is raised.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.autocast import numerics, renewed
from brim.context import context, set_grad_enabled
from brim.device import Device
from brim.eager import Eager, check_out
from brim.errors import TraceError
from brim.gathered import Gathered
from brim.memory.ledger import user_site
from brim.op import REGISTRY, Op
from brim.program.ir import STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.traced import Hole, ModuleForm, TraceBlock, TracedStep
from brim.program.tree import rebuild, take_apart
from brim.spec import Spec, as_dtype
from brim.tensor import Tensor

_COPY = REGISTRY["copy"]

__all__ = ["MetaState", "TracedStep", "trace"]


class MetaState(Exception):
    """The step reads tensors of the meta device: trace it there. Caught by ``plan`` and ``compile``."""


@dataclass(eq=False, slots=True)
class _State:
    """Storage that existed before the trace, and the value it holds at this point of the step."""

    block: Any
    tensor: Tensor
    initial: Value
    current: Value


@dataclass(eq=False, slots=True)
class _Leaf:
    """A tensor whose ``.grad`` the step touches."""

    tensor: Tensor
    entry: Tensor | None
    written: bool = False
    consulted: bool = False


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


class Tracer(Eager):
    """Interpreter that records ops instead of running them."""

    def __init__(self, place: Device, target: Device) -> None:
        super().__init__()
        self.place, self.target = place, target
        self.instructions: list[Instruction] = []
        self.inputs: list[Value] = []
        self.constants: dict[Value, np.ndarray[Any, Any]] = {}
        self.reads: list[HostScalar] = []
        self.receivers: list[tuple[Tensor, Callable[[Any], None]]] = []
        self.baked_values: list[tuple[Callable[[], Any], Any]] = []
        self.modules: dict[int, ModuleForm] = {}
        self._flags: dict[int, tuple[Tensor, bool]] = {}
        self.created: list[tuple[Value, Tensor, float, Callable[[], Any]]] = []
        self.created_keys: list[Any] = []
        self._named: set[int] = set()
        self._states: dict[int, _State] = {}
        self._leaves: dict[int, _Leaf] = {}
        self._blocks: list[weakref.ref[TraceBlock]] = []

    # ---------------------------------------------------------------- operands

    def input(self, shape: tuple[int, ...], dtype: np.dtype[Any], requires_grad: bool) -> Tensor:
        """A tensor that stands for one argument."""
        value = Value(Spec(shape, dtype), "input", "inputs", "input", f"argument {len(self.inputs)}")
        self.inputs.append(value)
        return self._tensor(value, "argument").requires_grad_(requires_grad)

    def _tensor(self, value: Value, owner: str) -> Tensor:
        block = TraceBlock(value.spec, owner, value)
        self._blocks.append(weakref.ref(block))
        return Tensor(value.spec, self.place, block)  # type: ignore[arg-type]

    def _state(self, tensor: Tensor) -> _State:
        block = tensor._block
        found = self._states.get(id(block))
        if found is None:
            if block is None:
                raise TraceError(f"a tensor of shape {tensor.shape} without memory was used in a step")
            record = block.record
            spec = Spec(record.shape, record.dtype) if record.shape is not None else tensor.spec
            if spec.nbytes != record.nbytes:
                spec = Spec((record.nbytes // tensor.dtype.itemsize,), tensor.dtype)
            value = Value(spec, "state", record.category, record.op, record.layer, record.site)
            found = self._states[id(block)] = _State(block, tensor, value, value)
        return found

    def _ref(self, tensor: Tensor) -> Ref:
        block: Any = tensor._block
        if type(block) is TraceBlock:
            if block.current is None:
                raise TraceError(f"a tensor of shape {tensor.shape} is read in the step, but was never written")
            return Ref(block.current, tensor.spec, tensor.offset)
        return Ref(self._state(tensor).current, tensor.spec, tensor.offset)

    def _scalar_kind(self, arg: Any) -> type | None:
        return arg.kind if isinstance(arg, HostScalar) else None

    # ---------------------------------------------------------------- ops

    def apply(self, op: Op, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> Any:
        for arg in args[0] if op.arity is None and args and isinstance(args[0], list | tuple) else args:
            if isinstance(arg, Tensor) and arg.device is not self.place:
                if arg.device.is_meta:
                    raise MetaState
                raise TraceError(
                    f"{op.name} got a tensor on {arg.device} in a step that is traced for {self.target}{_at()}; move "
                    "it there before the step, or pass it as an argument"
                )
            if isinstance(arg, Tensor) and arg._node is None:
                self.note_flag(arg)
        return super().apply(op, args, params, out)

    def infer(self, op: Op, ins: Sequence[Any], params: dict[str, Any]) -> tuple[Spec, ...]:
        context.interpreter = None
        try:
            return super().infer(op, [i.kind(1) if isinstance(i, HostScalar) else i for i in ins], params)
        finally:
            context.interpreter = self

    def _plan(self, op: Op, args: Sequence[Any], params: dict[str, Any], place: Device) -> Any:
        plain = [arg.kind(1) if isinstance(arg, HostScalar) else arg for arg in args]
        return super()._plan(op, plain, params, self.target)  # its kernels, wherever the tensors are while tracing

    def _run(self, op: Op, plan: Any, args: Sequence[Any], params: dict[str, Any], place: Device, out: Any) -> Any:
        given = () if out is None else out if isinstance(out, tuple) else (out,)
        if given:
            check_out(op, plan.out_specs, given, args)
        site = user_site()
        operands = []
        needs = plan.kernel.contiguous if plan.copies else ()
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor):
                if position < len(needs) and needs[position] and not arg.spec.contiguous:
                    with set_grad_enabled(False):
                        arg = arg.copy()
                operands.append(self._ref(arg))
            else:
                operands.append(arg)
        values = tuple(
            Value(Spec(s.shape, s.dtype), op=op.name, layer=context.layer, site=site) for s in plan.out_specs
        )
        self.instructions.append(Instruction(op, tuple(operands), values, params, context.layer, site, context.phase))
        outputs = []
        for number, value in enumerate(values):
            target = given[number] if given else None
            if target is None:
                outputs.append(self._tensor(value, op.name))
            else:
                self._assign(target, value)
                outputs.append(target)
        return tuple(outputs)

    def _assign(self, target: Tensor, value: Value) -> None:
        """From here on, the memory of ``target`` holds ``value``."""
        block: Any = target._block
        traced = type(block) is TraceBlock
        held = block.spec if traced else self._state(target).initial.spec
        if not (target.offset == 0 and target.spec.contiguous and target.size == held.size):
            raise TraceError(
                f"a step writes through a view of shape {target.shape} into part of a tensor of shape {held.shape}"
                f"{_at()}; write x[index] = value on the tensor itself"
            )
        block.version += 1
        if traced:
            value.category, value.layer = block.category, block.layer or value.layer
            block.current = value
        else:
            self._state(target).current = value

    # ---------------------------------------------------------------- what else happens in a step

    def empty(self, spec: Spec, place: Device, op: str) -> Tensor:
        """Memory that the step writes later."""
        block = TraceBlock(spec, op, None)
        self._blocks.append(weakref.ref(block))
        return Tensor(spec, self.place, block)  # type: ignore[arg-type]

    def constant(self, host: np.ndarray[Any, Any], place: Any, category: str) -> Tensor:
        """Host data that the step brings along; it is the same in every run."""
        value = Value(
            Spec(host.shape, as_dtype(host.dtype)), "constant", "buffers", "constant", context.layer, user_site()
        )
        self.constants[value] = host
        return self._tensor(value, "a NumPy array")

    def host_scalars(self, read: Callable[[], tuple[Any, ...]], kinds: tuple[type, ...]) -> tuple[HostScalar, ...]:
        """Numbers that one call of ``read`` gives before each run."""
        whole = HostScalar(read, tuple)
        self.reads.append(whole)
        return tuple(HostScalar(_item(i), kind, (whole,)) for i, kind in enumerate(kinds))

    def baked(self, read: Callable[[], Any]) -> Any:
        """A Python value on which the recorded instructions depend."""
        for known, value in self.baked_values:
            if known is read:
                return value
        value = read()
        self.baked_values.append((read, value))
        return value

    def after_step(self, tensor: Tensor, receive: Callable[[Any], None]) -> None:
        """Hand the host a number after each run."""
        self.receivers.append((tensor.detach(), receive))

    def new_state(
        self, like: Tensor, value: float, category: str, forget: Callable[[], Any], spec: Spec | None = None
    ) -> Tensor:
        """A tensor that outlives the step, filled with one number before the first run; in the shape and dtype of
        another unless ``spec`` states them."""
        record = getattr(like._block, "record", None)
        layer = context.layer if record is None else record.layer
        spec = Spec(like.shape, like.dtype) if spec is None else spec
        made = Value(spec, "state", category, "state", layer, user_site())
        tensor = self._tensor(made, category)
        self.created.append((made, tensor, value, forget))
        kind = (id(like), category)
        self.created_keys.append((*kind, sum(key[:2] == kind for key in self.created_keys[-8:])))
        return tensor

    def note_module(self, module: Any) -> None:
        """Remember a module's mode and buffers: another mode is another program."""
        if id(module) not in self.modules:
            if id(module) not in self._named:
                self._named.update(id(one) for one in module.modules())
                _name_layers(module)
            self.modules[id(module)] = ModuleForm(module)

    def note_flag(self, tensor: Tensor) -> None:
        """Remember whether a tensor requires gradients, before the step changes or uses that."""
        block: Any = tensor._block
        if type(block) is not TraceBlock:
            self._flags.setdefault(id(tensor), (tensor, tensor._requires_grad))

    def note_gradient(self, tensor: Tensor, event: str | None) -> None:
        """Remember a tensor's ``.grad`` before the step changes it, and whether the step depends on what it was."""
        block: Any = tensor._block
        if type(block) is TraceBlock:
            return
        leaf = self._leaves.get(id(tensor))
        if leaf is None:
            leaf = self._leaves[id(tensor)] = _Leaf(tensor, tensor._grad)
        if event == "written":
            leaf.written = True
        elif not leaf.written:
            leaf.consulted = True

    def refuse_read(self, tensor: Tensor) -> None:
        """A value is wanted while there is none."""
        raise TraceError(
            f"a step that is traced reads the value of a tensor of shape {tensor.shape}{_at()}: values are not known "
            "until the step runs. Return the tensor and read it after the step; choose with brim.where() instead of "
            "if; a shape that depends on values (x[mask]) becomes x * mask or brim.where()"
        )

    def refuse_move(self, tensor: Tensor, place: Device) -> None:
        """A copy to another device is wanted in the middle of a step."""
        raise TraceError(
            f"a step that is traced moves a tensor from {tensor.device} to {place}{_at()}; one program runs on one "
            "device: move it before the step, or return it and move it afterwards"
        )

    # ---------------------------------------------------------------- the end

    def finish(self, box: list[Any]) -> TracedStep:
        """The traced step; ``box`` holds what it returned, and is emptied."""
        returned = box.pop()
        outputs, _ = take_apart(returned, _is_tensor)
        results = [self._ref(t) for t in outputs] + [self._ref(t) for t, _ in self.receivers]
        structure = rebuild(returned, _is_tensor, [Hole(number) for number in range(len(outputs))])
        leaves, guards = self._finish_gradients()
        self._finish_modules()
        written = [state for state in self._states.values() if state.current is not state.initial]
        for value, tensor, _, _ in self.created:
            block: Any = tensor._block
            if block.current is not value:
                written.append(_State(block, tensor, value, block.current))
        for state in written:
            if state.current.origin != "temp":  # another state's value, which that state's own store may overwrite
                source = state.current
                state.current = Value(source.spec, op="copy", layer=source.layer, site=source.site)
                self.instructions.append(
                    Instruction(_COPY, (Ref.of(source),), (state.current,), {}, source.layer, source.site, "update")
                )
        for state in written:
            store = (Ref.of(state.initial), Ref(state.current, state.initial.spec))
            self.instructions.append(
                Instruction(STORE, store, (), {}, state.initial.layer, state.initial.site, "update")
            )
        states = [state.initial for state in self._states.values()]
        program = Program(
            self.inputs,
            [*states, *(value for value, _, _, _ in self.created)],
            self.constants,
            self.instructions,
            results,
            self.target.name,
            tuple(self.reads),
        )
        for tensor in outputs:
            tensor._node = None
        step = TracedStep(
            program,
            [(state.tensor, state.block) for state in self._states.values()],
            self.created,
            len(outputs),
            [receive for _, receive in self.receivers],
            structure,
            leaves,
            guards,
            self.baked_values,
            list(self.modules.values()),
            list(self._flags.values()),
            self.created_keys,
        )
        self.receivers.clear()
        return step

    def _finish_gradients(self) -> tuple[list[Any], list[Any]]:
        after: list[Any] = []
        guards: list[Any] = []
        for leaf in self._leaves.values():
            final = leaf.tensor._grad
            if leaf.consulted:
                guards.append((leaf.tensor, leaf.entry))
            if final is leaf.entry:
                continue
            if final is None:
                after.append((leaf.tensor, None))
                leaf.tensor._grad = leaf.entry
                continue
            value = self._own_value(final)
            home = leaf.entry
            if home is None or home.spec != Spec(leaf.tensor.shape, leaf.tensor.dtype):
                home = self.new_state(leaf.tensor, 0.0, "grads", lambda: None)
            block: Any = home._block
            if type(block) is TraceBlock:
                block.current = value
            else:
                self._state(home).current = value
            after.append((leaf.tensor, home))
            leaf.tensor._grad = leaf.entry
        return after, guards

    def _own_value(self, tensor: Tensor) -> Value:
        """The value that is exactly this tensor, row-major; a copy of it where the tensor is part of a larger one."""
        ref = self._ref(tensor)
        if ref.offset == 0 and tensor.spec.contiguous and tensor.spec.size == ref.value.spec.size:
            return ref.value
        with set_grad_enabled(False):
            return self._ref(tensor.copy()).value

    def _finish_modules(self) -> None:
        """A buffer that the step bound to a new tensor becomes a write into the old one."""
        bound: list[tuple[Tensor, Value]] = []  # all are read before one is written: two may have changed places
        for form in self.modules.values():
            module = form.module
            form.settle()
            for registry in ("_parameters", "_buffers"):
                before, now = form.registries[registry], module.__dict__[registry]
                for name, old in before.items():
                    new = now.get(name)
                    if new is old:
                        continue
                    where = f"{type(module).__name__}.{name}"
                    if not isinstance(new, Tensor) or not isinstance(old, Tensor) or new.spec.shape != old.spec.shape:
                        now[name] = old
                        shape = getattr(new, "shape", new)
                        raise TraceError(
                            f"{where} of shape {getattr(old, 'shape', old)} is bound to one of shape {shape} in the "
                            "step; state keeps its shape from step to step: register a buffer of the final shape"
                        )
                    if new.dtype != old.dtype:
                        now[name] = old
                        raise TraceError(f"{where} is {old.dtype} and is bound to a {new.dtype} tensor in the step")
                    bound.append((old, self._own_value(new)))
                    now[name] = old
        for tensor, value in bound:
            self._assign(tensor, value)

    def find_leaks(self) -> None:
        """Raise TraceError when tensors of the trace are still referenced by the user's objects."""
        mine = {id(tensor._block) for _, tensor, _, _ in self.created}
        if any(ref() is not None and id(ref()) not in mine for ref in self._blocks):
            gc.collect()
        for ref in self._blocks:
            block = ref()
            if block is not None and id(block) not in mine:
                raise TraceError(
                    f"the result of {block.owner} of shape {block.spec.shape}, made at {block.where}, is still "
                    "referenced after the step (kept in a list, an attribute or a closure). A step runs once as Python "
                    "and is then replayed: return what you want to keep, and store it outside the step"
                )


def _name_layers(root: Any) -> None:
    """Book parameters and buffers under the dotted name of their layer, where they have none yet."""
    for path, module in root.named_modules(context.layer):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            record = getattr(getattr(tensor, "_block", None), "record", None)
            if record is not None and not record.layer:
                record.layer = path


def _item(index: int) -> Callable[[tuple[Any, ...]], Any]:
    return lambda numbers: numbers[index]


def _at() -> str:
    site = user_site()
    return f" at {site[0]}:{site[1]}" if site else ""


def trace(
    fn: Callable[..., Any], arguments: Any, specs: Sequence[tuple[Spec, bool]], place: Device, target: Device
) -> TracedStep:
    """Run ``fn`` on shapes alone and record what it does.

    Arguments:
        fn: the step.
        arguments: ``(args, kwargs)`` with a leaf at the place of each input (tensors and NumPy arrays).
        specs: (shape and dtype, requires_grad) of each input.
        place: device of the tensors in the trace: ``target``, or meta when the model's tensors are there.
        target: device that the program is for.

    Raises:
        TraceError: the step does something that cannot be replayed; the message names the line and the way out.
        MetaState: ``place`` must be the meta device.
    """
    tracer = Tracer(place, target)
    before = context.interpreter, context.default_device
    if before[0] is not None:
        raise TraceError("a step cannot be compiled inside another one that is being traced; call the plain function")
    context.interpreter, context.default_device = tracer, place
    try:
        inputs = [tracer.input(spec.shape, spec.dtype, wants) for spec, wants in specs]
        args, kwargs = rebuild(arguments, is_argument, inputs)
        del inputs
        tracer.baked(numerics)
        with renewed():
            box = [fn(*args, **kwargs)]
        del args, kwargs  # or this frame would keep the tensors alive that must not outlive the step
        step = tracer.finish(box)
        tracer.find_leaks()
        return step
    except BaseException:
        for leaf in tracer._leaves.values():
            leaf.tensor._grad = leaf.entry
        for form in tracer.modules.values():
            for registry in ("_parameters", "_buffers"):
                form.module.__dict__[registry].update(form.registries[registry])
        for _, _, _, forget in tracer.created:
            forget()
        raise
    finally:
        context.interpreter, context.default_device = before


def is_argument(x: Any) -> bool:
    """True for what becomes an input of a program: tensors, NumPy arrays, rows to gather, and specs in their place."""
    return isinstance(x, Tensor | np.ndarray | Spec | Gathered)
