"""Fusion: elementwise instructions that hand values to each other become one, which goes through memory once.

A value that only members of its group read is never stored. A group runs at one place in the order; instructions that
are no members stay where they are. Results are the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.groups import Group, group_of, is_cheap, is_fusible, joined

__all__ = ["fuse"]

STEPS_MAX = 64
OPERANDS_MAX = 32
"""Inputs, outputs and registers of one group: what stays in the second-level cache, block by block."""

_ROUNDS_MAX = 8


def fuse(program: Program) -> Program:
    """The program with elementwise instructions merged into groups, where that keeps no more bytes alive in between.

    - A producer joins its consumer, at the consumer's place or at its own: not past an instruction that it depends on,
      and only if what it keeps alive for longer is no more than what need not be kept any more.
    - A cheap producer with several readers is copied into each of them, if then nobody needs its value stored: masks
      and other small things are computed again in the backward pass.
    - Only instructions of one shape join; what works on another shape (a scale a channel) stays by itself.
    """
    search = _Search(program)
    search.copy_cheap_producers()
    search.merge()
    return search.result()


class _Node:
    """A group or another instruction, and where in the order it runs."""

    __slots__ = ("after", "at", "before", "group", "instruction", "number", "reads")

    def __init__(self, number: int, instruction: Instruction) -> None:
        self.number, self.at = number, float(number)
        self.instruction = instruction
        self.group: Group | None = group_of(instruction) if is_fusible(instruction) else None
        self.before: set[_Node] = set()  # must run before this one
        self.after: set[_Node] = set()
        self.reads: list[Ref] = []
        self.update()

    def update(self) -> None:
        operands: Iterable[object] = self.instruction.ins if self.group is None else self.group.ins
        self.reads = [x for x in operands if isinstance(x, Ref)]

    @property
    def outs(self) -> Iterable[Value]:
        return self.instruction.outs if self.group is None else self.group.outs


class _Search:
    """Merges nodes as long as it pays."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = {_Node(n, instruction) for n, instruction in enumerate(program.instructions)}
        self.changed: set[_Node] = set()
        self.needed = {ref.value for ref in program.results}
        self.maker: dict[Value, _Node] = {}
        self.readers: dict[Value, set[_Node]] = {}
        self.ordered = _in_order(self.nodes)
        self._connect(self.ordered)
        for node in self.ordered:
            self._drop_dead_outputs(node)

    def _drop_dead_outputs(self, node: _Node) -> None:
        dead = {out for out in node.outs if out not in self.needed and out not in self.readers}
        if node.group is None or not 0 < len(dead) < len(node.group.outs):
            return
        for ref in node.reads:
            self.readers[ref.value].discard(node)
        node.group = node.group.without(dead)
        node.update()
        for ref in node.reads:
            self.readers[ref.value].add(node)
        self.changed.add(node)

    def _connect(self, ordered: list[_Node]) -> None:
        """Who must run before whom: writers before readers; readers of a state before what writes its memory."""
        writer: dict[Value, _Node] = {}
        readers_since: dict[Value, list[_Node]] = {}

        def edge(first: _Node | None, second: _Node) -> None:
            if first is not None and first is not second:
                first.after.add(second)
                second.before.add(first)

        for node in ordered:
            instruction = node.instruction
            written = [out.home for out in instruction.outs if out.home is not None]
            refs = list(instruction.refs)
            if instruction.op is STORE:
                written.append(refs[0].value)
                refs = refs[1:]
            for ref in refs:
                self.readers.setdefault(ref.value, set()).add(node)
                edge(self.maker.get(ref.value), node)
                memory = ref.value.home or ref.value
                edge(writer.get(memory), node)
                readers_since.setdefault(memory, []).append(node)
            for memory in written:
                edge(writer.get(memory), node)
                for reader in readers_since.pop(memory, []):
                    edge(reader, node)
                writer[memory] = node
            for out in instruction.outs:
                self.maker[out] = node

    # ------------------------------------------------------------------------------------------------- what is legal

    def _joinable(self, first: _Node, second: _Node) -> bool:
        """Whether the groups have one shape, ``second`` reads ``first`` element for element, and both fit in one."""
        a, b = first.group, second.group
        if a is None or b is None or a.shape != b.shape:
            return False
        made = set(a.outs)
        if any(ref.value in made and not ref.whole for ref in second.reads):
            return False
        return len(a.formula.steps) + len(b.formula.steps) <= STEPS_MAX + 16  # equal steps are counted once, later

    @staticmethod
    def _fits(group: Group) -> bool:
        operands = len(group.ins) + len(group.outs) + group.live_steps()
        return len(group.formula.steps) <= STEPS_MAX and operands <= OPERANDS_MAX

    @staticmethod
    def _place(first: _Node, second: _Node) -> float | None:
        """Where both may run as one, as late as possible; None if nowhere."""
        earliest = max((n.at for n in first.before | second.before if n is not first and n is not second), default=-1.0)
        latest = min((n.at for n in first.after | second.after if n is not first and n is not second), default=math.inf)
        if second.at < latest:
            return second.at if second.at > earliest else None
        if first.at > earliest:
            return first.at
        middle = (earliest + latest) / 2
        return middle if earliest < middle < latest else None

    # ------------------------------------------------------------------------------------------------ what it costs

    def _last_read(self, value: Value, without: _Node) -> float:
        if value in self.needed:
            return math.inf
        return max((n.at for n in self.readers.get(value, ()) if n is not without), default=-1.0)

    def _kept_longer(self, node: _Node, until: float) -> int:
        """Bytes of what a node reads that nobody else reads at ``until`` or later; single numbers do not count."""
        values = {ref.value for ref in node.reads if _takes_memory(ref.value) and ref.value.spec.size > 1}
        return sum(value.nbytes for value in values if self._last_read(value, node) < until)

    def _something_between(self, first: _Node, second: _Node) -> bool:
        """Whether anything of size runs between two nodes, while which more bytes might be alive than now."""
        small = sum(out.nbytes for out in first.outs) // 4
        for number in range(math.floor(first.at) + 1, math.ceil(second.at)):
            node = self.ordered[number]
            if node not in self.nodes or not first.at < node.at < second.at:
                continue  # it has become a part of another, or runs elsewhere
            if node.group is None or sum(out.nbytes for out in node.outs) > small:
                return True
        return False

    def _pays(self, first: _Node, second: _Node, at: float) -> bool:
        """Whether running both at ``at`` keeps no more bytes alive over the instructions in between."""
        if not self._something_between(first, second):
            return True
        if at > first.at and self._kept_longer(first, at) > sum(out.nbytes for out in first.outs):
            return False
        if at < second.at:
            earlier = sum(out.nbytes for out in second.outs)
            values = {ref.value for ref in second.reads if _takes_memory(ref.value)}
            freed = sum(value.nbytes for value in values if self._last_read(value, second) <= at)
            return earlier <= freed
        return True

    # ----------------------------------------------------------------------------------------------------- changes

    def merge(self) -> None:
        """Join producers with consumers, nearest first, until nothing more pays."""
        for _ in range(_ROUNDS_MAX):
            merged = False
            for value in self._by_distance():
                for second in _in_order(self.readers.get(value, ())):
                    first = self.maker.get(value)
                    if first is not None and first is not second and self._try(first, second):
                        merged = True
            if not merged:
                return

    def _by_distance(self) -> list[Value]:
        found: list[tuple[float, float, int, Value]] = []
        for value, readers in self.readers.items():
            first = self.maker.get(value)
            if first is not None and first.group is not None:
                gaps = [node.at - first.at for node in readers if node.group is not None and node is not first]
                if gaps:
                    found.append((min(gaps), first.at, len(found), value))
        return [value for *_, value in sorted(found)]

    def _try(self, first: _Node, second: _Node) -> bool:
        if not self._joinable(first, second):
            return False
        at = self._place(first, second)
        if at is None or not self._pays(first, second, at):
            return False
        assert first.group is not None
        assert second.group is not None
        unread = {v for v in first.group.outs if v not in self.needed and self.readers.get(v, set()) <= {second}}
        whole = joined(first.group, second.group, unread)
        if not self._fits(whole):
            return False
        self._unite(first, second, whole, at)
        return True

    def _unite(self, first: _Node, second: _Node, whole: Group, at: float) -> None:
        """``second`` becomes both."""
        for ref in (*first.reads, *second.reads):
            self.readers[ref.value] -= {first, second}
        for value in first.outs:
            self.maker[value] = second
        second.group, second.at = whole, at
        second.update()
        for ref in second.reads:
            self.readers[ref.value].add(second)
        for node in first.before:
            node.after.discard(first)
        for node in first.after:
            node.before.discard(first)
        second.before = (first.before | second.before) - {first, second}
        second.after = (first.after | second.after) - {first, second}
        for node in second.before:
            node.after.add(second)
        for node in second.after:
            node.before.add(second)
        self.nodes.discard(first)
        self.changed.add(second)

    def copy_cheap_producers(self) -> None:
        """Put cheap producers of several readers into each of them, where their value then need not be stored."""
        for node in _in_order(self.nodes):
            group = node.group
            if group is None or len(group.outs) != 1 or group.outs[0] in self.needed or not is_cheap(group):
                continue
            readers = _in_order(self.readers.get(group.outs[0], ()))
            if len(readers) < 2 or not all(self._joinable(node, reader) for reader in readers):
                continue
            last = readers[-1].at
            if any(n.at <= last for n in node.after if n not in readers):
                continue  # a state that it reads is written before the last of them
            if self._kept_longer(node, last) > group.outs[0].nbytes:
                continue
            groups = [joined(group, reader.group, set(group.outs)) for reader in readers if reader.group]
            if all(map(self._fits, groups)):
                self._absorb(node, list(zip(readers, groups, strict=True)))

    def _absorb(self, node: _Node, changed: list[tuple[_Node, Group]]) -> None:
        """Copies of a node become parts of its readers; the node goes."""
        for reader, group in changed:
            reader.group = group
            reader.update()
            reader.before |= node.before
            reader.before.discard(node)
            for earlier in node.before:
                earlier.after.add(reader)
            later = node.after - {reader for reader, _ in changed}
            reader.after |= later
            for after in later:
                after.before.add(reader)
        for ref in node.reads:
            self.readers[ref.value].discard(node)
        for reader, _ in changed:
            for ref in reader.reads:
                self.readers.setdefault(ref.value, set()).add(reader)
        for value in node.outs:
            self.readers.pop(value, None)
            self.maker.pop(value, None)
        for earlier in node.before:
            earlier.after.discard(node)
        for after in node.after:
            after.before.discard(node)
        self.nodes.discard(node)
        self.changed.update(reader for reader, _ in changed)

    def result(self) -> Program:
        """The program with what has become of it."""
        made = self.program.with_instructions(
            [
                node.group.instruction(node.instruction) if node in self.changed and node.group else node.instruction
                for node in _in_order(self.nodes)
            ]
        )
        for node in (
            *self.nodes,
            *self.ordered,
        ):  # they refer to each other, and so would keep the model's memory alive
            node.before.clear()
            node.after.clear()
        return made


def _in_order(nodes: Iterable[_Node]) -> list[_Node]:
    return sorted(nodes, key=lambda node: (node.at, node.number))


def _takes_memory(value: Value) -> bool:
    """True for a value that occupies memory only while it is needed; the others are there anyway."""
    return value.origin in ("temp", "input") and value.home is None
