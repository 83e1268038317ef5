"""Measuring a gradient on the problem at hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from symplectic_adjoint import gradients
from symplectic_adjoint._errors import SolveError, UnderResolvedWarning
from symplectic_adjoint._tree import as_real
from symplectic_adjoint.api import default_controller, resolved_stepper, solve
from symplectic_adjoint.capture import Capture, graph_leaves
from symplectic_adjoint.controllers import Controller, FixedGrid, SensitivityControl
from symplectic_adjoint.field import RandomState
from symplectic_adjoint.gradients import ACA, Backprop, Strategy
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.steppers import Stepper

__all__ = ["Errors", "GradientCheck", "check_gradient", "peak_memory"]

_SHARE = 1e-3
"""Inputs whose gradient is a smaller part of the whole are not judged on their own."""

_ROUNDING = 1e-11
"""Relative errors in float64 that rounding explains."""


@dataclass(frozen=True)
class Errors:
    """Relative L2 errors of a gradient.

    Attributes:
        inputs: By name: ``y0`` (``y0[0]``, ... where it has several leaves), ``t`` where it
            requires grad, and each tensor that ``func`` and ``args`` depend on.
        total: Of all of them joined.
    """

    inputs: dict[str, float]
    total: float


@dataclass(frozen=True)
class GradientCheck:
    """What ``check_gradient`` has found; ``print`` it for a verdict in words.

    Attributes:
        exactness: Distance of the gradient from that of the computed solution: plain autograd on
            the accepted steps, in ``reference``.
        discretisation: Estimated distance of the gradient of the computed solution from that of
            the ODE; None where it was not asked for, or ``func`` draws random numbers.
        distance: Estimated distance of the gradient from that of the ODE; likewise.
        solution: Estimated relative L2 error of the solution at the output times; likewise.
        rate: Factor by which halving the steps last reduced the change of the gradient; for a
            smooth problem and small steps ``2**order``. Infinite where rounding is all there is.
        rounding: Error of plain autograd in the problem's dtype, on the same steps.
        asked: The relative error of the solution that the tolerances ask for; 0 on a fixed grid.
        dtype: Dtype of the problem.
        reference: Dtype in which the reference was computed.
        steps: Number of accepted steps.
        strategy: Name of the gradient strategy.
        advice: What to do about a sensitivity that is not resolved; otherwise empty.
        judged: The inputs whose gradient is not a negligible part of the whole.
    """

    exactness: Errors
    discretisation: Errors | None
    distance: Errors | None
    solution: float | None
    rate: float | None
    rounding: float
    asked: float
    dtype: torch.dtype
    reference: torch.dtype
    steps: int
    strategy: str
    advice: str = ""
    judged: tuple[str, ...] = field(default=(), repr=False)

    @property
    def errors(self) -> dict[str, float]:
        """``exactness.inputs``."""
        return self.exactness.inputs

    @property
    def total(self) -> float:
        """``exactness.total``."""
        return self.exactness.total

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of the computed solution up to rounding.

        In float64 that is 1e-11; in lower precision ten times the error of plain autograd.
        """
        unseen = 1e3 * torch.finfo(self.reference).eps
        return self.total <= max(_ROUNDING, 10 * self.rounding, unseen)

    @property
    def reliable(self) -> bool:
        """Whether halving the steps twice has shown convergence, so that estimates can be trusted.

        Otherwise the errors are at least of the size that is estimated.
        """
        return self.rate is not None and self.rate >= 1.5

    @property
    def under_resolved(self) -> bool:
        """Whether the steps resolve the solution, but not its derivatives.

        That is, whether the gradient, in total or of one input that makes up at least a thousandth
        of it, has lost two digits more than the solution has, and than the tolerances ask for: its
        error is more than a hundred times as large, or ten times where not one digit is left.
        """
        if self.solution is None:
            return False
        # Differences in single precision are no better than the square root of its rounding.
        floor = math.sqrt(torch.finfo(self.reference).eps)
        fair = max(self.solution, self.asked, floor)
        return self._worst > max(10 * fair, min(100 * fair, 0.1))

    @property
    def verdict(self) -> str:
        """A word for the gradient and one for the steps, such as ``"exact, resolved"``.

        The first is ``"exact"``, ``"rounding"`` (exact up to the rounding of a low precision) or
        ``"inexact"``; the second ``"resolved"``, ``"under-resolved"``, ``"coarse"`` (not one digit
        of the gradient is right, nor many of the solution), ``"unreliable"`` or ``"unknown"``.
        """
        return f"{self._exactness}, {self._resolution}"

    @property
    def _exactness(self) -> str:
        if not self.exact:
            return "inexact"
        return "exact" if self.total <= _ROUNDING else "rounding"

    @property
    def _resolution(self) -> str:
        if self.discretisation is None:
            return "unknown"
        if self.under_resolved:
            return "under-resolved"
        if not self.reliable:
            return "unreliable"
        return "coarse" if self.discretisation.total > 0.1 else "resolved"

    @property
    def _worst(self) -> float:
        if self.discretisation is None:
            return 0.0
        errors = [self.discretisation.inputs[name] for name in self.judged]
        return max(self.discretisation.total, *errors)

    def __str__(self) -> str:
        lines = [self._say_exactness(), self._say_resolution(), ""]
        columns = {"exactness": self.exactness}
        if self.discretisation is not None and self.distance is not None:
            columns |= {"discretisation": self.discretisation, "distance": self.distance}
        rows = [("", list(columns))]
        rows += [
            (name, [f"{errors.inputs[name]:.1e}" for errors in columns.values()])
            for name in self.errors
        ]
        rows.append(("total", [f"{errors.total:.1e}" for errors in columns.values()]))
        width = max(len(name) for name, _ in rows)
        lines += [
            " ".join([name.ljust(width), *(cell.rjust(15) for cell in cells)]).rstrip()
            for name, cells in rows
        ]
        return "\n".join(lines)

    def _say_exactness(self) -> str:
        error = f"{self.total:.0e}"
        if self._exactness == "exact":
            return f"exact: the gradient is that of the computed solution up to rounding ({error})"
        if self._exactness == "rounding":
            said = (
                f"rounding: the gradient is that of the computed solution up to the rounding of "
                f"{_name(self.dtype)} ({error})"
            )
            if self.discretisation is not None and self.total > self.discretisation.total:
                said += ", more than the error of the steps: tighter tolerances gain nothing"
            return said
        said = (
            f"inexact: the gradient ({self.strategy}) is {error} away from that of the computed "
            "solution, more than rounding explains"
        )
        if self.distance is not None:
            said += f"; from that of the ODE it is {self.distance.total:.0e} away"
        return said

    def _say_resolution(self) -> str:
        if self.discretisation is None or self.solution is None:
            return "steps: not judged"
        said = (
            f"{self._resolution}: over {self.steps} steps the gradient of the computed solution is "
            f"{self.discretisation.total:.0e} away from that of the ODE, and the solution "
            f"{self.solution:.0e}"
        )
        if not self.reliable:
            said += " or more: halving the steps does not show convergence"
        return said + self.advice


def check_gradient(
    func: Any,
    y0: Any,
    t: Any,
    *,
    args: Sequence[Any] = (),
    method: str | Stepper | None = None,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    controller: Controller | None = None,
    gradient: str | Strategy = "symplectic",
    loss: Callable[[Any], Tensor] | None = None,
    discretisation: bool = True,
) -> GradientCheck:
    """Measure how exact a gradient is on a problem, and how far from the gradient of the ODE.

    Two distances are told apart. The gradient is compared with plain autograd on the same accepted
    steps, in float64 (complex128): an exact strategy differs by rounding. And the gradient of the
    computed solution is compared with those on the grids with every step halved, once and twice,
    from which the gradient of the ODE is extrapolated (Richardson); the ratio of the
    differences says whether the estimate can be trusted. The steps are those of the accepted grid
    throughout, so the derivatives of the step control, which would be spurious (Alexe, Sandu 2009,
    "On the discrete adjoints of adaptive time stepping algorithms", J. Comput. Appl. Math. 233,
    1005-1020), take no part.

    Tensors that ``func`` holds are replaced by float64 ones for the reference wherever they sit in
    a module, closure or container. If that does not suffice (func makes float32 tensors itself,
    TorchScript), the dtype of the problem is used. If ``func`` draws random numbers, the reference
    draws the same ones, in the dtype of the problem, and there is no ODE to compare with. The
    caller's random streams are left as they were.

    The reference takes as much memory as backpropagation; the finer grids take little memory, and
    six times the evaluations.

    Args:
        func: As for ``solve``.
        y0: As for ``solve``.
        t: As for ``solve``.
        args: As for ``solve``.
        method: As for ``solve``.
        rtol: As for ``solve``.
        atol: As for ``solve``.
        controller: As for ``solve``.
        gradient: The strategy to measure.
        loss: What to differentiate: a function of ``solution.y``. By default a random linear
            function of the solution at all times after ``t[0]``.
        discretisation: Whether to estimate the distance from the gradient of the ODE.

    Returns:
        The errors by input and in total, and the verdict.

    Raises:
        ArgumentError: An argument is unusable.
        SolveError: ``t[-1]`` could not be reached.

    Warns:
        UnderResolvedWarning: The gradient has lost two digits more than the solution
            (``GradientCheck.under_resolved``): the steps follow the solution, which does not show
            how its derivatives vary.

    Example:
        >>> class Field(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 2)
        ...
        ...     def forward(self, t, y):
        ...         return torch.tanh(self.net(y))
        >>> check = check_gradient(Field().double(), torch.ones(3, 2).double(), [0.0, 1.0])
        >>> check.verdict
        'exact, resolved'
    """
    strategy = gradients.get(gradient)
    stepper = resolved_stepper(method, strategy)
    if controller is None:
        controller = default_controller(stepper)
    options = {"method": stepper, "rtol": rtol, "atol": atol}
    probe = _Probe(func, y0, _as_times(t), args, loss, options)
    own = probe.sample(controller, strategy)
    if probe.random:
        reference = probe.sample(controller, Backprop())
        plain, finer = reference, []
    else:
        frozen = _frozen(controller, own.steps)
        reference = probe.precise(frozen, Backprop())
        plain = reference if reference.dtype == own.dtype else probe.sample(frozen, Backprop())
        halvings = (1, 2) if discretisation else ()
        finer = [probe.precise(_frozen(controller, own.steps, k), ACA()) for k in halvings]
    check = _judge(own, reference, plain, finer, strategy, _asked(controller, rtol, atol, own))
    if check.under_resolved:
        advice = _advice(check, controller, stepper, rtol)
        check = replace(check, advice=advice)
        warnings.warn(check._say_resolution(), UnderResolvedWarning, stacklevel=2)
    return check


@dataclass(frozen=True)
class _Sample:
    """A solve and its gradients."""

    steps: Tensor
    y: Tensor
    grads: dict[str, Tensor]
    dtype: torch.dtype


@dataclass
class _Probe:
    """The problem, solved and differentiated in several ways, always drawing the same numbers.

    ``random`` says that ``func`` draws any, ``hidden`` lists tensors that only solving has found,
    and ``fails`` says that ``func`` cannot be evaluated in double precision.
    """

    func: Any
    y0: Any
    t: Tensor
    args: Sequence[Any]
    loss: Callable[[Any], Tensor] | None
    options: dict[str, Any]
    random: bool = False
    hidden: list[Tensor] | None = None
    fails: bool = False

    def __post_init__(self) -> None:
        leaf = next((x for x in pytree.tree_leaves(self.y0) if isinstance(x, Tensor)), self.t)
        self.device = leaf.device
        self.start = RandomState(leaf.device)

    def sample(self, controller: Controller, strategy: Strategy) -> _Sample:
        """In the dtype of the problem."""
        arguments = list(self.args)
        capture = Capture(self.func, arguments)
        named = dict(zip(_unique(capture.names), capture.tensors, strict=True))
        return self._differentiated(controller, strategy, arguments, named, _same)

    def precise(self, controller: Controller, strategy: Strategy) -> _Sample:
        """In double precision if ``func`` allows it."""
        arguments = list(self.args)
        capture = Capture(self.func, arguments)
        if not self.fails and capture.convertible and not self.hidden:
            leaves = [_leaf(_doubled(x)) for x in capture.tensors]
            named = dict(zip(_unique(capture.names), leaves, strict=True))
            try:
                with (
                    capture.converted(leaves, _doubled),
                    torch.autocast(self.device.type, enabled=False),
                ):
                    return self._differentiated(controller, strategy, arguments, named, _doubled)
            except SolveError:
                raise
            except (RuntimeError, TypeError):
                self.fails = True  # such as a tensor that func makes in single precision
        return self.sample(controller, strategy)

    def _differentiated(
        self,
        controller: Controller,
        strategy: Strategy,
        arguments: list[Any],
        named: dict[str, Tensor],
        convert: Callable[[Tensor], Tensor],
    ) -> _Sample:
        y0 = pytree.tree_map(lambda x: _leaf(convert(x)) if isinstance(x, Tensor) else x, self.y0)
        t = self.t.detach().requires_grad_(self.t.requires_grad)
        chosen: dict[str, Any] = {"controller": controller, "gradient": strategy, **self.options}
        with torch.enable_grad(), self.start.restored():
            sol = solve(self.func, y0, t, args=arguments, **chosen)
            self.random = self.random or not self.start.same(RandomState(self.device))
            outputs = pytree.tree_leaves(sol.y)
            leaves = pytree.tree_leaves(y0)
            names = [f"y0[{i}]" for i in range(len(leaves))] if len(leaves) > 1 else ["y0"]
            inputs = {**dict(zip(names, leaves, strict=True)), **named}
            if t.requires_grad:
                inputs["t"] = t
            inputs |= self._found(outputs, list(inputs.values()))
            loss = _random_loss(outputs) if self.loss is None else self.loss(sol.y)
            grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
        y = torch.cat([y[1:].detach().reshape(-1).to(_wide(y.dtype)) for y in outputs])
        return _Sample(sol.steps, y, dict(zip(inputs, grads, strict=True)), _coarsest(leaves))

    def _found(self, outputs: list[Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
        """Tensors that ``func`` depends on and only solving has found."""
        if self.hidden is None:
            known = {id(x) for x in inputs}
            cut = {(x.grad_fn, x.output_nr) for x in inputs if x.grad_fn is not None}
            reached = {id(x): x for y in outputs for x in graph_leaves(y, cut)}
            self.hidden = [x for i, x in reached.items() if i not in known]
        return {f"found[{i}]": x for i, x in enumerate(self.hidden)}


def _as_times(t: Any) -> Tensor:
    if isinstance(t, Tensor):
        return t.detach().to("cpu", torch.float64).requires_grad_(t.requires_grad)
    return torch.as_tensor(t, dtype=torch.float64)


def _unique(names: Sequence[str]) -> list[str]:
    """Names that tell tensors apart; those without one are numbered."""
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        counts[name] = counts.get(name, -1) + 1
        unique.append(name if counts[name] == 0 and name else f"{name}[{counts[name]}]")
    return unique


def _same(x: Tensor) -> Tensor:
    return x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float64)


def _doubled(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype)) if x.is_floating_point() or x.is_complex() else x


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _coarsest(leaves: Sequence[Tensor]) -> torch.dtype:
    return max((x.dtype for x in leaves), key=lambda dtype: torch.finfo(dtype).eps)


def _random_loss(outputs: Sequence[Tensor]) -> Tensor:
    """A linear function of the solution after its start, with the same weights in every dtype."""
    draw = torch.Generator().manual_seed(0)
    parts = []
    for y in outputs:
        weights = torch.randn(y[1:].shape, generator=draw, dtype=_wide(y.dtype))
        parts.append((weights.to(y) * y[1:]).sum().real)
    return torch.stack(parts).sum()


def _frozen(controller: Controller, steps: Tensor, halvings: int = 0) -> FixedGrid:
    """The accepted steps as a fixed grid, each halved as often as asked for."""
    if isinstance(controller, FixedGrid) and halvings == 0:
        return controller

    def grid(func: Any, y0: Any, t: Tensor) -> Tensor:
        if isinstance(controller, FixedGrid):
            nodes = controller.grid(func, y0, t)
        else:
            nodes = torch.cat([t[:1], steps[1:-1], t[-1:]])
        for _ in range(halvings):
            halves = torch.stack([nodes[:-1], (nodes[:-1] + nodes[1:]) / 2], dim=1)
            nodes = torch.cat([halves.flatten(), nodes[-1:]])
        return nodes

    # On both sides of a jump, func is seen from its own side.
    sides = getattr(controller, "perturb", False) or getattr(controller, "jump_t", None) is not None
    return FixedGrid(grid_constructor=grid, perturb=sides)


def _judge(
    own: _Sample,
    reference: _Sample,
    plain: _Sample,
    finer: Sequence[_Sample],
    strategy: Strategy,
    asked: float,
) -> GradientCheck:
    discretisation = distance = solution = rate = None
    if finer:
        chain = [reference, *finer]
        floor = 100 * torch.finfo(reference.dtype).eps
        limit = {}
        for name in reference.grads:
            limit[name], _ = _extrapolated([x.grads[name] for x in chain], floor)
        y, y_rate = _extrapolated([x.y for x in chain], floor)
        _, gradient_rate = _extrapolated([_joined(x.grads) for x in chain], floor)
        rate = min(gradient_rate, y_rate)
        discretisation = _errors(reference.grads, limit)
        distance = _errors(own.grads, limit)
        solution = _ratio(_size(reference.y - y), _size(y))
    whole = _size(_joined(reference.grads))
    return GradientCheck(
        exactness=_errors(own.grads, reference.grads),
        discretisation=discretisation,
        distance=distance,
        solution=solution,
        rate=rate,
        rounding=_errors(plain.grads, reference.grads).total,
        asked=asked,
        dtype=own.dtype,
        reference=reference.dtype,
        steps=len(own.steps) - 1,
        strategy=strategy.name,
        judged=tuple(n for n, g in reference.grads.items() if _size(g) >= _SHARE * whole),
    )


def _extrapolated(chain: Sequence[Tensor], floor: float) -> tuple[Tensor, float]:
    """The limit of values on grids halved twice, and the factor by which their changes fell.

    The changes are taken to fall on by the factor observed, as in Aitken's process, which needs no
    order: interpolated outputs and stiff problems show a lower one than the method has.
    """
    coarse, fine, finest = (x.to(_wide(x.dtype)) for x in chain)
    first, second = _size(coarse - fine), _size(fine - finest)
    if first <= floor * _size(finest):
        return finest, math.inf
    if second == 0.0:
        return finest, math.inf
    rate = first / second
    return finest + (finest - fine) / (max(rate, 2.0) - 1), rate


def _errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Errors:
    wrong = {name: _size(_widened(x) - _widened(wanted[name])) for name, x in got.items()}
    size = {name: _size(x) for name, x in wanted.items()}
    total = _ratio(math.hypot(*wrong.values()), math.hypot(*size.values()))
    return Errors({name: _ratio(wrong[name], size[name]) for name in wrong}, total)


def _joined(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([as_real(_widened(x), 0).cpu() for x in grads.values()])


def _widened(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(_widened(x)))


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0.0 else error / size if size else math.inf


def _asked(
    controller: Controller, rtol: float | Tensor, atol: float | Tensor, own: _Sample
) -> float:
    """The relative error that the tolerances ask for."""
    if isinstance(controller, FixedGrid):
        return 0.0
    size = _size(own.y) / math.sqrt(max(own.y.numel(), 1))
    return _least(rtol) + _ratio(_least(atol), size)


def _least(tolerance: float | Tensor) -> float:
    return float(tolerance.min()) if isinstance(tolerance, Tensor) else float(tolerance)


def _advice(
    check: GradientCheck, controller: Controller, stepper: Stepper, rtol: float | Tensor
) -> str:
    """How to bring the error of the gradient down to where that of the solution is.

    The error of a solve is proportional to ``h^p``, where ``p`` is observed; an adaptive step
    obeys ``h^q = tol``, where ``q`` is the order of the error estimate.
    """
    order = float(stepper.order)
    if check.rate is not None and check.reliable:
        order = min(math.log2(check.rate), order)
    factor = (max(check.solution or 0.0, check.asked) / check._worst) ** (1 / order)
    if stepper.error_order is None or isinstance(controller, FixedGrid):
        return f"; take steps about {math.ceil(1 / factor)} times shorter"
    advice = ["control the error of the sensitivities: controller=SensitivityControl()"]
    if isinstance(controller, SensitivityControl):
        advice = ["let SensitivityControl watch more inputs or directions"]
    tighter = _least(rtol) * factor**stepper.error_order
    if tighter > 100 * torch.finfo(check.dtype).eps:
        advice.insert(0, f"tighten rtol to about {tighter:.0e}, and atol likewise")
    return "; " + ", or ".join(advice)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
