"""Tensor: making it, leaving brim, conversion, promotion, and a repr that can be read."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest

import brim
from brim.device import Device
from brim.errors import DeviceError, DTypeError, ShapeError, TraceError
from replaying import Recorder


@pytest.mark.parametrize(
    ("obj", "dtype"),
    [
        (1.5, "float32"),
        (2, "int64"),
        (True, "bool"),
        ([[1, 2], [3, 4]], "int64"),
        ([1.0, 2.0], "float32"),
        (1j, "complex64"),
    ],
)
def test_python_values_get_the_default_dtypes(obj: object, dtype: str) -> None:
    x = brim.asarray(obj)
    assert x.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(x.numpy(), np.asarray(obj).astype(dtype))


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ("int32", "float32", "float32"),
        ("int64", "float16", "float16"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("uint8", "int8", "int16"),
        ("bool", "int8", "int8"),
        ("float64", "complex64", "complex128"),
    ],
)
def test_promotion(a: str, b: str, want: str) -> None:
    x, y = brim.asarray([1, 0], dtype=a), brim.asarray([1, 1], dtype=b)
    assert (x + y).dtype.name == want
    assert (y + x).dtype.name == want


def test_python_scalars_never_widen() -> None:
    assert (brim.asarray([1.0], dtype="float16") * 2.5).dtype.name == "float16"
    assert (brim.asarray([1], dtype="int32") + 1).dtype.name == "int32"
    assert (brim.asarray([1], dtype="int32") + 0.5).dtype.name == "float32"
    with pytest.raises(DTypeError, match="no common integer"):
        brim.asarray([1], dtype="uint64") + brim.asarray([1], dtype="int64")


def test_numpy_shares_memory_and_gradients_make_it_read_only() -> None:
    x = brim.asarray([1.0, 2.0])
    x.numpy()[0] = 7.0
    assert x[0].item() == 7.0
    x.requires_grad_()
    assert not x.numpy().flags.writeable
    assert x.detach().numpy().flags.writeable


def test_bfloat16_goes_out_and_in() -> None:
    x = brim.asarray([1.0, 2.5], dtype="bfloat16")
    assert x.numpy().dtype == brim.bfloat16
    np.testing.assert_array_equal(x.numpy().astype(np.float32), [1.0, 2.5])
    assert "bfloat16" in repr(x)


def test_dlpack_both_ways() -> None:
    source = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = brim.from_dlpack(source)
    source[0, 0] = 9.0
    assert x[0, 0].item() == 9.0
    np.testing.assert_array_equal(np.from_dlpack(x), source)


def test_dlpack_with_torch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch not installed")
    x = brim.asarray([[1.0, 2.0], [3.0, 4.0]])
    shared = torch.from_dlpack(x)
    shared[0, 0] = 5.0
    assert x[0, 0].item() == 5.0
    back = brim.from_dlpack(torch.arange(4.0))
    assert back.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_asarray_without_a_copy() -> None:
    source = np.zeros(4, np.float32)
    x = brim.asarray(source, copy=False)
    source[1] = 3.0
    assert x.tolist() == [0.0, 3.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="row-major"):
        brim.asarray(np.zeros((4, 4), np.float32)[:, 1], copy=False)
    y = brim.asarray(source)
    source[1] = 4.0
    assert y.tolist() == [0.0, 3.0, 0.0, 0.0]


def test_devices_that_are_missing_are_named() -> None:
    with pytest.raises(DeviceError, match="cuda"):
        brim.asarray([1.0], device="cuda")
    with pytest.raises(DeviceError, match="there are 1"):
        brim.device("cpu:3")
    with pytest.raises(DeviceError, match="meta"):
        brim.empty((2, 2), device="meta").numpy()


def test_meta_tensors_have_shapes_and_no_memory() -> None:
    before = brim.memory_stats()["live_bytes"]
    x = brim.empty((2**20, 2**20), device="meta")
    y = (x * 2.0 + x).reshape(-1)
    assert y.shape == (2**40,)
    assert brim.memory_stats()["live_bytes"] == before


def test_conversions() -> None:
    x = brim.asarray([1.9, -1.9])
    assert x.to("int32").tolist() == [1, -1]
    assert x.to("cpu") is x
    assert x.to("cpu", "float64").dtype == np.float64
    assert float(brim.asarray(2.0)) == 2.0
    assert int(brim.asarray(3)) == 3
    assert [10, 20, 30][brim.asarray(1)] == 20
    with pytest.raises(ShapeError, match="one element"):
        x.item()
    with pytest.raises(ShapeError, match="ambiguous"):
        bool(x)


def test_repr_shows_values_dtype_and_gradient() -> None:
    assert repr(brim.asarray([1.0, 2.0])) == "tensor([1., 2.])"
    assert "int32" in repr(brim.asarray([1], dtype="int32"))
    assert "requires_grad=True" in repr(brim.asarray([1.0]).requires_grad_())
    assert "shape=(0, 3)" in repr(brim.empty((0, 3)))


def test_pickle_keeps_values_and_gradients_flag() -> None:
    x = brim.asarray([1.0, 2.0]).requires_grad_()
    y = pickle.loads(pickle.dumps(x))
    assert y.requires_grad
    np.testing.assert_array_equal(x.detach().numpy(), y.detach().numpy())


def test_numpy_operands_meet_tensors() -> None:
    x = brim.asarray([1.0, 2.0])
    assert (x + np.array([1.0, 1.0], np.float32)).tolist() == [2.0, 3.0]
    assert (np.float32(2.0) * x).tolist() == [2.0, 4.0]
    assert (np.array([1.0, 1.0], np.float32) - x).tolist() == [0.0, -1.0]
    with pytest.raises(DTypeError, match="asarray"):
        x + "one"  # type: ignore[operator]


def test_moving_between_devices_carries_gradients() -> None:
    other = Device("cpu", 1, brim.device("cpu").backend)  # a second device with books of its own
    x = brim.asarray([1.0, 2.0]).requires_grad_()
    there = x.to(other)
    assert there.device is other
    assert other.memory.stats()["live_bytes"] > 0
    with pytest.raises(DeviceError, match="move them"):
        x + there
    (there * there).sum().backward()
    assert x.grad is not None
    assert x.grad.device is x.device
    assert x.grad.tolist() == [2.0, 4.0]


def test_meta_tensors_share_storage_and_say_what_they_are() -> None:
    x = brim.empty((4, 6), device="meta")
    view, other = x.reshape(24)[2:5], x + 1.0
    assert view._block is x._block is x.detach()._block
    assert other._block is not x._block
    x.detach().bump_version()
    assert (view.version, other.version) == (1, 0)
    view.book_as("buffers", "stem")
    record = x._block.record
    assert (record.category, record.layer, record.nbytes) == ("buffers", "stem", 96)
    assert (record.shape, record.dtype) == ((4, 6), brim.float32)
    assert record.where.startswith(__file__)
    assert other._block.record.op == "add"
    with pytest.raises(DeviceError, match="meta"):
        x.array  # noqa: B018
    with pytest.raises(DeviceError, match="meta"):
        x.to("cpu")


def test_the_meta_block_sets_this_threads_default_device() -> None:
    seen: list[str] = []
    with brim.meta():
        assert brim.default_device().is_meta
        assert brim.zeros(3).device.is_meta
        assert brim.asarray([1.0]).device.is_meta
        assert brim.zeros(3, device="cpu").tolist() == [0.0, 0.0, 0.0]
        thread = threading.Thread(target=lambda: seen.append(brim.zeros(3).device.name))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError), brim.meta():
            raise RuntimeError
        assert brim.zeros(3).device.is_meta
    assert seen == ["cpu"]
    assert brim.zeros(3).device.kind == "cpu"


def test_values_are_not_read_while_a_step_is_recorded() -> None:
    x = brim.asarray([1.0, 2.0])
    recorder = Recorder()
    with recorder.recording():
        y = x + 1.0
        for read in (
            y.numpy,
            y.tolist,
            y.sum().item,
            lambda: bool(x[0] > 0),
            lambda: np.asarray(x),
            lambda: float(x[1]),
        ):
            with pytest.raises(TraceError):
                read()
        with pytest.raises(TraceError):
            x.to("meta")
        assert repr(y) == "tensor(..., shape=(2,), dtype=float32)"
        made = brim.empty((2,)), brim.asarray([5.0, 6.0])
    assert y.tolist() == [2.0, 3.0]
    assert [t.shape for t in made] == [(2,), (2,)]
