"""``brim.compile`` and ``brim.plan``: a step is traced once for each kind of arguments, planned, admitted, replayed."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter, is_
from typing import Any

import numpy as np

from brim.autocast import numerics, restored
from brim.context import context, modes
from brim.device import META, Device, default_device, process_default
from brim.device import device as find_device
from brim.errors import TraceError
from brim.memory.budget import BudgetLike
from brim.memory.guard import give_back_on_refusal
from brim.memory.pool import Block
from brim.program.admit import refusal, staged_where_it_fits
from brim.program.fit import choose_recomputation, describe, remedies
from brim.program.ir import Program, Value
from brim.program.lower import Bound, Pass, Prepared, arena_bytes, prepare, scratch_bytes
from brim.program.options import NO_OPTIONS, Options, option_passes
from brim.program.passes import default_passes
from brim.program.passes.exact_convolutions import exact_convolutions
from brim.program.passes.recompute import matcher
from brim.program.pause import collector_paused
from brim.program.plan import Plan, PlannedProgram, residents_of
from brim.program.profiles import ProfileDevice, profile_facts
from brim.program.run import Runner
from brim.program.trace import MetaState, is_argument, trace
from brim.program.traced import TracedStep, is_hole
from brim.program.tree import rebuild, take_apart
from brim.spec import Spec, as_dtype, as_shape, default_float
from brim.tensor import Tensor

__all__ = ["EXACT_TO_FIT", "CompiledStep", "compile", "leaner", "plan", "spec"]

_BLOCK, _GRADIENT = attrgetter("_block"), attrgetter("_grad")
_KEPT_PROGRAMS = 16
_KEPT_LINES = 100
_FETCHED_BYTES = 2**20  # larger results are not worth pinned memory of their own


def spec(shape: Any, dtype: Any = default_float) -> Spec:
    """The shape and dtype of an argument that need not exist, for ``brim.plan``.

    Arguments:
        shape: an int or a sequence of ints.
        dtype: dtype or its name; float32 by default.
    """
    return Spec(as_shape(shape), as_dtype(dtype))


def _argument_spec(argument: Any) -> tuple[Spec, bool]:
    if isinstance(argument, Spec):
        return Spec(argument.shape, argument.dtype), False
    return Spec(tuple(argument.shape), as_dtype(argument.dtype)), bool(getattr(argument, "requires_grad", False))


def _from_host(argument: Any, device: Device) -> bool:
    """Whether an argument, or what a spec stands for, is copied to a device from the host."""
    return isinstance(argument, Spec | np.ndarray) or (isinstance(argument, Tensor) and argument.device is not device)


def trace_step(
    fn: Callable[..., Any], arguments: Any, specs: Sequence[tuple[Spec, bool]], target: Device
) -> tuple[TracedStep, bool]:
    """Trace on the target device, or on the meta device when the model's tensors are there; tells which."""
    place = target.stands_on if isinstance(target, ProfileDevice) else target
    try:
        return trace(fn, arguments, specs, place, target), False
    except MetaState:
        return trace(fn, arguments, specs, find_device(META), target), True


def planned(
    name: str,
    traced: TracedStep,
    prepared: Prepared,
    on_meta: bool,
    lower: Callable[[Program, Options], Prepared] | None = None,
    options: Options = NO_OPTIONS,
) -> PlannedProgram:
    """The entry of a plan for one traced step, prepared with ``options``; ``lower`` plans it with others."""
    program = traced.program
    refs: list[tuple[Any, Value, bool]] = [
        (id(block), value, not on_meta) for value, (_, block) in zip(program.states, traced.state_blocks, strict=False)
    ]
    refs += [(key, value, False) for key, (value, *_) in zip(traced.created_keys, traced.created, strict=True)]
    refs += [(id(host), value, False) for value, host in program.constants.items()]
    residents = residents_of(refs, prepared.alignment_bytes)
    return PlannedProgram(name, prepared, residents, traced.n_results, program, lower, options)


EXACT_TO_FIT = "convolutions are computed exactly: the working memory of the fast algorithm does not fit the budget"


def leaner(options: Options, program: Program) -> list[Options]:
    """The options, and where convolutions take working memory for speed, those without it."""
    exact = replace(options, exact_convolutions=True)
    return [options, exact] if exact != options and exact_convolutions(program) is not program else [options]


def _check_layers(names: Sequence[str], program: Program) -> None:
    layers = dict.fromkeys(i.layer for i in program.instructions if i.phase == "forward" and i.layer)
    for name in names:
        if layers and not any(map(matcher(name), layers)):  # a step without layers, such as an update, is let pass
            known = ", ".join(list(layers)[:12])
            raise ValueError(f"recompute names {name!r}, but the step runs no such layer; it runs {known}")


class _Compiled:
    """One traced and planned version of a step, and its runner once it was admitted."""

    def __init__(self, traced: TracedStep, plan: Plan, runner: Runner, device: Device) -> None:
        self.traced, self.plan, self.runner, self.device = traced, plan, runner, device
        self.modes_seen = modes.changes
        # What each replay compares, as lists.
        self.states, self.blocks = [t for t, _ in traced.state_blocks], [block for _, block in traced.state_blocks]
        self.guarded, self.entries = [t for t, _ in traced.grad_guards], [entry for _, entry in traced.grad_guards]

    def why_not(self) -> str:
        """Why this version does not describe the step any more, or an empty string."""
        traced = self.traced
        if self.modes_seen != modes.changes:
            if found := traced.change():
                return found
            self.modes_seen = modes.changes
        if not all(map(is_, map(_BLOCK, self.states), self.blocks)):
            tensor = next(t for t, block in traced.state_blocks if t._block is not block)
            return f"a tensor of shape {tensor.shape} that the step uses was moved to other memory"
        if not all(map(is_, map(_GRADIENT, self.guarded), self.entries)):
            tensor, entry = next((t, entry) for t, entry in traced.grad_guards if t._grad is not entry)
            had = "had no gradient" if entry is None else "had a gradient to add to"
            return f"a parameter of shape {tensor.shape} {had} when the step was traced, and now it is different"
        for read, value in traced.baked:
            if read() != value:
                return f"a setting that the step depends on changed from {value!r} to {read()!r}"
        return ""

    def run(self, leaves: Sequence[Any], copy: bool) -> Any:
        traced = self.traced
        tensors = self.runner.run(leaves, copy)
        for tensor, after in traced.leaves:
            tensor._grad = after
        return rebuild(traced.results, is_hole, tensors)


class CompiledStep:
    """A step that is traced and planned at its first call with certain shapes, and replayed from then on.

    Calling it does what the plain function does, without allocating anything but its results. Arguments that are
    tensors or NumPy arrays are inputs; anything else among them is part of the program. See ``brim.compile``.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        budget: BudgetLike | None = None,
        passes: Sequence[Pass] | None = None,
        device: Any = None,
        copy: bool = True,
        name: str | None = None,
        recompute: Sequence[str] = (),
        activations: str | None = None,
        exact_convolutions: bool = False,
        fit: str | None = None,
        report: Callable[[str], Any] = print,
    ) -> None:
        if isinstance(recompute, str):
            recompute = (recompute,)
        if activations not in (None, "bfloat16"):
            raise ValueError(f"activations is 'bfloat16' or None (kept as they are), got {activations!r}")
        if fit not in (None, "recompute"):
            raise ValueError(f"fit is 'recompute' or None (refuse), got {fit!r}; the Trainer has 'microbatch', too")
        self.fn, self.budget, self.device = fn, budget, device
        self.passes, self.copy, self.fit, self.report = passes, copy, fit, report
        self.options = Options(tuple(recompute), activations, exact_convolutions)
        self.name = str(name or getattr(fn, "__name__", type(fn).__name__))
        self._versions: OrderedDict[Any, list[_Compiled]] = OrderedDict()
        self._history: list[str] = []
        self._ran: Runner | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step.

        Raises:
            BudgetExceeded: it does not fit the budget; nothing was run or allocated.
            TraceError: it cannot be planned; the message names the line and the way out.
        """
        if context.interpreter is not None:
            return self.fn(*args, **kwargs)
        if not kwargs and all(map(is_argument, args)):
            leaves, structure = list(args), len(args)
        else:
            leaves, structure = take_apart((args, kwargs), is_argument)
        key = (structure, *[(a.shape, a.dtype, getattr(a, "requires_grad", False)) for a in leaves])
        versions = self._versions.get(key)
        reason = ""
        if versions is not None:
            for compiled in versions:
                reason = compiled.why_not()
                if not reason:
                    self._ran = compiled.runner
                    return compiled.run(leaves, self.copy)
        with give_back_on_refusal():
            compiled = self._compile((args, kwargs), leaves)
        self._remember(key, compiled, leaves, reason)
        self._ran = compiled.runner
        return compiled.run(leaves, self.copy)

    def _target(self, leaves: Sequence[Any]) -> Device:
        if self.device is not None:
            return find_device(self.device)
        found = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), default_device())
        return found if not found.is_meta else process_default()

    def _lower(self, device: Device, check: bool) -> Callable[[Program, Options], Prepared]:
        """What prepares a traced program: the rewrites that options ask for, then the usual passes."""
        backend, passes = device.backend, self.passes  # not self, which a plan that the step keeps must not keep

        def lower(program: Program, options: Options) -> Prepared:
            bound: Bound = {}
            costs = [partial(one, backend=backend, bound=bound) for one in (arena_bytes, scratch_bytes)]
            usual = default_passes(backend, *costs) if passes is None else passes
            known = () if getattr(backend, "knows_fast_convolutions", False) else (exact_convolutions,)
            return prepare(program, backend, (*known, *option_passes(options), *usual), check=check, bound=bound)

        return lower

    def _entry(
        self, traced: TracedStep, on_meta: bool, device: Device, options: Options, check: bool = True
    ) -> PlannedProgram:
        _check_layers(options.recompute, traced.program)
        prepared = self._lower(device, check)(traced.program, options)
        # Variants of the step are only compared; what is going to run is verified.
        entry = planned(self.name, traced, prepared, on_meta, self._lower(device, False), options)
        entry.n_results = entry.n_results if self.copy else 0  # only copies take memory of their own
        return entry

    def _plan_of(
        self,
        entry: PlannedProgram,
        arguments: Any,
        leaves: Sequence[Any],
        device: Device,
        options: Options,
        own: bool = False,
    ) -> Plan:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        entry.host_inputs = [_from_host(leaf, device) for leaf in leaves]
        replan = self._replan(arguments, leaves, own)
        facts = profile_facts(device)
        return Plan([entry], device.name, self.name, self.budget, replan, shapes, options=options, **facts)

    @collector_paused()
    def _compile(self, arguments: Any, leaves: Sequence[Any], options: Options | None = None) -> _Compiled:
        """A version for these arguments. ``options`` are given where a search has found what fits."""
        device = self._target(leaves)
        with device.memory.arena.lock:  # one thread traces at a time: a trace makes the optimizer's state
            return self._compile_on(device, arguments, leaves, options)

    def _compile_on(self, device: Device, arguments: Any, leaves: Sequence[Any], options: Options | None) -> _Compiled:
        specs = [_argument_spec(leaf) for leaf in leaves]
        traced, on_meta = trace_step(self.fn, arguments, specs, device)
        if on_meta:
            traced.forget_created()
            raise TraceError(
                f"{self.name} uses tensors on the meta device, which have shapes and no values: it can be planned with "
                f"brim.plan, not run; build the model outside brim.meta() or on device={str(device)!r}"
            )
        try:
            refused = None
            for used in leaner(options or self.options, traced.program):
                entry = self._entry(traced, on_meta, device, used)
                made = self._plan_of(entry, arguments, leaves, device, used, own=True)
                if (why := refusal(made, device, self.budget)) is None:
                    if refused is not None:
                        self._history.append(EXACT_TO_FIT)
                    refused = None
                    made = staged_where_it_fits(made, device, self.budget)
                    homes = _commit(traced, device)
                    break
                refused = refused or why
        except BaseException:
            traced.forget_created()
            raise
        if refused is None:
            fetched_bytes = 0 if self.copy else _FETCHED_BYTES
            runner = Runner(entry.prepared, device, homes, traced.receivers, made.staged_bytes, fetched_bytes)
            return _Compiled(traced, made, runner, device)
        traced.forget_created()  # before other variants of the step are traced
        del traced
        most_bytes = refused.most_bytes
        if self.fit == "recompute" and options is None and most_bytes is not None:
            choice = choose_recomputation(made, most_bytes, refused.needed)
            if choice is not None and choice.fits:
                self.report(describe(self.name, choice, most_bytes))
                return self._compile(arguments, leaves, replace(self.options, recompute=choice.layers))
        raise refused.error(remedies)

    def _replan(self, arguments: Any, leaves: Sequence[Any], own: bool) -> Callable[[list[tuple[int, ...]]], Plan]:
        # A plan that the step keeps must not keep the step, or its memory would wait for the garbage collector.
        step: Callable[[], CompiledStep | None] = weakref.ref(self) if own else lambda: self
        specs = [_argument_spec(leaf)[0] for leaf in leaves]
        shell = rebuild(arguments, is_argument, specs)
        state = numerics()

        def replan(shapes: list[tuple[int, ...]]) -> Plan:
            others = [Spec(shape, one.dtype) for shape, one in zip(shapes, specs, strict=True)]
            args, kwargs = rebuild(shell, is_argument, others)
            if (found := step()) is None:
                raise ValueError("the step of this plan is gone: plan it anew with brim.plan")
            with restored(state):
                return found._plan(args, kwargs, False)

        return replan

    def _remember(self, key: Any, compiled: _Compiled, leaves: Sequence[Any], reason: str) -> None:
        shapes = ", ".join(f"{leaf.dtype}[{'x'.join(map(str, leaf.shape))}]" for leaf in leaves)
        why = reason or ("first call" if not self._versions else "arguments of new shapes, dtypes or values")
        self._history.append(f"traced for ({shapes}): {why}")
        del self._history[:-_KEPT_LINES]
        versions = self._versions.setdefault(key, [])
        versions.insert(0, compiled)
        self._versions.move_to_end(key)
        del versions[4:]
        while sum(map(len, self._versions.values())) > _KEPT_PROGRAMS:
            _, dropped = self._versions.popitem(last=False)
            self._history.append(f"forgot {len(dropped)} programs: more than {_KEPT_PROGRAMS} are not kept")

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for arguments like these (tensors, arrays, or ``brim.spec``); nothing is run or allocated."""
        return self._plan(args, kwargs, True)

    @collector_paused()
    def _plan(self, args: Any, kwargs: Any, check: bool) -> Plan:
        leaves, _ = take_apart((args, kwargs), is_argument)
        device = self._target(leaves)
        traced, on_meta = trace_step(self.fn, (args, kwargs), [_argument_spec(leaf) for leaf in leaves], device)
        try:
            entry = self._entry(traced, on_meta, device, self.options, check)
        finally:
            traced.forget_created()
        return self._plan_of(entry, (args, kwargs), leaves, device, self.options)

    def on_host(self, result: Tensor) -> Any:
        """A result of the latest call, with ``copy=False``, as a NumPy array: see ``Runner.on_host``."""
        return result.detach().numpy() if self._ran is None else self._ran.on_host(result)

    def program(self) -> Program:
        """The program of the latest version, after all passes; ``print`` shows one line an instruction."""
        return self._latest().runner.prepared.program

    def current_plan(self) -> Plan:
        """The plan of the latest version."""
        return self._latest().plan

    def _latest(self) -> _Compiled:
        if not self._versions:
            raise TraceError(f"{self.name} has not been called yet, so there is no program; call it, or use plan()")
        return next(reversed(self._versions.values()))[0]

    def explain(self) -> str:
        """Why there are the programs that there are, how the latest one is launched, and what it moves.

        Returns:
            one line for each trace; lines about launches, where there is something to say; a line with the kernels and
            bytes of a run against the least possible, and one for each phase. ``current_plan().traffic()`` tells more.
        """
        if not self._versions:
            return "\n".join(self._history) or "not called yet"
        latest = self._latest()
        return "\n".join([*self._history, *latest.runner.launched(), *latest.plan.traffic().lines()])


def _commit(traced: TracedStep, device: Device) -> dict[Value, Block]:
    """Make the states that do not exist yet, upload the constants; memory of all values that live outside the arena."""
    homes: dict[Value, Block] = {}
    for value, (_, block) in zip(traced.program.states, traced.state_blocks, strict=False):
        homes[value] = block
    for value, tensor, number, _ in traced.created:
        block = device.memory.allocate(value.nbytes, value.category, value.op, value.spec)
        block.recategorise(value.category, value.layer)
        tensor._block, tensor._array, tensor.device = block, None, device
        tensor.fill_(number)
        homes[value] = block
    for value, host in traced.program.constants.items():
        block = device.memory.allocate(value.nbytes, value.category, "constant", value.spec)
        device.backend.upload(device.backend.view(block.buffer, block.offset_bytes, value.spec), np.asarray(host))
        homes[value] = block
    return homes


def compile(
    fn: Callable[..., Any],
    *,
    budget: BudgetLike | None = None,
    passes: Sequence[Pass] | None = None,
    device: Any = None,
    copy: bool = True,
    recompute: Sequence[str] = (),
    activations: str | None = None,
    fit: str | None = None,
) -> CompiledStep:
    """A planned version of a step: traced once for each kind of arguments, then replayed.

    The step is ordinary eager code: forward, backward, optimizer update. Its tensors and NumPy arrays among the
    arguments are inputs; every tensor that existed before and is used in it is state and is updated in place. Other
    Python side effects (printing, counting, appending to lists) happen only when it is traced.

    Arguments:
        fn: the step, or a model in evaluation mode.
        budget: the most memory that the device may hold while it runs; the device's budget when None.
        passes: functions from Program to Program to run instead of the usual ones (``brim.program.passes``).
        device: where it runs; by default where its tensor arguments are.
        copy: hand out copies of the results; False hands out tensors that last until the next run.
        recompute: layers, by their dotted paths, whose activations are not kept for the backward pass but computed
            again ("stage1.block0"; "stage1.0..3" takes four layers as one block, "stage1.*" each of stage1's by itself;
            ":elementwise" is whatever a few elementwise operations make again). Results are the same to the last bit.
        activations: "bfloat16" keeps what the backward pass needs in half the memory; gradients are then less precise.
        fit: "recompute" chooses layers to recompute when the step does not fit, prints them, and runs; None refuses.
    """
    return CompiledStep(
        fn,
        budget=budget,
        passes=passes,
        device=device,
        copy=copy,
        recompute=recompute,
        activations=activations,
        fit=fit,
    )


def plan(
    fn: Callable[..., Any],
    *args: Any,
    device: Any = None,
    budget: BudgetLike | None = None,
    device_profile: str | None = None,
    **kwargs: Any,
) -> Plan:
    """What a step will need, before anything is allocated or run.

    Arguments:
        fn: the step, a compiled step, or a model.
        args, kwargs: its arguments; ``brim.spec(shape, dtype)`` stands for a tensor that need not exist.
        device: device to plan for; the default device when None.
        budget: recorded in the plan for its reports.
        device_profile: plan for this card instead (``brim.program.profiles.PROFILES``); everything is estimated then.

    Raises:
        TraceError: the step cannot be planned; the message names the line and the way out.
    """
    if device_profile is not None:
        if isinstance(fn, CompiledStep):
            base, options = fn._target([]), fn.options
            place = ProfileDevice(device_profile, base)
            fn = CompiledStep(fn.fn, passes=fn.passes, device=place, copy=fn.copy, name=fn.name, **asdict(options))
        else:
            base = find_device(device)
            device = ProfileDevice(device_profile, process_default() if base.is_meta else base)
    step = fn if isinstance(fn, CompiledStep) else CompiledStep(fn, budget=budget, device=device)
    return step.plan(*args, **kwargs)
