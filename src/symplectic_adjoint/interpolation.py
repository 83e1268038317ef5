"""Data as a function of time: controls and forcing terms of a differential equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.capture import wrapped

Filling = Literal["linear", "forward"]


class Interpolation(nn.Module):
    """A piecewise polynomial of time, usually through data that were seen at irregular times.

    ``linear``, ``hermite`` and ``natural_cubic`` make one. It is a function of a time and so can be
    used inside the right-hand side of an equation, from ``args`` or from wherever else ``func``
    finds it; gradients reach the data and their times. Left of the first knot and right of the last
    one the outermost polynomials go on. At a knot itself the polynomial on its right holds. An
    evaluation reads nothing back from the device.

    Args:
        knots: Where the pieces meet, (T,), strictly increasing.
        coefficients: Of each piece, by ascending powers of the time since the knot on its left,
            (T - 1, degree + 1, *batch, channels).

    Raises:
        ArgumentError: The shapes do not fit together.

    Example:
        >>> x = Interpolation.linear([0.0, 1.0, 3.0], torch.tensor([[0.0], [1.0], [5.0]]))
        >>> x(torch.tensor(2.0)), x.derivative(torch.tensor(2.0))
        (tensor([3.]), tensor([2.]))

        A forcing term, here captured by ``func``:

        >>> from symplectic_adjoint import odeint
        >>> y = odeint(lambda t, y: x(t) - y, torch.zeros(1), [0.0, 3.0])
        >>> y.shape
        torch.Size([2, 1])
    """

    knots: Tensor
    coefficients: Tensor

    def __init__(self, knots: Tensor, coefficients: Tensor) -> None:
        super().__init__()
        if knots.ndim != 1 or coefficients.ndim < 2 or len(coefficients) != len(knots) - 1:
            raise ArgumentError(
                "coefficients must have shape (T - 1, degree + 1, *batch, channels) for T knots, "
                f"but are {tuple(coefficients.shape)} for knots of shape {tuple(knots.shape)}"
            )
        # Data, not weights: they follow the module to a device, but are no part of its state_dict.
        self.register_buffer("knots", knots, persistent=False)
        self.register_buffer("coefficients", coefficients, persistent=False)

    @staticmethod
    def linear(t: Any, x: Tensor) -> Interpolation:
        """Straight lines between the data. The derivative jumps at the knots.

        Args:
            t: Times of the data, (T,), strictly increasing; of a floating-point dtype.
            x: The data, (*batch, T, channels), all at the same times.

        Returns:
            The interpolation.

        Raises:
            ArgumentError: ``t`` or ``x`` is unusable, or a value is missing (NaN).
        """
        t, h, x = _checked(t, x)
        return Interpolation(t, torch.stack([x[:-1], x.diff(dim=0) / h], dim=1))

    @staticmethod
    def hermite(t: Any, x: Tensor) -> Interpolation:
        """Cubics whose slope at each knot is the one of the straight line that leads there.

        At the first knot it is the slope of the line that leads away. The derivative is continuous,
        and up to a knot the path depends on no later data than that knot's (Morrill, Kidger, Yang,
        Lyons 2021, "Neural Controlled Differential Equations for Online Prediction Tasks", arXiv
        2106.11028, "cubic Hermite splines with backward differences"). The usual choice for neural
        controlled differential equations.

        Args:
            t: Times of the data, (T,), strictly increasing; of a floating-point dtype.
            x: The data, (*batch, T, channels), all at the same times.

        Returns:
            The interpolation.

        Raises:
            ArgumentError: ``t`` or ``x`` is unusable, or a value is missing (NaN).
        """
        t, h, x = _checked(t, x)
        slope = x.diff(dim=0) / h
        before = torch.cat([slope[:1], slope[:-1]])
        turn = (slope - before) / h
        return Interpolation(t, torch.stack([x[:-1], before, 2 * turn, -turn / h], dim=1))

    @staticmethod
    def natural_cubic(t: Any, x: Tensor) -> Interpolation:
        """The natural cubic spline: the smoothest curve through the data.

        Its second derivative is continuous, and zero at both ends. Every value depends on all data,
        future ones too.

        Args:
            t: Times of the data, (T,), strictly increasing; of a floating-point dtype.
            x: The data, (*batch, T, channels), all at the same times.

        Returns:
            The interpolation.

        Raises:
            ArgumentError: ``t`` or ``x`` is unusable, or a value is missing (NaN).
        """
        t, h, x = _checked(t, x)
        slope = x.diff(dim=0) / h
        # Rows of the system for the second derivatives: the ends are zero, between them the first
        # derivative is continuous.
        end = torch.zeros_like(h[:1])
        lower, upper = torch.cat([end, h[:-1], end]), torch.cat([end, h[1:], end])
        main = torch.cat([end + 1, 2 * (h[:-1] + h[1:]), end + 1])
        right = torch.cat([torch.zeros_like(x[:1]), 6 * slope.diff(dim=0), torch.zeros_like(x[:1])])
        bend = _tridiagonal(lower, main, upper, right)
        left, rise = bend[:-1], bend.diff(dim=0)
        start = slope - h * (left / 2 + rise / 6)
        return Interpolation(t, torch.stack([x[:-1], start, left / 2, rise / (6 * h)], dim=1))

    def forward(self, t: Any) -> Tensor:
        """The value at a time.

        Args:
            t: A time or a tensor of times of any shape, on the device of the data.

        Returns:
            Of shape (*t.shape, *batch, channels), dtype of the data.
        """
        t, place, pieces = self._find(t)
        return _horner(pieces, place).reshape(*t.shape, *pieces[0].shape[1:])

    def derivative(self, t: Any) -> Tensor:
        """The derivative with respect to time, at a time.

        Args:
            t: As for a call.

        Returns:
            Of shape (*t.shape, *batch, channels), dtype of the data.
        """
        t, place, pieces = self._find(t)
        slopes = [p * c for p, c in enumerate(pieces)][1:] or [torch.zeros_like(pieces[0])]
        return _horner(slopes, place).reshape(*t.shape, *pieces[0].shape[1:])

    def _find(self, t: Any) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """The times, where in its piece each one lies, and the pieces' coefficients by power."""
        like = self.coefficients
        if not isinstance(t, Tensor):
            t = torch.as_tensor(t, dtype=self.knots.dtype, device=like.device)
        # In the dtype of t, in which the solver meets the knots when its steps end there.
        knots, times = self.knots.to(t.dtype), t.reshape(-1)
        index = torch.searchsorted(knots.detach()[1:-1], times.detach(), right=True)
        pieces = like.index_select(0, index).unbind(1)
        place = (times - knots.index_select(0, index)).to(like.dtype)
        return t, place.reshape(-1, *[1] * (like.ndim - 2)), pieces

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        pieces, powers, *shape = self.coefficients.shape
        return f"knots={pieces + 1}, degree={powers - 1}, shape={tuple(shape)}"


def fill_missing(t: Any, x: Tensor, how: Filling = "linear") -> Tensor:
    """Data with every NaN replaced, in each series by itself, differentiably.

    Before the first observation of a series stands that observation, and after the last one the
    last. A mask of what was observed, such as ``~x.isnan()``, may be appended as further channels
    where it matters that a value was missing.

    Args:
        t: Times of the data, (T,), strictly increasing.
        x: The data, (*batch, T, channels), NaN where a value is missing.
        how: "linear" puts the missing values on the line between their neighbours, "forward"
            repeats the last observation, which looks into no future but that of a series that has
            not begun.

    Returns:
        Like ``x``, without NaN; gradients go to the observations.

    Raises:
        ArgumentError: ``t`` or ``x`` is unusable, or a series has no observation at all.
        UnknownNameError: ``how`` is neither.

    Example:
        >>> nan = float("nan")
        >>> x = torch.tensor([[1.0, nan], [nan, 5.0], [2.0, nan]])
        >>> fill_missing([0.0, 3.0, 4.0], x)
        tensor([[1.0000, 5.0000],
                [1.7500, 5.0000],
                [2.0000, 5.0000]])
    """
    if how not in get_args(Filling):
        raise UnknownNameError("filling", how, get_args(Filling))
    t, series = _shaped(t, x)
    seen = ~series.isnan()
    begun = _plain(seen.any(0))
    if not bool(begun.all()):
        where = tuple((~begun).nonzero()[0].tolist())
        raise ArgumentError(
            f"the series {where} of x has no observation; drop it or fill it before the others"
        )
    count = len(t)
    index = torch.arange(count, device=x.device).reshape(-1, *[1] * (series.ndim - 1))
    before = torch.where(seen, index, -1).cummax(0).values
    after = torch.where(seen, index, count).flip(0).cummin(0).values.flip(0)
    left = torch.where(before < 0, after, before)
    start = series.gather(0, left)
    if how == "forward":
        return start.movedim(0, -2)
    right = torch.where(after == count, before, after)
    gap = torch.where(right > left, t[right] - t[left], 1.0)
    weight = ((t.reshape(index.shape) - t[left]) / gap).to(x.dtype)
    weight = torch.where(right > left, weight, 0.0)
    return (start + weight * (series.gather(0, right) - start)).movedim(0, -2)


def _shaped(t: Any, x: Any) -> tuple[Tensor, Tensor]:
    """Times on the device of the data, and the data with their times first."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        raise ArgumentError("x must be a floating-point or complex tensor, (*batch, T, channels)")
    if not isinstance(t, Tensor) or not t.is_floating_point():
        t = torch.as_tensor(t, dtype=x.dtype.to_real())
    t = t.to(x.device)
    values = _plain(t.detach())
    if t.ndim != 1 or len(t) < 2 or not bool(values.isfinite().all() & (values.diff() > 0).all()):
        raise ArgumentError(
            f"t must be 1-D with at least two finite, strictly increasing times, but is {t}"
        )
    if x.ndim < 2 or x.shape[-2] != len(t):
        raise ArgumentError(
            f"x must have shape (*batch, T, channels) with T = {len(t)} times, but has shape "
            f"{tuple(x.shape)}; a single series of shape (T,) is x.unsqueeze(-1)"
        )
    return t, x.movedim(-2, 0)


def _checked(t: Any, x: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Times (T,), the gaps between them, broadcasting against the data, and the data, T first."""
    t, series = _shaped(t, x)
    values = _plain(x.detach())
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ArgumentError(
            f"x[{', '.join(map(str, where))}] = {values[where].item()} is not finite; replace "
            "missing values first, e.g. by fill_missing(t, x)"
        )
    return t, t.diff().to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)), series


def _plain(x: Tensor) -> Tensor:
    """The values behind the transforms of ``torch.func``, those of a whole batch of ``vmap``."""
    while wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _horner(coefficients: Sequence[Tensor], place: Tensor) -> Tensor:
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + place * value
    return value


def _tridiagonal(lower: Tensor, main: Tensor, upper: Tensor, right: Tensor) -> Tensor:
    """Solve ``lower[i] z[i-1] + main[i] z[i] + upper[i] z[i+1] = right[i]``.

    By parallel cyclic reduction (Hockney and Jesshope 1981, "Parallel Computers"): each round
    eliminates the neighbours of every row at once and doubles their distance, so that T rows take
    log2(T) rounds. It needs no pivoting where the diagonal dominates.
    """
    distance = 1
    while distance < len(main):
        down = -lower / _moved(main, distance, 1.0)
        up = -upper / _moved(main, -distance, 1.0)
        right = right + down * _moved(right, distance) + up * _moved(right, -distance)
        main = main + down * _moved(upper, distance) + up * _moved(lower, -distance)
        lower, upper = down * _moved(lower, distance), up * _moved(upper, -distance)
        distance *= 2
    return right / main


def _moved(x: Tensor, by: int, fill: float = 0.0) -> Tensor:
    """Row ``i`` becomes row ``i + by``; what enters is ``fill``."""
    entering = torch.full_like(x[: abs(by)], fill)
    return torch.cat([entering, x[:-by]] if by > 0 else [x[-by:], entering])
