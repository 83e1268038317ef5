"""What the peers written in JAX share. JAX is imported when one of them is bound, not before."""

from __future__ import annotations

import importlib.util
import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.base import Bound, Counts, Peer
from benchmarks.peers.ours import Ours
from benchmarks.problems import Instance, Problem
from benchmarks.problems.fields import Convolution, Field, Hamiltonian, Hutchinson

Array = Any
Params = list[Array]
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
Func = Callable[[Params, Array], Array]
"""A vector field: of (parameters, state)."""


class Solved(NamedTuple):
    """What a solve gives.

    Attributes:
        after: The states at the times after the start.
        steps: Number of accepted steps.
        ends: Times at which steps ended, and whatever is beyond ``t1`` is padding; empty if not
            asked for.
        full: Whether the room for steps was too small.
    """

    after: Array
    steps: Array
    ends: Array
    full: Array


class JaxPeer(Peer):
    """A solve in JAX, compiled together with the loss and its gradient."""

    compiled = True
    reference_note = "torch's autograd in float64 on the steps it accepted"
    room = 4096
    """Steps that a solve has room for; doubled where they do not suffice."""

    def installed(self) -> bool:
        return importlib.util.find_spec("jax") is not None and super().installed()

    @abstractmethod
    def solve(self, instance: Instance, func: Func, params: Params, y0: Array, room: int) -> Solved:
        """The solve, to be traced.

        Args:
            instance: Says what is solved; where its field counts, the ends of steps are asked for.
            func: The field of the instance in JAX.
            params: Its parameters.
            y0: Initial states.
            room: The largest number of steps.
        """

    def bind(self, instance: Instance) -> Bound:
        _hold_to_threads()
        program = _Program(self, instance)
        return Bound(
            program.run,
            program.gradient,
            lambda: program.last.clear(),
            program.peak,
            program.steps,
            program.grid,
            program.counts,
        )

    def reference(self, instance: Instance, grid: Tensor | None) -> Bound | None:
        return Ours("backprop").reference(instance, grid)


def _hold_to_threads() -> None:
    """Hold XLA to one thread where PyTorch is; it reads its flags when JAX is first used."""
    flags = os.environ.get("XLA_FLAGS", "")
    if torch.get_num_threads() == 1 and _ONE_THREAD not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD}".strip()


class _Program:
    """Loss and gradient of one instance, compiled at the first run."""

    def __init__(self, peer: JaxPeer, instance: Instance) -> None:
        self.peer, self.instance = peer, instance
        self.double = instance.y0.dtype == torch.float64
        self.room = peer.room
        self.compiled: Any = None
        self.last: list[Any] = []

    def run(self) -> None:
        """Runs, and compiles where it has not, or where the room for steps was too small."""
        import jax

        field = self.instance.field
        with jax.enable_x64(self.double):
            given = arguments(self.instance)
            while True:
                field.evaluations = field.products = 0
                if self.compiled is None:
                    self.compiled = self._lower(given)
                (_, solved), gradient = jax.block_until_ready(self.compiled(*given))
                if not bool(solved.full):
                    break
                self.room, self.compiled = 2 * self.room, None
            self.last[:] = [solved, gradient]
            jax.effects_barrier()  # the counts are complete

    def _lower(self, given: tuple[Any, ...]) -> Any:
        import jax

        def loss(params: Params, y0: Array) -> tuple[Array, Solved]:
            solved = self.peer.solve(self.instance, func, params, y0, self.room)
            return jax.numpy.mean(jax.numpy.square(solved.after)), solved

        func = function(self.instance.field)
        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*given).compile()

    def gradient(self) -> Tensor:
        """The gradient of the last run."""
        parts = [np.asarray(g, np.float64).ravel() for g in self.last[1]]
        return torch.from_numpy(np.concatenate(parts))

    def peak(self) -> int:
        """What XLA has laid out: arguments, results and everything between."""
        if self.compiled is None:
            self.run()
        found = self.compiled.memory_analysis()
        return int(
            found.temp_size_in_bytes + found.output_size_in_bytes + found.argument_size_in_bytes
        )

    def steps(self) -> int:
        """Accepted steps."""
        return int(self.last[0].steps)

    def grid(self) -> Tensor | None:
        """Accepted times, for one output time: the continuous extensions differ."""
        problem = self.instance.problem
        ends = np.asarray(self.last[0].ends, np.float64)
        if not ends.size or problem.outputs > 1:
            return None
        inner = ends[: self.steps() - 1]
        return torch.tensor([0.0, *inner, problem.t1], dtype=torch.float64)

    def counts(self) -> Counts | None:
        """Counted by the field; the forward solve is run once more, alone, to count it apart."""
        import jax

        field = self.instance.field
        if not field.counting:
            return None
        evaluations, products = field.evaluations, field.products
        with jax.enable_x64(self.double):
            field.evaluations = 0
            func = function(field)
            solve = jax.jit(lambda p, y: self.peer.solve(self.instance, func, p, y, self.room))
            jax.block_until_ready(solve(*arguments(self.instance)))
            jax.effects_barrier()
        forward = field.evaluations
        return Counts(forward, evaluations - forward, products)


def arguments(instance: Instance) -> tuple[Params, Array]:
    """Parameters and initial states as JAX has them."""
    import jax.numpy as jnp

    params = [jnp.asarray(p.detach().numpy()) for p in instance.field.parameters()]
    return params, jnp.asarray(instance.y0.numpy())


def function(field: Field) -> Func:
    """The field in JAX, counting where the field does."""
    func = _FUNCTIONS[type(field)](field)
    return _counted(func, field) if field.counting else func


def _layers(params: Params) -> list[tuple[Array, Array]]:
    return list(zip(params[::2], params[1::2], strict=True))


def _dense(field: Field) -> Func:
    import jax.numpy as jnp

    def func(params: Params, y: Array) -> Array:
        *hidden, (weight, bias) = _layers(params)
        for w, b in hidden:
            y = jnp.tanh(y @ w.T + b)
        return y @ weight.T + bias

    return func


def _hutchinson(field: Field) -> Func:
    import jax
    import jax.numpy as jnp

    net = _dense(field)
    noise = np.asarray(field.noise)

    def func(params: Params, y: Array) -> Array:
        dx, product = jax.vjp(lambda x: net(params, x), y[:, :-1])
        e = jnp.asarray(noise, y.dtype)
        dl = (product(e)[0] * e).sum(1, keepdims=True)
        return jnp.concatenate([dx, dl], 1)

    return func


def _hamiltonian(field: Field) -> Func:
    import jax
    import jax.numpy as jnp

    net = _dense(field)

    def func(params: Params, y: Array) -> Array:
        gradient = jax.grad(lambda x: net(params, x).sum())(y)
        q, p = jnp.split(gradient, 2, axis=1)
        return jnp.concatenate([p, -q], 1)

    return func


def _convolution(field: Field) -> Func:
    import jax
    import jax.numpy as jnp

    def layer(y: Array, w: Array, b: Array) -> Array:
        half = w.shape[-1] // 2
        padded = jnp.pad(y, ((0, 0), (0, 0), (half, half)), mode="wrap")
        return jax.lax.conv(padded, w, (1,), "VALID") + b[:, None]

    def func(params: Params, y: Array) -> Array:
        *hidden, (weight, bias) = _layers(params)
        y = y[:, None]
        for w, b in hidden:
            y = jnp.tanh(layer(y, w, b))
        return layer(y, weight, bias)[:, 0]

    return func


_FUNCTIONS: dict[type[Field], Callable[[Any], Func]] = {
    Field: _dense,
    Hutchinson: _hutchinson,
    Hamiltonian: _hamiltonian,
    Convolution: _convolution,
}


def _counted(func: Func, field: Field) -> Func:
    """The same function, telling the field of each evaluation and each product."""
    import jax

    def evaluated() -> None:
        field.evaluations += 1

    def multiplied() -> None:
        field.products += 1

    def backward(_: None, gradient: Array) -> tuple[Array]:
        jax.debug.callback(multiplied)
        return (gradient,)

    marked = jax.custom_vjp(lambda out: out)
    marked.defvjp(lambda out: (out, None), backward)

    def counting(params: Params, y: Array) -> Array:
        jax.debug.callback(evaluated)
        return marked(func(params, y))

    return counting


def size_of_steps(problem: Problem) -> float | None:
    """The size of fixed steps, None for an adaptive method."""
    return None if problem.steps is None else problem.t1 / problem.steps
