"""Running a prepared program: kernels bound to fixed places in the arena once, then called one after another.

A run copies the arguments in, computes the host's numbers, calls the bound kernels and copies the results out. It
allocates nothing but the results that it hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from brim.backend import BoundKernel, ScalarCell
from brim.device import Device
from brim.memory.pool import Block
from brim.program.ir import STORE, HostScalar, Instruction, Ref, Value
from brim.program.lower import COPY, Prepared
from brim.spec import Spec
from brim.tensor import Tensor, empty

__all__ = ["Runner"]

_BYTES = np.dtype("u1")


class Runner:
    """A prepared program on a device with memory.

    Arguments:
        prepared: the program.
        device: where it runs.
        homes: memory of each state and constant of the program.
        receivers: called with a number each, the last of the program's results, as soon as it is known; one that
            raises ends the run there.
    """

    def __init__(
        self,
        prepared: Prepared,
        device: Device,
        homes: dict[Value, Block],
        receivers: Sequence[Callable[[Any], None]] = (),
    ) -> None:
        self.prepared, self.device, self.homes, self.receivers = prepared, device, homes, list(receivers)
        self._generation = -1
        self._calls: list[Callable[[], None]] = []
        self._inputs: list[Any] = []
        self._results: list[Tensor] = []  # but for the receivers' numbers
        self._scalars: list[tuple[ScalarCell, Callable[..., Any], tuple[Any, ...]]] = []
        self._copies: dict[Spec, BoundKernel] = {}  # by the spec of what is copied
        self.runs = 0

    # ---------------------------------------------------------------- binding

    def _bind(self, arena: Block) -> None:
        program, memory = self.prepared.program, self.prepared.memory
        view = self.device.backend.view
        cells: dict[int, ScalarCell] = {}
        self._scalars = []
        for scalar in program.scalars():
            cell = cells[id(scalar)] = ScalarCell()
            args = tuple(cells[id(a)] if isinstance(a, HostScalar) else a for a in scalar.args)
            self._scalars.append((cell, scalar.read, args))

        def place(value: Value) -> tuple[Block, int]:
            block = self.homes.get(value.home or value)
            if block is not None:
                return block, block.offset_bytes
            return arena, arena.offset_bytes + memory.offset_bytes(value)

        def array(ref: Ref) -> Any:
            block, start = place(ref.value)
            return view(block.buffer, start + ref.offset * ref.spec.dtype.itemsize, ref.spec)

        def operand(x: Any) -> Any:
            return array(x) if isinstance(x, Ref) else cells[id(x)] if isinstance(x, HostScalar) else x

        results = []
        for ref in program.results:
            block, start = place(ref.value)
            offset = (start - block.offset_bytes) // ref.spec.dtype.itemsize + ref.offset
            results.append(Tensor(ref.spec, self.device, block, offset))
        wanted = len(results) - len(self.receivers)
        self._results = results[:wanted]
        producers = program.producers()
        due: dict[int, list[Callable[[], None]]] = {}
        for ref, result, receive in zip(program.results[wanted:], results[wanted:], self.receivers, strict=True):
            at = producers.get(ref.value, len(program.instructions) - 1)
            due.setdefault(at, []).append(partial(_deliver, receive, result))

        if (load := getattr(self.device.backend, "load", None)) is not None:
            load(self.prepared.kernels)
        calls: list[Callable[[], None]] = []
        for number, (instruction, kernel) in enumerate(zip(program.instructions, self.prepared.kernels, strict=True)):
            scratch = None
            if kernel.scratch_bytes:
                start = arena.offset_bytes + memory.scratch_offset_bytes(number)
                scratch = view(arena.buffer, start, Spec((kernel.scratch_bytes,), _BYTES))
            if instruction.op is STORE:
                state, new = instruction.ins
                outs, ins = [array(state)], [array(new)]
            else:
                outs = [array(Ref.of(out)) for out in instruction.outs]
                ins = [operand(i) for i in instruction.ins]
            calls += _calls(kernel, instruction, outs, ins, scratch)
            calls += due.pop(number, ())
        calls += [call for late in due.values() for call in late]
        chained = getattr(self.device.backend, "chained", None)
        self._calls = calls if chained is None else chained(calls)
        self._inputs = [array(Ref.of(value)) for value in program.inputs]
        self._generation = self.device.memory.arena.generation
        self.device.memory.arena.tenants.add(self)

    # ---------------------------------------------------------------- running

    def run(self, arguments: Sequence[Any], copy: bool) -> list[Tensor]:
        """One run; returns the results but for the receivers' numbers.

        Arguments:
            arguments: a tensor or NumPy array for each input, of its shape and dtype.
            copy: hand out copies; otherwise tensors whose elements last until the next run on the device.
        """
        arena = self.device.memory.arena
        backend = self.device.backend
        with arena.lock:
            block = arena.reserve(self.prepared.memory.arena_bytes)
            if self._generation != arena.generation:
                with backend.running(self.device.index):
                    self._bind(block)
            if arena.lent:
                arguments = [_apart(given, block) for given in arguments]
            for target, given in zip(self._inputs, arguments, strict=True):
                if type(given) is Tensor or isinstance(given, Tensor):
                    if given.device is not self.device:
                        given = given.detach().numpy()
                    else:
                        self._copy(target, given)
                        continue
                backend.upload(target, given)
            for cell, read, args in self._scalars:
                cell.value = read(*[a.value if type(a) is ScalarCell else a for a in args]) if args else read()
            with backend.running(self.device.index):
                for call in self._calls:
                    call()
            self.runs += 1
            arena.lent = arena.lent or not copy
            return [self._copied(result) for result in self._results] if copy else list(self._results)

    def _copied(self, result: Tensor) -> Tensor:
        made = empty(result.shape, dtype=result.dtype, device=self.device, op="copy")
        self._copy(made.array, result)
        return made

    def _copy(self, target: Any, given: Tensor) -> None:
        """Copy a tensor of this device into an array of its shape, with nothing to be worked out a second time."""
        if self.device.backend.shares_host_memory:
            self.device.backend.upload(target, given.array)
            return
        kernel = self._copies.get(given.spec)
        if kernel is None:
            kernel = self.device.backend.bind(COPY, [given.spec], [Spec(given.shape, given.dtype)], {})
            self._copies[given.spec] = kernel
        with self.device.backend.running(self.device.index):
            kernel.run(target, given.array)

    def launched(self) -> list[str]:
        """A line for each group of calls that the backend joined and has something to say about."""
        return [call.describe() for call in self._calls if hasattr(call, "describe")]

    def release(self) -> None:
        """Drop every array over the arena and the states."""
        self._calls, self._inputs, self._results, self._scalars = [], [], [], []
        self._generation = -1


def _apart(given: Any, arena: Block) -> Any:
    """The argument, or a copy of it where it lies in the arena: an earlier result, where inputs may be written now."""
    if isinstance(given, Tensor):
        return given.copy() if given._block is arena else given
    shared = isinstance(arena.buffer, np.ndarray) and np.may_share_memory(given, arena.buffer)
    return given.copy() if shared else given


def _deliver(receive: Callable[[Any], None], result: Tensor) -> None:
    receive(result.item())


def _calls(
    kernel: BoundKernel, instruction: Instruction, outs: list[Any], ins: list[Any], scratch: Any
) -> list[Callable[[], None]]:
    """Calls without arguments that run one instruction."""
    params = instruction.params
    out = outs[0] if len(outs) == 1 else tuple(outs)
    if kernel.prepare is not None:
        prepared = kernel.prepare(out, *ins, scratch=scratch, **params)
        if prepared is not None:
            return list(prepared)
    cells = [(position, operand) for position, operand in enumerate(ins) if type(operand) is ScalarCell]
    if not cells:
        return [partial(kernel.run, out, *ins, scratch=scratch, **params)]
    run, arguments = kernel.run, list(ins)

    def call() -> None:
        for position, cell in cells:
            arguments[position] = cell.value
        run(out, *arguments, scratch=scratch, **params)

    return [call]
