"""The Butcher tableau of a Runge-Kutta method, which proves its order when built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from symplectic_adjoint._errors import TableauError
from symplectic_adjoint.dense import Interpolant, Number, as_floats, hermite
from symplectic_adjoint.tableaus._conditions import Condition, conditions

__all__ = ["Butcher", "Tableau"]

# Coefficients printed to double precision fulfil their conditions to 1e-14 or so; a wrong digit
# that matters does not.
_TOLERANCE = 1e-12


class Butcher(NamedTuple):
    """Square matrix ``a``, weights ``b`` and abscissae ``c``, as exact as they were given."""

    a: tuple[tuple[Number, ...], ...]
    b: tuple[Number, ...]
    c: tuple[Number, ...]


@dataclass(frozen=True, init=False)
class Tableau:
    """A Runge-Kutta method with its error estimate and its continuous extension.

    A step of size ``h`` from ``(t, y)`` is

        k_i = f(t + c_i h, y + h sum_j a_ij k_j),       i = 0 ... s - 1,
        y_new = y + h sum_{i<s} b_i k_i,                k_s = f(t + h, y_new)

    (Hairer, Norsett, Wanner I, section II.1, definition 1.1, and section II.7, definition 7.1).
    Stage ``0`` is ``f(t, y)``. Stage ``s``, the *node*, is stage ``0`` of the next step and no part
    of ``a`` and ``b``; so the last stage of a method published as FSAL (first same as last) is not
    listed. The stages of an explicit method depend on those before them; its rows end there. The
    rows of an implicit method have ``s`` weights; where it does not use ``f(t, y)``, that stage has
    weight zero throughout, and ``b_0 = 0``. Numbers may be integers, fractions, ``Surd`` or floats.
    They are stored as floats, ready for use; :meth:`butcher` gives them as they were written.

    When built, a tableau checks its shapes, that rows sum to ``c``, the order conditions of all
    rooted trees for ``b`` up to ``order``, for the error estimate up to ``embedded_order`` and, as
    polynomials in ``theta``, for the interpolant up to ``interpolant.order``.

    Args:
        name: Name of the method.
        order: Order of ``y_new``.
        a: ``s`` rows. Explicit: row ``i`` has ``i`` weights, row ``0`` is empty. Implicit: all have
            ``s`` weights, those of row ``0`` are zero.
        b: ``s`` weights.
        c: ``s`` abscissae; the row sums of ``a`` where not given.
        error: ``s + 1`` weights ``e_i`` (the last is the node's) such that the estimate of the
            local error is ``h sum_i e_i k_i``; ``None`` for a method without estimate. Its sign is
            the publication's: only its size is used.
        embedded_order: Order of ``y_new - h sum_i e_i k_i``. Given together with ``error``.
        interpolant: Continuous extension; cubic Hermite where not given.
        damping: Where positive, the estimate is ``(I - damping h J)^{-1} h sum_i e_i k_i`` with
            ``J = df/dy``, which keeps it bounded on stiff components.
        fsal: Whether the method was published with the node as its last stage.
        citation: Where the coefficients come from.

    Raises:
        TableauError: A check failed; the message names the method, the condition and the defect.

    Example:
        >>> heun = Tableau(name="heun", order=2, a=((), (1,)), b=(0.5, 0.5))
        >>> heun.stages, heun.c, heun.adaptive
        (2, (0.0, 1.0), False)
        >>> try:
        ...     Tableau(name="heun", order=3, a=((), (1,)), b=(0.5, 0.5))
        ... except TableauError as error:
        ...     print(error)
        heun: b misses order 3 on the tree ((), ()): got 0.5 instead of 0.3333333333333333
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] | None
    embedded_order: int | None
    interpolant: Interpolant
    damping: float
    fsal: bool
    citation: str
    _exact: Butcher = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        name: str,
        order: int,
        a: Iterable[Iterable[Number]],
        b: Iterable[Number],
        c: Iterable[Number] | None = None,
        error: Iterable[Number] | None = None,
        embedded_order: int | None = None,
        interpolant: Interpolant | None = None,
        damping: float = 0.0,
        fsal: bool = False,
        citation: str = "",
    ) -> None:
        rows, b = tuple(map(tuple, a)), tuple(b)
        c = tuple(map(sum, rows)) if c is None else tuple(c)
        for key, value in {
            "name": name,
            "order": order,
            "a": as_floats(rows),
            "b": tuple(map(float, b)),
            "c": tuple(map(float, c)),
            "error": None if error is None else tuple(map(float, error)),
            "embedded_order": embedded_order,
            "interpolant": interpolant or hermite(b, order=min(order, 3)),
            "damping": damping,
            "fsal": fsal,
            "citation": citation,
            "_exact": Butcher(rows, b, c),
        }.items():
            object.__setattr__(self, key, value)
        self._check_shapes()
        self._check_row_sums()
        self._check_order_conditions()

    @property
    def stages(self) -> int:
        """Number ``s`` of stages that make the new value; also the number of the node."""
        return len(self.b)

    @property
    def implicit(self) -> bool:
        """Whether stages depend on themselves or on later ones, so that a step solves equations."""
        return len(self.a[0]) > 0

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return self.error is not None

    @property
    def error_needs_node(self) -> bool:
        """Whether the error estimate weighs the node, so that every attempted step evaluates it."""
        return self.error is not None and self.error[-1] != 0

    def butcher(self) -> Butcher:
        """The tableau as published, as exact as it was given.

        Returns:
            Square ``a``, weights ``b`` and abscissae ``c``, with the node as a last stage of weight
            zero where the method was published as FSAL, and without stage ``0`` where an implicit
            method does not use it.

        Example:
            >>> Tableau(name="euler", order=1, a=((),), b=(1,), fsal=True).butcher()
            Butcher(a=((0, 0), (1, 0)), b=(1, 0), c=(0, 1))
        """
        a, b, c = self._exact
        if self.fsal:
            a, b, c = (*a, b), (*b, 0), (*c, 1)
        if self.implicit and not any(row[0] != 0 for row in (*a, b)):
            a, b, c = tuple(row[1:] for row in a[1:]), b[1:], c[1:]
        return Butcher(tuple((*row, *[0] * (len(b) - len(row))) for row in a), b, c)

    def _check_shapes(self) -> None:
        s = len(self.b)
        self._require(self.order >= 1, f"order must be at least 1, got {self.order}")
        self._require(s >= 1, "b is empty: a method needs at least one stage")
        rows = [len(row) for row in self.a]
        self._require(
            rows in (list(range(s)), [s] * s),
            f"a needs rows of 0 ... {s - 1} weights, or of {s} each, got {rows}",
        )
        self._require(not any(self.a[0]), "row 0 of a must be zero: stage 0 is f(t, y)")
        self._require(len(self.c) == s, f"c must have {s} entries, got {len(self.c)}")
        self._require(
            (self.error is None) == (self.embedded_order is None),
            "error and embedded_order belong together: give both or none",
        )
        self._require(0 <= self.damping < math.inf, f"damping = {self.damping} must be finite")
        if self.error is not None:
            self._require(
                len(self.error) == s + 1,
                f"error must weigh {s} stages and the node, got {len(self.error)} weights",
            )
        shared = self.interpolant.stages - self.interpolant.extra_stages
        self._require(
            shared == s + 1,
            f"the interpolant must weigh {s} stages, the node and its own extra ones, "
            f"but beside those it weighs {shared} stages",
        )

    def _check_row_sums(self) -> None:
        for stage, (row, c) in enumerate(zip(self.a, self.c, strict=True)):
            self._require_equal(math.fsum(row), c, f"c[{stage}] is not the sum of row {stage} of a")

    def _check_order_conditions(self) -> None:
        """All conditions in one walk over the rooted trees, on all the stages of a step."""
        rows = (*self.a, self.b, *self.interpolant.a)
        greatest = max(self.order, self.embedded_order or 0, self.interpolant.order)
        for condition in conditions(rows, greatest):
            if condition.order <= self.order:
                self._check_weights(condition)
            if self.error is not None and condition.order <= (self.embedded_order or 0):
                self._check_error(condition, self.error)
            if condition.order <= self.interpolant.order:
                self._check_interpolant(condition)
        self._check_interpolant_end()

    def _check_weights(self, condition: Condition) -> None:
        self._require_equal(
            condition.left(self.b),
            1 / condition.density,
            f"b misses order {condition.order} on the tree {condition.tree}",
        )

    def _check_error(self, condition: Condition, error: Sequence[float]) -> None:
        # Where y_new fulfils the condition, too, their difference must not see the tree.
        fulfilled = condition.order <= self.order
        self._require_equal(
            condition.left(error) if fulfilled else condition.left(self.b) - condition.left(error),
            0.0 if fulfilled else 1 / condition.density,
            f"error misses embedded order {condition.order} on the tree {condition.tree}",
        )

    def _check_interpolant(self, condition: Condition) -> None:
        """``sum_i b_i(theta) Phi_i = theta^order / density``, power by power."""
        powers = tuple(zip(*self.interpolant.coefficients, strict=True))
        for power in range(1, max(len(powers), condition.order) + 1):
            weights = powers[power - 1] if power <= len(powers) else (0.0,)
            self._require_equal(
                condition.left(weights),
                1 / condition.density if power == condition.order else 0.0,
                f"interpolant misses order {condition.order} in theta^{power} "
                f"on the tree {condition.tree}",
                scale=max(map(abs, weights)),
            )

    def _check_interpolant_end(self) -> None:
        """Continuity: at ``theta = 1`` the interpolant gives ``y_new``."""
        extras = self.interpolant.extra_stages
        for stage, (weight, b, row) in enumerate(
            zip(
                self.interpolant.weights(1.0),
                (*self.b, 0.0, *[0.0] * extras),
                self.interpolant.coefficients,
                strict=True,
            )
        ):
            self._require_equal(
                weight,
                b,
                f"interpolant at theta = 1 does not weigh stage {stage} as y_new does",
                scale=max(map(abs, row)),
            )

    def _require_equal(self, got: float, wanted: float, what: str, scale: float = 0.0) -> None:
        # Written so that a NaN is refused too.
        close = abs(got - wanted) <= _TOLERANCE * max(1.0, scale)
        self._require(close, f"{what}: got {got!r} instead of {wanted!r}")

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise TableauError(f"{self.name}: {what}")
