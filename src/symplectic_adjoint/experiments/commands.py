"""The command line, built on typer."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from symplectic_adjoint import datasets
from symplectic_adjoint.experiments.compare import Comparison
from symplectic_adjoint.experiments.config import STRATEGIES, CompareConfig, ConfigError
from symplectic_adjoint.experiments.console import print_results, table_console, watcher
from symplectic_adjoint.experiments.reproduce import group
from symplectic_adjoint.experiments.results import version
from symplectic_adjoint.experiments.shell import guarded

app = typer.Typer(
    name="symplectic-adjoint",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Exact gradients of differential equations, shown on real data.",
)
app.add_typer(group, name="reproduce")
_DEFAULT = CompareConfig()
_data, _strategies, _solver, _model, _training, _output = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Data", "Strategies", "Solver", "Model", "Training", "Output")
)
_SETTINGS = tuple(field.name for field in fields(CompareConfig))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("symplectic-adjoint"))
        raise typer.Exit


@app.callback()
def _root(
    version_: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Exact gradients of differential equations, shown on real data."""


@app.command()
def compare(
    context: typer.Context,
    data: Annotated[
        str,
        _data(help=f"{', '.join(datasets.names())}, or the path of a .npy or .csv file."),
    ] = _DEFAULT.data,
    strategies: Annotated[
        str, _strategies(help="Gradient strategies, separated by commas.")
    ] = ",".join(STRATEGIES),
    method: Annotated[str, _solver(help="Solver; mali runs with its own, alf.")] = _DEFAULT.method,
    rtol: Annotated[float, _solver(help="Relative tolerance.")] = _DEFAULT.rtol,
    atol: Annotated[float, _solver(help="Absolute tolerance.")] = _DEFAULT.atol,
    step_size: Annotated[
        float | None, _solver(help="Size of fixed steps, in place of step size control.")
    ] = None,
    max_steps: Annotated[
        int | None, _solver(help="Attempted steps after which a solve fails.")
    ] = None,
    model: Annotated[
        str, _model(help="mlp, or conv for a multi-scale flow of images.")
    ] = _DEFAULT.model,
    blocks: Annotated[
        int, _model(help="Stacked blocks of the flow, or of each scale.")
    ] = _DEFAULT.blocks,
    hidden: Annotated[
        str, _model(help="Widths or channels of the hidden layers, separated by commas.")
    ] = ",".join(map(str, _DEFAULT.hidden)),
    layer: Annotated[str, _model(help="concatsquash or concat.")] = _DEFAULT.layer,
    activation: Annotated[str, _model(help="softplus or tanh.")] = _DEFAULT.activation,
    trace: Annotated[str, _model(help="hutchinson or exact, while training.")] = _DEFAULT.trace,
    noise: Annotated[
        str, _model(help="rademacher or gaussian, of Hutchinson's estimate.")
    ] = _DEFAULT.noise,
    iterations: Annotated[
        int, _training(help="Training iterations under each strategy.")
    ] = _DEFAULT.iterations,
    epochs: Annotated[
        int | None, _training(min=1, help="Passes over the training rows, for --iterations.")
    ] = None,
    batch_size: Annotated[int, _training(help="Rows in a batch.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[
        float, _training(help="Learning rate of Adam.")
    ] = _DEFAULT.learning_rate,
    seed: Annotated[int, _training(help="Seed of everything random.")] = _DEFAULT.seed,
    device: Annotated[str, _training(help="cpu, cuda, cuda:1, ...")] = _DEFAULT.device,
    dtype: Annotated[str, _training(help="float32 or float64.")] = _DEFAULT.dtype,
    evaluate_every: Annotated[
        int, _training(help="Iterations between scores of the validation rows.")
    ] = _DEFAULT.evaluate_every,
    checkpoint_every: Annotated[
        int, _training(help="Iterations between checkpoints.")
    ] = _DEFAULT.checkpoint_every,
    sweep: Annotated[
        str, _strategies(help="Tolerances of the memory sweep, separated by commas.")
    ] = ",".join(map(str, _DEFAULT.sweep)),
    out: Annotated[Path, _output(help="Output folder.", file_okay=True, dir_okay=True)] = Path(
        "runs/compare"
    ),
    overwrite: Annotated[
        bool, _output("--overwrite", help="Replace an earlier run in the output folder.")
    ] = False,
    resume: Annotated[
        bool, _output("--resume", help="Continue the stopped run in the output folder.")
    ] = False,
) -> None:
    """Trains the same flow under each gradient strategy and compares what that takes.

    Writes results.json, figures and report.html to the output folder.
    """
    messages = Console(stderr=True)
    settings: dict[str, Any] = {name: context.params[name] for name in _SETTINGS}
    given = {name for name in context.params if _is_given(context, name)}
    with guarded(messages, f"symplectic-adjoint compare --resume --out {out}") as stop:
        if {"epochs", "iterations"} <= given:
            raise ConfigError("--epochs and --iterations both say how long to train; give one")
        comparison = (
            _resumed(out, settings, given)
            if resume
            else Comparison.start(_config(settings), out, overwrite=overwrite, epochs=epochs)
        )
        with watcher(messages) as watching:
            results = comparison.run(watching, stop)
    print_results(table_console(), results)
    typer.echo(f"\nReport: {comparison.folder.report}")
    if all(result.error for result in results.strategies):
        raise typer.Exit(1)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _config(settings: dict[str, Any]) -> CompareConfig:
    """Settings from what the command line holds, where lists are words separated by commas."""
    values = dict(settings)
    values["strategies"] = tuple(_words(values["strategies"]))
    values["hidden"] = _numbers("hidden", values["hidden"], int)
    values["sweep"] = _numbers("sweep", values["sweep"], float)
    return CompareConfig(**values)


def _resumed(out: Path, settings: dict[str, Any], given: set[str]) -> Comparison:
    """The stopped run, if no given option contradicts its settings."""
    for name in ("overwrite", "epochs"):
        if name in given:
            raise ConfigError(f"--{name} cannot be combined with --resume")
    comparison = Comparison.resume(out)
    wanted, stored = _config(settings).to_dict(), comparison.config.to_dict()
    for name in sorted(given & set(_SETTINGS)):
        if wanted[name] != stored[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {settings[name]} differs from the stopped run's "
                f"{stored[name]}; leave the option out to resume, or start a new run"
            )
    return comparison


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> tuple[float, ...]:
    try:
        return tuple(kind(word) for word in _words(text.replace("-", ",") if kind is int else text))
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be numbers separated by commas") from None
