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
from brim.errors import BudgetExceeded
from brim.gathered import Gathered
from brim.memory.pool import Block
from brim.program.feeding import Feeding
from brim.program.ir import STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.lower import COPY, Prepared
from brim.spec import Spec, is_float
from brim.tensor import Tensor, empty

__all__ = ["Runner"]

_BYTES = np.dtype("u1")


class Runner:
    """A prepared program on a device with memory.

    Arguments:
        prepared: the program.
        device: where it runs.
        homes: memory of each state and constant of the program.
        receivers: called with a number each, the last of the program's results, before anything that comes later
            changes a state; one that raises ends the run there. Where the device computes by itself (a backend with
            ``fetcher``), what comes before that change is launched first, and the number is waited for only then.
        staged_bytes: size of the second set of input buffers, in which inputs arrive while the run before computes;
            0 for none.
        fetched_bytes: results of at most so many bytes are on their way to the host with the receivers' numbers, where
            they are known by then: see ``on_host``.
    """

    def __init__(
        self,
        prepared: Prepared,
        device: Device,
        homes: dict[Value, Block],
        receivers: Sequence[Callable[[Any], None]] = (),
        staged_bytes: int = 0,
        fetched_bytes: int = 0,
    ) -> None:
        self.prepared, self.device, self.homes, self.receivers = prepared, device, homes, list(receivers)
        self._generation = -1
        self._calls: list[Callable[[], None]] = []
        self._inputs: list[Any] = []
        self._results: list[Tensor] = []  # but for the receivers' numbers
        self._scalars: list[tuple[ScalarCell, Callable[..., Any], tuple[ScalarCell, ...]]] = []
        self._copies: dict[Spec, BoundKernel] = {}  # by the spec of what is copied
        self.runs = 0
        self.feeding, self.fetched_bytes = Feeding(device, staged_bytes), fetched_bytes
        self._fetches: dict[int, Any] = {}  # by id of a result

    # ---------------------------------------------------------------- binding

    def _bind(self, arena: Block) -> None:
        program, memory = self.prepared.program, self.prepared.memory
        view = self.device.backend.view
        cells: dict[int, ScalarCell] = {}
        self._scalars = []
        for scalar in program.scalars():
            cell = cells[id(scalar)] = ScalarCell()
            args = tuple(cells[id(a)] if isinstance(a, HostScalar) else ScalarCell(a) for a in scalar.args)
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
        self._fetches = {}
        wanted = len(results) - len(self.receivers)
        self._results = results[:wanted]
        producers = program.producers()
        due: dict[int, list[Callable[[], None]]] = {}
        fetcher = getattr(self.device.backend, "fetcher", None)
        for ref, result, receive in zip(program.results[wanted:], results[wanted:], self.receivers, strict=True):
            at = producers.get(ref.value, len(program.instructions) - 1)
            if fetcher is None:
                due.setdefault(at, []).append(partial(_deliver, receive, result))
                continue
            fetch = fetcher(result.array)
            due.setdefault(at, []).append(fetch.start)
            due.setdefault(_last_before_change(program, at), []).append(partial(_deliver_fetched, receive, fetch))
        if fetcher is not None and due:  # other results that are there by then are on their way, too
            at = max(producers.get(ref.value, -1) for ref in program.results[wanted:])
            for ref, result in zip(program.results[:wanted], self._results, strict=True):
                is_small = 0 < result.nbytes <= self.fetched_bytes and ref.spec.contiguous
                if is_small and producers.get(ref.value, at + 1) <= at:
                    fetch = self._fetches[id(result)] = fetcher(result.array)
                    due[at].insert(0, fetch.start)

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
            arguments: a tensor, a NumPy array or rows to gather for each input, of its shape and dtype.
            copy: hand out copies; otherwise tensors whose elements last until the next run on the device.
        """
        arena = self.device.memory.arena
        backend = self.device.backend
        with arena.lock:
            try:
                block = arena.reserve(self.prepared.memory.arena_bytes)
            except BudgetExceeded:
                if not self.device.memory.stage.nbytes:
                    raise
                self.device.memory.stage.release()  # no step is refused for its sake
                block = arena.reserve(self.prepared.memory.arena_bytes)
            if self._generation != arena.generation:
                with backend.running(self.device.index):
                    self._bind(block)
            if arena.lent:
                arguments = [_apart(given, block) for given in arguments]
            fed = []
            for target, given in zip(self._inputs, arguments, strict=True):
                if type(given) is Tensor or isinstance(given, Tensor):
                    if given.device is not self.device:
                        given = given.detach().numpy()
                    else:
                        self._copy(target, given)
                        continue
                elif type(given) is Gathered:
                    if given.device is self.device:
                        given.write_into(target)
                        continue
                    given = given.numpy()
                if self.feeding.later:
                    fed.append((target, given))
                else:
                    backend.upload(target, given)
            if fed:
                self.feeding.put(fed)
            for cell, read, args in self._scalars:  # an optimizer has several for each parameter
                if not args:
                    cell.value = read()
                elif len(args) == 1:
                    cell.value = read(args[0].value)
                else:
                    cell.value = read(*[one.value for one in args])
            with backend.running(self.device.index):
                for call in self._calls:
                    call()
            self.runs += 1
            arena.lent = arena.lent or not copy
            return [self._copied(result) for result in self._results] if copy else list(self._results)

    def on_host(self, result: Tensor) -> Any:
        """A result of the latest run, not a copy of one, as a NumPy array; waits for no more than it must."""
        fetch = self._fetches.get(id(result))
        return result.detach().numpy() if fetch is None else fetch.value()

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
        """A line on how inputs arrive, where the host does not wait for that, and one for each group of calls that the
        backend joined and has something to say about."""
        lines = self.feeding.describe() if self.prepared.program.inputs else []
        return [*lines, *[call.describe() for call in self._calls if hasattr(call, "describe")]]

    def release(self) -> None:
        """Drop every array over the arena and the states."""
        self._calls, self._inputs, self._results, self._scalars, self._fetches = [], [], [], [], {}
        self.feeding.release()
        self._generation = -1


def _apart(given: Any, arena: Block) -> Any:
    """The argument, or a copy of it where it lies in the arena: an earlier result, where inputs may be written now."""
    if isinstance(given, Tensor):
        return given.copy() if given._block is arena else given
    if isinstance(given, Gathered):
        return given
    shared = isinstance(arena.buffer, np.ndarray) and np.may_share_memory(given, arena.buffer)
    return given.copy() if shared else given


def _deliver(receive: Callable[[Any], None], result: Tensor) -> None:
    receive(result.item())


def _deliver_fetched(receive: Callable[[Any], None], fetch: Any) -> None:
    value = fetch.value()
    number = value.item()
    receive(float(number) if is_float(value.dtype) else number)


def _last_before_change(program: Program, at: int) -> int:
    """The last instruction from ``at`` on before one that writes to a state; the program's last where there is none."""
    for number in range(at + 1, len(program.instructions)):
        instruction = program.instructions[number]
        if instruction.op is STORE or any(out.home is not None for out in instruction.outs):
            return number - 1
    return len(program.instructions) - 1


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
