"""Which part of an image meets which part of the output, for one element of a sliding window."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["window_slices"]

Pair = tuple[int, int]


def _range(size: int, out: int, at: int, stride: int, padding: int, dilation: int) -> tuple[slice, slice] | None:
    shift = at * dilation - padding  # output o reads input o * stride + shift
    first = max(0, -(shift // stride))
    last = min(out, (size - 1 - shift) // stride + 1)
    if first >= last:
        return None
    start = first * stride + shift
    return slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)


def window_slices(
    size: Pair, out: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Iterator[tuple[int, int, tuple[slice, slice], tuple[slice, slice]]]:
    """(a, b, output slices, image slices) for every window element (a, b) that meets the image somewhere."""
    for a in range(kernel[0]):
        rows = _range(size[0], out[0], a, stride[0], padding[0], dilation[0])
        for b in range(kernel[1]):
            columns = _range(size[1], out[1], b, stride[1], padding[1], dilation[1])
            if rows is not None and columns is not None:
                yield a, b, (rows[0], columns[0]), (rows[1], columns[1])
