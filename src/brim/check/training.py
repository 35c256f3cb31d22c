"""The section "networks": small networks in training, eager and planned, against the CPU.

How far two devices may differ is not guessed: the CPU's run is made twice more from initial weights that are one
rounding apart, and what this moves, a few times over, is allowed. So a sum that happens to be zero but for rounding,
or a gradient that Adam scales up, is judged by what rounding does to it, and everything else strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from brim.check.compare import Mismatch, Worst, compare, demand_same_bits, wide, worst_of
from brim.check.networks import CHOSEN, Net, compiled, make
from brim.check.place import on, settle
from brim.check.result import Check, Finding
from brim.device import Device
from brim.device import device as find_device
from brim.spec import is_float
from brim.tensor import Tensor, asarray

__all__ = ["OnCpu", "Run", "check_network", "checks", "train"]

Array = np.ndarray[Any, Any]

TIMES = 20
"""How often what one rounding of the weights moves is allowed."""

BASE = 1e-5
"""Allowed in any case: this part of an array's largest element (float32 sums of some hundred numbers)."""

RESULT_MOST = 0.02
"""Most that may ever be allowed for a result, relative to its size: a comparison within more would say nothing."""

ROUNDINGS = 64
"""A network that computes in half width is nudged by this part of a rounding there, which tips one in so many over."""

QUICK = ("mlp", "cnn", "transformer", "dropout_heavy")


@dataclass(frozen=True)
class Run:
    """What came of training a network for the batches that it brings along.

    Attributes:
        results: arrays that each call returned: losses, masks, predictions.
        state: parameters, buffers, gradients, optimizer state and the place in the random stream, after the last call.
    """

    results: list[list[Array]]
    state: dict[str, Any]

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Everything that is an array, by name."""
        for call, results in enumerate(self.results):
            for number, array in enumerate(results):
                yield f"call {call} result {number}", array
        for name, value in self.state.items():
            if isinstance(value, np.ndarray):
                yield name, value


def checks(device: Device, quick: bool = False, names: Sequence[str] | None = None) -> Iterator[Check]:
    """Two checks a network: eager and planned.

    Arguments:
        device: where.
        quick: four networks instead of all.
        names: which networks of ``NETWORKS``, whatever ``quick`` says.
    """
    for name in names or (QUICK if quick else CHOSEN):
        reference = OnCpu(name)
        for how in ("eager", "planned"):

            def run(reference: OnCpu = reference, planned: bool = how == "planned") -> Finding:
                return check_network(reference, device, planned)

            yield Check("networks", "", f"{name}, {how}", run)


def check_network(reference: OnCpu, device: Device, planned: bool) -> Finding:
    """Train on the device, and compare all results and the final state.

    On a device, with the CPU's eager run. On the CPU, the planned run with that too, and the eager run with the same
    training in float64.

    Raises:
        Mismatch: naming the array.
    """
    against, right = "the CPU, eager", reference.eager
    if device.kind == "cpu" and not planned:
        found, against, right = reference.eager, "float64", reference.in_float64
    else:
        found = train(reference.name, device, planned=planned)
    if right is reference.in_float64 and reference.computes_low:
        worst = _compare_roughly(found, right)
    else:
        worst = compare_runs(found, right, reference)
    arrays = dict(found.arrays())
    still = [n for n, a in reference.initial.items() if n in arrays and a.tobytes() == arrays[n].tobytes()]
    if still:
        raise Mismatch(f"training moved no element of {', '.join(still)}")
    figures = {"calls": len(found.results), "arrays": len(arrays)}
    return Finding(f"{against}: {len(found.results)} calls, {len(arrays)} arrays", worst, figures)


def train(
    name: str, device: Device, *, planned: bool = False, prepare: Callable[[Net], None] = lambda net: None
) -> Run:
    """Run all calls of a network on a device, eagerly or planned.

    Arguments:
        name: of a network in ``NETWORKS``.
        device: where.
        planned: compile its steps.
        prepare: changes the network before it runs.
    """
    with on(device):
        net = make(name)
        prepare(net)
        steps: Sequence[Callable[..., Any]] = compiled(net) if planned else net.steps
        results = []
        for which, arguments in net.calls:
            given = arguments if planned else [asarray(a, device=device) for a in arguments]
            results.append(_arrays(steps[which](*given)))
        run = Run(results, net.state())
        del net, steps
    settle(device)
    return run


def compare_runs(found: Run, right: Run, reference: OnCpu) -> Worst:
    """Hold a run against what is right, within what rounding moves; anything but floats exactly.

    Raises:
        Mismatch: naming the first result, or the array of the state, that is off.
    """
    got, want = dict(found.arrays()), dict(right.arrays())
    if (other := sorted(got.keys() ^ want.keys())) or found.state.keys() != right.state.keys():
        raise Mismatch(f"the runs gave different results or state: {', '.join(other or found.state)}")
    nudged = [dict(run.arrays()) for run in reference.nudged]
    worst = []
    for name, normal in reference.eager.arrays():
        if not is_float(normal.dtype):
            demand_same_bits(name, got[name], want[name])
            continue
        limit = _allowed(normal, [arrays[name] for arrays in nudged])
        size = max(1.0, float(np.max(np.abs(wide(normal)), initial=0.0)))
        if name.startswith("call") and limit > RESULT_MOST * size:
            raise Mismatch(f"{name}: one rounding of the weights moves it by more than can be compared ({limit:.2g})")
        worst.append(compare(name, got[name], want[name], 0.0, limit, dtype=got[name].dtype))
    for name, value in right.state.items():
        if not isinstance(value, np.ndarray):
            _demand_same_settings(name, found.state[name], value)
    return worst_of(*worst)


def _compare_roughly(found: Run, right: Run) -> Worst:
    """Hold the results of a run in half width against those in float64, within a few hundredths of the largest.

    Raises:
        Mismatch: naming the first result that is off.
    """
    want = dict(right.arrays())
    worst = []
    for name, array in found.arrays():
        if name.startswith("call"):
            size = max(1.0, float(np.max(np.abs(wide(want[name])), initial=0.0)))
            worst.append(compare(name, array, want[name], 0.0, RESULT_MOST * size, dtype=array.dtype))
    return worst_of(*worst)


def _demand_same_settings(name: str, got: Any, want: Any) -> None:
    """Numbers that the host keeps, such as a learned rate, as exact as float32 is; anything else exactly."""
    if isinstance(want, Mapping) and isinstance(got, Mapping) and got.keys() == want.keys():
        for key in want:
            _demand_same_settings(f"{name}.{key}", got[key], want[key])
    elif isinstance(want, list | tuple) and isinstance(got, list | tuple) and len(got) == len(want):
        for number, (one, other) in enumerate(zip(got, want, strict=True)):
            _demand_same_settings(f"{name}[{number}]", one, other)
    elif isinstance(want, float) and isinstance(got, float):
        compare(name, np.array(got), np.array(want), BASE, 1e-9)
    elif got != want:
        raise Mismatch(f"{name}: expected {want}, got {got}")


def _allowed(array: Array, nudged: Sequence[Array]) -> float:
    """Absolute tolerance of an array of the CPU's run, given how a rounding moves it."""
    if not is_float(array.dtype) or not array.size:
        return 0.0
    size = float(np.max(np.abs(wide(array))))
    moved = max(float(np.max(np.abs(wide(array) - wide(other)))) for other in nudged)
    return BASE * size + TIMES * moved + 1e-7


def _arrays(results: Any) -> list[Array]:
    if isinstance(results, Mapping):
        results = list(results.values())
    if isinstance(results, list | tuple):
        return [array for part in results for array in _arrays(part)]
    return [np.array(results.detach().numpy())] if isinstance(results, Tensor) else []


# ---------------------------------------------------------------- what it is compared with


class OnCpu:
    """Runs of one network on the CPU, each made when it is first asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def eager(self) -> Run:
        return train(self.name, find_device("cpu"))

    @cached_property
    def nudged(self) -> list[Run]:
        """From weights that are one rounding apart, each up or down at random."""
        return [train(self.name, find_device("cpu"), prepare=partial(_nudge, seed=seed)) for seed in (5, 6)]

    @cached_property
    def in_float64(self) -> Run:
        return train(self.name, find_device("cpu"), prepare=_in_float64)

    @cached_property
    def computes_low(self) -> bool:
        """Whether the network computes in less than its weights are stored in."""
        with on(find_device("cpu")):
            return make(self.name).rounding > 0

    @cached_property
    def initial(self) -> dict[str, Array]:
        """Parameters before the first call, by their names in the state."""
        with on(find_device("cpu")):
            state = make(self.name).state()
        return {name: value for name, value in state.items() if isinstance(value, np.ndarray)}


def _nudge(net: Net, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for module in net.modules:
        for p in module.parameters():
            values = np.array(p.detach().numpy())
            towards = np.where(rng.random(values.shape) < 0.5, -np.inf, np.inf).astype(values.dtype)
            nudged = values * (1.0 + np.sign(towards) * net.rounding / ROUNDINGS) if net.rounding else None
            p.write(np.nextafter(values, towards) if nudged is None else nudged.astype(values.dtype))


def _in_float64(net: Net) -> None:
    for module in net.modules:
        module.to("float64")
    net.calls = [
        (which, tuple(a.astype(np.float64) if a.dtype == np.float32 else a for a in arguments))
        for which, arguments in net.calls
    ]
