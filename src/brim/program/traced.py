"""What a trace is made of and what it gives: stand-ins for memory, the traced step, and the places of its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from brim.context import context
from brim.errors import TraceError
from brim.memory.ledger import user_site
from brim.program.ir import Program, Value
from brim.spec import Spec
from brim.tensor import Tensor

__all__ = ["Hole", "ModuleForm", "TraceBlock", "TracedStep", "is_hole"]


class TraceBlock:
    """Stands for a block of memory while a step is traced: knows which value lies there now."""

    __slots__ = ("__weakref__", "category", "current", "layer", "owner", "site", "spec", "version")
    offset_bytes = 0

    def __init__(self, spec: Spec, owner: str, current: Value | None) -> None:
        self.spec, self.owner, self.current = spec, owner, current
        self.category = "temps" if current is None else current.category
        self.layer, self.site, self.version = context.layer, user_site(), 0

    @property
    def record(self) -> TraceBlock:
        return self

    @property
    def where(self) -> str:
        return f"{self.site[0]}:{self.site[1]}" if self.site else "an unknown line"

    def recategorise(self, category: str, layer: str | None = None) -> None:
        """What a ``Block`` does, for the value that lies here now."""
        self.category = category
        if self.current is not None:
            self.current.category = category
            self.current.layer = self.current.layer if layer is None else layer
        self.layer = self.layer if layer is None else layer

    @property
    def buffer(self) -> Any:
        raise TraceError(
            f"this tensor of shape {self.spec.shape}, made by {self.owner} at {self.where}, belongs to a step that was "
            "traced: it has a shape and no values. Return it from the step to get its value after each run"
        )


class ModuleForm:
    """What a module was when a step was traced: its mode, its tensors and layers, its plain settings.

    Arguments:
        module: an ``nn.Module``, before the step calls it.
    """

    REGISTRIES = ("_parameters", "_buffers", "_modules")

    def __init__(self, module: Any) -> None:
        self.module, self.training = module, module.training
        self.registries = {name: dict(module.__dict__[name]) for name in self.REGISTRIES}
        self.settings: dict[str, Any] = {}

    def settle(self) -> None:
        """Note the settings as the trace leaves them: what the step itself changes is no reason to trace again."""
        self.settings = {name: value for name, value in self.module.__dict__.items() if type(value) in _PLAIN}

    def change(self) -> str:
        """What is different now, or an empty string."""
        module, kind = self.module, type(self.module).__name__
        if module.training is not self.training:
            return f"{kind} changed to {'training' if module.training else 'evaluation'} mode"
        for registry, before in self.registries.items():
            now = module.__dict__[registry]
            if len(now) != len(before) or any(now.get(name) is not value for name, value in before.items()):
                return f"{kind} has other {registry[1:]} than when the step was traced"
        for name, value in self.settings.items():
            if module.__dict__.get(name) != value:
                return f"{kind}.{name} changed from {value!r} to {module.__dict__.get(name)!r}"
        return ""


_PLAIN = frozenset((bool, int, float, str, type(None), tuple))


@dataclass(eq=False, slots=True)
class TracedStep:
    """A traced step: the program, and what has to be done around each run of it.

    Attributes:
        program: as traced, before any pass.
        state_blocks: storage of the program's states, in their order: (tensor, block).
        created: states that do not exist yet: (value, tensor, number to fill it with, how to forget it).
        n_results: how many of the program's results are the step's own; the rest go to ``receivers``.
        receivers: called with a number each after a run.
        results: the structure that the step returned.
        leaves: gradients: (tensor, the tensor that ``.grad`` is set to after each run or None).
        grad_guards: (tensor, ``.grad`` that it must have before a run).
        baked: (read, value it had): another value needs another trace.
        modules: what the modules that it called were like.
        flags: (tensor, whether it required gradients when the step began).
        created_keys: names of the created states that are the same in another trace of the same model.
    """

    program: Program
    state_blocks: list[tuple[Tensor, Any]]
    created: list[tuple[Value, Tensor, float, Callable[[], Any]]]
    n_results: int
    receivers: list[Callable[[Any], None]]
    results: Any
    leaves: list[tuple[Tensor, Tensor | None]]
    grad_guards: list[tuple[Tensor, Tensor | None]]
    baked: list[tuple[Callable[[], Any], Any]]
    modules: list[ModuleForm]
    flags: list[tuple[Tensor, bool]]
    created_keys: list[Any]

    def change(self) -> str:
        """How modules and tensors differ from those traced, or an empty string; ``context.modes`` says when to ask."""
        for form in self.modules:
            if found := form.change():
                return found
        for tensor, required in self.flags:
            if tensor._requires_grad is not required:
                return f"a tensor of shape {tensor.shape} {'no longer requires' if required else 'requires'} gradients"
        return ""

    def forget_created(self) -> None:
        """Undo the creation of states (the step was refused, or only planned)."""
        for _, _, _, forget in self.created:
            forget()


@dataclass(frozen=True, slots=True)
class Hole:
    """The place of one tensor in the structure that a step returned."""

    number: int


def is_hole(x: Any) -> bool:
    """True for the place of a tensor in ``TracedStep.results``."""
    return isinstance(x, Hole)
