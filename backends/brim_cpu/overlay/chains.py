"""Which lines of an interpreter's program become chains (native/vm_chain.hpp), whose results stay in registers.

A chain is a run of float32 lines of exact arithmetic, and of comparisons followed by the choice that alone reads them.
Each becomes a link, whose operands are the result of the link before (a), memory (m) or a constant (c); a result is
stored only where another line reads it later. The results' bits are those of the lines by themselves.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from brim.expr import SCALAR_FUNCTIONS, FusedFormula, ScalarStep
from brim_cpu import native

__all__ = ["Chains", "Line", "chains_of", "depth_first", "link_codes"]

Line = tuple[int, int, int, int, int]
"""(code, d, a, b, c)"""

UNARY = ("neg", "abs", "square", "sqrt")
BINARY = ("add", "sub", "mul", "div", "max", "min")
MAX_LINES = 200
"""Of a chain: with a store for each and what is asked for ahead there is room for its links (kMaxLinks of vm.cpp)."""
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@functools.cache
def link_codes() -> dict[str, int]:
    """Code of each kind of link by its name."""
    room = ctypes.create_string_buffer(1 << 14)
    native.Function("brim_vm_link_names", "pi").bind(ctypes.addressof(room), len(room))()
    pairs = (line.split() for line in room.value.decode().splitlines())
    return {name: int(code) for code, name in pairs}


@dataclass
class Chains:
    """The chains of a program.

    Attributes:
        links: (code, x, y) of every link; x and y are slots, or -1 - number for a constant.
        at: the line at which a chain starts -> (how many lines it is, its first link).
        streams: arrays read by chains, each with the line at which the first chain that reads it starts.
    """

    links: list[tuple[int, int, int]] = field(default_factory=list)
    at: dict[int, tuple[int, int]] = field(default_factory=dict)
    streams: list[tuple[int, int]] = field(default_factory=list)


def chains_of(
    lines: Sequence[Line], codes: Mapping[str, int], constants: Mapping[int, int], arrays: int, outputs: int
) -> Chains:
    """The chains of a program.

    Arguments:
        lines: the program.
        codes: of the instructions, by name.
        constants: slot of a constant's register -> number of the constant.
        arrays, outputs: how many; the slots of inputs, then of outputs are the first ones.
    """
    return _Finder(lines, codes, constants, arrays, outputs).found


class _Finder:
    def __init__(
        self, lines: Sequence[Line], codes: Mapping[str, int], constants: Mapping[int, int], arrays: int, outputs: int
    ) -> None:
        self.lines, self.constants, self.arrays, self.outputs = lines, constants, arrays, outputs
        self.arity = {code: _arity(name) for name, code in codes.items()}
        names = {codes[f"{fn}.f32"]: fn for fn in (*UNARY, *BINARY)}
        self.kinds = [names.get(line[0]) for line in lines]  # the functions of links, None for other lines
        comparisons = {codes[f"{fn}.f32"]: fn for fn in COMPARISONS}
        for n, (line, after) in enumerate(pairwise(lines)):
            if line[0] in comparisons and after[0] == codes["where.4"] and self.is_choice(n):
                self.kinds[n], self.kinds[n + 1] = comparisons[line[0]], "where"
        self.found = Chains()
        start = 0
        while start < len(lines):
            end = start
            while end < len(lines) and end - start < MAX_LINES and self.links_up(end):
                end += 1
            if end > start and self.chooses(end - 1):  # its choice is in the next chain
                end -= 1
            if end - start >= 2:
                self.make(start, end)
            start = max(end, start + 1)

    def links_up(self, n: int) -> bool:
        """True for a line that may be a link: one with an operand that is no constant."""
        return self.kinds[n] is not None and any(slot not in self.constants for slot in self.operands(n))

    def operands(self, n: int) -> tuple[int, ...]:
        """The slots that a line reads; none for random numbers, whose arguments are no slots."""
        return self.lines[n][2 : 2 + self.arity.get(self.lines[n][0], 0)]

    def readers(self, n: int) -> list[int]:
        """The lines that read a line's result."""
        slot, found = self.lines[n][1], []
        for later in range(n + 1, len(self.lines)):
            if slot in self.operands(later):
                found.append(later)
            if self.lines[later][1] == slot:
                break
        return found

    def is_output(self, n: int) -> bool:
        return self.arrays <= self.lines[n][1] < self.arrays + self.outputs

    def is_product(self, n: int) -> bool:
        """True for a product that is only added to, or subtracted from or by, the result of the line before it."""
        if self.kinds[n] != "mul" or self.kinds[n + 1] not in ("add", "sub") or self.is_output(n):
            return False
        before, own = self.lines[n - 1][1], self.lines[n][1]
        return (
            before != own
            and before not in self.operands(n)
            and sorted(self.operands(n + 1)) == sorted((before, own))
            and self.readers(n) == [n + 1]
        )

    def is_choice(self, n: int) -> bool:
        """True for a comparison that only the next line reads, to choose by."""
        _, mask, *compared, _ = self.lines[n]
        return (
            not self.is_output(n)
            and self.readers(n) == [n + 1]
            and self.lines[n + 1][2] == mask
            and any(slot not in self.constants for slot in compared)
        )

    def make(self, start: int, end: int) -> None:
        """The links of a chain, in groups: one line, a product and its sum, or a comparison and its choice."""
        groups: list[tuple[int, ...]] = []
        n = start
        while n < end:
            pair = self.chooses(n) or (n > start and n + 1 < end and self.is_product(n))
            groups.append((n, n + 1) if pair else (n,))
            n = groups[-1][-1] + 1
        first = len(self.found.links)
        held: int | None = None  # the slot whose value the accumulator holds
        for group, after in zip(groups, (*groups[1:], ())):
            self.link(group, held)
            last = group[-1]
            held = self.lines[last][1]
            passed_on = after[:1] if after and self.chooses(after[0]) else after
            if self.is_output(last) or any(reader not in passed_on for reader in self.readers(last)):
                self.emit("store", held, held)
        self.emit("end", 0, 0)
        self.found.at[start] = (end - start, first)
        known = {array for _, array in self.found.streams}
        read = {slot for n in range(start, end) for slot in self.operands(n) if slot < self.arrays}
        self.found.streams += [(start, slot) for slot in sorted(read - known)]

    def chooses(self, n: int) -> bool:
        return self.kinds[n] in COMPARISONS

    def letters(self, operands: Sequence[int], held: int | None) -> str:
        return "".join("a" if slot == held else "c" if slot in self.constants else "m" for slot in operands)

    def link(self, group: tuple[int, ...], held: int | None) -> None:
        first, last = group[0], group[-1]
        kind = self.kinds[last]
        operands = self.operands(first)
        if kind == "where":
            self.link((first,), held)
            _, x, y = self.operands(last)
            self.emit(f"where.{self.letters((x, y), None)}", x, y)
            return
        letters = self.letters(operands, held)
        if len(group) == 2:
            product_first = self.operands(last)[0] == self.lines[first][1]
            letters = f"{letters}a" if product_first else f"a{letters}"
        self.emit(f"{kind}.{letters}", operands[0], operands[-1])

    def emit(self, name: str, x: int, y: int) -> None:
        number = [-1 - self.constants[slot] if slot in self.constants else slot for slot in (x, y)]
        self.found.links.append((link_codes()[name], number[0], number[1]))


def _arity(name: str) -> int:
    fn = name.partition(".")[0]
    return SCALAR_FUNCTIONS[fn][0] if fn in SCALAR_FUNCTIONS else 1  # "cast", "copy"


def depth_first(formula: FusedFormula) -> FusedFormula:
    """The formula with its steps in an order in which most results are read by the very next step.

    What a step reads is computed right before it, the larger part first; but last a product or a
    comparison, which are links together with what reads them.
    """
    steps = formula.steps
    needs = [[which for kind, which in step.args if kind == "step"] for step in steps]
    sizes: list[int] = []
    for need in needs:  # of what a step needs, counted again for each reader
        sizes.append(min(1 + sum(sizes[n] for n in set(need)), 1 << 30))
    order: list[int] = []
    done: set[int] = set()

    def urgency(n: int) -> tuple[bool, int, bool]:
        return steps[n].fn not in COMPARISONS, sizes[n], steps[n].fn != "mul"

    for output in formula.outputs:
        waiting = [output]
        while waiting:
            n = waiting[-1]
            open_ones = [need for need in needs[n] if need not in done]
            if n not in done and open_ones:
                waiting.append(max(open_ones, key=urgency))
                continue
            waiting.pop()
            if n not in done:
                done.add(n)
                order.append(n)
    numbers = {old: new for new, old in enumerate(order)}

    def moved(step: ScalarStep) -> ScalarStep:
        return replace(step, args=tuple((kind, numbers[x] if kind == "step" else x) for kind, x in step.args))

    return FusedFormula(tuple(moved(steps[n]) for n in order), tuple(numbers[n] for n in formula.outputs))
