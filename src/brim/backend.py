"""The Backend protocol: everything a device package must offer. The framework knows devices only through it.

A backend is found by its entry point in the group ``brim.backends``. It owns the array type, the raw memory and the
kernels; it never decides about budgets, gradients or plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np

from brim.op import Op
from brim.spec import Scalar, Spec

__all__ = [
    "Backend",
    "BoundKernel",
    "HostMemoryView",
    "HostServices",
    "MemoryInfo",
    "ScalarCell",
    "join_neighbours",
]


class ScalarCell:
    """A number that may differ from run to run of prepared calls: ``value`` is read at each run."""

    __slots__ = ("value",)

    def __init__(self, value: Scalar = 0) -> None:
        self.value = value


Call = Callable[[], None]


def join_neighbours(
    calls: Sequence[Call], can_join: Callable[[Any], bool], join: Callable[[list[Any]], Call], least: int = 2
) -> list[Call]:
    """The same calls in the same order, each row of neighbours joined into one.

    Arguments:
        can_join: whether a call may be part of a row.
        join: makes one call of a row.
        least: shorter rows are left as they are.
    """
    found: list[Call] = []
    for joins, row in groupby(calls, can_join):
        group = list(row)
        found += [join(group)] if joins and len(group) >= least else group
    return found


@dataclass(frozen=True, slots=True)
class BoundKernel:
    """A kernel chosen for certain specs.

    Attributes:
        run: ``run(out, *ins, scratch=None, **params)``; ``out`` is an array, or a tuple for several outputs; Python
            scalars among the inputs are passed as they are. It writes every element of ``out`` and allocates nothing.
        scratch_bytes: working memory the caller provides as ``scratch`` (a flat uint8 array), exact.
        library_bytes: memory that a library call inside allocates and frees by itself, an upper bound.
        contiguous: which inputs must be row-major (the caller copies the others).
        aliasing: True when an output may share its memory, element for element, with an input of the same spec.
        prepare: ``prepare(out, *ins, scratch=None, **params)`` gives calls without arguments that together do what
            ``run`` does on exactly these arrays; None where there are none. Scalars among the inputs are constants,
            but for a ``ScalarCell``.
        aligned_bytes: what each array's address must be a multiple of, at most 64 (the caller copies other views).
        exact_outputs: outputs must have the layouts of their specs; otherwise any strides will do.
        launches: how many kernels and library calls ``run`` launches, for reports.
        skipped_in_place: how many of them are not needed where the output lies over the first input.
    """

    run: Callable[..., None]
    scratch_bytes: int = 0
    library_bytes: int = 0
    contiguous: tuple[bool, ...] = ()
    aliasing: bool = False
    prepare: Callable[..., list[Callable[[], None]] | None] | None = None
    exact_outputs: bool = False
    aligned_bytes: int = 1
    launches: int = 1
    skipped_in_place: int = 0


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Memory of a device as this process sees it, in bytes.

    Attributes:
        total_bytes: the most this process could ever use; what a budget in percent refers to.
        available_bytes: what it could use now without swapping or taking from others.
        limited_by: what sets the total ("device memory", "MIG instance", "cgroup v2 ...").
        overhead_bytes: what context, modules and libraries of this process hold on the device; a budget includes it.
        overhead_exactness: how the overhead is known.
        headroom_bytes: what a budget "auto" leaves free here; ``available_bytes`` is before it.
        unified: the device computes in the host's memory: it has one limit together with the host.
    """

    total_bytes: int
    available_bytes: int
    limited_by: str
    overhead_bytes: int = 0
    overhead_exactness: Literal["exact", "measured", "estimated"] = "exact"
    headroom_bytes: int = 0
    unified: bool = False


@dataclass(frozen=True, slots=True)
class HostMemoryView:
    """The host's memory as the guard sees it, in bytes. Swap is in none of the numbers.

    Attributes:
        total_bytes: the most this process may use.
        available_bytes: what it could take now.
        held_bytes: what brim has given out as host memory.
        resident_bytes: physical memory of this process. Less than ``held_bytes``: the rest is promised, not yet taken.
    """

    total_bytes: int
    available_bytes: int
    held_bytes: int = 0
    resident_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HostServices:
    """What the framework does for the backend of a device.

    Attributes:
        trim: gives the pool's unused segments of this device back and returns their bytes; may be called from inside
            ``Backend.allocate``. In any other thread than the pool's present user it waits for that one.
        charge: ``charge(nbytes, category)`` books host memory that the backend is about to take (a staging buffer)
            against the host's budget, or raises BudgetExceeded; what it returns books it out again.
        host: reads the host's memory anew.
    """

    trim: Callable[[], int]
    charge: Callable[[int, str], Callable[[], None]]
    host: Callable[[], HostMemoryView]


class Backend(Protocol):
    """What a device package implements.

    What follows is optional: the framework looks whether a backend has it. ``ins``, ``outs`` are the Specs (or scalars)
    and ``params`` the params of an instruction that a planned step could have.

    What a planned step should look like:

    - ``prefers_channels_last``: names of ops that are faster on images (N, C, H, W) whose channels lie side by side;
      ``gains_channels_last(op, ins, outs, params)``: whether one of these does with these specs.
    - ``knows_fast_convolutions``: True where its convolutions take the param ``fast``.
    - ``joins_epilogue(op, ins, outs, params)``: whether this ``matmul_epilogue`` or ``conv2d_epilogue`` is wanted
      instead of the product and the elementwise group after it.
    - ``joins_norms(op, ins, outs, params)``: whether this one of the ``FUSED_NORMS`` (``brim.program.norm_groups``) is
      wanted instead of a norm and the elementwise groups around it.
    - ``joins_loss_gradient(op, ins, outs, params)``: whether this ``cross_entropy_with_grad`` is wanted instead of a
      loss and its gradient.
    - ``keeps_powers(op, ins, outs, params)``: whether it has a kernel for this ``cross_entropy_powers`` or
      ``cross_entropy_powers_grad``, which save the gradient of a loss its powers.
    - ``joins_side_by_side``: how many bytes may be kept alive longer for the sake of fewer launches, where independent
      elementwise groups of one formula are to run as one ``fused_many``; ``joins_arrays_of``: how many bytes each of
      their arrays may have, 1 MiB without it; ``joins_updates``: how many where they update a state, if that is more;
      ``joins_early``: True, beside ``joins_arrays_of``, where casts of weights are to be made together, before they are
      needed.

    How a planned step runs:

    - ``load(kernels)``: called with the bound kernels of a program before they are prepared, so that what must be
      compiled is compiled together.
    - ``chained(calls)``: joins a program's prepared calls where that saves time.
    - ``feed(pairs, stage, generation)``: copies the inputs of a step, (device array, host array) each, without waiting
      for what was launched before; ``stages_inputs``: True where that is to go by way of a second set of device
      buffers, the stage: a flat uint8 array of the inputs' bytes, each rounded up to ``alignment_bytes``, which is
      other memory than before when ``generation`` is another number.
    - ``fetcher(array)``: prepares copies of a small device array to the host: ``start()`` orders one behind what was
      launched, ``value()`` waits for it.
    - ``gather_rows(source, indices, out, on_team=True)``: copies rows of a host array into another one,
      ``out[i] = source[indices[i]]``, on its threads or with the calling one alone.

    What it tells, and is told:

    - ``connect(index, services)``: called with the ``HostServices`` of a device, once, before anything else is asked of
      that device.
    - ``facts(index)``: versions of what is between brim and the device, as a dict of texts.
    - ``process_bytes(index)``: what the driver says that this process holds on the device, or None where nobody tells.
    - ``set_threads(n)``, ``get_threads()``: where its kernels run on threads of this process.
    - ``native_status()``: one line about the compiled kernels that it runs.
    - ``register_rate(seconds)``: how many float32 operations a second its processors make at most, or None.
    """

    kind: str
    """The device's name in ``brim.device("kind:index")``."""

    alignment_bytes: int
    """Every block starts at, and is rounded up to, a multiple of this."""

    shares_host_memory: bool
    """True when the host reads and writes the device's arrays as they are, as on the CPU."""

    segment_bytes: int
    """Memory is taken in pieces of at least so many bytes, which are kept for reuse, and every block is carved from
    one; 0: blocks below 64 KiB are taken and given back one by one."""

    def count(self) -> int:
        """Number of devices. Raises DeviceError saying exactly what is missing when there is none."""

    def describe(self, index: int) -> str:
        """One line: the device's name and size."""

    def allocate(self, index: int, nbytes: int) -> Any:
        """A raw buffer of ``nbytes``, aligned, not initialised; it frees itself with its last reference.

        Raises:
            BudgetExceeded: the device cannot give so much now (others may hold it); nothing was taken.
        """

    def view(self, buffer: Any, offset_bytes: int, spec: Spec) -> Any:
        """An array over part of a raw buffer."""

    def bind(self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> BoundKernel:
        """The kernel for an op on these specs. Raises KeyError when the op has none (a composite's body runs then)."""

    def running(self, index: int) -> AbstractContextManager[Any]:
        """A new context that is entered around kernel calls (one or many) on the arrays of device ``index``."""

    def upload(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Copy a host array of the same shape and dtype into a device array."""

    def download(self, array: Any) -> np.ndarray[Any, Any]:
        """A host array with a device array's values (the array itself where host and device are one)."""

    def adopt(self, host: np.ndarray[Any, Any]) -> Any:
        """A raw buffer over a host array's memory without copying, or None where that is impossible."""

    def synchronize(self, index: int) -> None:
        """Return when everything launched on the device has finished."""

    def memory(self, index: int) -> MemoryInfo | None:
        """Memory as this process sees it now; None where the host's limits are the answer.

        The first call starts the device, so that the overhead is known.
        """
