"""What a planned program moves and launches: kernels, bytes and arithmetic of each instruction, against the least.

Bytes are those of operands, not of the chips' buses: every element that an instruction reads or writes counts once, a
broadcast one once, views nothing; what is updated in place is read and written. Caches may serve part of it (on a CPU
most of a small step), and kernels that read an operand several times move more. Scratch is told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from brim.backend import BoundKernel
from brim.program.ir import Instruction, Program, Value
from brim.program.least import PHASES, Least, multiplies, read_bytes, written_bytes
from brim.program.lower import Prepared
from brim.program.passes.epilogue import is_epilogue, product_of
from brim.units import format_bytes

__all__ = ["Count", "Traffic", "counted", "traffic_of"]


@dataclass(frozen=True, slots=True)
class Count:
    """Of one or several instructions.

    Attributes:
        launches: kernels and library products; on a CPU, calls of kernels.
        read_bytes, written_bytes: of operands.
        scratch_bytes: working memory, which a kernel writes and reads at least once.
        flops: additions and multiplications of products and convolutions by their definitions.
    """

    launches: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    scratch_bytes: int = 0
    flops: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes read and written, scratch apart."""
        return self.read_bytes + self.written_bytes

    def __add__(self, other: Count) -> Count:
        return Count(
            self.launches + other.launches,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.scratch_bytes + other.scratch_bytes,
            self.flops + other.flops,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Kernels and bytes of one run of a program.

    Attributes:
        program: the program as it runs.
        counts: one for each instruction.
        least: what the same step needs at least (``brim.program.least``).
    """

    program: Program
    counts: list[Count]
    least: Least

    @property
    def total(self) -> Count:
        """Of all instructions."""
        return sum(self.counts, Count())

    def by_phase(self) -> dict[str, Count]:
        """Of each phase, in order."""
        found = self._grouped(lambda i: i.phase)
        return {phase: found.get(phase, Count()) for phase in PHASES}

    def by_op(self) -> dict[str, Count]:
        """Of each kind of op, the one that moves most first."""
        found = self._grouped(lambda i: i.op.name)
        return dict(sorted(found.items(), key=lambda item: (-item[1].nbytes, item[0])))

    def largest(self, top: int = 10) -> list[tuple[int, Count]]:
        """(number of the instruction, what it moves), most first."""
        return sorted(enumerate(self.counts), key=lambda item: (-item[1].nbytes, item[0]))[:top]

    def _grouped(self, key: Callable[[Instruction], str]) -> dict[str, Count]:
        found: dict[str, Count] = {}
        for instruction, count in zip(self.program.instructions, self.counts, strict=True):
            name = key(instruction)
            found[name] = found.get(name, Count()) + count
        return found

    def summary(self) -> str:
        """One line: kernels and bytes a run, and how far from the least."""
        total, least = self.total, self.least
        ratio = f"{total.nbytes / least.nbytes:.2f} times " if least.nbytes else ""
        return (
            f"{_kernels(total.launches)} (at least {least.launches:,}), {format_bytes(total.nbytes)} read and written, "
            f"{ratio}the least ({format_bytes(least.nbytes)})"
        )

    def lines(self) -> list[str]:
        """The summary, and a line for each phase."""
        found = [f"a run: {self.summary()}"]
        for phase, count in self.by_phase().items():
            if count.launches:
                least = format_bytes(self.least.by_phase[phase])
                found.append(f"  {phase}: {_kernels(count.launches)}, {format_bytes(count.nbytes)} (least {least})")
        return found

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("phase", "kernels", "read", "written", "least", "scratch", "Gflop")]
        counts = {phase: count for phase, count in self.by_phase().items() if count != Count()}
        rows += [_row(name, count, format_bytes(self.least.by_phase[name])) for name, count in counts.items()]
        rows += [_row("all", self.total, format_bytes(self.least.nbytes)), ("",) * 7, ("op", *rows[0][1:])]
        rows += [_row(name, count, "") for name, count in self.by_op().items()]
        rows += [("",) * 7, ("largest", *rows[0][1:])]
        for number, count in self.largest():
            one = self.program.instructions[number]
            rows.append(_row(f"{number} {one.op.name} {one.phase} {one.layer}".strip(), count, ""))
        return _aligned(rows)


def _kernels(count: int) -> str:
    return f"{count:,} kernel{'s' if count != 1 else ''}"


def _row(name: str, count: Count, least: str) -> tuple[str, ...]:
    sizes = [format_bytes(n) for n in (count.read_bytes, count.written_bytes)]
    return name, f"{count.launches:,}", *sizes, least, format_bytes(count.scratch_bytes), f"{count.flops / 1e9:,.2f}"


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    lines = list(rows)
    widths = [max(len(row[n]) for row in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(row[1:], widths[1:], strict=True))])
        .rstrip() for row in lines
    )  # fmt: skip


def traffic_of(prepared: Prepared, least: Least) -> Traffic:
    """What a prepared program moves, beside the least of its step."""
    shares = prepared.memory.shares
    pairs = zip(prepared.program.instructions, prepared.kernels, strict=True)
    return Traffic(prepared.program, [counted(one, kernel, shares) for one, kernel in pairs], least)


def counted(instruction: Instruction, kernel: BoundKernel, shares: dict[Value, Value]) -> Count:
    """What one instruction moves.

    Arguments:
        shares: value -> the value over which it is written, as ``MemoryMap.shares``.
    """
    first = next(instruction.refs, None)
    out = instruction.outs[0] if instruction.outs else None
    over = (
        out is not None and first is not None and instruction.ins[0] is first and _same_place(out, first.value, shares)
    )
    return Count(
        kernel.launches - (kernel.skipped_in_place if over else 0),
        sum(read_bytes(instruction, over).values()),
        written_bytes(instruction, over),
        kernel.scratch_bytes,
        _flops(instruction),
    )


def _same_place(out: Value, old: Value, shares: dict[Value, Value]) -> bool:
    """Whether an output lies where an input of its instruction lies: in a state's memory, or taken over from it."""
    return shares.get(out) is old or (out.home is not None and out.home is (old.home or old))


def _flops(instruction: Instruction) -> int:
    """Two for each multiplication of a product, by its definition."""
    if not multiplies(instruction):
        return 0
    a, b = (ref.spec for ref in instruction.ins[:2])
    op, params = product_of(instruction) if is_epilogue(instruction) else (instruction.op, instruction.params)
    name = op.name
    if name == "matmul":
        return 2 * op.infer([a, b], params)[0].size * a.shape[-1]
    if not a.size or not b.size:
        return 0
    if name == "conv2d":  # each output is a sum over a filter
        return 2 * op.infer([a, b], params)[0].size * (b.size // b.shape[0])
    if name == "conv2d_grad_input":  # each gradient is handed to a filter's inputs
        return 2 * a.size * (b.size // b.shape[0])
    made = instruction.outs[0].spec
    return 2 * a.size * (made.size // made.shape[0])
