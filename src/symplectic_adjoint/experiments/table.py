"""The comparison in words and figures, shared by the terminal and the report."""

from __future__ import annotations

from symplectic_adjoint.experiments.measure import Cost
from symplectic_adjoint.experiments.results import Results, StrategyResult

HEADINGS = (
    "strategy",
    "solver",
    "exact",
    "test NLL\nnats",
    "gradient\nerror",
    "same in\nfloat64",
    "peak\nmemory",
    "seconds/\niteration",
    "evals\nforward",
    "evals\nbackward",
    "products",
    "steps",
)
_MISSING = "-"


def row(result: StrategyResult) -> tuple[str, ...]:
    """One strategy's cells under ``HEADINGS``."""
    cost = result.cost
    start = (
        result.name,
        result.method + ("*" if result.own_solver else ""),
        "yes" if result.exact else "no",
        _MISSING if result.test_nll is None else f"{result.test_nll:.3f}",
    )
    seconds = result.seconds_per_iteration
    pace = _MISSING if seconds is None else f"{seconds:.3f}"
    if cost is None:
        return (*start, *[_MISSING] * 3, pace, *[_MISSING] * 4)
    return (
        *start,
        _error(cost.gradient_error),
        _error(cost.gradient_error_float64),
        size(cost.peak_memory),
        pace,
        str(cost.evaluations),
        str(cost.backward_evaluations),
        str(cost.products),
        str(cost.accepted),
    )


def notes(results: Results) -> list[str]:
    """What a reader must know to read the table rightly."""
    lines = [
        "Gradient error: relative L2 distance of the parameters' gradient from float64 "
        "backpropagation through the same accepted steps, for the strategy in "
        f"{results.config.dtype} and in float64. Exact means that only rounding separates them, "
        "whatever the tolerance.",
    ]
    if results.probe is not None:
        lines.append(
            "Error, memory, evaluations (evals), products and steps are of one gradient, measured "
            "for every strategy on the same rows and noise, at the weights trained under "
            f"{results.probe}."
        )
    for result in results.strategies:
        if result.own_solver:
            lines.append(
                f"* {result.name} runs with its own solver, {result.method}, because it must "
                "invert the steps: its steps, solution and score differ from the others', and its "
                "gradient is judged against backpropagation through its own steps."
            )
        if result.error is not None:
            lines.append(f"{result.name} stopped early: {result.error}")
    traces = {result.test_trace for result in results.strategies if result.test_trace is not None}
    if traces:
        lines.append(
            f"Test NLL: standardised coordinates, {' and '.join(sorted(traces))} trace. "
            f"Add {results.data.log_scale:.3f} for the original coordinates."
        )
    return lines


def findings(results: Results) -> list[str]:
    """What the figures say, in sentences made of them."""
    lines = []
    scores = [s.test_nll for s in results.strategies if s.test_nll is not None]
    if scores:
        start, gaussian = results.data.standard_normal_nll, results.data.gaussian_nll
        reference = (
            "" if gaussian is None else f"; a Gaussian with full covariance scores {gaussian:.2f}"
        )
        lines.append(
            f"Training took the test NLL from {start:.2f} nats to "
            f"{_span(min(scores), max(scores))}{reference}."
        )
    base = next((s for s in results.strategies if s.name == "backprop"), None)
    if base is not None and base.cost is not None:
        lines += [
            _against(base, base.cost, result, result.cost)
            for result in results.strategies
            if result.cost is not None and result is not base
        ]
    return lines


def size(count: int) -> str:
    """A number of bytes for people.

    Example:
        >>> size(500), size(3 * 2**20)
        ('500 B', '3.00 MiB')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _against(base: StrategyResult, base_cost: Cost, result: StrategyResult, cost: Cost) -> str:
    memory = cost.peak_memory / base_cost.peak_memory
    text = f"{result.name}: {memory:.2f} times backprop's peak memory"
    if base.seconds_per_iteration and result.seconds_per_iteration:
        pace = result.seconds_per_iteration / base.seconds_per_iteration
        text += f", {pace:.2f} times its time"
    text += f", gradient error {_error(cost.gradient_error_float64)} in float64"
    if result.own_solver:
        text += f" (with another solver, {result.method})"
    return text + "."


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _span(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"between {low:.2f} and {high:.2f}"
