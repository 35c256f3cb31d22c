"""A small interpreter for tests: runs a step op by op, records it, and runs the record again. Plans nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from brim.context import context
from brim.eager import Eager
from brim.errors import TraceError
from brim.program.ir import HostScalar
from brim.tensor import Tensor, empty, from_host


class Recorder:
    """Records what happens inside ``with recorder.recording():``, which is the first run; ``replay()`` is each other.

    Attributes:
        ops: (op, phase, layer) in order.
        baked_values: (read, value) in order.
        modules: those that were called.
        forgets: undoes the creation of each new state.
    """

    def __init__(self) -> None:
        self.ops: list[tuple[str, str, str]] = []
        self.baked_values: list[tuple[Callable[[], Any], Any]] = []
        self.modules: list[Any] = []
        self.forgets: list[Callable[[], Any]] = []
        self._eager = Eager()
        self._tape: list[tuple[Any, ...]] = []
        self._reads: list[HostScalar] = []
        self._known: dict[HostScalar, Any] = {}
        self._receivers: list[tuple[Tensor, Callable[[Any], None]]] = []
        self._moved: dict[Any, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        context.interpreter = self
        try:
            yield
        finally:
            context.interpreter = None
        self._deliver()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        context.interpreter = None
        try:
            yield
        finally:
            context.interpreter = self

    def replay(self) -> None:
        """Run the recorded operations again, with the host's numbers of now."""
        self._known, self._moved = {}, {}
        for read in self._reads:
            self._known[read] = read.read()
        for op, args, params, out, outputs in self._tape:
            made = self._eager.apply(op, self._now(args), params, self._now(out))
            for old, new in zip(_tuple(outputs), _tuple(made), strict=True):
                self._moved[old._block] = new._block
        self._deliver()

    def stale(self) -> bool:
        """True when a value that decides what the step does has changed."""
        return any(read() != value for read, value in self.baked_values)

    def _deliver(self) -> None:
        for tensor, receive in self._receivers:
            receive(self._now(tensor).item())

    def _now(self, arg: Any) -> Any:
        if isinstance(arg, HostScalar):
            if arg not in self._known:
                self._known[arg] = arg.read(*(self._now(a) for a in arg.args))
            return self._known[arg]
        if isinstance(arg, Tensor):
            block = self._moved.get(arg._block)
            return arg if block is None else Tensor(arg.spec, arg.device, block, arg.offset)
        return type(arg)(self._now(a) for a in arg) if isinstance(arg, list | tuple) else arg

    # ---------------------------------------------------------------- what an interpreter does

    def apply(self, op: Any, args: Any, params: dict[str, Any], out: Any) -> Any:
        with self._paused():
            outputs = self._eager.apply(op, self._now(args), params, out)
        self._tape.append((op, args, params, out, outputs))
        self.ops.append((op.name, context.phase, context.layer))
        return outputs

    def empty(self, spec: Any, place: Any, op: str) -> Tensor:
        with self._paused():
            return empty(spec.shape, dtype=spec.dtype, device=place, op=op)

    def constant(self, host: Any, place: Any, category: str) -> Tensor:
        with self._paused():
            return from_host(host, place, category)

    def host_scalars(self, read: Callable[[], Any], kinds: tuple[type, ...]) -> tuple[HostScalar, ...]:
        whole = HostScalar(read, tuple)
        self._reads.append(whole)
        self._known[whole] = found = read()
        assert len(found) == len(kinds)
        assert all(type(number) is kind for number, kind in zip(found, kinds, strict=True))
        return tuple(HostScalar(lambda t, i=i: t[i], kind, (whole,)) for i, kind in enumerate(kinds))

    def baked(self, read: Callable[[], Any]) -> Any:
        self.baked_values.append((read, read()))
        return self.baked_values[-1][1]

    def after_step(self, tensor: Tensor, receive: Callable[[Any], None]) -> None:
        self._receivers.append((tensor, receive))

    def new_state(self, like: Tensor, value: float, category: str, forget: Callable[[], Any]) -> Tensor:
        self.forgets.append(forget)
        with self._paused():
            return empty(like.shape, dtype=like.dtype, device=like.device).book_as(category).write(value)

    def note_module(self, module: Any) -> None:
        self.modules.append(module)

    def note_flag(self, tensor: Tensor) -> None:
        """Tensors keep their flags here."""

    def note_gradient(self, tensor: Tensor, event: str | None) -> None:
        """Gradients are real tensors here: nothing to note."""

    def refuse_read(self, tensor: Tensor) -> None:
        raise TraceError(f"read of {tensor.shape}")

    def refuse_move(self, tensor: Tensor, place: Any) -> None:
        raise TraceError(f"move to {place}")


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
