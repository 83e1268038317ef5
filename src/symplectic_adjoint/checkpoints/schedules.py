"""Schedules: what is kept of the steps of a solve, and how they are reversed with it.

A schedule knows numbers of steps and sizes of what is kept of them, in any unit, and no solver. It
begins a plan for each solve. The plan is asked after each accepted step what to keep and what no
longer, since how many steps will follow is not known; then it yields the actions of the backward
pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint.checkpoints import binomial
from symplectic_adjoint.checkpoints.actions import (
    Action,
    Advance,
    Drop,
    Keep,
    Move,
    Reduce,
    Restore,
    Reverse,
    What,
    Where,
)


class Sizes(NamedTuple):
    """How much room each manner of keeping a step takes; None where it cannot be kept so."""

    state: int = 1
    stages: int | None = None
    graph: int | None = None

    def of(self, what: What) -> int:
        """The size of ``what``."""
        size = self[what]
        assert size is not None
        return size

    def most(self) -> What:
        """The most that can be kept."""
        return max(what for what in What if self[what] is not None)

    def joined(self, other: Sizes) -> Sizes:
        """Room for either of two steps."""
        pairs = zip(self, other, strict=True)
        parts = [None if a is None or b is None else max(a, b) for a, b in pairs]
        return Sizes(max(self.state, other.state), *parts[1:])


UNIT = Sizes()
"""States alone, each in a slot of its own."""


class Plan(Protocol):
    """The schedule of one solve.

    Attributes:
        capacity: How much may be kept at a time, in the fast store where there are two; may be
            changed between steps.
    """

    capacity: float

    def took(self, step: int, sizes: Sizes = UNIT) -> Iterator[Action]:
        """``Keep``, ``Reduce``, ``Move`` and ``Drop``: what to do now that ``step`` was accepted.

        Steps are numbered from 0 and come in order; ``sizes`` says what each costs to keep.
        """
        ...

    def found(self, step: int, sizes: Sizes = UNIT) -> Iterator[Action]:
        """The same where nothing but the state at the start of ``step`` is there.

        So a plan begins for a solve that goes on; between two such steps others may be missing.
        """
        ...

    def reverse(self, steps: int) -> Iterator[Action]:
        """The actions of the backward pass; it drops everything that was kept."""
        ...

    def again(self, steps: int) -> Iterator[Action]:
        """Those of a further backward pass, which has nothing but the state at the start."""
        ...


class Schedule(Protocol):
    """How plans are made."""

    def begin(self) -> Plan:
        """A plan for a solve."""
        ...


def recomputed(actions: Iterable[Action]) -> int:
    """How many steps actions take again.

    Example:
        >>> recomputed([Restore(0), Advance(0, 3), Reverse(3)])
        3
    """
    return sum(action.stop - action.first for action in actions if isinstance(action, Advance))


class _Kept(NamedTuple):
    """What is kept of a step, and how much room it takes."""

    what: What
    size: int


class _Plan:
    """Keeps what a subclass decides, and reverses segment after segment with the room there is.

    Attributes:
        capacity: How much may be kept at a time.
        kept: What is kept, by its step.
        used: How much room it takes.
        sizes: Room for what may be kept of any step so far.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.kept: dict[int, _Kept] = {}
        self.used = 0
        self.sizes: Sizes | None = None

    def took(self, step: int, sizes: Sizes = UNIT) -> Iterator[Action]:
        self.sizes = sizes if self.sizes is None else self.sizes.joined(sizes)
        yield from self.decide(step, sizes)

    def found(self, step: int, sizes: Sizes = UNIT) -> Iterator[Action]:
        self.sizes = sizes if self.sizes is None else self.sizes.joined(sizes)
        yield from self.state(step, sizes.state)

    def state(self, step: int, size: int) -> Iterator[Action]:
        """Keep the state at the start of ``step``, if it has to be, and others no longer."""
        yield self.keep(step, What.STATE, size)

    def decide(self, step: int, sizes: Sizes) -> Iterator[Action]:
        """What to keep of ``step``, and what no longer."""
        raise NotImplementedError

    def keep(self, step: int, what: What, size: int) -> Action:
        """Note that ``what`` of ``step`` is kept."""
        self.kept[step] = _Kept(what, size)
        self.used += size
        return Keep(step, what)

    def drop(self, step: int) -> Action:
        """Note that nothing of ``step`` is kept any longer."""
        self.used -= self.kept.pop(step).size
        return Drop(step)

    def reverse(self, steps: int) -> Iterator[Action]:
        end, sizes = steps, self.sizes or UNIT
        for first in sorted(self.kept, reverse=True):
            if first >= steps:  # taken, but not accepted in the end
                yield self.drop(first)
                continue
            if self.kept[first].what == What.STATE:
                yield from _segment(first, end, self.room(first), sizes)
            else:
                yield Restore(first)
                yield Reverse(first)
            yield self.drop(first)
            end = first

    def again(self, steps: int) -> Iterator[Action]:
        if not steps:
            return
        sizes = self.sizes or UNIT
        self.kept = {0: _Kept(What.STATE, sizes.state)}
        self.used = sizes.state
        yield from self.reverse(steps)

    def room(self, first: int) -> float:
        """How much more may be kept while the segment that begins with ``first`` is reversed."""
        return self.capacity - self.used


def _segment(first: int, end: int, room: float, sizes: Sizes) -> Iterator[Action]:
    """Reverse the steps from ``first``, of which the state is kept, to ``end - 1``.

    Keeps the stages of all steps where there is room for them, and otherwise states by the
    binomial schedule.
    """
    held, at = [first], -1
    while True:
        top = held[-1]
        if end == top:
            held.pop()
            if not held:
                return
            yield Drop(top)
            room += sizes.state
            at = -1
            continue
        if at < 0:
            yield Restore(top)
            at = top
        if end - at > 1 and not _fits(max(at, top + 1), end, room, sizes):
            slots = int(min(room, (end - top) * sizes.state) // sizes.state)
            target = top + binomial.split(end - top, slots + 1) if slots else end - 1
            if target > at:
                yield Advance(at, target)
                at = target
            if end - at > 1 and not _fits(at, end, room, sizes):
                yield Advance(at, at + 1)
                yield Keep(at)
                held.append(at)
                room -= sizes.state
                at += 1
                continue
        elif end - at > 1 and at == top:
            yield Advance(top, top + 1)
            at += 1
        yield from _filled(at, end)
        end, at = at, -1


def _fits(first: int, end: int, room: float, sizes: Sizes) -> bool:
    """Whether the stages of all steps but the last, which needs none, can be kept."""
    return sizes.stages is not None and (end - 1 - first) * sizes.stages <= room


def _filled(first: int, end: int) -> Iterator[Action]:
    """Reverse the steps from the present one to ``end - 1``, keeping the stages of all."""
    for step in range(first, end - 1):
        yield Advance(step, step + 1)
        yield Keep(step, What.STAGES)
    yield Reverse(end - 1)
    for step in reversed(range(first, end - 1)):
        yield Restore(step)
        yield Reverse(step)
        yield Drop(step)


@dataclass(frozen=True)
class All:
    """Keeps ``what`` of every step, or the most that a step offers; none is taken again."""

    what: What = What.STATE

    def begin(self) -> Plan:
        return _All(self.what)


class _All(_Plan):
    def __init__(self, what: What) -> None:
        super().__init__(math.inf)
        self.what = what

    def decide(self, step: int, sizes: Sizes) -> Iterator[Action]:
        what = min(self.what, sizes.most())
        yield self.keep(step, what, sizes.of(what))


@dataclass(frozen=True)
class Every:
    """Keeps the state at each ``period``-th step, and ``slots`` more while it reverses a segment.

    Of a segment of ``l`` steps, ``binomial.advances(l, slots + 1)`` are taken again: ``l (l - 1) /
    2`` without slots, ``l - 1`` with ``period - 2`` of them.

    Raises:
        ArgumentError: ``period`` is less than 1, or ``slots`` negative.
    """

    period: int
    slots: int = 0

    def __post_init__(self) -> None:
        if self.period < 1 or self.slots < 0:
            raise ArgumentError(f"Every needs period >= 1 and slots >= 0, not {self}")

    def begin(self) -> Plan:
        return _Every(self.period, self.slots)


def two_level(period: int) -> Every:
    """Keeps each ``period``-th state, and every state of the segment that it reverses.

    With ``sqrt(N)`` for the period, about ``2 sqrt(N)`` states reverse ``N`` steps, each of them
    taken again once. This is the schedule of Chen, Xu, Zhang and Guestrin 2016, arXiv 1604.06174.
    """
    return Every(period, max(period - 2, 0))


class _Every(_Plan):
    def __init__(self, period: int, slots: int) -> None:
        super().__init__(math.inf)
        self.period = period
        self.slots = slots

    def decide(self, step: int, sizes: Sizes) -> Iterator[Action]:
        if step % self.period == 0:
            yield self.keep(step, What.STATE, sizes.state)

    def room(self, first: int) -> float:
        return self.slots * (self.sizes or UNIT).state


@dataclass(frozen=True)
class Revolve:
    """The binomial schedule for a known number of steps: the fewest of them taken again.

    Griewank and Walther 2000, doi 10.1145/347837.347846. The end of the solve, at which the
    backward pass begins, counts as one more step to be reversed: ``binomial.advances(steps + 1,
    slots)`` steps are taken, the ``steps`` of the first pass among them.

    Attributes:
        steps: The number of steps; further ones would be taken again from the last checkpoint.
        slots: How many states may be kept at a time, at least 1.

    Raises:
        ArgumentError: There is no step, or no slot.
    """

    steps: int
    slots: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.slots < 1:
            raise ArgumentError(f"Revolve needs at least one step and one slot, not {self}")

    def begin(self) -> Plan:
        return _Revolve(self.steps, self.slots)


class _Revolve(_Plan):
    def __init__(self, steps: int, slots: int) -> None:
        super().__init__(slots)
        self.steps = steps
        self.next = 0

    def decide(self, step: int, sizes: Sizes) -> Iterator[Action]:
        if step != self.next:
            return
        yield self.keep(step, What.STATE, 1)
        left, free = self.steps + 1 - step, int(self.capacity) - self.used
        self.next = step + binomial.split(left, free + 1) if free else -1


@dataclass(frozen=True)
class Thinning:
    """Keeps the most that fits, of as many steps as there will be.

    First the most of every step; when the room is full, the oldest steps are reduced, from graphs
    to stages to states. When nothing but states is left and no more fit, they are thinned by the
    dynamic checkpointing of Wang, Moin and Iaccarino 2009, algorithm 1, doi 10.1137/080727890: the
    step that is taken most often is taken at most once more than by ``Revolve``, which knows the
    number of steps. Each segment is then reversed by the binomial schedule itself, with the room
    that is free by then.

    Attributes:
        capacity: How much may be kept at a time, in the unit of the sizes; slots with unit sizes.

    Raises:
        ArgumentError: There is no room.
    """

    capacity: float

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ArgumentError(f"Thinning needs room for something, not {self}")

    def begin(self) -> ThinningPlan:
        return ThinningPlan(self.capacity)


class Full(Exception):  # noqa: N818 - a signal; who knows the unit says what is missing
    """Not even the state of one step fits."""


class ThinningPlan(_Plan):
    """The plan of ``Thinning``; its capacity may be lowered as the solve goes on."""

    def __init__(self, capacity: float) -> None:
        super().__init__(capacity)
        self.what = What.GRAPH
        self.rich: dict[What, deque[int]] = {What.STAGES: deque(), What.GRAPH: deque()}
        self.firm: list[tuple[int, int]] = []  # (step, level), of levels that never rise
        self.spare: list[int] = []  # dispensable: a later one is of a higher level
        self.reduced: dict[int, Sizes] = {}  # sizes of steps of which more than a state is kept

    def decide(self, step: int, sizes: Sizes) -> Iterator[Action]:
        self.what = min(self.what, sizes.most())
        while self.used + sizes.of(self.what) > self.capacity and self.what > What.STATE:
            if self.rich[self.what]:
                yield self._reduce()
            else:
                self.what = What(self.what - 1)
        if self.what > What.STATE:
            self.rich[self.what].append(step)
            self.reduced[step] = sizes
            yield self.keep(step, self.what, sizes.of(self.what))
            return
        yield from self.state(step, sizes.state)

    def state(self, step: int, size: int) -> Iterator[Action]:
        level = 0
        while self.used + size > self.capacity:
            if self.spare:
                yield self.drop(self.spare.pop())
            elif len(self.firm) > 1:
                last, old = self.firm.pop()
                level = max(level, old + 1)
                self._raise(level)
                yield self.drop(last)
            else:
                # One checkpoint at the start reverses everything, if there is any at all.
                if not self.firm or self.used > self.capacity:
                    raise Full
                return
        self._raise(level)
        self.firm.append((step, level))
        yield self.keep(step, What.STATE, size)

    def _reduce(self) -> Action:
        """Reduce the oldest of the steps of which most is kept."""
        step = self.rich[self.what].popleft()
        what = What(self.what - 1)
        sizes = self.reduced[step]
        if what == What.STATE:
            del self.reduced[step]
            self.firm.append((step, 0))
        else:
            self.rich[what].append(step)
        self.used -= self.kept[step].size - sizes.of(what)
        self.kept[step] = _Kept(what, sizes.of(what))
        return Reduce(step, what)

    def _raise(self, level: int) -> None:
        """Checkpoints before one of a higher level become dispensable; the first never does."""
        while len(self.firm) > 1 and self.firm[-1][1] < level:
            self.spare.append(self.firm.pop()[0])


@dataclass(frozen=True)
class Spill:
    """Another schedule, of which no more than ``fast`` is kept in the fast store.

    What lies there longest, and is needed last, moves to the slow store. So does the schedule of
    Stumm and Walther 2009, "MultiStage approaches for optimal offline checkpointing", doi
    10.1137/080718036, distribute the checkpoints: those least often read are the slow ones.

    Attributes:
        schedule: Which steps are kept, in both stores together.
        fast: How much of it the fast store may hold.
    """

    schedule: Schedule
    fast: float

    def begin(self) -> Plan:
        return SpillPlan(self.schedule.begin(), self.fast)


class SpillPlan:
    """The plan of ``Spill``."""

    def __init__(self, plan: Plan, fast: float) -> None:
        self.plan = plan
        self.capacity = fast
        self.used = 0
        self.held: dict[int, int] = {}  # in the fast store: the size by its step, oldest first
        self.sizes = UNIT

    def took(self, step: int, sizes: Sizes = UNIT) -> Iterator[Action]:
        self.sizes = sizes
        return self._spilled(self.plan.took(step, sizes))

    def found(self, step: int, sizes: Sizes = UNIT) -> Iterator[Action]:
        self.sizes = sizes
        return self._spilled(self.plan.found(step, sizes))

    def reverse(self, steps: int) -> Iterator[Action]:
        return self._spilled(self.plan.reverse(steps))

    def again(self, steps: int) -> Iterator[Action]:
        size = self.sizes.state
        self.held = {0: size} if steps and size <= self.capacity else {}
        self.used = sum(self.held.values())
        return self._spilled(self.plan.again(steps))

    def _spilled(self, actions: Iterable[Action]) -> Iterator[Action]:
        for action in actions:
            match action:
                case Keep(step, what):
                    yield from self._kept(action, self.sizes.of(what))
                    continue
                case Drop(step):
                    self.used -= self.held.pop(step, 0)
                case Reduce(step, what) if step in self.held:
                    self.used -= self.held[step] - self.sizes.of(what)
                    self.held[step] = self.sizes.of(what)
                case _:
                    pass
            yield action

    def _kept(self, action: Keep, size: int) -> Iterator[Action]:
        if size > self.capacity:
            yield Keep(action.step, action.what, Where.SLOW)
            return
        while self.used + size > self.capacity:
            oldest = next(iter(self.held))
            self.used -= self.held.pop(oldest)
            yield Move(oldest, Where.SLOW)
        self.held[action.step] = size
        self.used += size
        yield action
