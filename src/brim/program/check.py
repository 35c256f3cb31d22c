"""A plan held against a budget, without a device: for continuous integration and for the command line."""

from __future__ import annotations

from typing import Any

from brim.errors import BudgetExceeded
from brim.memory.budget import BudgetLike
from brim.memory.report import budget_exceeded
from brim.program.admit import plan_report
from brim.program.compile import plan as make_plan
from brim.program.fit import remedies
from brim.program.plan import Plan

__all__ = ["assert_fits", "over_budget"]


def over_budget(plan: Plan, budget: BudgetLike, search_s: float | None = None) -> BudgetExceeded | None:
    """The error of a plan whose peak is over a budget, with remedies that were planned; None when it fits.

    Arguments:
        plan: what is needed.
        budget: what there is.
        search_s: seconds to look for remedies; 0 for none, None for the usual two.
    """
    limit_bytes = plan.limit_bytes(budget)
    if limit_bytes is None or plan.peak_bytes <= limit_bytes:
        return None
    return budget_exceeded(
        plan_report(
            plan,
            budget_bytes=limit_bytes,
            budget_text=str(budget),
            needed_bytes=plan.peak_bytes,
            live_bytes=0,
            by_kind=plan.by_kind(),
            remedies=list(remedies(plan, limit_bytes, time_s=search_s)) if search_s != 0 else [],
            exactness={k: v for k, v in plan.exactness.items() if k in ("workspace", "overhead")},
        )
    )


def assert_fits(step: Any, *args: Any, budget: BudgetLike, device: Any = None, **kwargs: Any) -> Plan:
    """Check in a test that a step stays within a memory budget; nothing is run or allocated, no GPU is needed.

    Arguments:
        step: the step, a compiled step, or a model.
        args, kwargs: its arguments; ``brim.spec(shape, dtype)`` stands for a tensor.
        budget: such as "6GiB".
        device: device to plan for; the default device when None.

    Returns:
        The plan.

    Raises:
        BudgetExceeded: the plan's peak is over the budget; the report says where it is, and what would fit.
    """
    made = make_plan(step, *args, device=device, budget=budget, **kwargs)
    if (error := over_budget(made, budget)) is not None:
        raise error
    return made
