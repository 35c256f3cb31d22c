"""How arrays are walked through together: axes in the order of memory, merged where all of them allow it."""

from __future__ import annotations

from collections.abc import Sequence

from brim.spec import Shape, Spec

__all__ = ["broadcast_strides", "merged"]


def broadcast_strides(spec: Spec, shape: Shape) -> tuple[int, ...]:
    """Strides in elements that read an array as one of ``shape``: 0 along axes it lacks or that have one element."""
    own = tuple(0 if dim == 1 else step for dim, step in zip(spec.shape, spec.strides, strict=True))
    return (0,) * (len(shape) - spec.ndim) + own


def merged(
    shape: Shape, strides: Sequence[Sequence[int]], *, keep_order: bool = False
) -> tuple[list[int], list[list[int]]]:
    """The same walk in as few axes as possible.

    Arguments:
        shape: the common shape, without a size of 0.
        strides: of each operand, in elements; axes are sorted by those of the last operand, the slowest first.
        keep_order: whether elements must keep their row-major order.

    Returns:
        sizes of the axes and, for each operand, their strides; at least one axis.
    """
    axes = [axis for axis, dim in enumerate(shape) if dim > 1]
    if not keep_order:
        axes.sort(key=lambda axis: -abs(strides[-1][axis]))
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in axes:
        if sizes and all(s[-1] == own[axis] * shape[axis] for s, own in zip(steps, strides, strict=True)):
            sizes[-1] *= shape[axis]
            for s, own in zip(steps, strides, strict=True):
                s[-1] = own[axis]
        else:
            sizes.append(shape[axis])
            for s, own in zip(steps, strides, strict=True):
                s.append(own[axis])
    return (sizes, steps) if sizes else ([1], [[0] for _ in strides])
