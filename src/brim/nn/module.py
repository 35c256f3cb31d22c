"""Module: the base of all layers. It keeps parameters, buffers and sub-modules in order and runs ``forward``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from brim.autograd import no_grad
from brim.context import context, layer_scope, modes
from brim.device import Device
from brim.errors import CheckpointError, DTypeError, ShapeError
from brim.memory.guard import give_back_on_refusal
from brim.nn.parameter import Parameter
from brim.spec import DTYPES, as_dtype, is_float
from brim.tensor import Tensor, asarray

__all__ = ["Module"]

Self = TypeVar("Self", bound="Module")


class _Call(threading.local):
    """The dotted names of the modules of the outermost module that is being called; None outside any call."""

    paths: dict[int, str] | None = None


_call = _Call()


class Module:
    """A layer or a whole network.

    A subclass calls ``super().__init__()``, assigns parameters and sub-modules to attributes, and defines
    ``forward``. Calling the module runs ``forward``; memory that it takes is booked under the layer's dotted name.

    Attributes:
        training: True after ``train()``, False after ``eval()``.
    """

    training: bool

    def __init__(self) -> None:
        for name in ("_parameters", "_buffers", "_modules"):
            object.__setattr__(self, name, {})
        object.__setattr__(self, "_temporary_buffers", set())
        object.__setattr__(self, "training", True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes; every subclass defines it."""
        raise TypeError(f"{type(self).__name__} has no forward(); define forward(self, ...) in the class")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward``."""
        if context.interpreter is not None:
            context.interpreter.note_module(self)
        if _call.paths is not None:
            path = _call.paths.get(id(self))
            if path is None:
                return self.forward(*args, **kwargs)
            with layer_scope(path):
                return self.forward(*args, **kwargs)
        _call.paths = {id(module): name for name, module in self.named_modules(context.layer)}
        try:
            with give_back_on_refusal():
                return self.forward(*args, **kwargs)
        finally:
            _call.paths = None

    # ---------------------------------------------------------------- attributes

    def _registries(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        own = self.__dict__
        if "_modules" not in own:
            raise AttributeError(
                f"{type(self).__name__}: call super().__init__() before parameters, buffers or modules are assigned"
            )
        return own["_parameters"], own["_buffers"], own["_modules"]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Module):
            self.register_module(name, value)
        elif "_modules" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            parameters, buffers, modules = self._registries()
            modes.changes += 1
            if name in buffers and (value is None or isinstance(value, Tensor)):
                buffers[name] = value if value is None else value.book_as("buffers")
            elif name in parameters and value is None:
                parameters[name] = None
            elif name in modules and value is None:
                modules[name] = None
            elif name in parameters or name in modules:
                kind = "parameter" if name in parameters else "module"
                raise TypeError(
                    f"{type(self).__name__}.{name} is a {kind}; assign a {kind.capitalize()} or None, "
                    f"not {type(value).__name__} (delete the attribute first to change its meaning)"
                )
            else:
                object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for registry in ("_parameters", "_buffers", "_modules"):
            if registry in own and name in own[registry]:
                return own[registry][name]
        hint = "" if "_modules" in own else "; super().__init__() was not called"
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def __delattr__(self, name: str) -> None:
        modes.changes += 1
        for registry in self._registries():
            if name in registry:
                del registry[name]
                return
        object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for registry in self._registries() for name in registry)})

    def _claim(self, name: str, registry: dict[str, Any]) -> None:
        modes.changes += 1
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"a name inside a module is a non-empty string without dots, got {name!r}")
        for other in self._registries():
            if other is not registry:
                other.pop(name, None)
        self.__dict__.pop(name, None)

    def register_parameter(self, name: str, value: Parameter | None) -> None:
        """Add a parameter, or None for one that is absent (``bias=False``)."""
        parameters = self._registries()[0]
        if value is not None and not isinstance(value, Parameter):
            raise TypeError(f"parameter {name!r} must be an nn.Parameter, got {type(value).__name__}")
        self._claim(name, parameters)
        parameters[name] = value

    def register_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """Add a tensor that is part of the state but not learned.

        Arguments:
            persistent: False leaves it out of ``state_dict``.
        """
        buffers = self._registries()[1]
        self._claim(name, buffers)
        buffers[name] = value if value is None else value.book_as("buffers")
        (self._temporary_buffers.discard if persistent else self._temporary_buffers.add)(name)

    def register_module(self, name: str, value: Module | None) -> None:
        """Add a sub-module."""
        modules = self._registries()[2]
        self._claim(name, modules)
        modules[name] = value

    add_module = register_module

    # ---------------------------------------------------------------- walking

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(dotted name, module) of this module and all below, each module once."""
        seen: set[int] = set()

        def walk(module: Module, path: str) -> Iterator[tuple[str, Module]]:
            if id(module) in seen:
                return
            seen.add(id(module))
            yield path, module
            for name, child in module._modules.items():
                if child is not None:
                    yield from walk(child, f"{path}.{name}" if path else name)

        return walk(self, prefix)

    def modules(self) -> Iterator[Module]:
        """This module and all below."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the direct sub-modules."""
        return ((name, child) for name, child in self._modules.items() if child is not None)

    def children(self) -> Iterator[Module]:
        """The direct sub-modules."""
        return (child for _, child in self.named_children())

    def _named_tensors(self, registry: str, prefix: str, recurse: bool) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for path, module in self.named_modules(prefix) if recurse else ((prefix, self),):
            for name, value in module.__dict__[registry].items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter) in order of registration, each parameter once."""
        return self._named_tensors("_parameters", prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """All parameters, each once."""
        return (value for _, value in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, buffer) in order of registration, each buffer once."""
        return self._named_tensors("_buffers", prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """All buffers, each once."""
        return (value for _, value in self.named_buffers(recurse=recurse))

    def get_submodule(self, path: str) -> Module:
        """The module with this dotted name ("" is this one). Raises AttributeError."""
        module: Any = self
        for name in path.split(".") if path else ():
            found = module._modules.get(name)
            if found is None:
                known = ", ".join(module._modules) or "none"
                raise AttributeError(f"no module {path!r}: {type(module).__name__} has {known}")
            module = found
        return module

    # ---------------------------------------------------------------- modes

    def train(self: Self, mode: bool = True) -> Self:
        """Training mode here and in all modules below (dropout drops, batch norm uses the batch)."""
        for module in self.modules():
            if module.training is not bool(mode):
                modes.changes += 1
                object.__setattr__(module, "training", bool(mode))
        return self

    def eval(self: Self) -> Self:
        """Evaluation mode: dropout is the identity, batch norm uses its running statistics."""
        return self.train(False)

    def apply(self: Self, fn: Callable[[Module], Any]) -> Self:
        """Call ``fn`` on every module below, then on this one (for initialisation)."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def requires_grad_(self: Self, value: bool = True) -> Self:
        """Learn all parameters, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad = value
        return self

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters; their memory is free at once."""
        for parameter in self.parameters():
            parameter.grad = None

    def to(self: Self, *targets: Any, device: Any = None, dtype: Any = None) -> Self:
        """Move parameters, buffers and gradients to a device and/or a float dtype, in place; returns the module.

        Parameters stay the same objects, so an optimizer made before goes on working. Integer buffers keep their dtype.
        """
        place, kind = _destination(targets, device, dtype)
        with no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                _become(tensor, _moved(tensor, place, kind))
                if tensor.grad is not None:
                    tensor.grad = _moved(tensor.grad, place, kind).book_as("grads")
        return self

    # ---------------------------------------------------------------- state

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and persistent buffers by dotted name, under PyTorch's keys. The tensors share memory."""
        out: dict[str, Tensor] = {}
        for name, value in self._parameters.items():
            if value is not None:
                out[prefix + name] = value.detach()
        for name, value in self._buffers.items():
            if value is not None and name not in self._temporary_buffers:
                out[prefix + name] = value.detach()
        for name, child in self.named_children():
            out.update(child.state_dict(f"{prefix}{name}."))
        return out

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> tuple[list[str], list[str]]:
        """Copy values in from tensors, NumPy arrays or anything with ``__dlpack__``. All or nothing.

        Arguments:
            state: values by dotted name.
            strict: False accepts missing and unexpected keys.

        Returns:
            (missing keys, unexpected keys).

        Raises:
            CheckpointError: keys do not match (strict), or shapes differ; nothing was changed.
        """
        own = self.state_dict()
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        problems = [] if not strict else [
            f"{what} {len(keys)}: {', '.join(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]  # fmt: skip
        wrong = [
            f"{key}: the model has {own[key].shape}, the state {tuple(np.shape(state[key]))}"
            for key in own
            if key in state and own[key].shape != _shape_of(state[key])
        ]
        if wrong:
            problems.append("different shapes: " + "; ".join(wrong))
        if problems:
            raise CheckpointError(
                f"the state does not fit {type(self).__name__}. " + ". ".join(problems)
                + ". Build the model with the arguments it was saved with"
                + (", or pass strict=False to load what matches." if not wrong else ".")
            )  # fmt: skip
        sources = {key: _as_source(state[key]) for key in own if key in state}
        for key, source in sources.items():
            own[key].write(source)
        return missing, unexpected

    # ---------------------------------------------------------------- printing

    def extra_repr(self) -> str:
        """The arguments shown by ``repr``."""
        return ""

    def __repr__(self) -> str:
        lines = [f"({name}): {child!r}".replace("\n", "\n  ") for name, child in self.named_children()]
        head = f"{type(self).__name__}({self.extra_repr()}"
        return head + ("\n  " + "\n  ".join(lines) + "\n)" if lines else ")")


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else np.shape(value)


def _as_source(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "detach") and not isinstance(value, np.ndarray):
        value = value.detach()  # a PyTorch tensor that requires gradients does not export itself
    return asarray(value)


def _destination(targets: tuple[Any, ...], device: Any, dtype: Any) -> tuple[Any, Any]:
    for target in targets:
        if isinstance(target, Device) or (isinstance(target, str) and target not in DTYPES):
            device = target
        else:
            dtype = target
    kind = None if dtype is None else as_dtype(dtype)
    if kind is not None and not is_float(kind):
        raise DTypeError(f"a module can be converted to a float dtype, not to {kind}")
    return device, kind


def _moved(tensor: Tensor, device: Any, dtype: Any) -> Tensor:
    return tensor.detach().to(device=device, dtype=dtype if is_float(tensor.dtype) else None)


def _become(tensor: Tensor, other: Tensor) -> None:
    """Make ``tensor`` the same object over other memory, keeping what it is booked as."""
    if other._block is tensor._block and other.dtype == tensor.dtype and other.device is tensor.device:
        return
    if other.shape != tensor.shape:
        raise ShapeError(f"a tensor of shape {tensor.shape} cannot become one of shape {other.shape}")
    category = "params" if isinstance(tensor, Parameter) else "buffers"
    tensor.spec, tensor.device, tensor._block, tensor.offset = other.spec, other.device, other._block, other.offset
    tensor._array = None
    tensor.book_as(category)
