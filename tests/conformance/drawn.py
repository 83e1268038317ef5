"""Problems that Hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from torch import Tensor

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from tests import problems
from tests.conformance import reference


@dataclass
class Drawn:
    """A problem and how to solve it."""

    case: problems.Case
    method: str
    controller: Any
    tolerance: float

    @property
    def nodes(self) -> Callable[[Tensor, Sequence[Tensor]], list[Tensor]]:
        """How the accepted steps follow the output times."""
        fixed = isinstance(self.controller, sa.FixedGrid)
        return reference.uniform_nodes if fixed else reference.adaptive_nodes


@st.composite
def drawn_cases(draw: st.DrawFn, methods: Sequence[str]) -> Drawn:
    """Any dimension, horizon, direction, times, network, method, controller and tolerance."""
    span = draw(st.floats(0.05, 3.0)) * draw(st.sampled_from([1.0, -1.0]))
    start = draw(st.floats(-2.0, 2.0))
    places = draw(st.lists(st.floats(0.001, 0.999), max_size=6, unique_by=lambda x: round(x, 4)))
    case = problems.case(
        tree=draw(st.booleans()),
        times=[start, *(start + span * place for place in sorted(places)), start + span],
        wants_time=draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        dim=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 1000)),
    )
    method = draw(st.sampled_from(methods))
    stepper = steppers.get(method)
    # Steps far longer than the time scale of the network would amplify rounding.
    if stepper.error_order is None or draw(st.booleans()):
        step_size = max(draw(st.floats(0.05, 0.6)), abs(span) / 15)
        return Drawn(case, method, sa.FixedGrid(step_size=step_size), 1.0)
    control = draw(st.sampled_from([sa.Adaptive, sa.Adaptive.pi, sa.Adaptive.pid]))
    exponent = draw(st.floats(1.0, min(stepper.order + 1.5, 9.0)))
    return Drawn(case, method, control(max_step=0.6), 10.0**-exponent)
