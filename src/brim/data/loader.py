"""DataLoader: a dataset in batches, epoch by epoch, with (seed, epoch, position) as its whole state.

The order of an epoch is a pure function of the seed and the epoch number, so a run that stops anywhere continues with
exactly the batches it has not seen. Batches are gathered (``rows.py``) by the thread that asks for them, or ahead of
time by a prefetch thread; they become Tensors on the thread that asks for them.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from brim.context import context
from brim.data.dataset import ArrayDataset, Dataset, gather
from brim.data.prefetch import Prefetcher
from brim.data.resident import Order, ResidentSet, check_resident, resident_specs
from brim.data.rows import ArrayReader, Reader, in_memory, reader
from brim.data.transforms import Array
from brim.device import Device
from brim.device import device as find_device
from brim.errors import CheckpointError, DataError
from brim.random import permutation
from brim.spec import Spec, as_dtype
from brim.tensor import asarray

__all__ = ["DataLoader"]

_AHEAD = 2  # batches that are prefetched where nobody said how many
_IN_USE = 3  # batches that a training loop holds at a time: this one, the last one, the one in the making
_SAME = ("num_samples", "batch_size", "shuffle", "drop_last")  # what a position counts in; must not change on resume


class DataLoader:
    """Batches of a dataset. Each ``for`` loop over it is one epoch: every sample exactly once, then the next epoch.

    With prefetching, the dataset's reads and transforms run on a thread; they should not share mutable state with the
    training loop. Leaving a loop early ends that epoch: the next loop starts the next one. Only after `load_state_dict`
    does a loop start in the middle of an epoch.

    Arguments:
        dataset: an ArrayDataset, or anything with ``len()`` and ``[i]`` (see Dataset).
        batch_size: samples in a batch; the last batch of an epoch may be smaller.
        shuffle: a new order each epoch, or the dataset's own.
        drop_last: leave the smaller last batch out (with ``shuffle``, other samples each epoch).
        seed: of the order.
        prefetch: how many batches a thread prepares ahead; 0 prepares each batch when it is asked for. None chooses 0
            where that is a copy of a few microseconds on the CPU's own threads (arrays in memory, brim's own transforms
            or none, the CPU as the device), since a thread beside a step that uses all processors only gets in its way;
            else 2: samples read one by one, memory-mapped arrays, transforms of one's own, a GPU.
        device: where the Tensors go; None is the default device.
        to_tensor: False gives NumPy arrays.
        resident: keep the whole dataset in the device's memory: it is uploaded before the first batch, transformed
            once, and batches are gathered there, in the same order and with the same bits. It counts against the
            device's budget, and the memory goes back with the loader. The dataset is an ArrayDataset with brim's own
            transforms or none; later changes of its arrays are not seen. Where the device computes in host memory, as
            the CPU does, the arrays are there already, and nothing changes.

    Raises:
        ValueError, TypeError: bad settings, among them a batch size that with ``drop_last`` leaves no batch.
        DataError: an empty dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        prefetch: int | None = None,
        device: Any = None,
        to_tensor: bool = True,
        resident: bool = False,
    ) -> None:
        if isinstance(dataset, (tuple, np.ndarray)) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"DataLoader takes a dataset, such as ArrayDataset(inputs, targets), not {_kind(dataset)}")
        self.dataset = dataset
        self.batch_size = _integer("batch_size", batch_size, at_least=1)
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.seed = _integer("seed", seed, at_least=0)
        self.prefetch = None if prefetch is None else _integer("prefetch", prefetch, at_least=0)
        self.device = device
        self.to_tensor, self.resident = bool(to_tensor), bool(resident)
        if self.resident:
            check_resident(dataset)
            if not self.to_tensor:
                raise ValueError("resident=True gives Tensors, which to_tensor=False asks not to have; leave one out")
        self._sets: dict[Device, ResidentSet] = {}
        self._num_samples = len(dataset)
        if self._num_samples == 0:
            raise DataError("the dataset is empty: there is no batch to load")
        if len(self) == 0:
            raise ValueError(
                f"batch_size {self.batch_size} with drop_last=True gives no batch from {self._num_samples} samples; "
                f"use a batch_size of at most {self._num_samples}, or drop_last=False"
            )
        self._epoch = 0
        self._position = 0  # batches of this epoch that the consumer received
        self._resume = False  # the next loop continues at `position` instead of starting an epoch
        self._current: object = None  # identity of the loop that moves the state: the latest one

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self._num_samples, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    @property
    def num_samples(self) -> int:
        """Samples in the dataset."""
        return self._num_samples

    @property
    def epoch(self) -> int:
        """The epoch that is under way; between epochs, the one that comes next. Counts from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """How many batches of this epoch were handed out."""
        return self._position

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The distinct sizes of an epoch's batches, largest first: one or two numbers."""
        full, rest = divmod(self._num_samples, self.batch_size)
        partial = (rest,) if rest and not self.drop_last else ()
        return ((self.batch_size,) if full else ()) + partial

    def spec(self, batch_size: int | None = None) -> tuple[Spec, ...]:
        """Shape and dtype of each field of a batch, by default of an epoch's largest batch."""
        size = self.batch_sizes[0] if batch_size is None else batch_size
        one = gather(self.dataset, np.zeros(1, np.int64))
        return tuple(Spec((size, *field.shape[1:]), as_dtype(field.dtype)) for field in one)

    def is_resident(self, device: Any = None) -> bool:
        """Whether batches for a device are gathered in its memory."""
        if not self.resident:
            return False
        place = find_device(self.device if device is None else device)
        return place.backend is not None and not place.backend.shares_host_memory

    def resident_memory(self, device: Any = None) -> list[tuple[Spec, bool]]:
        """What the dataset takes of a device's memory: (spec, whether it is there already) of each piece."""
        if not self.is_resident(device):
            return []
        there = find_device(self.device if device is None else device) in self._sets
        *fields, order = resident_specs(self._num_samples, self.spec())
        return [*[(field, there) for field in fields], (order, False)]

    def _resident_set(self, device: Device) -> ResidentSet:
        if device not in self._sets:
            assert isinstance(self.dataset, ArrayDataset)
            self._sets[device] = ResidentSet(self.dataset, device)
        return self._sets[device]

    def order(self, epoch: int) -> Array:
        """The order in which an epoch visits the samples: an int64 permutation, a pure function of seed and epoch."""
        if self.shuffle:
            return permutation(self._num_samples, seed=self.seed, epoch=epoch)
        return np.arange(self._num_samples, dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Let the next loop run this epoch, from its beginning."""
        self._epoch = _integer("epoch", epoch, at_least=0)
        self._position, self._resume, self._current = 0, False, None

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: plain numbers, for JSON. Batches that were only prefetched do not count."""
        state = {"seed": self.seed, "epoch": self._epoch, "position": self._position}
        return state | {name: getattr(self, name) for name in _SAME}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: the next loop yields exactly the batches of that epoch that were left.

        A state taken after an epoch's last batch, but before its loop ended, gives an empty loop: that epoch is over.

        Raises:
            CheckpointError: a state of a loader with another dataset length, batch size, shuffle or drop_last, or not a
                state at all. Nothing is changed then.
        """
        try:
            seed, epoch, position = (_integer(key, state[key], at_least=0) for key in ("seed", "epoch", "position"))
            pairs = [(key, state[key], getattr(self, key)) for key in _SAME]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"this is not the state of a DataLoader ({error!r}): {state!r}") from error
        if changed := [f"{key} was {old}, is {new}" for key, old, new in pairs if old != new]:
            raise CheckpointError(f"the state belongs to another DataLoader: {'; '.join(changed)}")
        if position > len(self):
            raise CheckpointError(f"the state is at batch {position}, but an epoch has {len(self)}")
        self.seed, self._epoch, self._position = seed, epoch, position
        self._resume, self._current = True, None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._start(self.to_tensor, self.device)

    def arrays(self, device: Any = None) -> Iterator[tuple[Any, ...]]:
        """One epoch like a ``for`` loop over the loader, but always as NumPy arrays: for steps that are planned.

        Arguments:
            device: where the steps run, if not on the loader's device.
        """
        return self._start(False, self.device if device is None else device)

    def for_steps(self, device: Any = None) -> Iterator[tuple[Any, ...]]:
        """One epoch as steps take it: ``arrays``, or for a resident dataset ``brim.gathered.Gathered``, which planned
        steps gather straight into their memory."""
        place = self.device if device is None else device
        return self._start(None if self.is_resident(place) else False, place)

    def _start(self, to_tensor: bool | None, device: Any) -> Iterator[tuple[Any, ...]]:
        if self._position and not self._resume:  # the last loop was left early
            self._epoch, self._position = self._epoch + 1, 0
        self._resume = False
        return _Loop(self, to_tensor, device)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled or copied loader goes on where this one is.
        return self.__dict__ | {"_resume": True, "_current": None, "_sets": {}}

    def __repr__(self) -> str:
        return (
            f"DataLoader({self._num_samples:,} samples in {len(self):,} batches of {self.batch_size}, "
            f"shuffle={self.shuffle}, drop_last={self.drop_last}, seed={self.seed}, prefetch={self.prefetch})"
        )


class _Loop(Iterator[tuple[Any, ...]]):
    """One loop over one epoch, from the loader's position on; ``to_tensor=None`` leaves rows to be gathered."""

    def __init__(self, loader: DataLoader, to_tensor: bool | None, device: Any) -> None:
        self._loader, self._epoch, self._position = loader, loader.epoch, loader.position
        self._stop = len(loader)
        self._device, self._to_tensor = device, to_tensor
        self._depth = _depth(loader, device)
        self._reader: Reader = reader(
            loader.dataset, loader.order(loader.epoch), loader.batch_size, self._depth + _IN_USE
        )
        self._worker: Prefetcher[tuple[Array, ...]] | None = None
        self._process = os.getpid()
        self._resident: Order | None = None
        if to_tensor is not False and loader.is_resident(device):
            held = loader._resident_set(find_device(device))
            self._resident = Order(held, loader.order(loader.epoch), loader.batch_size)
        self._token = loader._current = object()

    def __next__(self) -> tuple[Any, ...]:
        if self._position >= self._stop:
            self.close()
            self._tell(self._epoch + 1, 0)
            self._token = object()  # told once
            raise StopIteration
        try:
            if self._resident is not None:
                batch = self._resident.batch(self._position)
                if self._to_tensor:
                    batch = tuple([field.tensor() for field in batch])
            else:
                batch = self._tensors() if self._to_tensor else self._arrays()
        except BaseException:
            # Whatever happened, Ctrl-C included, this batch was not received: the next call prepares it again.
            self.close()
            raise
        self._position += 1
        self._tell(self._epoch, self._position)
        return batch

    def _tensors(self) -> tuple[Any, ...]:
        if self._depth == 0 and isinstance(self._reader, ArrayReader) and context.interpreter is None:
            place = find_device(self._device)
            if _in_host_memory(place):
                return self._reader.tensors(self._position, place)
        return tuple([asarray(field, device=self._device) for field in self._arrays()])

    def _arrays(self) -> tuple[Array, ...]:
        if self._depth == 0:
            return self._reader.batch(self._position, on_team=True)
        if self._worker is None or self._process != os.getpid():  # threads do not survive a fork
            self._worker = Prefetcher(self._reader.batch, range(self._position, self._stop), self._depth)
            self._process = os.getpid()
        return self._worker.get()

    def _tell(self, epoch: int, position: int) -> None:
        if self._loader._current is self._token:  # a newer loop or a loaded state has taken over otherwise
            self._loader._epoch, self._loader._position = epoch, position

    def close(self) -> None:
        """Stop the prefetch thread; a later call of ``next`` would start another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _depth(loader: DataLoader, device: Any) -> int:
    """How many batches are prefetched."""
    if loader.prefetch is not None:
        return loader.prefetch
    return 0 if in_memory(loader.dataset) and _in_host_memory(find_device(device)) else _AHEAD


def _in_host_memory(place: Device) -> bool:
    return place.backend is not None and place.backend.shares_host_memory


def _integer(name: str, value: Any, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is an integer, not {_kind(value)}: {value!r}")
    if number < at_least:
        raise ValueError(f"{name} is at least {at_least}, not {number}")
    if number >= 2**64:  # seeds and epochs are words of the generator
        raise ValueError(f"{name} is at most 2**64 - 1, not {number}")
    return number


def _kind(value: Any) -> str:
    return "a " + type(value).__name__
