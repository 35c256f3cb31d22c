"""Two plans side by side: what a change of the model or the code did to the memory of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from brim.units import format_bytes

__all__ = ["PlanDifference", "compare"]


@dataclass(frozen=True)
class PlanDifference:
    """How one plan differs from another; positive numbers: the second needs more.

    Attributes:
        peak_bytes: of the whole peak.
        by_kind: of each kind that changed.
        by_layer: (layer, bytes) of each layer whose bytes at the peak changed, largest change first.
        instructions: how many more instructions.
    """

    peak_bytes: int
    by_kind: dict[str, int]
    by_layer: list[tuple[str, int]]
    instructions: int

    def __bool__(self) -> bool:
        return bool(self.peak_bytes or self.by_kind or self.by_layer or self.instructions)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        lines = [f"peak       {_signed(self.peak_bytes)}"]
        lines += [f"  {kind:<11}{_signed(nbytes)}" for kind, nbytes in self.by_kind.items()]
        lines += [f"  layer {layer or '(none)'}  {_signed(nbytes)}" for layer, nbytes in self.by_layer]
        if self.instructions:
            lines.append(f"  instructions {self.instructions:+d}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Values that ``json.dumps`` writes."""
        return {
            "peak_bytes": self.peak_bytes,
            "by_kind": dict(self.by_kind),
            "by_layer": [list(row) for row in self.by_layer],
            "instructions": self.instructions,
        }


def _signed(nbytes: int) -> str:
    return ("+" if nbytes >= 0 else "-") + format_bytes(abs(nbytes))


def compare(old: Any, new: Any) -> PlanDifference:
    """What the plan ``new`` needs more (or less) than the plan ``old``."""
    kinds_old, kinds_new = old.by_kind(), new.by_kind()
    kinds = {k: kinds_new.get(k, 0) - kinds_old.get(k, 0) for k in {**kinds_old, **kinds_new}}
    layers_old = {layer: sum(row.values()) for layer, row in old.by_layer()}
    layers_new = {layer: sum(row.values()) for layer, row in new.by_layer()}
    layers = [(k, layers_new.get(k, 0) - layers_old.get(k, 0)) for k in {**layers_old, **layers_new}]
    return PlanDifference(
        new.peak_bytes - old.peak_bytes,
        {kind: nbytes for kind, nbytes in kinds.items() if nbytes},
        sorted(((k, n) for k, n in layers if n), key=lambda row: (-abs(row[1]), row[0])),
        _instructions(new) - _instructions(old),
    )


def _instructions(plan: Any) -> int:
    return sum(len(p.prepared.program.instructions) for p in plan.programs)
