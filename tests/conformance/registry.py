"""Everything registered, in every variant its options allow."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from symplectic_adjoint import ArgumentError, FixedGrid, gradients, steppers
from symplectic_adjoint.controllers import Adaptive, Controller
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.steppers import ExplicitRK, ImplicitRK, Partitioned, Stepper

PARTITIONED = tuple(
    name for name in steppers.names() if isinstance(steppers.get(name), Partitioned)
)
# Methods for any system; those for separable ones have problems of their own.
METHODS = tuple(name for name in steppers.names() if name not in PARTITIONED)
EXPLICIT = tuple(name for name in METHODS if isinstance(steppers.get(name), ExplicitRK))
IMPLICIT = tuple(name for name in METHODS if isinstance(steppers.get(name), ImplicitRK))
# Steps that solve equations take longer: suites that test every combination leave them out, and
# test them on some that cover all values.
QUICK = tuple(name for name in METHODS if name not in IMPLICIT)


def variants(strategy: Strategy) -> Iterator[Strategy]:
    """The strategy itself, and one for each other value of each of its enumerated options."""
    yield strategy
    stepper = steppers.get(strategy.method or "dopri5")
    hints = typing.get_type_hints(type(strategy))
    for option in dataclasses.fields(strategy):  # type: ignore[arg-type]
        for value in _choices(hints[option.name]):
            # The value that an option takes where it is left open is no other one.
            if value != getattr(strategy.fitted(stepper), option.name):
                yield dataclasses.replace(strategy, **{option.name: value})  # type: ignore[type-var]


def _choices(hint: Any) -> Iterator[Any]:
    """The values that a ``Literal``, or a union of such with None, allows."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        yield from typing.get_args(hint)
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _choices(part)
    elif hint is bool:
        yield from (False, True)


def strategies(*, exact: bool) -> list[Strategy]:
    """Every variant of every strategy that claims, or does not claim, to be exact."""
    found = [gradients.get(name) for name in gradients.names()]
    return [v for strategy in found if strategy.exact is exact for v in variants(strategy)]


def supports(strategy: Strategy, method: str) -> bool:
    """Whether the strategy can reverse the method."""
    try:
        strategy.check(steppers.get(method))
    except ArgumentError:
        return False
    return True


def label(value: Any) -> str:
    """A short id of a strategy for test names: its name and the options that are not default."""
    default = gradients.get(value.name)
    changed = [
        f"{f.name}={getattr(value, f.name)}"
        for f in dataclasses.fields(value)
        if getattr(value, f.name) != getattr(default, f.name)
    ]
    return "-".join([value.name, *changed])


def pairs(strategies: Iterable[Strategy], methods: Sequence[str] = METHODS) -> list[Any]:
    """Each method with every one of the strategies that supports it, as test parameters."""
    return [
        pytest.param(method, strategy, id=f"{method}-{label(strategy)}")
        for method in methods
        for strategy in strategies
        if supports(strategy, method)
    ]


def pacing(stepper: Stepper, step_size: float = 0.37) -> tuple[Controller, float]:
    """A controller that takes a handful of steps of this method, and its tolerance."""
    if stepper.error_order is None:
        return FixedGrid(step_size=step_size), 1.0
    order = stepper.error_order if isinstance(stepper, ImplicitRK) else stepper.order
    return Adaptive(), 10.0 ** -min(max(1.3 * order - 1, 1.5), 5.5)
