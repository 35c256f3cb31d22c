"""What a workload is: a record of its name, its least work, and how a side builds it; and how workloads are selected.

Sizes are those that PyTorch, JAX and others were measured with before brim existed, so that tables can be compared.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Job", "Workload", "select", "with_tiny"]


@dataclass(frozen=True)
class Job:
    """A workload that a side has built.

    Attributes:
        run: does the work once. What it leaves unfinished on a device, ``Side.synchronize`` waits for.
        results: host arrays by name that every side must agree on; called once, before anything is timed.
        compiled: the compiled steps inside, whose plans tell the exact memory (brim only).
        sets: of arrays that runs take in turn, so that inputs are not in the device's cache already.
    """

    run: Callable[[], Any]
    results: Callable[[], Mapping[str, Any]]
    compiled: tuple[Any, ...] = ()
    sets: int = 1


@dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
        name: as in ``brim bench run NAME``.
        what: what it is, in one sentence.
        kind: the family's builder; a side with a method of this name builds it its own way.
        params: arguments of the builder.
        flops: floating-point operations of products and convolutions that cannot be left out; 0: none to speak of.
        nbytes: bytes that must at least be read from or written to memory: each input and result once, each
            intermediate that the mathematics needs again (a normalisation reads twice) as often as it must.
        build: ``build(side, checking, **params)`` gives a Job. With ``checking`` nothing in it is random.
        tolerances: for each of the results, the largest accepted relative difference (of the Euclidean norms).
        process: for workloads that are a process of their own: "import", "first_step" or "rss".
        unit: of the figure that is compared, "s" or "B".
        seconds: of one round, at least, where one call takes long enough to make it otherwise noisy.
        precision: of products: "fp32", "tf32", or "bf16" (autocast in a step, arrays of it in single operations).
        needs_bytes: device memory that each side is assumed to need, generously; a card with less leaves it out.
        random: there is something random in it that ``checking`` takes out, so that what is timed is built anew.
        fuses: there is more than one operation in it; else a compiler has nothing to do and takes no part.
        importance: a run of limited time begins with the smallest.
        tiny: the same with sizes for a rehearsal.
    """

    name: str
    what: str
    kind: str
    params: Mapping[str, Any] = field(default_factory=dict)
    flops: float = 0.0
    nbytes: float = 0.0
    build: Callable[..., Job] | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    process: str = ""
    unit: str = "s"
    seconds: float = 0.0
    precision: str = "fp32"
    needs_bytes: float = 0.0
    random: bool = True
    fuses: bool = True
    importance: int = 5
    tiny: Workload | None = None


def with_tiny(make: Callable[..., Workload], tiny: Mapping[str, Any], /, **full: Any) -> Workload:
    """``make(**full)``, which has ``make(**full, **tiny)`` under its own name for rehearsals.

    Arguments:
        make: from sizes to a workload.
        tiny: sizes of the rehearsal; what is not among them stays as in ``full``.
        full: the sizes that are measured.
    """
    one = make(**full)
    small = make(**{**full, **tiny})
    return replace(one, tiny=replace(small, name=one.name, tiny=None))


def select(workloads: Iterable[Workload], patterns: Sequence[str]) -> list[Workload]:
    """The workloads whose names match any of the patterns (``mlp_*``), in the table's order; all without patterns.

    Raises:
        ValueError: a pattern matches nothing.
    """
    known = list(workloads)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(one.name, pattern) for one in known):
            raise ValueError(
                f"no workload is called {pattern!r}; `brim bench list` shows them: {', '.join(w.name for w in known)}"
            )
    return [w for w in known if not patterns or any(fnmatch.fnmatchcase(w.name, p) for p in patterns)]
