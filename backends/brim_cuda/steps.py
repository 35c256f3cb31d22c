"""Running what an op consists of, launches, products, calls of cuDNN: once (``run``) or repeatedly (``prepare``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from brim.backend import BoundKernel, ScalarCell
from brim.errors import DeviceError
from brim_cuda.dnn import Execute
from brim_cuda.gemm_run import Addresses
from brim_cuda.launch import (
    Call,
    DnnCall,
    In,
    Kernel,
    Loader,
    Out,
    Param,
    Place,
    Product,
    Scratch,
    Table,
    pack,
    scalar_of,
)
from brim_cuda.lowlevel import OUT_OF_MEMORY, LowLevelError
from brim_cuda.nvrtc import NvrtcError

__all__ = ["Launch", "Step", "Steps", "bound", "load"]

Step = Call | Product | DnnCall


_Renewed = tuple[Any, Any, Param, ScalarCell]
"""A list or array, an index in it, and the scalar that is put there before each launch, as what parameter."""


class _Operands:
    """The arrays of one execution."""

    def __init__(self, loader: Loader, out: Any, ins: Sequence[Any], scratch: Any) -> None:
        self.loader, self.ins, self.scratch = loader, ins, scratch
        self.outs = out if isinstance(out, tuple) else (out,)

    def array(self, place: In | Out) -> Any:
        return self.outs[place.index] if isinstance(place, Out) else self.ins[place.index]

    def address(self, place: Place) -> int:
        if isinstance(place, Scratch):
            return self.loader.address(self.scratch) + place.offset_bytes
        array = self.array(place)
        return self.loader.address(array) + place.offset * int(array.dtype.itemsize)

    def packed(self, call: Call) -> tuple[list[Any], list[_Renewed]]:
        """The arguments of a launch, and which of them are read anew each time."""
        values: list[Any] = []
        cells: list[_Renewed] = []
        for n, (param, arg) in enumerate(zip(call.kernel.params, call.args, strict=True)):
            if isinstance(arg, Scratch):
                values.append(np.uint64(self.address(arg)))
                continue
            if isinstance(arg, Table):
                values.append(pack(param, self._filled(arg, cells)))
                continue
            value = self.array(arg) if isinstance(arg, In | Out) else arg
            if isinstance(value, ScalarCell):
                cells.append((values, n, param, value))
            if param.is_pointer:
                values.append(self._pointer(param, value, arg))
            elif isinstance(arg, In):
                values.append(pack(param, scalar_of(value, param)))
            else:
                values.append(pack(param, value))
        return values, cells

    def _filled(self, table: Table, cells: list[_Renewed]) -> np.ndarray[Any, Any]:
        """A table with its entries; scalars that are read anew each time are added to ``cells``."""
        made = table.values.copy()
        for entry in table.entries:
            numbers = made[entry.field]
            if entry.dtype is not None:
                pointed = Param(entry.field, entry.dtype, True)
                numbers[entry.position] = self._pointer(pointed, self.array(entry.place), entry.place)
                continue
            value = self.array(entry.place)
            param = Param(entry.field, numbers.dtype)
            if isinstance(value, ScalarCell):
                cells.append((numbers, entry.position, param, value))
            numbers[entry.position] = scalar_of(value, param)
        return made

    def _pointer(self, param: Param, array: Any, arg: Any) -> np.uint64:
        if not param.is_pointer or getattr(array, "dtype", None) != param.dtype:
            got = f"an array of {array.dtype}" if hasattr(array, "dtype") else type(array).__name__
            raise TypeError(f"parameter {param.name} is a pointer to {param.dtype}, got {got}")
        return np.uint64(self.address(arg) if isinstance(arg, In | Out) else self.loader.address(array))

    def wanted(self, call: Call) -> bool:
        """Whether a launch has anything to do on these arrays."""
        if call.only_if_apart is None:
            return True
        source, target = call.only_if_apart
        return self.loader.address(self.ins[source]) != self.loader.address(self.outs[target])

    def at(self, place: Place | None) -> int:
        """Where an operand starts; 0 for none."""
        return 0 if place is None else self.address(place)

    def addresses(self, product: Product) -> Addresses:
        """Where the operands of a product start."""
        at = self.at
        return Addresses(
            at(product.a), at(product.b), at(product.out),
            at(product.added), at(product.bias), at(product.aux), at(product.workspace),
        )  # fmt: skip


class Steps:
    """What an op does on operands of certain specs.

    Arguments:
        loader: runs it.
        steps: launches, products and calls of cuDNN, in order.
        title: the op and its operands, for messages.
    """

    def __init__(self, loader: Loader, steps: Sequence[Step], title: str) -> None:
        for step in steps:
            if isinstance(step, Call) and len(step.args) != len(step.kernel.params):
                raise TypeError(f"{step.kernel.name} takes {len(step.kernel.params)} arguments, got {len(step.args)}")
        self.loader, self.steps, self.title = loader, steps, title
        self._functions: dict[int, list[Callable[..., None]]] = {}  # by device; made at the first use: plans need none

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels that are launched, in order."""
        return [step.kernel for step in self.steps if isinstance(step, Call)]

    def _each(self, device: int) -> list[Any]:
        """(step, its function or None) in order."""
        if device not in self._functions:
            self._functions[device] = self.loader.functions(self.kernels)
        functions = iter(self._functions[device])
        return [(step, next(functions) if isinstance(step, Call) else None) for step in self.steps]

    def load(self) -> None:
        """Compile and load the kernels for the current device. Raises DeviceError naming the op."""
        device = None
        try:
            device = self.loader.device()
            self._each(device)
        except (LowLevelError, NvrtcError) as error:
            raise failure(self.title, error, device) from error

    def run(self, out: Any, *ins: Any, scratch: Any = None, **params: Any) -> None:
        """Execute on these arrays. Raises DeviceError naming the op when the device or the compiler fails."""
        operands = _Operands(self.loader, out, ins, scratch)
        device = None
        try:
            device = self.loader.device()
            for step, function in self._each(device):
                if isinstance(step, Product):
                    self.loader.gemm().run(step.plan, operands.addresses(step), self.loader.stream())
                elif isinstance(step, DnnCall):
                    self._execute(step, operands, device)()
                elif operands.wanted(step):
                    function(step.blocks, step.threads, step.shared_bytes, operands.packed(step)[0])
        except (LowLevelError, NvrtcError) as error:
            raise failure(self.title, error, device) from error

    def prepare(self, out: Any, *ins: Any, scratch: Any = None, **params: Any) -> list[Callable[[], None]]:
        """Calls without arguments that together do what ``run`` does on these arrays. Raises DeviceError."""
        operands = _Operands(self.loader, out, ins, scratch)
        calls: list[Callable[[], None]] = []
        device = None
        try:
            device = self.loader.device()
            for step, function in self._each(device):
                if isinstance(step, DnnCall):
                    calls.append(self._execute(step, operands, device))
                elif isinstance(step, Product):
                    calls += self.loader.gemm().prepare(step.plan, operands.addresses(step), self.loader.stream())
                elif operands.wanted(step):
                    calls.append(Launch(self.title, device, step, function, *operands.packed(step)))
        except (LowLevelError, NvrtcError) as error:
            raise failure(self.title, error, device) from error
        return calls

    def _execute(self, step: DnnCall, operands: _Operands, device: int) -> Execute:
        library = self.loader.dnn()
        if library is None:
            raise DeviceError(
                f"{self.title} was planned with cuDNN, which is not used on device {device}: plan it anew"
            )
        addresses = [operands.address(place) for place in step.places]
        translate = partial(failure, self.title, device=device)
        return Execute(library, step.plan, addresses, operands.at(step.workspace), self.loader.stream(), translate)


class Launch:
    """A kernel on fixed operands; it is launched each time that this is called.

    Attributes:
        device: number of the device that it runs on.
        values: its arguments, packed.
        cells: which of them are numbers that may differ from run to run.
    """

    __slots__ = ("_call", "_function", "_title", "cells", "device", "values")

    def __init__(
        self,
        title: str,
        device: int,
        call: Call,
        function: Callable[..., None],
        values: list[Any],
        cells: list[_Renewed],
    ) -> None:
        self._title, self.device, self._call, self._function = title, device, call, function
        self.values, self.cells = values, cells

    def renew(self) -> None:
        """Write the numbers of this run into the arguments."""
        for into, at, param, cell in self.cells:
            into[at] = pack(param, scalar_of(cell, param))

    def __call__(self) -> None:
        self.renew()
        call = self._call
        try:
            self._function(call.blocks, call.threads, call.shared_bytes, self.values)
        except LowLevelError as error:
            raise failure(self._title, error, self.device) from error


def failure(title: str, error: Exception, device: int | None = None) -> DeviceError:
    """What is said when something cannot be run: what, on which device, why, and the way out."""
    where = "the CUDA device" if device is None else f"CUDA device {device}"
    if isinstance(error, NvrtcError):
        return DeviceError(
            f"{title} cannot run on {where}, its kernel does not compile: {error}. Run this step with device='cpu'; "
            "nothing is lost"
        )
    if getattr(error, "code", 0) == OUT_OF_MEMORY:
        return DeviceError(
            f"{title} failed on {where}, which has no room left for the code of kernels: {error}. Nothing is lost; end "
            "other processes on the device, or lower brim's budget, and try again"
        )
    return DeviceError(
        f"{title} failed on {where}: {error}. What is in host memory is unharmed; what is on the device may be lost: "
        "start the process anew and go on from the last checkpoint"
    )


def bound(
    loader: Loader,
    steps: Sequence[Step],
    *,
    title: str = "a kernel",
    scratch_bytes: int = 0,
    contiguous: tuple[bool, ...] = (),
    aliasing: bool = False,
    aligned_bytes: int = 1,
) -> BoundKernel:
    """The kernel of an op that consists of these launches, products and calls of cuDNN, in order."""
    made = Steps(loader, steps, title)
    in_place = sum(isinstance(step, Call) and step.only_if_apart is not None for step in steps)
    return BoundKernel(
        made.run, scratch_bytes, 0, contiguous, aliasing, made.prepare,
        aligned_bytes=aligned_bytes, launches=len(steps), skipped_in_place=in_place,
    )  # fmt: skip


def load(kernels: Sequence[BoundKernel]) -> None:
    """Compile what these kernels launch, all together: far quicker than one after another at their first use.

    Raises:
        DeviceError: the compiler or the device refuses; it names the first op that cannot be loaded alone.
    """
    found = [steps for kernel in kernels if isinstance(steps := getattr(kernel.run, "__self__", None), Steps)]
    for loader in dict.fromkeys(steps.loader for steps in found):
        mine = [steps for steps in found if steps.loader is loader]
        try:
            loader.functions([kernel for steps in mine for kernel in steps.kernels])
        except (LowLevelError, NvrtcError):
            for steps in mine:
                steps.load()
