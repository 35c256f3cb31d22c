"""Optimizer: parameter groups, the state kept for each parameter, and how both are saved; rules are in other files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from brim.autocast import suspended
from brim.autograd import no_grad
from brim.context import baked, context, host_scalars, layer_scope, phase_scope
from brim.errors import CheckpointError
from brim.op import Op
from brim.ops import where
from brim.spec import Spec, default_float
from brim.tensor import Tensor, empty

__all__ = ["Optimizer", "check_range", "layer_of"]


class Optimizer:
    """Base of all optimizers. A subclass defines ``update``.

    A step may be part of a planned step, which is recorded once and run many times. So what is read from the host in
    it goes through ``settings`` and ``brim.context``: numbers are read anew for each run.

    Arguments:
        params: tensors (as from ``model.parameters()``), or dicts with "params" and settings of their own.
        defaults: settings of groups that do not state them.

    Attributes:
        param_groups: dicts of settings, each with its tensors under "params".
        state: position of a parameter (counted through all groups) -> name -> Tensor or number.
        can_skip: whether ``update`` writes through ``assign``, so that ``step(finite)`` can leave everything as it is.
    """

    can_skip: ClassVar[bool] = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if isinstance(params, Tensor | Mapping):
            raise TypeError(f"params: expected a list of tensors or groups, got one {type(params).__name__}")
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[int, dict[str, Any]] = {}
        self._unused: set[int] = set()  # ids of buffers that no step has used yet
        self._changes = 0  # how often parameters were added or buffers exchanged
        given = list(params)
        if not given:
            raise ValueError("params is empty: there is nothing to optimize; was the model's parameters() used up?")
        for group in given if isinstance(given[0], Mapping) else [{"params": given}]:
            self.add_param_group(group)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Optimize further parameters: a dict with "params" and settings that differ from the defaults."""
        if unknown := set(group) - {"params"} - set(self.defaults):
            raise ValueError(f"unknown settings {sorted(unknown)}; {type(self).__name__} has {sorted(self.defaults)}")
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        known = {id(p) for other in self.param_groups for p in other["params"]}
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"params: expected tensors, got {type(p).__name__}")
            if not p.is_leaf:
                raise ValueError("can only optimize leaf tensors, this one was computed; use x.detach()")
            if id(p) in known:
                raise ValueError("a parameter appears twice; each belongs to one group")
            known.add(id(p))
        made = {**self.defaults, **group, "params": params}
        self.check(made)
        self.param_groups.append(made)
        self._changes += 1

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError for settings out of range."""
        check_range("lr", settings["lr"], 0.0)
        check_range("weight_decay", settings.get("weight_decay", 0.0), 0.0)

    def step(self, finite: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, in place.

        Arguments:
            finite: a bool tensor without axes (``GradScaler`` makes it); where it is False, no parameter and no state
                changes, and the step does not count. It is not read back.

        Raises:
            TypeError: ``finite`` is given, and this optimizer cannot skip a step.
        """
        if finite is not None and not self.can_skip:
            raise TypeError(
                f"{type(self).__name__} cannot skip steps: write new values with self.assign(), and set can_skip = True"
            )
        with no_grad(), suspended(), phase_scope("update"):
            baked(lambda: self._changes)
            for group, members in self._members():
                found = [(i, p, grad) for i, p in members if (grad := p.grad) is not None]
                if found:
                    self.update_group({**self.settings(group), "finite": finite}, found)

    def update_group(self, group: dict[str, Any], members: list[tuple[int, Tensor, Tensor]]) -> None:
        """Update one group's parameters: its settings, their positions, themselves and their gradients."""
        for index, param, grad in members:
            with layer_scope(layer_of(param)):
                self.update(group, self.state.setdefault(index, {}), param, grad)

    def update(self, group: dict[str, Any], state: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        """Update one parameter; ``group`` is what ``settings`` gave, and "finite" as ``step`` was given it."""
        raise TypeError(f"{type(self).__name__} must define update()")

    def assign(self, group: dict[str, Any], op: Op, targets: list[Tensor], *operands: Any, **params: Any) -> None:
        """Write the outputs of an update rule into ``targets``, which stay as they are in a step that is skipped."""
        finite = group["finite"]
        if finite is None:
            op.into(tuple(targets) if op.outputs > 1 else targets[0], *operands, **params)
            return
        made = op(*operands, **params)
        for target, value in zip(targets, made if op.outputs > 1 else (made,), strict=True):
            where.into(target, finite, value, target)

    def counted(self, group: dict[str, Any], state: dict[str, Any], param: Tensor, before: int = 0) -> Tensor:
        """The number of this step for a parameter, counted on the device, where a step that is skipped does not count.

        Arguments:
            before: steps done, where none were counted yet.
        """
        count = state.get("step", before)
        if not isinstance(count, Tensor):
            known = "step" in state

            def forget() -> None:
                state.pop("step", None)
                if known:
                    state["step"] = count

            if context.interpreter is None:
                made = _like(param, Spec((), default_float)).write(float(count))
            else:
                made = context.interpreter.new_state(param, float(count), "optimizer", forget, Spec((), default_float))
            state["step"] = made
        counter: Tensor = state["step"]
        number = counter + 1.0
        where.into(counter, group["finite"], number, counter)
        return number

    def count_on_host(self, state: dict[str, Any]) -> None:
        """Make a number of steps that was counted on the device a plain number again."""
        count = state.get("step")
        if isinstance(count, Tensor):
            tracing, context.interpreter = context.interpreter, None  # it is from before the step that is traced
            try:
                state["step"] = 0 if count.device.is_meta else int(count.item())
            finally:
                context.interpreter = tracing
            self._changes += 1

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group as one step uses it: numbers are floats that are read anew in each run of a planned step.

        The entry "source" is the group itself, for functions that read it in each run.
        """
        fixed = baked(lambda: self.flags(group))
        names = [name for name, value in group.items() if name != "params" and _count(value) is not None]
        counts = [_count(group[name]) for name in names]

        def read() -> tuple[float, ...]:
            return tuple(float(number) for name in names for number in _flat(group[name]))

        flat = iter(host_scalars(read, (float,) * sum(count or 1 for count in counts)))
        numbers = {
            name: tuple(next(flat) for _ in range(count)) if count else next(flat)
            for name, count in zip(names, counts, strict=True)
        }
        return {**fixed, **numbers, "source": group}

    def flags(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What decides which operations a step consists of: settings that are no numbers; a subclass adds its own."""
        return {name: value for name, value in group.items() if name != "params" and _count(value) is None}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, which frees their memory, or with ``set_to_none=False`` overwrite them with zeros."""
        for group in self.param_groups:
            for p in group["params"]:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad.write(0.0)

    def _members(self) -> Iterator[tuple[dict[str, Any], list[tuple[int, Tensor]]]]:
        index = 0
        for group in self.param_groups:
            members = list(enumerate(group["params"], index))
            index += len(members)
            yield group, members

    def buffer(self, state: dict[str, Any], name: str, param: Tensor) -> Tensor:
        """The state tensor of this name, made of zeros in the parameter's shape when it is missing."""
        if name not in state:
            if context.interpreter is None:
                made = _like(param, _spec_of(name, param)).write(0.0)
            else:  # it outlives the step that is being recorded, and making it is no part of that step

                def forget() -> None:
                    self._unused.discard(id(state.pop(name, None)))

                made = context.interpreter.new_state(param, 0.0, "optimizer", forget)
            state[name] = made
            self._unused.add(id(made))
        found: Tensor = state[name]
        return found

    def first_use(self, buffer: Tensor) -> bool:
        """True the first time that this is asked about a buffer that ``buffer`` made; False for one that was loaded."""
        if id(buffer) not in self._unused:
            return False
        self._unused.discard(id(buffer))
        return True

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {position: {name: value}}, "param_groups": [...]}`` with positions for tensors, as PyTorch's."""
        groups = [{**group, "params": [i for i, _ in members]} for group, members in self._members()]
        return {"state": {i: dict(values) for i, values in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; tensors (or arrays) are copied, where possible into those in use.

        Raises:
            CheckpointError: it belongs to other parameters; nothing was changed.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        sizes, found = [len(g["params"]) for g in self.param_groups], [len(g["params"]) for g in groups]
        if sizes != found:
            raise CheckpointError(f"the state is of groups with {found} parameters, this optimizer has {sizes}")
        params = [p for _, members in self._members() for _, p in members]
        for index, values in state.items():
            for name, value in values.items():
                shape = _spec_of(name, params[int(index)]).shape
                if hasattr(value, "shape") and tuple(value.shape) != shape:
                    raise CheckpointError(f"{name} of parameter {index}: expected {shape}, got {tuple(value.shape)}")
        before = {(i, name): id(v) for i, name, v in self._tensors()}
        loaded: dict[int, dict[str, Any]] = {
            int(index): {
                name: _like(param, _spec_of(name, param)).write(value) if hasattr(value, "shape") else value
                for param in [params[int(index)]]
                for name, value in values.items()
            }
            for index, values in state.items()
        }
        # Dicts stay the same objects, tensors too where they fit: a planned step goes on with them.
        for index, values in loaded.items():
            present = self.state.get(index, {})
            values.update({name: _kept(present.get(name), value) for name, value in values.items()})
            loaded[index] = _replace(present, values)
        self.state = loaded
        self._unused.clear()
        if {(i, name): id(v) for i, name, v in self._tensors()} != before:
            self._changes += 1
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: _tuple(v) for k, v in saved.items() if k != "params"})

    def _tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        for index, values in self.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    yield index, name, value

    def state_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors of the state as arrays by flat names such as ``"3.momentum_buffer"``, for a safetensors file."""
        return {f"{index}.{name}": value.detach().numpy() for index, name, value in self._tensors()}

    def state_settings(self) -> dict[str, Any]:
        """All of the state that is no tensor: plain values, for JSON."""
        state = {
            str(i): {name: v for name, v in values.items() if not isinstance(v, Tensor)}
            for i, values in self.state.items()
        }
        return {"state": state, "param_groups": self.state_dict()["param_groups"]}

    def load_state(self, arrays: Mapping[str, np.ndarray[Any, Any]], settings: Mapping[str, Any]) -> None:
        """Continue from ``state_arrays()`` and ``state_settings()``."""
        state: dict[str, dict[str, Any]] = {index: dict(values) for index, values in settings["state"].items()}
        for key, array in arrays.items():
            index, _, name = key.partition(".")
            state.setdefault(index, {})[name] = array
        self.load_state_dict({"state": state, "param_groups": settings["param_groups"]})

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.param_groups[0].items() if k != "params")
        return f"{type(self).__name__}({sum(len(g['params']) for g in self.param_groups)} parameters, {settings})"


def layer_of(param: Tensor) -> str:
    """The layer under which a parameter is booked."""
    return param._block.record.layer


def _spec_of(name: str, param: Tensor) -> Spec:
    """Shape and dtype of a parameter's state of this name: its own, but for a count of steps."""
    return Spec((), default_float) if name == "step" else Spec(param.shape, param.dtype)


def _like(param: Tensor, spec: Spec) -> Tensor:
    """Memory for state, booked as the optimizer's under the parameter's layer."""
    made = empty(spec.shape, dtype=spec.dtype, device=param.device, op="optimizer")
    return made.book_as("optimizer", layer_of(param))


def _count(value: Any) -> int | None:
    """0 for a number, the length of a sequence of numbers, None for anything else."""
    kind = type(value)
    if kind is float or kind is int:  # asked for every setting at every step: the usual ones first
        return 0
    if kind is bool or value is None:
        return None
    if isinstance(value, list | tuple):
        return len(value) if value and all(_count(v) == 0 for v in value) else None
    return 0 if isinstance(value, Real) else None


def _flat(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _kept(present: Any, value: Any) -> Any:
    """The tensor in use with the values of the new one, or the new value where it cannot stay."""
    both = isinstance(present, Tensor) and isinstance(value, Tensor)
    if not both or present.device is not value.device or (present.dtype, present.shape) != (value.dtype, value.shape):
        return value
    return present.write(value)


def _replace(into: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    into.clear()
    into.update(values)
    return into


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


def check_range(name: str, value: Any, low: float, below: float = math.inf) -> None:
    """Raise ValueError unless ``low <= value < below``."""
    if not isinstance(value, int | float) or not low <= value < below:
        limit = f" and below {below}" if below < math.inf else ""
        raise ValueError(f"{name}: expected a finite number of at least {low:g}{limit}, got {value!r}")
