"""What is kept of the steps of a solve under a schedule, and how the schedule is carried out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, overload

from symplectic_adjoint.checkpoints import Store
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
from symplectic_adjoint.checkpoints.schedules import Plan, Schedule, Sizes
from symplectic_adjoint.field import Field, LeafField, RandomState, StageGraph
from symplectic_adjoint.gradients._base import Record, Sweep
from symplectic_adjoint.gradients._budget import ENTRY
from symplectic_adjoint.steppers import Stepper
from symplectic_adjoint.steppers._base import Saved

NOTHING = Record(Saved(()))


class Ledger(Sequence[Record]):
    """Keeps of each step what a plan says, and brings the steps back in reverse.

    As a sequence it gives of each step what no plan may drop: the random states of its stages, and
    the state at its end where the next step begins anew. All else lies in the stores. The backward
    pass empties them as it goes, so that there is room for what it computes again; a further one
    (``retain_graph=True``) starts from the initial state alone.

    Attributes:
        retaken: How many steps the last backward pass took again.
        traces: Bytes of what no plan may drop.
    """

    def __init__(
        self,
        stepper: Stepper,
        schedule: Schedule,
        stores: Sequence[Store],
        most: What,
        settle: Callable[[Plan, int, int, int], None],
    ) -> None:
        """Prepare to keep steps.

        Args:
            stepper: The method.
            schedule: Makes the plan.
            stores: The fast one and the slow one.
            most: The most that is kept of a step.
            settle: Called with (plan, steps, bytes of traces, room for a state) before each step
                is kept; sets the capacity of a plan that has one.
        """
        self.stepper = stepper
        self.schedule = schedule
        self.stores = stores
        self.most = most
        self.settle = settle
        self.retaken = 0
        self.field: LeafField | None = None
        self._restart()

    def use(self, field: Field) -> None:
        """Tell of the field of the forward pass, which may keep graphs."""
        if isinstance(field, LeafField):
            self.field = field
            field.measured = self._measured

    def _measured(self) -> None:
        """Keep no graphs where those of one step alone would leave no room for its state."""
        assert self.field is not None
        self.settle(self.plan, 0, 0, 0)
        if self.plan.capacity < 2 * self._in_flight:
            self.field.stop_keeping()

    @property
    def _in_flight(self) -> int:
        """Bytes of the graphs of the step at hand."""
        if self.field is None or not self.field.keeping or self.field.tape is None:
            return 0
        work = self.stepper.work
        return (1 + work.inner + work.error + work.extra + work.node) * self.field.tape

    def _restart(self) -> None:
        self.plan = self.schedule.begin()
        self.saved: dict[int, Saved] = {}  # without tensors that lie in a store
        self.graphs: dict[int, Sequence[StageGraph | None]] = {}
        self.where: dict[int, Where] = {}
        self.what: dict[int, What] = {}
        self.tokens: dict[int, Sequence[RandomState | None]] = {}
        self.ends: dict[int, Saved] = {}
        self.steps = 0
        self.traces = 0
        self.spent = False

    # As a sequence ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, n: int) -> Record: ...
    @overload
    def __getitem__(self, n: slice) -> Sequence[Record]: ...
    def __getitem__(self, n: int | slice) -> Record | Sequence[Record]:
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(self.steps))]
        if not 0 <= n < self.steps:
            raise IndexError(n)
        tokens, end = self.tokens.get(n, ()), self.ends.get(n)
        return Record(Saved((), tokens), (), end) if tokens or end else NOTHING

    # Forward ---------------------------------------------------------------------------------

    def took(self, n: int, step: Any, end: Saved | None) -> None:
        """Keep what the plan says now that step ``n`` was accepted.

        Args:
            n: Number of the step.
            step: The step.
            end: The state at its end, where the next step begins anew.

        Raises:
            MemoryBudgetError: Not even one state fits.
            StoreError: A store failed; what was kept before is still there.
        """
        if n == 0:
            self._empty()
            self._restart()
        state, stages, sizes = self._offered(step)
        if state.tokens:
            self.tokens[n] = stages.tokens
            self.traces += sum(map(_token_bytes, stages.tokens))
        if end is not None:
            self.cut(n, end)
        self.allot(n + 1, sizes.state, self._in_flight)
        graphs = [stage.graph for stage in self.stepper.stages(step)]
        for action in self.plan.took(n, sizes):
            if isinstance(action, Keep) and action.what == What.GRAPH:
                self.graphs[n] = graphs
            self._store(action, state, stages)
        if self.field is not None and self.field.keeping and n not in self.graphs:
            self.field.stop_keeping()
            for stage in self.stepper.stages(step):
                stage.graph = None
        self.steps = n + 1

    def allot(self, steps: int, state: int, in_flight: int) -> None:
        """Leave to the plan its room, less that of the graphs of the step at hand.

        Args:
            steps: How many steps were taken.
            state: Room for a state.
            in_flight: Bytes of those graphs.
        """
        self.settle(self.plan, steps, self.traces, state)
        if in_flight:
            self.plan.capacity = max(self.plan.capacity - in_flight, state)

    def found(self, n: int, state: Saved, sizes: Sizes) -> None:
        """Begin with the state at the start of step ``n`` of a solve that goes on.

        Raises:
            MemoryBudgetError: Not even one state fits.
            StoreError: A store failed.
        """
        sizes = sizes._replace(state=max(sizes.state, _bytes(state)))
        self.settle(self.plan, n, self.traces, sizes.state)
        for action in self.plan.found(n, sizes):
            self._store(action, state, state)

    def sizes(self, step: Any) -> Sizes:
        """How much room what can be kept of a step takes."""
        return self._offered(step)[2]

    def cut(self, n: int, end: Saved) -> None:
        """Keep the state at the end of step ``n``, after which the next one begins anew."""
        self.ends[n] = end
        self.traces += _bytes(end)

    def until(self, steps: int) -> None:
        """No more than so many steps were accepted in the end."""
        self.steps = steps

    def _offered(self, step: Any) -> tuple[Saved, Saved, Sizes]:
        """What can be kept of a step, and its sizes."""
        state = self.stepper.save(step, stages=False)
        least = Sizes(ENTRY + _bytes(state))
        if self.most == What.STATE:
            return state, state, least
        stages = self.stepper.save(step, stages=True)
        # A record of the stages from which the state cannot be told, or that holds no more than it,
        # is none that a plan could use.
        first = stages.tensors[: len(state.tensors)]
        whole = len(first) < len(stages.tensors) or self.most == What.GRAPH
        if not whole or any(a is not b for a, b in zip(first, state.tensors, strict=False)):
            return state, state, least
        sizes = Sizes(least.state, ENTRY + _bytes(stages))
        if self.field is not None and self.field.keeping and self.field.tape is not None:
            # The last of its stages is the first of the next step.
            count = len(self.stepper.stages(step)) - 1
            graphs = count * (self.field.tape + step.y1.nbytes)
            return state, stages, sizes._replace(graph=ENTRY + _bytes(stages) + graphs)
        return state, stages, sizes

    def _store(self, action: Action, state: Saved, stages: Saved) -> None:
        """Carry out what concerns the stores; ``state`` and ``stages`` of the step just taken."""
        match action:
            case Keep(n, what, where):
                self._put(n, state if what == What.STATE else stages, what, where)
            case Reduce(n, What.STAGES):
                del self.graphs[n]
                self._put(n, self.saved[n], What.STAGES, self.where[n])
            case Reduce(n, what):
                saved, where = self._get(n), self.where[n]
                self._drop(n)
                kept = saved.tensors[: len(state.tensors)]
                self._put(n, Saved(kept, saved.tokens), what, where)
            case Move(n, where):
                saved, what = self._get(n), self.what[n]
                self._drop(n)
                self._put(n, saved, what, where)
            case Drop(n):
                # A step that was not accepted, since a store failed, may not have got into one.
                if n < self.steps or n in self.where:
                    self._drop(n)
            case _:
                raise AssertionError(action)

    def _put(self, n: int, saved: Saved, what: What, where: Where) -> None:
        self.what[n], self.where[n] = what, where
        if what == What.GRAPH:
            self.saved[n] = saved  # the tensors of which are part of the graph
            return
        self.saved[n] = saved._replace(tensors=())
        self.stores[where].put(n, saved.tensors)

    def _get(self, n: int) -> Saved:
        if self.what[n] == What.GRAPH:
            return self.saved[n]
        return self.saved[n]._replace(tensors=self.stores[self.where[n]].get(n))

    def _drop(self, n: int) -> None:
        where = self.where.pop(n)
        if self.what.pop(n) != What.GRAPH:
            self.stores[where].drop(n)
        self.graphs.pop(n, None)
        del self.saved[n]

    def _empty(self) -> None:
        for n in list(self.where):
            self._drop(n)

    @contextlib.contextmanager
    def guarded(self) -> Generator[None]:
        """Give back the stores on an exception, whose traceback may outlive the solve."""
        try:
            yield
        except BaseException:
            for store in self.stores:
                store.close()
            raise

    # Reverse ---------------------------------------------------------------------------------

    def reversing(self, sweep: Sweep, load: Callable[[int, Saved, Any], Any]) -> Iterator[Any]:
        """A coroutine that yields each step, last to first; the state at its end is sent to it.

        Args:
            sweep: The backward pass.
            load: ``(n, saved, end) -> step``.
        """
        actions = self._again(sweep) if self.spent else self.plan.reverse(sweep.remaining)
        self.spent, self.retaken = True, 0
        state = saved = taken = None
        end = yield
        for action in actions:
            match action:
                case Restore(n):
                    saved = self._get(n)
                    if self.what[n] == What.STATE:
                        state = self._resumed(sweep, n, saved)
                case Advance(first, stop):
                    saved = None
                    taken, state = self._advance(sweep, state, first, stop)
                case Reverse(n):
                    if saved is None:
                        tokens = self.tokens.get(n, ())
                        saved = Saved(self.stepper.carried(state), tokens)
                    step = load(n, saved, end)
                    for stage, graph in zip(
                        self.stepper.stages(step), self.graphs.pop(n, ()), strict=False
                    ):
                        stage.graph = stage.graph or graph
                    state = saved = taken = None
                    end = yield step
                    del step
                case Keep():
                    self._store(action, *self._offered(taken)[:2])
                    taken = None
                case _:
                    self._store(action, NOTHING.saved, NOTHING.saved)

    def _again(self, sweep: Sweep) -> Iterator[Action]:
        self._empty()
        tokens = self.tokens.get(0, ())
        if sweep.remaining:
            self._put(0, Saved((sweep.y0,), tokens), What.STATE, Where.FAST)
        return self.plan.again(sweep.remaining)

    def _resumed(self, sweep: Sweep, n: int, saved: Saved) -> Any:
        token = saved.tokens[0] if saved.tokens else None
        return self.stepper.resume(sweep.start(n), saved.tensors, token)

    def _advance(self, sweep: Sweep, state: Any, first: int, stop: int) -> tuple[Any, Any]:
        """Take recorded steps again, from their recorded times: the last of them, and its end."""
        sweep.field.linearize(False)
        step = None
        for n in range(first, stop):
            tokens = self.tokens.get(n, ())
            if tokens:
                state.node.token = tokens[0]
            del step  # so that its stages are freed before the next ones are made
            step = self.stepper.step(sweep.field, state, sweep.stop(n), tokens)
            state = self.stepper.end(step)
            if n in self.ends:
                state = self.stepper.begin(sweep.start(n + 1), state.y)
        self.retaken += stop - first
        sweep.field.linearize(True)
        return step, state


def _token_bytes(token: RandomState | None) -> int:
    if token is None:
        return 0
    return token.cpu.nbytes + (0 if token.cuda is None else token.cuda.nbytes)


def _bytes(saved: Saved) -> int:
    return sum(x.nbytes for x in saved.tensors)
