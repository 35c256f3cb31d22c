"""The section "memory": planned against held memory, budgets that are kept, refusals that leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from brim.check.compare import Mismatch
from brim.check.long_run import LongRun, check_long_run
from brim.check.networks import CHOSEN, compiled, make
from brim.check.pair import check_coexistence, check_shared_refusal
from brim.check.place import on, settle
from brim.check.result import Check, Finding, Skip
from brim.check.sampling import process_bytes
from brim.check.training import QUICK
from brim.creation import zeros
from brim.device import Device
from brim.errors import BudgetExceeded
from brim.program.admit import needed_bytes
from brim.program.compile import CompiledStep, spec
from brim.program.compile import compile as compile_step
from brim.program.plan import Plan
from brim.random import get_state
from brim.units import format_bytes

__all__ = ["checks"]

MIB = 2**20

OVERHEAD_BYTES = 32 * MIB
"""By how much the driver's count may be above brim's: kernels that were loaded after the device was started."""

QUICK_STEPS = 30


def checks(
    device: Device, quick: bool = False, names: Sequence[str] | None = None, long_run: LongRun | None = None
) -> Iterator[Check]:
    """The checks of the section.

    Arguments:
        device: where.
        quick: four networks, a shorter run, no other processes.
        names: which networks of ``NETWORKS``.
        long_run: size of the run within a budget.
    """
    chosen = names or (QUICK if quick else CHOSEN)
    run = long_run or (LongRun(steps=QUICK_STEPS) if quick else LongRun())
    for name in chosen:
        yield Check("memory", "", f"{name}, planned = held", partial(check_peak, name, device))
    yield Check("memory", "", f"{run.steps} steps within a budget", partial(check_long_run, device, run))
    for name in ("mlp", "transformer"):
        if name in chosen:
            yield Check("memory", "", f"{name}, a refused step", partial(check_refusal, name, device))
    yield Check("memory", "", "a refused tensor", partial(check_eager_refusal, device))
    yield Check("memory", "", "overhead", partial(check_overhead, device))
    if not quick:
        yield Check("memory", "", "two processes side by side", partial(check_coexistence, device))
        yield Check("memory", "", "two processes, too much together", partial(check_shared_refusal, device))


# ---------------------------------------------------------------- planned and held


def check_peak(name: str, device: Device) -> Finding:
    """What a network's steps hold at most is what was planned before they ran, to the byte, and all is given back.

    Raises:
        Mismatch: with both numbers.
    """
    before_bytes = settle(device)
    with on(device):
        planned_bytes, held_bytes, planning_bytes = _planned_and_held(name, device, before_bytes)
    after_bytes = settle(device)
    figures = {"planned_bytes": planned_bytes, "held_bytes": held_bytes, "left_bytes": after_bytes - before_bytes}
    if planning_bytes:
        raise Mismatch(f"planning alone took {_exact(planning_bytes)}")
    if held_bytes != planned_bytes:
        raise Mismatch(f"planned {_exact(planned_bytes)}, but held {_exact(held_bytes)}")
    if after_bytes != before_bytes:
        raise Mismatch(f"{_exact(after_bytes - before_bytes)} are still held when the network is gone")
    return Finding(f"{_exact(planned_bytes)} planned and held", figures=figures)


def _planned_and_held(name: str, device: Device, before_bytes: int) -> tuple[int, int, int]:
    memory = device.memory
    net = make(name)
    steps = compiled(net)
    model_bytes = memory.live_bytes
    plan = steps[0].plan(*[spec(a.shape, a.dtype) for a in net.calls[0][1]])
    memory.settle()
    planning_bytes = memory.live_bytes - model_bytes
    memory.reset_peak()
    for which, arguments in net.calls:
        steps[which](*arguments)
    held_bytes = memory.stats()["peak_bytes"] - memory.overhead_bytes - before_bytes
    if len(steps) > 1:  # what one step makes and another reads is known as one thing only once it is there
        kinds = {(which, *(a.shape for a in arguments)): (which, arguments) for which, arguments in net.calls}
        plans = [steps[which].plan(*arguments) for which, arguments in kinds.values()]
        plan = Plan([program for one in plans for program in one.programs], device.name, staging=plans[0].staging)
    return plan.peak_bytes - plan.overhead_bytes, held_bytes, planning_bytes


# ---------------------------------------------------------------- refusals


def check_refusal(name: str, device: Device) -> Finding:
    """A step that needs one byte more than its budget is refused, nothing changes, and with that byte it runs.

    Raises:
        Mismatch: naming what changed.
    """
    settle(device)
    with on(device):
        needed = _refused_then_run(name, device)
    settle(device)
    return Finding(f"{_exact(needed - 1)} refused, one more runs", figures={"needed_bytes": needed})


def _refused_then_run(name: str, device: Device) -> int:
    memory = device.memory
    net = make(name)
    (step,) = net.steps
    arguments = net.calls[0][1]
    plan = compile_step(step).plan(*arguments)
    state = net.state()
    settle(device)  # a refusal may give back what is held for reuse
    needed = needed_bytes(plan, device)
    before = _books(device)
    try:
        CompiledStep(step, budget=needed - 1)(*arguments)
    except BudgetExceeded:
        pass
    else:
        raise Mismatch(f"a step that needs {_exact(needed)} ran under a budget of one byte less")
    memory.settle()
    if changed := [f"{k} from {before[k]:,} to {v:,}" for k, v in _books(device).items() if v != before[k]]:
        raise Mismatch(f"the refusal changed {', '.join(changed)}")
    now = net.state()
    if now.keys() != state.keys() or get_state() != state["random"]:
        raise Mismatch("the refusal left gradients, optimizer state or random draws behind")
    memory.reset_peak()
    CompiledStep(step, budget=needed)(*arguments)
    most = memory.stats()["peak_bytes"]
    if most > needed:
        raise Mismatch(f"a step that needs {_exact(needed)} held {_exact(most)}")
    return needed


def check_eager_refusal(device: Device) -> Finding:
    """A tensor that does not fit is refused before anything is allocated, and a smaller one is made then.

    Raises:
        Mismatch: naming what changed.
    """
    settle(device)
    memory = device.memory
    before = _books(device)
    limit = memory.held_bytes + 4 * MIB
    if memory.limit_bytes is not None:
        limit = min(limit, memory.limit_bytes)
    room = limit - memory.held_bytes
    with on(device), memory.lowered(limit):
        try:
            zeros(room + 1, dtype="uint8")
        except BudgetExceeded as error:
            message = str(error).partition("\n")[0]
        else:
            raise Mismatch(f"a tensor of {_exact(room + 1)} was made where the budget left {_exact(room)}")
        memory.settle()
        if changed := [f"{k} from {before[k]:,} to {v:,}" for k, v in _books(device).items() if v != before[k]]:
            raise Mismatch(f"the refusal changed {', '.join(changed)}")
        if zeros(room // 4, dtype="uint8").numpy().any():
            raise Mismatch("a tensor made after the refusal does not hold its zeros")
    return Finding(f"{_exact(room + 1)} refused where {_exact(room)} were left", figures={"message": message})


def _books(device: Device) -> dict[str, int]:
    memory = device.memory
    found = {"live bytes": memory.live_bytes, "held bytes": memory.held_bytes}
    counted = process_bytes(device)
    return found if counted is None else found | {"the process's bytes on the device": counted}


# ---------------------------------------------------------------- overhead


def check_overhead(device: Device) -> Finding:
    """What the driver says that this process holds is what brim counts: its pool, and the overhead that it measured.

    Raises:
        Mismatch: the driver counts more.
        Skip: nobody counts.
    """
    settle(device)
    memory = device.memory
    counted = process_bytes(device)
    if counted is None:
        if memory.in_host_memory:
            raise Skip("in the host's memory Python and its libraries are no part of a budget")
        raise Skip(f"nobody tells what this process holds on {device}")
    memory.settle()
    other = counted - memory.held_bytes
    figures = {
        "process_bytes": counted, "held_bytes": memory.held_bytes, "overhead_bytes": memory.overhead_bytes,
        "not_counted_bytes": other,
    }  # fmt: skip
    if other > OVERHEAD_BYTES:
        raise Mismatch(
            f"the process holds {_exact(counted)} on {device}, brim counts {_exact(memory.held_bytes)}: "
            f"{format_bytes(other)} more than it may be, with an overhead of {format_bytes(memory.overhead_bytes)}"
        )
    overhead = f"{format_bytes(memory.overhead_bytes)} ({memory.overhead_exactness})"
    return Finding(f"{overhead} counted, {format_bytes(other)} not", figures=figures)


def _exact(nbytes: int) -> str:
    return format_bytes(nbytes, exact=True)
