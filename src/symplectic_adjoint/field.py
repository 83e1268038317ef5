"""The vector field as the solver sees it: evaluated at stages, pulled back at stages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from symplectic_adjoint._errors import FieldOutputError, SymplecticAdjointError
from symplectic_adjoint._tree import real_dtype
from symplectic_adjoint._types import FlatFunc, Time, side_of
from symplectic_adjoint.accumulate import InPlace
from symplectic_adjoint.capture import Capture, foreign_leaves, has_tangent


class Stage:
    """One evaluation ``k = f(t, x)``.

    Attributes:
        t: Time of the evaluation.
        x: Where ``f`` is evaluated.
        k: Its value; None where only the point is known.
        token: State of the random generators before the evaluation; None unless ``f`` draws.
        graph: The evaluation on the autograd tape, or what a product with its transposed Jacobian
            takes of it, where that is kept.
    """

    __slots__ = ("graph", "k", "t", "token", "x")

    def __init__(
        self, t: Time, x: Tensor, k: Tensor | None = None, token: RandomState | None = None
    ) -> None:
        self.t = t
        self.x = x
        self.k = k
        self.token = token
        self.graph: Any = None


class StageGraph(NamedTuple):
    """An evaluation on the autograd tape: leaves ``t`` and ``x``, and ``k``."""

    t: Tensor
    x: Tensor
    k: Tensor


class Pullback(NamedTuple):
    """``v = (df/dy)^T kappa``, ``time = (df/dt)^T kappa`` where asked for, and ``k`` itself."""

    v: Tensor
    time: Tensor | None
    k: Tensor


class Rediscovered(Exception):  # noqa: N818 - a signal, not an error
    """Something about ``f`` was learned late, such as a missed tensor: the solve starts again."""


class RandomState:
    """State of the CPU generator and of the generator of the state's device."""

    __slots__ = ("cpu", "cuda", "device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def same(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        if not torch.equal(self.cpu, other.cpu):
            return False
        return self.cuda is None or other.cuda is None or bool(torch.equal(self.cuda, other.cuda))

    def set(self) -> None:
        """Put the generators into this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """Draw from this state inside the block, and as before it afterwards."""
        before = RandomState(self.device)
        self.set()
        try:
            yield
        finally:
            before.set()


class Field:
    """``f(t, y)`` on the flat state, with no graph kept: the forward pass of a solve.

    Attributes:
        evaluations: How often ``f`` was called.
        products: How many products with a Jacobian or its transpose were taken.
        solver_evaluations: Those evaluations that only served to solve equations.
        solver_products: Those products that did.
        backward: Statistics of the pass that reverses this field's graph, while it runs.
        corrections: To which order the steps of an implicit method can be differentiated.
        random: Whether ``f`` draws random numbers that a recomputation has to draw again.
        leafy: Whether ``f`` needs an argument that requires grad.
        locate: Names an element of the raveled flat state, for messages.
    """

    def __init__(self, func: FlatFunc, like: Tensor) -> None:
        self.func = func
        self.shape = like.shape
        self.dtype = like.dtype
        self.device = like.device
        self.time_dtype = real_dtype(like)
        self.evaluations = 0
        self.products = 0
        self.solver_evaluations = 0
        self.solver_products = 0
        self.corrections = 1
        self.backward: Any = None
        self.random = False
        self.leafy = False
        self.locate: Callable[[int], str] = lambda index: f"component {index}"

    def count_solver(self, evaluations: int, products: int) -> None:
        """Count what solving equations took; its evaluations are counted by ``call``, too."""
        self.solver_evaluations += evaluations
        self.solver_products += products
        self.products += products
        if self.backward is not None:
            self.backward.products += products
            self.backward.backward_solver_products += products

    def time(self, t: Time) -> Tensor:
        """A time as the 0-dim tensor that ``f`` receives."""
        if isinstance(t, Tensor):
            time = t.to(self.device, self.time_dtype)
        else:
            time = torch.full((), t, dtype=self.time_dtype, device=self.device)
        side = side_of(t)
        return _beside(time, side) if side else time

    def call(self, t: Tensor, x: Tensor) -> Tensor:
        """``f(t, x)`` as autograd sees it, checked.

        Raises:
            FieldOutputError: The result is no tensor of the state's shape, dtype and device.
        """
        self.evaluations += 1
        if self.leafy and not x.requires_grad:
            x = x.view_as(x).requires_grad_()  # detach() would drop a tangent
        try:
            k = self.func(t, x)
        except SymplecticAdjointError:
            raise  # which says all by itself
        except TypeError as error:
            error.add_note(self._manner())
            raise
        except RuntimeError as error:
            if x.requires_grad or "does not require grad" not in str(error):
                error.add_note(self._manner())
                raise
            # func differentiates with respect to its argument and expects it to require grad.
            self.leafy = True
            self.evaluations += 1
            k = self.func(t, x.view_as(x).requires_grad_())
        if (
            type(k) is Tensor
            and k.shape == self.shape
            and k.dtype == self.dtype
            and k.device == self.device
        ):
            return k
        return self._coerced(k)

    def evaluate(self, stage: Stage) -> Tensor:
        """Set and return ``stage.k``; with a token, the random numbers are those drawn then."""
        if stage.token is not None:
            with stage.token.restored():
                stage.k = self._evaluate(stage)
        else:
            if self.random:
                stage.token = RandomState(self.device)
            stage.k = self._evaluate(stage)
        return stage.k

    def value(self, stage: Stage) -> Tensor:
        """``stage.k``, evaluated where it is not known yet."""
        return self.evaluate(stage) if stage.k is None else stage.k

    def _evaluate(self, stage: Stage) -> Tensor:
        raise NotImplementedError

    def _manner(self) -> str:
        """How ``func`` is called, for who has written one that fails at it."""
        return (
            f"func is called as func(t, y): t is a {self.time_dtype} tensor without dimensions, y "
            f"is like y0, of dtype {self.dtype}. A network of y alone is sa.Autonomous(network)."
        )

    def _coerced(self, k: Any) -> Tensor:
        if not isinstance(k, Tensor):
            raise FieldOutputError(
                f"func must return a tensor like y0, but returned {type(k).__name__}"
            )
        if k.shape != self.shape:
            raise FieldOutputError(
                f"func returned shape {tuple(k.shape)} for a state of shape {tuple(self.shape)}; "
                "they must be equal"
            )
        if k.device != self.device:
            raise FieldOutputError(
                f"func returned a tensor on {k.device} for a state on {self.device}; move the "
                "module or y0 so that they agree"
            )
        if k.dtype != self.dtype:
            if k.is_floating_point() and torch.is_autocast_enabled(self.device.type):
                return k.to(self.dtype)
            raise FieldOutputError(
                f"func returned dtype {k.dtype} for a state of dtype {self.dtype}; convert y0 or "
                "func's module so that they agree, e.g. y0.to(dtype) or module.to(dtype)"
            )
        return k


class GraphField(Field):
    """The field under plain autograd: every stage stays on the caller's graph."""

    def _evaluate(self, stage: Stage) -> Tensor:
        # An alias where there is no graph: func may call requires_grad_() on its argument.
        # A view, since detach() would drop the tangents of forward mode.
        x = stage.x if stage.x.requires_grad else stage.x.view_as(stage.x)
        return self.call(self.time(stage.t), x)


class TangentField(GraphField):
    """The field where tangents alone are wanted: no graph is kept, whatever ``f`` does inside."""

    def _evaluate(self, stage: Stage) -> Tensor:
        k = super()._evaluate(stage)
        if not k.requires_grad:
            return k
        parts = forward_ad.unpack_dual(k)
        primal: Tensor = parts.primal.detach()
        tangent = parts.tangent
        return primal if tangent is None else forward_ad.make_dual(primal, tangent.detach())


class DetachedField(Field):
    """The field while aliases stand for everything that requires grad.

    In the forward pass the aliases require no grad. A result that requires grad then means that
    ``f`` differentiates inside itself, or that it reached a tensor that the capture has missed.
    """

    def __init__(
        self, func: FlatFunc, like: Tensor, aliases: Sequence[Tensor], capture: Capture | None
    ) -> None:
        """Wrap ``func``.

        Args:
            func: The flat function.
            like: A tensor of the state's shape, dtype and device.
            aliases: What stands in for the captured tensors; their ``.grad`` accumulates.
            capture: Where to report missed tensors; None where all were found before.
        """
        super().__init__(func, like)
        self.aliases = aliases
        self.capture = capture
        self.sums = InPlace(aliases)

    def linearize(self, on: bool) -> None:
        """Let evaluations build a graph down to the aliases, or not."""
        for alias in self.aliases:
            alias.requires_grad_(on)

    def _evaluate(self, stage: Stage) -> Tensor:
        # An alias of x: func may call requires_grad_() on its argument.
        time, alias = self.time(stage.t), stage.x.detach()
        k = self.call(time, alias)
        if k.requires_grad or has_tangent(k):
            leaves = foreign_leaves(k, (time, alias)) if self.capture is not None else ()
            missed = has_tangent(k)
            k = k.detach()
            missed = missed or any(leaf() is not None for leaf in leaves)
            if self.capture is not None and missed:
                self._rediscover(self.capture, time, alias)
        return k

    def _rediscover(self, capture: Capture, time: Tensor, x: Tensor) -> None:
        with RandomState(self.device).restored():
            found = capture.discover(lambda: self.call(time, x), (time, x, *self.aliases))
        if found:
            raise Rediscovered

    def on_graph(self) -> GraphField:
        """The same function under plain autograd, for replays of recorded steps."""
        field = GraphField(self.func, torch.empty(self.shape, dtype=self.dtype, device="meta"))
        field.device = self.device
        field.locate = self.locate
        return field

    def pull(self, stage: Stage, cotangent: Tensor, wants_time: bool = False) -> Pullback:
        """The vector-Jacobian product at a stage; parameters' parts go to the aliases' ``.grad``.

        The aliases must require grad (``linearize``). A graph kept by the stage is used up;
        otherwise ``f`` is evaluated again.
        """
        self.products += 1
        graph = stage.graph or self.graph(stage, wants_time)
        stage.graph = None
        if graph.k.requires_grad:
            _accumulate(graph.k, cotangent)
            self.sums.collect()
        v = graph.x.grad
        return Pullback(
            torch.zeros_like(cotangent) if v is None else v, graph.t.grad, graph.k.detach()
        )

    def graph(self, stage: Stage, wants_time: bool) -> StageGraph:
        """Evaluate ``f`` at a stage with its graph."""
        x = stage.x.detach().requires_grad_()
        t = self.time(stage.t)
        if wants_time:
            t.requires_grad_()
        if stage.token is None:
            return StageGraph(t, x, self.call(t, x))
        with stage.token.restored():
            return StageGraph(t, x, self.call(t, x))


def _beside(t: Tensor, side: float) -> Tensor:
    """The next number below or above ``t``, differentiable as ``t`` itself."""
    value = t.detach()
    return t + (torch.nextafter(value, torch.full_like(value, side * math.inf)) - value)


def _accumulate(output: Tensor, cotangent: Tensor) -> None:
    """``torch.autograd.backward`` without its checks of shapes, which hold here.

    They take a third of the time of a small network's product.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (output,), (cotangent,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class LeafField(DetachedField):
    """A detached field that keeps the graph of every stage for its pull-back.

    Attributes:
        keeping: Whether it still does; where not, it is a detached field like any other.
        tape: Bytes that the graph of the first evaluation has kept beside its point and its value;
            None before.
        measured: Called once they are known.
    """

    def __init__(
        self,
        func: FlatFunc,
        like: Tensor,
        aliases: Sequence[Tensor],
        capture: Capture | None,
        wants_time: bool,
    ) -> None:
        super().__init__(func, like, aliases, capture)
        self.wants_time = wants_time
        self.keeping = True
        self.tape: int | None = None
        self.measured: Callable[[], None] | None = None
        self.linearize(True)

    def stop_keeping(self) -> None:
        """Keep no further graphs."""
        self.keeping = False
        self.linearize(False)

    def _evaluate(self, stage: Stage) -> Tensor:
        if not self.keeping:
            return super()._evaluate(stage)
        graph = self.graph(Stage(stage.t, stage.x), self.wants_time)
        foreign = has_tangent(graph.k) or foreign_leaves(graph.k, (graph.t, graph.x, *self.aliases))
        if self.capture is not None and foreign:
            self._rediscover(self.capture, graph.t, graph.x)
        k = graph.k.detach()
        if self.measured is not None:
            self.tape = _tape(graph, self.aliases)
            measured, self.measured = self.measured, None
            measured()
        if self.keeping:
            stage.graph = graph
        return k


def _tape(graph: StageGraph, known: Sequence[Tensor]) -> int:
    """Bytes that a graph keeps beside its point, its value and what was there before."""
    found: dict[int, int] = {}
    nodes, seen = [graph.k.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += (parent for parent, _ in node.next_functions)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for x in pytree.tree_leaves([saved, getattr(node, "saved_tensors", ())]):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    for x in (graph.x, graph.k, *known):
        found.pop(x.untyped_storage().data_ptr(), None)
    return sum(found.values())
