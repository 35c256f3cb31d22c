"""Reverse-mode differentiation: the tape that ops record, and the walk back over it.

A ``Node`` is one recorded op. It knows its parents, never its children, so the tape has no cycles and memory goes as
soon as the last reference does. Gradients are computed by the ops' own ``vjp`` functions, which are made of ops, so
gradients of gradients need nothing more.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from brim.autocast import suspended
from brim.context import context, layer_scope, phase_scope, set_grad_enabled
from brim.errors import BrimError, BudgetExceeded, ShapeError
from brim.op import Op
from brim.ops.movement import sum_to
from brim.spec import Spec, is_float

__all__ = ["AutogradError", "Node", "backward", "enable_grad", "grad", "no_grad", "record"]

_sequence = itertools.count()


class AutogradError(BrimError, RuntimeError):
    """A gradient that was asked for cannot be computed."""


def no_grad() -> AbstractContextManager[None]:
    """Record nothing inside the block: results do not require gradients. Also works as a decorator."""
    return set_grad_enabled(False)


def enable_grad() -> AbstractContextManager[None]:
    """Record again inside a ``no_grad`` block."""
    return set_grad_enabled(True)


class _Saved:
    """A tensor kept for the backward pass, with the version it had (an in-place write since then is an error)."""

    __slots__ = ("index", "tensor", "version")

    def __init__(self, tensor: Any, index: int | None) -> None:
        # An output is kept without its node, or the node would hold itself.
        self.tensor = tensor if index is None else tensor.detach()
        self.index = index
        self.version = tensor.version

    def get(self, node: Node) -> Any:
        if self.tensor.version != self.version:
            raise AutogradError(
                f"a tensor of shape {self.tensor.shape} that the gradient of {node.op.name} needs was overwritten in "
                f"place after it was used; write to a copy (x.copy()) or update under brim.no_grad() after backward()"
            )
        if self.index is None:
            return self.tensor
        out = self.tensor.detach()
        if self.index < node.n_outputs - node.op.aux and is_float(out.dtype):  # the others carry no gradient
            out._node, out._index, out.requires_grad = node, self.index, True
        return out


class Node:
    """One recorded op on the tape."""

    __slots__ = (
        "__weakref__",
        "inputs",
        "layer",
        "n_outputs",
        "op",
        "out_specs",
        "params",
        "parents",
        "saved",
        "sequence",
    )

    def __init__(self, op: Op, params: dict[str, Any], args: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.op, self.params = op, params
        self.sequence = next(_sequence)
        self.n_outputs = len(outputs)
        self.layer = context.layer
        self.out_specs = [out.spec for out in outputs]
        # parent: (node, output index) for a result, a leaf tensor itself, or None where no gradient is wanted
        self.parents: list[Any] = [_parent(arg) for arg in args]
        self.inputs = [arg.spec if hasattr(arg, "spec") else arg for arg in args]
        keeps = op.keeps_inputs if op.arity is not None else op.keeps_inputs * len(args)
        kept_in = [
            _Saved(arg, None) if keep and hasattr(arg, "spec") else None for keep, arg in zip(keeps, args, strict=True)
        ]
        kept_out = [
            _Saved(out, i) if keep else None
            for i, (keep, out) in enumerate(zip(op.keeps_outputs, outputs, strict=True))
        ]
        for kept in (*kept_in, *kept_out):
            if kept is not None:
                kept.tensor.mark_saved()
        self.saved: tuple[list[_Saved | None], list[_Saved | None]] | None = (kept_in, kept_out)

    def gradients(self, grads: Sequence[Any]) -> list[Any]:
        """Gradients of the inputs (None where not wanted) from gradients of the outputs."""
        if self.saved is None:
            raise AutogradError(
                f"the record of {self.op.name} was used by an earlier backward() and is gone; "
                "pass retain_graph=True to the first call to walk the same results twice"
            )
        kept_in, kept_out = self.saved
        ins: Any = [spec if kept is None else kept.get(self) for kept, spec in zip(kept_in, self.inputs, strict=True)]
        outs = [spec if kept is None else kept.get(self) for kept, spec in zip(kept_out, self.out_specs, strict=True)]
        if self.op.arity is None:
            ins = [tuple(ins)]
        try:
            return self._entries(grads, ins, outs)
        except BudgetExceeded as refusal:
            # A frame keeps its function, and that the variables it closes over: without these inner frames nothing
            # of the failed computation stays alive with the error.
            raise refusal.with_traceback(None) from None

    def _entries(self, grads: Sequence[Any], ins: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
        assert self.op.vjp is not None
        result = self.op.vjp(*grads, *ins, *outs, **self.params)
        found = list(result) if isinstance(result, tuple | list) else [result]
        if len(found) != len(self.parents):
            raise AssertionError(
                f"gradient of {self.op.name} returned {len(found)} entries for {len(self.parents)} inputs"
            )
        out: list[Any] = []
        for entry, parent, spec in zip(found, self.parents, self.inputs, strict=True):
            if parent is None or entry is None:
                out.append(None)
            else:
                value = entry() if callable(entry) else entry
                out.append(None if value is None else _match(value, spec))
        return out


def _parent(arg: Any) -> Any:
    if not getattr(arg, "requires_grad", False):
        return None
    return arg if arg._node is None else (arg._node, arg._index)


def _match(gradient: Any, spec: Spec) -> Any:
    """Undo broadcasting and promotion: the one place where a gradient is brought to its input's shape and dtype."""
    if gradient.shape != spec.shape:
        gradient = sum_to(gradient, spec.shape)
    return gradient if gradient.dtype == spec.dtype else gradient.astype(spec.dtype)


def record(op: Op, params: dict[str, Any], args: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Put an op on the tape: its differentiable float outputs now require gradients."""
    node = Node(op, params, args, outputs)
    for index, out in enumerate(outputs[: len(outputs) - op.aux]):
        if is_float(out.dtype):
            out._node, out._index, out.requires_grad = node, index, True


def _walk(
    outputs: Sequence[Any],
    gradients: Sequence[Any],
    create_graph: bool,
    retain_graph: bool,
    on_leaf: Callable[[Any, Any], None],
    wanted: dict[tuple[int, int], int],
    on_wanted: Callable[[int, Any], None],
) -> None:
    pending: dict[Node, list[Any]] = {}
    heap: list[tuple[int, Node]] = []

    def give(parent: Any, gradient: Any) -> None:
        if not isinstance(parent, tuple):
            on_leaf(parent, gradient)
            return
        node, index = parent
        slots = pending.get(node)
        if slots is None:
            slots = pending[node] = [None] * node.n_outputs
            heapq.heappush(heap, (-node.sequence, node))
        slots[index] = gradient if slots[index] is None else slots[index] + gradient

    with set_grad_enabled(create_graph), suspended():
        for output, gradient in zip(outputs, gradients, strict=True):
            give(_parent(output), gradient)
        gradient = None
        while heap:
            _, node = heapq.heappop(heap)
            slots = pending.pop(node)
            for index in range(node.n_outputs):
                position = wanted.get((id(node), index))
                if position is not None and slots[index] is not None:
                    on_wanted(position, slots[index])
            count = node.n_outputs - node.op.aux
            given = slots[:count]
            if count == 1 and given[0] is None:
                continue
            with layer_scope(node.layer):
                found = node.gradients(given)
            del given, slots
            if not retain_graph:
                node.saved = None
            for position_in, parent in enumerate(node.parents):
                gradient = found[position_in]
                found[position_in] = None
                if gradient is not None:
                    give(parent, gradient)
                gradient = None


def _seed(output: Any, gradient: Any) -> Any:
    if not output.requires_grad:
        raise AutogradError(
            "this tensor does not depend on anything that requires gradients; set requires_grad on an input or "
            "parameter, and check that it was not computed under brim.no_grad() or detached"
        )
    if gradient is None:
        if output.size != 1:
            raise ShapeError(
                f"backward() of a tensor of shape {output.shape} needs a gradient of that shape: "
                "pass gradient=..., or reduce to one number first, as in loss.mean().backward()"
            )
        return output.ones_like()
    if gradient.shape != output.shape:
        raise ShapeError(f"gradient has shape {gradient.shape}, the tensor {output.shape}; they must be equal")
    return gradient


def _phase(create_graph: bool) -> AbstractContextManager[None]:
    """Gradients belong to the backward pass, unless they are themselves something to differentiate."""
    return nullcontext() if create_graph else phase_scope("backward")


def backward(
    output: Any, gradient: Any = None, *, create_graph: bool = False, retain_graph: bool | None = None
) -> None:
    """Add the gradient of ``output`` to ``.grad`` of every leaf that it depends on.

    Arguments:
        output: a Tensor, usually a loss of one element.
        gradient: weight of each element of ``output``; needed unless it has one element.
        create_graph: record the gradient computation itself, for gradients of gradients.
        retain_graph: keep what was recorded, so that backward can be called again.

    Raises:
        AutogradError: nothing requires gradients, or the record is used up.
        ShapeError: no gradient given for more than one element.
    """

    def on_leaf(leaf: Any, value: Any) -> None:
        leaf.accumulate_grad(value, create_graph)

    keep = create_graph if retain_graph is None else retain_graph
    with _phase(create_graph):
        seed = _seed(output, gradient)
        _walk([output], [seed], create_graph, keep, on_leaf, {}, _ignore)


def _ignore(position: int, value: Any) -> None:
    return None


def grad(
    outputs: Any,
    inputs: Any,
    gradients: Any = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    allow_unused: bool = False,
) -> Any:
    """Gradients of ``outputs`` with respect to ``inputs``, leaving every ``.grad`` alone.

    Arguments:
        outputs: a Tensor or a sequence of Tensors.
        inputs: a Tensor or a sequence of Tensors that require gradients.
        gradients: weights of the outputs, as in ``backward``.
        create_graph: make the results differentiable again.
        allow_unused: return None for an input that does not matter, instead of raising.

    Returns:
        A Tensor, or a tuple of Tensors when ``inputs`` is a sequence.

    Raises:
        AutogradError: an input is not used, or does not require gradients.
    """
    single = not isinstance(inputs, Sequence)
    wanted_tensors = [inputs] if single else list(inputs)
    outs = [outputs] if not isinstance(outputs, Sequence) else list(outputs)
    weights = [gradients] * len(outs) if not isinstance(gradients, Sequence) else list(gradients)
    leaves: dict[int, int] = {}
    wanted: dict[tuple[int, int], int] = {}
    for position, tensor in enumerate(wanted_tensors):
        if not tensor.requires_grad:
            raise AutogradError(f"input {position} does not require gradients; set requires_grad before using it")
        if tensor._node is None:
            leaves[id(tensor)] = position
        else:
            wanted[id(tensor._node), tensor._index] = position
    results: list[Any] = [None] * len(wanted_tensors)

    def on_wanted(position: int, value: Any) -> None:
        results[position] = value if results[position] is None else results[position] + value

    def on_leaf(leaf: Any, value: Any) -> None:
        if id(leaf) in leaves:
            on_wanted(leaves[id(leaf)], value)

    keep = create_graph if retain_graph is None else retain_graph
    with _phase(create_graph):
        seeds = [_seed(out, weight) for out, weight in zip(outs, weights, strict=True)]
        _walk(outs, seeds, create_graph, keep, on_leaf, wanted, on_wanted)
    for position, result in enumerate(results):
        if result is None and not allow_unused:
            raise AutogradError(
                f"the outputs do not depend on input {position} (shape {wanted_tensors[position].shape}); "
                "pass allow_unused=True to get None for it"
            )
    return results[0] if single else tuple(results)
