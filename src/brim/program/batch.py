"""The largest batch that fits: plans for other batches, few of them, until one fits and the next larger does not.

The peak is nearly a straight line over the batch, so a secant lands close to the answer at once; it is no exact line
(rounding, holes, a kernel that needs other scratch), so the answer and its neighbour are always planned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from brim.errors import ShapeError, TraceError

if TYPE_CHECKING:
    from brim.program.plan import Plan

__all__ = ["BatchSearch", "batch_of", "largest_batch", "with_batch"]

_BATCH_MAX = 2**40


def batch_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """The size of the first axis that the inputs share: the batch.

    Raises:
        ValueError: there are no inputs, one has no axes, or they differ.
    """
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"the inputs of the step have shapes {list(shapes)}: they share no first axis that could be the batch"
        )
    return int(next(iter(sizes)))  # type: ignore[arg-type]


def with_batch(plan: Plan, batch: int) -> Plan:
    """The plan for another batch."""
    batch_of(plan.input_shapes)
    if plan.replan is None:
        raise ValueError("this plan cannot be made for another batch")
    made = plan.replan([(batch, *shape[1:]) for shape in plan.input_shapes])
    return made if made.options == plan.options else made.vary(plan.options)


def largest_batch(plan: Plan, limit_bytes: int) -> int:
    """The largest batch whose planned peak is within a limit; 0 when not even the smallest is.

    Raises:
        ValueError: the step cannot be planned for other batches.
    """
    found = BatchSearch(plan, limit_bytes).run()
    assert found is not None  # no deadline was given
    return found


class BatchSearch:
    """One search.

    Arguments:
        plan: of some batch.
        limit_bytes: what the peak has to be within; equality fits.
        needed: the bytes that count for a plan; by default its peak, without a second set of input buffers.
        late: True when no further plan may be made.
        vary: applied to the plan of each batch, such as recomputation.

    Attributes:
        known: batch -> bytes, of all that were planned; None where the step refuses a batch (batch norm, one sample).
    """

    def __init__(
        self,
        plan: Plan,
        limit_bytes: int,
        needed: Callable[[Plan], int] = lambda plan: plan.least_bytes,
        late: Callable[[], bool] = lambda: False,
        vary: Callable[[Plan], Plan] | None = None,
    ) -> None:
        self.plan, self.limit_bytes, self.needed, self.late, self.vary = plan, limit_bytes, needed, late, vary
        self.batch = batch_of(plan.input_shapes)
        self.known: dict[int, int | None] = {}
        if vary is None:
            self.known[self.batch] = needed(plan)
        self.time_is_up = False

    def fits(self, batch: int) -> bool:
        """Plan for a batch. Batches that the step refuses count as if they fitted: something larger may do."""
        if batch not in self.known:
            if self.late():
                self.time_is_up = True
                return True
            try:
                made = self.plan if batch == self.batch else with_batch(self.plan, batch)
                self.known[batch] = self.needed(made if self.vary is None else self.vary(made))
            except (ShapeError, TraceError):
                if batch > 2:
                    raise ValueError(f"the step cannot be planned for batches of {batch}") from None
                self.known[batch] = None
        nbytes = self.known[batch]
        return nbytes is None or nbytes <= self.limit_bytes

    def run(self) -> int | None:
        """The batch; 0 when none fits; None when time was up before it was known.

        Raises:
            ValueError: the step cannot be planned for other batches.
        """
        low, high = 0, _BATCH_MAX  # low fits (0 always does), high does not (or nobody would want it)
        guess, row = self.batch, 0  # row: how many guesses in a row were too small (or, negative, too large)
        while high - low > 1:
            if self.fits(guess):
                low, row = max(low, guess), max(row, 0) + 1
            else:
                high, row = min(high, guess), min(row, 0) - 1
            if self.time_is_up:
                return None
            if len(self.known) <= 2:  # one batch says nothing of the slope, so the first guess may err by any amount
                row = 1 if row > 0 else -1
            guess = self.next_guess(low, high, row)
        return low if self.known.get(low, 0) is not None and low < _BATCH_MAX - 1 else 0

    def next_guess(self, low: int, high: int, row: int) -> int:
        """Where the line through two batches crosses the limit; ever further while that errs on one side."""
        points = {b: nbytes for b, nbytes in self.known.items() if nbytes is not None}
        if not points:
            return low + 1
        if len(points) == 1:
            (first,) = points.values()
            points[0] = min(self.plan.resident_bytes, first - 1)
        # The ends of the bracket, or what is nearest to the limit.
        nearest = sorted(points, key=lambda b: (b not in (low, high), abs(points[b] - self.limit_bytes)))
        b0, b1 = sorted(nearest[:2])
        guess = low + 1
        if points[b1] > points[b0]:
            guess = b0 + (self.limit_bytes - points[b0]) * (b1 - b0) // (points[b1] - points[b0])
        step = 2 ** min(abs(row) - 1, 40) - 1
        guess = max(guess, low + 1) + step if row > 0 else min(guess, high - 1) - step
        if high == _BATCH_MAX:
            guess = min(guess, max(64, 8 * low))
        elif abs(row) > 6:
            guess = (low + high) // 2
        return min(max(guess, low + 1), high - 1)
