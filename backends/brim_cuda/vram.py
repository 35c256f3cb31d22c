"""Taking device memory: measured overhead, a look at what is free, one plain cudaMalloc, and a look at where it lies.

Whoever asks gets either a segment that is really on the device, or an error and the state of before. What others do
with the device meanwhile changes only that look, never this process's books.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from brim.errors import BudgetExceeded, DeviceError, SpillDetected
from brim.units import format_bytes
from brim_cuda.lowlevel import OUT_OF_MEMORY, LowLevelError, Runtime
from brim_cuda.providers import Provider, describe_neighbours

__all__ = ["Overhead", "Segment", "Vram"]

_MIB = 2**20
_WINDOW_BYTES = 16 * _MIB  # what one measurement of the copy rate copies
_SLOW = 0.25  # of the rate at the start: host memory over PCIe is ten times slower or more
_SPILL_TOLERANCE_BYTES = 16 * _MIB  # the driver itself moves small things between the two memories
_PLAUSIBLE = 4  # a difference of more than this many times the estimate is not ours


@dataclass(frozen=True, slots=True)
class Overhead:
    """What context, modules and libraries of this process hold on the device.

    Attributes:
        nbytes: how much.
        exactness: "measured" or "estimated".
        source: where the number comes from.
    """

    nbytes: int
    exactness: Literal["measured", "estimated"]
    source: str


class Segment:
    """Memory from one cudaMalloc; it goes back when the last reference does.

    Attributes:
        address: on the device.
        nbytes: how much.
    """

    __slots__ = ("__weakref__", "_vram", "address", "nbytes")

    def __init__(self, vram: Vram, address: int, nbytes: int) -> None:
        self._vram: Vram | None = vram
        self.address, self.nbytes = address, nbytes

    def release(self) -> None:
        """Give the memory back now; again does nothing. Raises LowLevelError when the device is lost."""
        vram, self._vram = self._vram, None
        if vram is not None:
            vram._give_back(self.address)

    def __del__(self) -> None:
        if getattr(self, "_vram", None) is not None:
            with contextlib.suppress(LowLevelError):  # a lost device has no memory to give back
                self.release()


class Vram:
    """Memory of one device in the hands of this process.

    Arguments:
        provider: tells what is free.
        runtime: does what is asked.
        index: CUDA's number of the device.
        estimate_bytes: what context and libraries take where it cannot be measured.
        trim: gives back what the process holds without need; called once before anything is refused.
        address_space_limit_bytes: RLIMIT_AS, None for none: where CUDA's address space counts too.

    Attributes:
        overhead: after ``start``.
    """

    def __init__(
        self,
        provider: Provider,
        runtime: Runtime,
        index: int,
        *,
        estimate_bytes: int,
        trim: Callable[[], object] = lambda: None,
        address_space_limit_bytes: int | None = None,
    ) -> None:
        self._provider, self._runtime, self._index = provider, runtime, index
        self._estimate_bytes, self._trim = estimate_bytes, trim
        self._address_space_limit_bytes = address_space_limit_bytes
        self._lock = threading.RLock()
        self._live: dict[int, int] = {}  # address -> bytes; changed by single dict operations, also from __del__
        self._canary: tuple[int, int] | None = None
        self._fast_bytes_per_s = 0.0
        self._spilled_before = 0
        self.overhead: Overhead | None = None

    # ---------------------------------------------------------------- start

    def start(self, open_context: Callable[[], object], load_libraries: Callable[[], object]) -> Overhead:
        """Create the context, load what the process will use, and measure what that took; again does nothing.

        Arguments:
            open_context: creates the CUDA context.
            load_libraries: loads modules and makes the handles of libraries, so that nothing of it comes later.

        Raises:
            DeviceError: the device does not start.
        """
        with self._lock:
            if self.overhead is not None:
                return self.overhead
            outside_before = self._provider.outside_free_bytes()
            try:
                open_context()
                inside_before = self._runtime.memory(self._index).free_bytes
                load_libraries()
                inside_after = self._runtime.memory(self._index).free_bytes
                outside_after = self._provider.outside_free_bytes()
                if self._provider.can_spill:
                    self._prepare_canary()
            except LowLevelError as error:
                self._drop_canary()
                raise DeviceError(
                    f"cuda:{self._index} does not start: {error}. Close programs that use the device, or restart it; "
                    "`nvidia-smi` shows its state"
                ) from error
            except BaseException:
                self._drop_canary()
                raise
            self._spilled_before = self._provider.spilled_bytes() or 0
            deltas = [inside_before - inside_after]
            if outside_before is not None and outside_after is not None:
                deltas.append(outside_before - outside_after)
            self.overhead = self._overhead(self._provider.used_by_me_bytes(), deltas)
            return self.overhead

    def _overhead(self, used_bytes: int | None, deltas: list[int]) -> Overhead:
        canary_bytes = 2 * _WINDOW_BYTES if self._canary is not None else 0
        if used_bytes is not None:
            return Overhead(max(0, used_bytes - self.held_bytes), "measured", "NVML, this process")
        # What is out of all proportion, or negative, is the doing of others.
        credible = [delta if 0 <= delta <= _PLAUSIBLE * self._estimate_bytes else 0 for delta in deltas]
        if len(deltas) > 1 and credible[1]:  # the first has no context in it
            return Overhead(max(credible) + canary_bytes, "measured", "free memory before and after the start")
        nbytes = max(self._estimate_bytes, credible[0]) + canary_bytes
        return Overhead(nbytes, "estimated", "typical of such a device; processes cannot be told apart here")

    # ---------------------------------------------------------------- taking

    @property
    def held_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(list(self._live.values()))

    def unattributed_bytes(self) -> int | None:
        """What this process holds besides segments and overhead (foreign code); None where nobody tells."""
        used = self._provider.used_by_me_bytes()
        if used is None or self.overhead is None:
            return None
        return max(0, used - self.overhead.nbytes - self.held_bytes)

    def take(self, nbytes: int, what: str = "memory") -> Segment:
        """A segment of ``nbytes`` on the device.

        Arguments:
            nbytes: more than 0.
            what: for the message, e.g. "the arena".

        Raises:
            BudgetExceeded: not enough is free, or the driver has no piece of this size; others are named.
            SpillDetected: it came to lie in host memory; it is given back.
            DeviceError: the device failed otherwise.
        """
        if nbytes <= 0:
            raise ValueError(f"a segment has at least one byte, got {nbytes}")
        with self._lock:
            if self.overhead is None:
                raise RuntimeError("take() before start(): call start(), which makes the context and measures it")
            free = self._free_for(nbytes)
            if nbytes > free:
                raise BudgetExceeded(self._not_enough(nbytes, free, what, "Nothing was allocated."))
            hint = self._provider.hint(nbytes)
            if hint:
                warnings.warn(f"cuda:{self._index}: {hint}", RuntimeWarning, stacklevel=2)
            spilled_before = self._provider.spilled_bytes() or 0
            address = self._malloc(nbytes, what)
            self._live[address] = nbytes
            segment = Segment(self, address, nbytes)
            try:
                self._check([(address, nbytes)], what, spilled_before)
            except BaseException:
                segment.release()
                raise
            return segment

    def _free_for(self, nbytes: int) -> int:
        free = self._provider.free_bytes()
        if nbytes > free:
            self._trim()
            free = self._provider.free_bytes()
        return free

    def _malloc(self, nbytes: int, what: str) -> int:
        """One plain cudaMalloc, tried a second time after giving back what is not needed."""
        try:
            return self._runtime.malloc(self._index, nbytes)
        except LowLevelError as error:
            self._raise_unless_refused(error, nbytes, what)
        self._trim()
        try:
            return self._runtime.malloc(self._index, nbytes)
        except LowLevelError as error:
            free = self._raise_unless_refused(error, nbytes, what)
            raise BudgetExceeded(self._no_piece(nbytes, free, what)) from error

    def _raise_unless_refused(self, error: LowLevelError, nbytes: int, what: str) -> int:
        """Free bytes, where CUDA said "out of memory" though they would do; else the error that tells the cause."""
        if error.code != OUT_OF_MEMORY:
            raise DeviceError(
                f"cuda:{self._index} failed while {what} was taken ({format_bytes(nbytes)}): {error}. This is no lack "
                "of memory; the device may be lost: save what is in host memory and start the process anew"
            ) from error
        free = self._provider.free_bytes()
        if nbytes > free:
            outcome = "It went between the look at it and the request; nothing was allocated."
            raise BudgetExceeded(self._not_enough(nbytes, free, what, outcome)) from error
        return free

    def _give_back(self, address: int) -> None:
        if self._live.pop(address, None) is not None:
            self._runtime.free(self._index, address)

    # ---------------------------------------------------------------- where it lies

    def check_residency(self, pinned_bytes: int = 0) -> None:
        """Look again whether all segments lie on the device; some milliseconds, only where the driver can spill.

        Arguments:
            pinned_bytes: host memory that this process pinned since the start, which the system counts alike.

        Raises:
            SpillDetected: some do not. They are still held.
        """
        with self._lock:
            self._check(list(self._live.items()), "memory", self._spilled_before + pinned_bytes)

    def _check(self, segments: list[tuple[int, int]], what: str, spilled_before: int) -> None:
        if not self._provider.can_spill or not segments:
            return
        nbytes = sum(size for _, size in segments)
        spilled = self._provider.spilled_bytes()
        if spilled is not None:
            grown = spilled - spilled_before
            if grown > _SPILL_TOLERANCE_BYTES:
                reason = f"{format_bytes(grown)} more of this process lie in host memory than before"
                raise SpillDetected(self._spill_text(nbytes, what, reason), spilled_bytes=grown)
            return
        try:
            rates = self._rates(segments)
        except LowLevelError as error:
            raise DeviceError(f"cuda:{self._index} failed while the speed of memory was measured: {error}") from error
        if rates and statistics.median(rates) < _SLOW * self._fast_bytes_per_s:
            reason = (
                f"it is copied at {statistics.median(rates) / 1e9:.0f} GB/s, device memory at "
                f"{self._fast_bytes_per_s / 1e9:.0f} GB/s (measured)"
            )
            raise SpillDetected(self._spill_text(nbytes, what, reason), spilled_bytes=nbytes)

    def _prepare_canary(self) -> None:
        """Two small buffers, taken while the device is surely free, whose copy rate is the measure for all others."""
        if self._provider.spilled_bytes() is not None:
            return  # the system tells it itself
        source = self._runtime.malloc(self._index, _WINDOW_BYTES)
        try:
            target = self._runtime.malloc(self._index, _WINDOW_BYTES)
        except LowLevelError:
            self._runtime.free(self._index, source)
            raise
        self._canary = source, target
        rates = [self._runtime.copy_bytes_per_s(self._index, source, target, _WINDOW_BYTES) for _ in range(3)]
        self._fast_bytes_per_s = statistics.median(rates)

    def _drop_canary(self) -> None:
        addresses, self._canary = self._canary, None
        for address in addresses or ():
            with contextlib.suppress(LowLevelError):
                self._runtime.free(self._index, address)

    def _rates(self, segments: list[tuple[int, int]]) -> list[float]:
        """Copy rates of the first, middle and last window of each segment; what is in them stays as it is.

        Segments smaller than a window are left out: a small copy is slow for other reasons.
        """
        if self._canary is None:
            return []
        return [
            self._runtime.copy_bytes_per_s(self._index, address + offset, self._canary[1], _WINDOW_BYTES)
            for address, nbytes in segments
            if nbytes >= _WINDOW_BYTES
            for offset in sorted({0, (nbytes - _WINDOW_BYTES) // 2 // 512 * 512, nbytes - _WINDOW_BYTES})
        ]

    # ---------------------------------------------------------------- messages

    def _neighbours(self) -> str:
        own = self.held_bytes + (self.overhead.nbytes if self.overhead else 0)
        text = describe_neighbours(self._provider.others(own), self._provider.unnamed)
        return f" Others: {text}." if text else " No other process is seen on the device."

    def _not_enough(self, nbytes: int, free: int, what: str, outcome: str) -> str:
        total = self._provider.total_bytes()
        overhead = self.overhead.nbytes if self.overhead else 0
        headroom = self._provider.headroom_bytes()
        most = max(0, total - overhead - headroom)
        start = f"cuda:{self._index}: {what} needs"
        if nbytes > most:
            exact = format_bytes(nbytes) == format_bytes(most)
            less = f"less {format_bytes(overhead)} of context and libraries"
            less += f" and {format_bytes(headroom)} of headroom" if headroom else ""
            return (
                f"{start} {format_bytes(nbytes, exact=exact)}, more than the device can ever give: "
                f"{format_bytes(most, exact=exact)} ({format_bytes(total)} in all, {less}). {outcome} Take a smaller "
                f"model or batch; a budget of {format_bytes(total - headroom)} or less is planned for."
            )
        exact = format_bytes(nbytes) == format_bytes(free)
        needed, given, whole = (format_bytes(count, exact=exact) for count in (nbytes, free, total))
        kept = f" ({format_bytes(headroom)} of headroom off already)" if headroom else ""
        held = f"; this process holds {format_bytes(self.held_bytes)} in segments" if self.held_bytes else ""
        return (
            f"{start} {needed}, and {given} of {whole} are free{kept}{held}.{self._neighbours()} {outcome} "
            f"Free at least {format_bytes(nbytes - free)} there, or lower the budget to "
            f"{format_bytes(free + overhead + self.held_bytes)} or less."
        )

    def _no_piece(self, nbytes: int, free: int, what: str) -> str:
        """CUDA refused although enough is free: a smaller batch is not the first thing to think of."""
        if self._address_space_limit_bytes is not None:
            cause = (
                f"the address space of this process is limited to {format_bytes(self._address_space_limit_bytes)} "
                "(RLIMIT_AS, `ulimit -v`), and device memory counts there too: lift that limit"
            )
        elif self._provider.kind == "wddm":
            cause = (
                "Windows backs device memory with its page file, which may be too small, or no free piece is that "
                "large: enlarge the page file, or close other programs that use the device"
            )
        elif self._provider.shares_host_memory:
            cause = (
                "file cache may hold the memory, or no free piece is that large: drop the cache "
                "(`sync; echo 3 | sudo tee /proc/sys/vm/drop_caches`)"
            )
        else:
            cause = (
                "no free piece may be that large (the free memory lies in several), or a driver limit is reached: "
                "start this process anew, or close the others on the device"
            )
        return (
            f"cuda:{self._index}: CUDA refused {format_bytes(nbytes)} for {what} although {format_bytes(free)} are "
            f"free; {cause}.{self._neighbours()} Nothing was allocated."
        )

    def _spill_text(self, nbytes: int, what: str, reason: str) -> str:
        return (
            f"cuda:{self._index}: {what} of {format_bytes(nbytes)} does not lie on the device: {reason}. It would work "
            f"many times slower, so brim does not go on.{self._neighbours()} Close other programs that use the device, "
            "or lower the budget."
        )
