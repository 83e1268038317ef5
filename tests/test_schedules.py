"""Every schedule, executed by a machine that knows nothing but what the actions mean."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from symplectic_adjoint import ArgumentError
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
from symplectic_adjoint.checkpoints.schedules import (
    UNIT,
    All,
    Every,
    Full,
    Plan,
    Revolve,
    Schedule,
    Sizes,
    Spill,
    Thinning,
    recomputed,
    two_level,
)


class Machine:
    """Takes steps, keeps them, and refuses every action that the model does not allow.

    Attributes:
        kept: What is kept of each step, and where.
        peak: The most that was kept at a time, in both stores and in the fast one.
        taken: How often each step was taken.
        reversed: Steps, in the order of their reversal.
    """

    def __init__(self, sizes: Sizes = UNIT) -> None:
        self.sizes = sizes
        self.kept: dict[int, tuple[What, Where]] = {}
        self.at: int | None = None  # the present state is that at the start of this step
        self.restored: int | None = None
        self.just: int | None = None  # the step just taken
        self.peak = {"all": 0, "fast": 0}
        self.used = {"all": 0, "fast": 0}
        self.taken: Counter[int] = Counter()
        self.reversed: list[int] = []

    def took(self, step: int, actions: Iterable[Action]) -> None:
        self.taken[step] += 1
        self.just = step
        for action in actions:
            assert isinstance(action, Keep | Reduce | Move | Drop)
            self.do(action)

    def do(self, action: Action) -> None:
        match action:
            case Keep(step, what, where):
                assert step == self.just
                assert step not in self.kept
                self._hold(step, (what, where))
            case Reduce(step, what):
                assert what < self.kept[step][0]
                self._hold(step, (what, self.kept[step][1]))
            case Move(step, where):
                assert where != self.kept[step][1]
                self._hold(step, (self.kept[step][0], where))
            case Drop(step):
                assert step in self.kept
                self._hold(step, None)
            case Restore(step):
                assert step in self.kept
                self.at = self.restored = step
            case Advance(first, stop):
                assert first == self.at
                assert first < stop
                # What is restored with its stages serves to be reversed and no other purpose.
                assert self.restored is None or self.kept[self.restored][0] == What.STATE
                self.taken.update(range(first, stop))
                self.at, self.just, self.restored = stop, stop - 1, None
            case Reverse(step):
                assert step == self.at
                self.reversed.append(step)
                self.at = self.just = None

    def _hold(self, step: int, held: tuple[What, Where] | None) -> None:
        for sign, entry in ((-1, self.kept.pop(step, None)), (1, held)):
            if entry is not None:
                self.used["all"] += sign * self.sizes.of(entry[0])
                self.used["fast"] += sign * self.sizes.of(entry[0]) * (entry[1] == Where.FAST)
        if held is not None:
            self.kept[step] = held
        self.peak = {name: max(self.peak[name], used) for name, used in self.used.items()}


def forward(schedule: Schedule, steps: int, sizes: Sizes = UNIT) -> tuple[Plan, Machine]:
    plan, machine = schedule.begin(), Machine(sizes)
    for step in range(steps):
        machine.took(step, plan.took(step, sizes))
    return plan, machine


def backward(actions: Iterable[Action], machine: Machine, steps: int) -> list[Action]:
    """Executes a backward pass, which must reverse each step once, last to first."""
    done: list[Action] = []
    machine.reversed.clear()
    for action in actions:
        machine.do(action)
        done.append(action)
    assert machine.reversed == list(reversed(range(steps)))
    assert not machine.kept
    return done


def executed(schedule: Schedule, steps: int, sizes: Sizes = UNIT) -> tuple[Machine, int]:
    """Forward pass and backward pass; the machine, and how many steps were taken again."""
    plan, machine = forward(schedule, steps, sizes)
    again = recomputed(backward(plan.reverse(steps), machine, steps))
    assert sum(machine.taken.values()) == steps + again
    return machine, again


@functools.cache
def optimum(steps: int, slots: int) -> int:
    """The fewest steps to take, by trying every place of the next checkpoint."""
    if slots == 1 or steps == 1:
        return steps * (steps - 1) // 2
    return min(m + optimum(steps - m, slots - 1) + optimum(m, slots) for m in range(1, steps))


SMALL = [(n, c) for n in range(1, 41) for c in range(1, 9)]


def test_the_formula_of_griewank_and_walther_is_the_optimum() -> None:
    for steps, slots in SMALL:
        assert binomial.advances(steps, slots) == optimum(steps, slots)


def test_every_split_is_optimal() -> None:
    for steps, slots in itertools.product(range(2, 200), range(2, 12)):
        m = binomial.split(steps, slots)
        assert 1 <= m < steps
        parts = binomial.advances(steps - m, slots - 1) + binomial.advances(m, slots)
        assert m + parts == binomial.advances(steps, slots)


def test_all_takes_no_step_again_and_keeps_every_one() -> None:
    for what in What:
        for steps in range(20):
            machine, again = executed(All(what), steps, Sizes(1, 3, 10))
            assert again == 0
            assert machine.peak["all"] == steps * (1, 3, 10)[what]
            machine, again = executed(All(what), steps, Sizes(2))
            assert again == 0
            assert machine.peak["all"] == 2 * steps


@pytest.mark.parametrize("slots", [0, 1, 2, 5])
def test_every_kth_state_takes_the_steps_between_again_by_its_formula(slots: int) -> None:
    for steps, period in itertools.product(range(30), range(1, 12)):
        machine, again = executed(Every(period, slots), steps)
        lengths = [min(period, steps - first) for first in range(0, steps, period)]
        assert again == sum(binomial.advances(length, slots + 1) for length in lengths)
        assert machine.peak["all"] <= len(lengths) + slots


def test_two_levels_take_each_step_again_once_at_most() -> None:
    for steps, period in itertools.product(range(1, 60), range(1, 12)):
        machine, again = executed(two_level(period), steps)
        segments = math.ceil(steps / period)
        assert again == steps - segments
        assert machine.peak["all"] <= segments + max(period - 2, 0)
        assert max(machine.taken.values()) <= 2


def test_revolve_takes_the_fewest_steps_there_are() -> None:
    for steps, slots in SMALL:
        machine, again = executed(Revolve(steps, slots), steps)
        # What comes after the last step, the loss, is one more step to be reversed.
        assert steps + again == optimum(steps + 1, slots)
        assert machine.peak["all"] <= slots


def test_revolve_is_optimal_for_many_steps_as_well() -> None:
    for steps, slots in [(1000, 3), (1000, 30), (5000, 12), (20_000, 5), (3000, 2000)]:
        machine, again = executed(Revolve(steps, slots), steps)
        assert steps + again == binomial.advances(steps + 1, slots)
        assert machine.peak["all"] <= slots


def test_thinning_takes_a_step_once_more_at_most_than_who_knows_how_many_there_are() -> None:
    for steps, slots in itertools.product([*range(1, 60), 150, 400], [1, 2, 3, 4, 8]):
        machine, again = executed(Thinning(slots), steps)
        assert machine.peak["all"] <= slots
        most = max(machine.taken.values())
        assert binomial.sweeps(steps + 1, slots) <= most <= binomial.sweeps(steps + 1, slots) + 1
        assert 1 <= (steps + again) / binomial.advances(steps + 1, slots) <= 1.35


def test_thinning_uses_its_room_to_keep_the_most_of_every_step() -> None:
    sizes = Sizes(state=1, stages=4, graph=20)
    seen = []
    for steps in range(1, 61):
        machine, again = executed(Thinning(60), steps, sizes)
        assert machine.peak["all"] <= 60
        _, held = forward(Thinning(60), steps, sizes)
        counts = Counter(what for what, _ in held.kept.values())
        assert again == 0
        assert sum(counts.values()) == steps
        seen.append(tuple(counts[what] for what in reversed(What)))
        # What is left over would not do for more of one of the steps.
        used = sum(sizes.of(what) for what, _ in held.kept.values())
        poorest = min(what for what, _ in held.kept.values())
        if poorest < What.GRAPH:
            assert used + sizes.of(What(poorest + 1)) - sizes.of(poorest) > 60
    assert seen[2] == (3, 0, 0)
    assert seen[3] == (2, 2, 0)
    assert seen[14] == (0, 15, 0)
    assert seen[59] == (0, 0, 60)


plans = (
    st.builds(Thinning, st.integers(1, 40))
    | st.builds(Every, st.integers(1, 15), st.integers(0, 6))
    | st.just(All())
)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.integers(1, 120),
    capacity=st.integers(1, 90),
    state=st.integers(1, 4),
    stages=st.none() | st.integers(0, 12),
    graph=st.none() | st.integers(0, 30),
)
def test_whatever_is_kept_the_room_suffices(
    steps: int, capacity: int, state: int, stages: int | None, graph: int | None
) -> None:
    sizes = Sizes(
        state,
        None if stages is None else state + stages,
        None if stages is None or graph is None else state + stages + graph,
    )
    if capacity < state:
        with pytest.raises(Full):
            forward(Thinning(capacity), steps, sizes)
        return
    machine, _ = executed(Thinning(capacity), steps, sizes)
    assert machine.peak["all"] <= capacity


@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(1, 100),
    start=st.integers(10, 60),
    shrink=st.floats(0, 0.4),
    state=st.integers(1, 3),
)
def test_the_room_may_shrink_while_steps_are_taken(
    steps: int, start: int, shrink: float, state: int
) -> None:
    sizes = Sizes(state, 2 * state, 5 * state)
    plan, machine = Thinning(start).begin(), Machine(sizes)
    for step in range(steps):
        plan.capacity = max(start - shrink * step, state)
        machine.took(step, plan.took(step, sizes))
        assert sum(sizes.of(what) for what, _ in machine.kept.values()) <= plan.capacity
    machine.peak["all"] = 0
    backward(plan.reverse(steps), machine, steps)
    assert machine.peak["all"] <= plan.capacity


@settings(max_examples=100, deadline=None)
@given(schedule=plans, steps=st.integers(0, 80), fast=st.integers(0, 20))
def test_what_does_not_fit_into_the_fast_store_moves_to_the_slow_one(
    schedule: Schedule, steps: int, fast: int
) -> None:
    alone, again = executed(schedule, steps)
    machine, spilled = executed(Spill(schedule, fast), steps)
    assert spilled == again
    assert machine.peak["fast"] <= fast
    assert machine.peak["all"] == alone.peak["all"]
    assert machine.taken == alone.taken


@settings(max_examples=60, deadline=None)
@given(schedule=plans, steps=st.integers(0, 80), fast=st.none() | st.integers(0, 20))
def test_a_second_backward_pass_starts_from_the_first_state_within_the_same_room(
    schedule: Schedule, steps: int, fast: int | None
) -> None:
    schedule = schedule if fast is None else Spill(schedule, fast)
    plan, machine = forward(schedule, steps)
    backward(plan.reverse(steps), machine, steps)
    peak = machine.peak.copy()
    for _ in range(2):
        if steps:
            machine.just = 0
            machine.do(Keep(0))
        backward(plan.again(steps), machine, steps)
    if isinstance(schedule, Thinning):
        assert machine.peak == peak


def test_many_steps_are_thinned_and_reversed_in_little_time() -> None:
    plan, machine = forward(Thinning(300), 30_000)
    assert len(machine.kept) <= 300
    again = recomputed(plan.reverse(30_000))
    assert 30_000 + again <= 1.35 * binomial.advances(30_001, 300)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Every(0),
        lambda: Every(2, -1),
        lambda: Revolve(0, 1),
        lambda: Revolve(3, 0),
        lambda: Thinning(0),
    ],
)
def test_schedules_that_could_keep_nothing_are_refused(make: Callable[[], Schedule]) -> None:
    with pytest.raises(ArgumentError, match="needs"):
        make()


@settings(max_examples=150, deadline=None)
@given(
    found=st.sets(st.integers(1, 40)),
    more=st.integers(0, 20),
    left=st.floats(0, 1),
    capacity=st.integers(1, 60),
    schedule=st.sampled_from(["all", "every", "thinning", "spill"]),
)
def test_a_plan_that_begins_with_the_states_of_an_interrupted_solve_reverses_what_is_left(
    found: set[int], more: int, left: float, capacity: int, schedule: str
) -> None:
    sizes = Sizes(1, 3)
    plan = {
        "all": All(What.STAGES),
        "every": Every(3, 1),
        "thinning": Thinning(capacity),
        "spill": Spill(All(What.STAGES), capacity),
    }[schedule].begin()
    machine = Machine(sizes)
    taken = max(found, default=0) + 1  # one step more than the state that was found last
    for step in sorted({0, *found}):
        machine.just = step
        for action in plan.found(step, sizes):
            machine.do(action)
    for step in range(taken, taken + more):
        machine.took(step, plan.took(step, sizes))
    machine.peak = dict.fromkeys(machine.peak, 0)
    backward(plan.reverse(round(left * (taken + more))), machine, round(left * (taken + more)))
    if schedule == "thinning":
        assert machine.peak["all"] <= capacity
    if schedule == "spill":
        assert machine.peak["fast"] <= capacity
