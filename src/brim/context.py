"""What the current thread is doing: recording gradients or not, inside which layer, under which interpreter.

Also here: how code that is part of a training step asks the host for what changes from step to step. Run eagerly, the
functions answer at once; while a step is traced, they become inputs of the program, which are read before every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "after_step",
    "baked",
    "context",
    "host_scalar",
    "host_scalars",
    "layer_scope",
    "modes",
    "phase_scope",
    "set_grad_enabled",
]


class _Context(threading.local):
    """Per-thread state; every thread starts with gradients on, outside any layer, running eagerly."""

    grad_enabled: bool = True
    layer: str = ""
    phase: str = "forward"
    interpreter: Any = None  # None: the eager interpreter
    default_device: Any = None  # None: the process-wide default
    autocast: Any = None  # the casts of ``brim.autocast``; None: ops run as they are written
    products: str | None = None  # precision of float32 products; None: that of the process


context = _Context()


class _Modes:
    """Counts what may make a recorded step stale: changes of a module's mode, parts or settings, and of
    ``requires_grad``, so that a program looks at them only after there was one."""

    changes: int = 0


modes = _Modes()


@contextmanager
def set_grad_enabled(enabled: bool) -> Iterator[None]:
    """Record operations for gradients inside the block, or not."""
    before = context.grad_enabled
    context.grad_enabled = enabled
    try:
        yield
    finally:
        context.grad_enabled = before


@contextmanager
def layer_scope(path: str) -> Iterator[None]:
    """Blocks allocated inside are booked under this layer path."""
    before = context.layer
    context.layer = path
    try:
        yield
    finally:
        context.layer = before


@contextmanager
def phase_scope(phase: str) -> Iterator[None]:
    """Operations inside belong to this part of a training step: "forward", "backward" or "update"."""
    before = context.phase
    context.phase = phase
    try:
        yield
    finally:
        context.phase = before


def host_scalar(read: Callable[[], Any], kind: type = float) -> Any:
    """A number that may differ from step to step (a learning rate): ``read()`` now, or before each run of a program.

    Arguments:
        read: gives the number; called exactly once a step, so it may also count.
        kind: float or int, known before ``read`` is called.
    """
    interpreter = context.interpreter
    return read() if interpreter is None else interpreter.host_scalars(lambda: (read(),), (kind,))[0]


def host_scalars(read: Callable[[], tuple[Any, ...]], kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """As ``host_scalar``, for several numbers that one call of ``read`` gives together."""
    interpreter = context.interpreter
    return read() if interpreter is None else interpreter.host_scalars(read, kinds)


def baked(read: Callable[[], Any]) -> Any:
    """A Python value that decides what a step does (a flag): a program made with it is made anew when it changes."""
    interpreter = context.interpreter
    return read() if interpreter is None else interpreter.baked(read)


def after_step(tensor: Any, receive: Callable[[Any], None]) -> None:
    """Call ``receive(number)`` with a tensor's only element: now, or after each run of a program."""
    interpreter = context.interpreter
    if interpreter is None:
        receive(tensor.item())
    else:
        interpreter.after_step(tensor, receive)
