"""Launches fit what every GPU takes, on shapes alone: blocks along each axis, threads, shared memory."""

from __future__ import annotations

from typing import Any

import pytest

from brim.op import REGISTRY
from brim.spec import DTYPES, Spec
from brim_cuda.launch import BLOCKS_MAX, SHARED_BYTES_MAX, THREADS_MAX, Call, named_kernel, pointer
from brim_cuda.registry import work_of

HOW: dict[str, Any] = {"padding": (1, 1), "dilation": (1, 1)}


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes"),
    [
        ((0,), 32, 0), ((1,), 0, 0), ((1,), THREADS_MAX + 1, 0), ((1,), 32, SHARED_BYTES_MAX + 1),
        ((BLOCKS_MAX[0] + 1,), 32, 0), ((1, BLOCKS_MAX[1] + 1), 32, 0), ((1, 1, BLOCKS_MAX[2] + 1), 32, 0),
    ],
)  # fmt: skip
def test_a_launch_that_no_gpu_takes_is_refused_when_it_is_made(
    blocks: tuple[int, ...], threads: int, shared_bytes: int
) -> None:
    kernel = named_kernel("none", [pointer("x", DTYPES["float32"])], "NAME(PARAMS)", ())
    assert Call(kernel, BLOCKS_MAX, (0,), threads=THREADS_MAX, shared_bytes=SHARED_BYTES_MAX)
    with pytest.raises(ValueError, match=rf"{kernel.name} asks for .* fix its binder"):
        Call(kernel, blocks, (0,), threads=threads, shared_bytes=shared_bytes)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    ("channels", "each", "pixels", "stride"),
    [(2, 1, 20000, 1), (2, 1, 20000, 2), (1 << 17, 8, 4, 1), (1 << 20, 1, 4, 2)],
)
def test_convolutions_of_small_groups(channels: int, each: int, pixels: int, stride: int, last: bool) -> None:
    def images(side: int) -> Spec:
        return Spec((2, channels, side, side), DTYPES["float32"], order(side) if last else None)

    def order(side: int) -> tuple[int, ...]:
        return channels * side * side, 1, channels * side, channels

    x, y, w = images(pixels), images(pixels // stride), Spec((channels, each, 3, 3))
    how = {**HOW, "stride": (stride, stride), "groups": channels // each}
    for name, ins, out, more in (
        ("conv2d", (x, w), y, {}),
        ("conv2d_grad_input", (y, w), x, {"size": (pixels, pixels)}),
        ("conv2d_grad_weight", (y, x), w, {"kernel": (3, 3)}),
    ):
        calls = work_of(REGISTRY[name], ins, [out], {**how, **more}).calls
        assert calls
        assert all(isinstance(call, Call) for call in calls), name
