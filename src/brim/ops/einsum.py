"""Sums of products over named axes: ``einsum("bik,bkj->bij", x, y)``, contracted pair by pair through matmul."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from brim.errors import ShapeError
from brim.ops.arithmetic import multiply
from brim.ops.matmul import matmul
from brim.ops.movement import permute_dims, reshape
from brim.ops.reduce import sum as _sum


def _parse(expression: str, operands: tuple[Any, ...]) -> tuple[list[str], str]:
    """Labels of every operand and of the result; an ellipsis becomes labels of its own."""
    text = expression.replace(" ", "")
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise ShapeError(f"einsum {expression!r} names {len(terms)} tensors, got {len(operands)}")
    letters = set(text) - set(",->.")
    if not all(c.isalpha() for c in letters) or text.replace("...", "").count("."):
        raise ShapeError(f"einsum {expression!r}: labels are letters, '...' stands for all other axes")
    free = [c for c in map(chr, range(0x3B1, 0x3B1 + 100)) if c.isalpha() and c not in letters]
    widest = 0
    for term, x in zip(terms, operands, strict=True):
        named = len(term.replace("...", ""))
        if term.count("...") > 1 or (x.ndim != named if "..." not in term else x.ndim < named):
            raise ShapeError(f"einsum {expression!r}: {term!r} does not fit a tensor of shape {x.shape}")
        if "..." in term:
            widest = max(widest, x.ndim - named)
    rest = "".join(free[:widest])
    filled = []
    for term, x in zip(terms, operands, strict=True):
        count = x.ndim - len(term.replace("...", ""))
        filled.append(term.replace("...", rest[widest - count :]))
    if arrow:
        out = result.replace("...", rest)
    else:
        counts = Counter("".join(t.replace("...", "") for t in terms))
        out = (rest if "..." in left else "") + "".join(sorted(c for c, n in counts.items() if n == 1))
    for c in out:
        if c not in "".join(filled) or out.count(c) > 1:
            raise ShapeError(f"einsum {expression!r}: the result's label {c!r} must stand once, and in an input")
    return filled, out


def _diagonal(labels: str, x: Any) -> tuple[str, Any]:
    """Repeated labels of one operand: its diagonal over those axes, by flat positions."""
    while len(set(labels)) < len(labels):
        label = next(c for c in labels if labels.count(c) > 1)
        first = labels.index(label)
        second = labels.index(label, first + 1)
        n = x.shape[first]
        rest = [a for a in range(x.ndim) if a not in (first, second)]
        flat = reshape(permute_dims(x, (first, second, *rest)), (n * n, *(x.shape[a] for a in rest)))
        x = flat[:: n + 1] if n else flat
        labels = label + "".join(labels[a] for a in rest)
    return labels, x


def _sum_out(labels: str, x: Any, keep: set[str]) -> tuple[str, Any]:
    gone = tuple(a for a, c in enumerate(labels) if c not in keep)
    if not gone:
        return labels, x
    return "".join(c for c in labels if c in keep), _sum(x, axis=gone, dtype=x.dtype)


def _order(labels: str, x: Any, wanted: str) -> Any:
    return x if labels == wanted else permute_dims(x, tuple(labels.index(c) for c in wanted))


def _squeeze_ones(labels: str, x: Any, sizes: dict[str, int]) -> tuple[str, Any]:
    """Without axes of size 1 whose label is larger elsewhere: they broadcast."""
    keep = [a for a, c in enumerate(labels) if not (x.shape[a] == 1 and sizes[c] != 1)]
    if len(keep) == len(labels):
        return labels, x
    return "".join(labels[a] for a in keep), reshape(x, tuple(x.shape[a] for a in keep))


def _pair(la: str, a: Any, lb: str, b: Any, keep: set[str], sizes: dict[str, int]) -> tuple[str, Any]:
    """One contraction of two operands: batch axes, rows, columns, and the axes that are summed."""
    la, a = _sum_out(la, a, keep | set(lb))
    lb, b = _sum_out(lb, b, keep | set(la))
    batch = "".join(c for c in la if c in lb and c in keep)
    inner = "".join(c for c in la if c in lb and c not in keep)
    rows = "".join(c for c in la if c not in lb)
    columns = "".join(c for c in lb if c not in la)

    def dims(labels: str) -> tuple[int, ...]:
        return tuple(sizes[c] for c in labels)

    lead = dims(batch)
    m, k, n = (math.prod(dims(part)) for part in (rows, inner, columns))
    if not inner:  # nothing is summed: an ordinary product
        left = reshape(_order(la, a, batch + rows), (*lead, m, 1))
        right = reshape(_order(lb, b, batch + columns), (*lead, 1, n))
        out = multiply(left, right)
    else:
        left = reshape(_order(la, a, batch + rows + inner), (*lead, m, k))
        right = reshape(_order(lb, b, batch + inner + columns), (*lead, k, n))
        out = matmul(left, right)
    return batch + rows + columns, reshape(out, lead + dims(rows) + dims(columns))


def einsum(expression: str, *operands: Any) -> Any:
    """Sum of products in Einstein's notation: labels that are not in the result are summed over.

    Arguments:
        expression: as in "bik,bkj->bij"; without "->" the labels that stand once, in alphabetical order.
            "..." stands for all other axes, which broadcast.
        operands: a tensor for every term.

    Raises:
        ShapeError: labels that do not fit the shapes.

    The order of contractions with three or more tensors comes from opt_einsum (D. G. A. Smith and J. Gray, 2018).
    """
    terms, out_labels = _parse(expression, operands)
    work: list[tuple[str, Any]] = []
    sizes: dict[str, int] = {}
    for labels, x in zip(terms, operands, strict=True):
        for c, dim in zip(labels, x.shape, strict=True):
            if labels.count(c) > 1 and any(x.shape[a] != dim for a, d in enumerate(labels) if d == c):
                raise ShapeError(f"einsum {expression!r}: label {c!r} stands for unequal sizes in shape {x.shape}")
            if sizes.setdefault(c, dim) != dim and 1 not in (dim, sizes[c]):
                raise ShapeError(f"einsum {expression!r}: label {c!r} is {sizes[c]} in one tensor and {dim} in another")
            sizes[c] = dim if sizes[c] == 1 else sizes[c]
        work.append(_diagonal(labels, x))
    work = [_squeeze_ones(labels, x, sizes) for labels, x in work]
    for first, second in _path(work, out_labels, sizes):
        lb, b = work.pop(second)
        la, a = work.pop(first)
        keep = set(out_labels).union(*(labels for labels, _ in work)) if work else set(out_labels)
        work.append(_pair(la, a, lb, b, keep, sizes))
    labels, x = _sum_out(*work[0], set(out_labels))
    x = _order(labels, x, out_labels)
    return x.copy() if any(x is operand for operand in operands) else x


def _path(work: list[tuple[str, Any]], out: str, sizes: dict[str, int]) -> list[tuple[int, int]]:
    """Pairs to contract, in order (first < second); each result goes to the end."""
    if len(work) <= 2:
        return [(0, 1)] * (len(work) - 1)
    import opt_einsum

    terms = ",".join(labels for labels, _ in work)
    shapes = [tuple(sizes[c] for c in labels) for labels, _ in work]
    path, _ = opt_einsum.contract_path(f"{terms}->{out}", *shapes, shapes=True, optimize="auto")
    pairs: list[tuple[int, int]] = []
    for step in path:
        if len(step) == 1:
            continue
        where = sorted(step)
        if len(where) > 2:  # several at once: one after the other
            raise AssertionError(f"opt_einsum gave a step of {len(where)} tensors")
        pairs.append((where[0], where[1]))
    return pairs


__all__ = ["einsum"]
