"""A minimal symplectic adjoint in JAX: what the algorithm takes where nothing else is done.

No output times, events, jumps, dense output or checks: one loop forwards that writes the stages of
each step to buffers, one backwards that takes a vector-Jacobian product a stage. It is the limit to
compare with, not a library.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.peers.base import final_alone
from benchmarks.peers.jax_base import Array, Func, JaxPeer, Params, Solved, size_of_steps
from benchmarks.problems import Instance, Problem
from symplectic_adjoint import tableaus
from symplectic_adjoint.tableaus import Tableau


class State(NamedTuple):
    """What the forward loop carries.

    Attributes:
        t: Time reached.
        h: Size of the next attempt.
        y: The solution there.
        k: Its derivative.
        n: Accepted steps.
        tried: Attempts.
        points: Where the stages of each step were evaluated, (room, stages, *state).
        sizes: The steps' sizes, (room,).
    """

    t: Array
    h: Array
    y: Array
    k: Array
    n: Array
    tried: Array
    points: Array
    sizes: Array


class Minimal(JaxPeer):
    """The stages of every step stored, the steps transposed stage by stage."""

    name = "jax/minimal"
    package = "jax"
    room = 64

    def lacks(self, problem: Problem) -> str | None:
        return final_alone("the minimal adjoint", problem)

    def solve(self, instance: Instance, func: Func, params: Params, y0: Array, room: int) -> Solved:
        import jax
        import jax.numpy as jnp

        problem = instance.problem
        tableau = tableaus.get(problem.method)

        def integrate(params: Params, y0: Array) -> State:
            return _integrate(func, tableau, problem, params, y0, room)

        @jax.custom_vjp
        def solve(params: Params, y0: Array) -> tuple[Array, Array, Array, Array]:
            return public(integrate(params, y0))

        def forward(params: Params, y0: Array) -> Any:
            last = integrate(params, y0)
            return public(last), (params, last.points, last.sizes, last.n)

        def backward(kept: Any, cotangents: Any) -> tuple[Params, Array]:
            params, points, sizes, n = kept
            return _transpose(func, tableau, params, points, sizes, n, cotangents[0])

        def public(last: State) -> tuple[Array, Array, Array, Array]:
            ends = jnp.cumsum(last.sizes) if instance.field.counting else jnp.zeros(0)
            return last.y, last.n, ends, _left(last.t, problem) > 0

        solve.defvjp(forward, backward)
        return Solved(*solve(params, y0))


def _integrate(
    func: Func, tableau: Tableau, problem: Problem, params: Params, y0: Array, room: int
) -> State:
    """The forward loop; it ends at t1 or when its buffers are full."""
    import jax
    import jax.numpy as jnp

    size = size_of_steps(problem)
    k0 = func(params, y0)
    h0 = _first(func, tableau, problem, params, y0, k0) if size is None else size
    start = State(
        t=jnp.zeros((), y0.dtype),
        h=jnp.asarray(h0, y0.dtype),
        y=y0,
        k=k0,
        n=jnp.zeros((), jnp.int32),
        tried=jnp.zeros((), jnp.int32),
        points=jnp.zeros((room, tableau.stages, *y0.shape), y0.dtype),
        sizes=jnp.zeros(room, y0.dtype),
    )

    def unfinished(s: State) -> Array:
        return (_left(s.t, problem) > 0) & (s.n < room) & (s.tried < 10 * room)

    def attempt(s: State) -> State:
        left = _left(s.t, problem)
        last = s.h >= left * (1 - 1e-4 if size is not None else 1)
        h = jnp.where(last, left, s.h)
        points, slopes = _stages(func, tableau, params, s.y, s.k, h)
        y = s.y + h * _combined(tableau.b, slopes)
        k = func(params, y)
        good, following = jnp.asarray(True), s.h
        if size is None:
            error = _norm(h * _combined(tableau.error, [*slopes, k]), s.y, y, problem)
            good = error <= 1
            factor = jnp.clip(0.9 * error ** _power(tableau), 0.2, 10.0)
            following = h * jnp.where(good, jnp.maximum(factor, 1.0), factor)
        end = jnp.where(last, jnp.asarray(problem.t1, y0.dtype), s.t + h)
        return State(
            t=jnp.where(good, end, s.t),
            h=jnp.asarray(following, y0.dtype),
            y=jnp.where(good, y, s.y),
            k=jnp.where(good, k, s.k),
            n=s.n + good,
            tried=s.tried + 1,
            points=jax.lax.dynamic_update_index_in_dim(s.points, jnp.stack(points), s.n, 0),
            sizes=s.sizes.at[s.n].set(h),
        )

    final: State = jax.lax.while_loop(unfinished, attempt, start)
    return final


def _transpose(
    func: Func, tableau: Tableau, params: Params, points: Array, sizes: Array, n: Array, lam: Array
) -> tuple[Params, Array]:
    """The backward loop: kappa_i = h (b_i lam + sum_l a_li v_l), v_i = (df/dy)^T kappa_i."""
    import jax
    import jax.numpy as jnp

    def step(carry: tuple[Array, Array, Params]) -> tuple[Array, Array, Params]:
        i, lam, total = carry
        xs, h = points[i], sizes[i]
        products: dict[int, Array] = {}
        for stage in reversed(range(tableau.stages)):
            kappa = tableau.b[stage] * lam if tableau.b[stage] else jnp.zeros_like(lam)
            for later, v in products.items():
                if tableau.a[later][stage]:
                    kappa = kappa + tableau.a[later][stage] * v
            _, pullback = jax.vjp(func, params, xs[stage])
            grads, products[stage] = pullback(h * kappa)
            total = [a + b for a, b in zip(total, grads, strict=True)]
        return i - 1, lam + sum(products.values()), total

    zero = [jnp.zeros_like(p) for p in params]
    _, lam, total = jax.lax.while_loop(lambda carry: carry[0] >= 0, step, (n - 1, lam, zero))
    return total, lam


def _stages(
    func: Func, tableau: Tableau, params: Params, y: Array, k: Array, h: Array
) -> tuple[list[Array], list[Array]]:
    """Where the stages are evaluated, and their slopes; the first is known."""
    points, slopes = [y], [k]
    for row in tableau.a[1:]:
        points.append(y + h * _combined(row, slopes))
        slopes.append(func(params, points[-1]))
    return points, slopes


def _combined(weights: Any, slopes: list[Array]) -> Array:
    return sum(w * k for w, k in zip(weights, slopes, strict=True) if w)


def _norm(error: Array, y: Array, new: Array, problem: Problem) -> Array:
    import jax.numpy as jnp

    scale = problem.atol + problem.rtol * jnp.maximum(jnp.abs(y), jnp.abs(new))
    return jnp.sqrt(jnp.mean(jnp.square(error / scale)))


def _first(
    func: Func, tableau: Tableau, problem: Problem, params: Params, y: Array, k: Array
) -> Array:
    """The first step (Hairer, Norsett, Wanner I, section II.4)."""
    import jax.numpy as jnp

    d0, d1 = _norm(y, y, y, problem), _norm(k, y, y, problem)
    h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    d2 = _norm(func(params, y + h0 * k) - k, y, y, problem) / h0
    largest = jnp.maximum(d1, d2)
    other = (largest / 0.01) ** _power(tableau)
    return jnp.minimum(100 * h0, jnp.where(largest <= 1e-15, jnp.maximum(1e-6, h0 * 1e-3), other))


def _power(tableau: Tableau) -> float:
    """The power of the error that the step size goes with."""
    assert tableau.embedded_order is not None
    return -1 / (tableau.embedded_order + 1)


def _left(t: Array, problem: Problem) -> Array:
    return problem.t1 - t


PEERS = (Minimal(),)
