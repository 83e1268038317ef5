"""The command group ``reproduce``: the experiments of the paper, each a study of its own.

To plug in another study, write it as a ``sweep.Study`` and add a command here that builds it from
its options and hands it to ``run_study``.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.console import Console

from symplectic_adjoint.experiments.console import watcher
from symplectic_adjoint.experiments.density import DensityStudy
from symplectic_adjoint.experiments.parallel import joined
from symplectic_adjoint.experiments.physics import PhysicsStudy
from symplectic_adjoint.experiments.shell import guarded
from symplectic_adjoint.experiments.sweep import Study, Sweep

group = typer.Typer(
    no_args_is_help=True,
    help="Reproduces the paper's experiments: tables, figures and a report.",
)

Out: TypeAlias = Annotated[Path, typer.Option(help="Output folder.")]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Continue the stopped run in the output folder.")
]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
]


@group.callback()
def _group() -> None:
    """Reproduces the paper's experiments: tables, figures and a report."""


@group.command()
def density(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the published files; without, stand-ins are generated."),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="reduced, paper, or tiny to see that all works.")
    ] = "reduced",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    out: Out = Path("runs/density"),
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Continuous normalizing flows: strategies, methods, tolerances and precisions compared."""
    run_study(
        lambda: DensityStudy(scale, data, seed, device), out, resume=resume, overwrite=overwrite
    )


def run_study(make: Callable[[], Study], out: Path, *, resume: bool, overwrite: bool) -> None:
    """Runs a study in a folder, alone or with the other processes of ``torchrun``.

    Args:
        make: Makes the study; what it raises is said in words.
        out: The folder.
        resume: Continue the stopped run that the folder holds.
        overwrite: Replace the run that the folder holds.

    Raises:
        Exit: The run failed or was stopped; a message says why and how to go on.
    """
    messages = Console(stderr=True)
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    again = shlex.join(["symplectic-adjoint", *words, "--resume"])
    with guarded(messages, again) as stop, joined() as world:
        sweep = Sweep(make(), out, world)
        sweep.prepare(resume=resume, overwrite=overwrite)
        messages.quiet = not world.first
        with watcher(messages) as watching:
            sweep.run(watching, stop)
    if world.first:
        typer.echo(f"Report: {sweep.report / 'index.md'}")


@group.command()
def physics(
    out: Out = Path("runs/physics"),
    systems: Annotated[
        str, typer.Option(help="Systems, separated by commas.")
    ] = "kdv,cahn-hilliard",
    strategies: Annotated[
        str, typer.Option(help="Gradient strategies, separated by commas.")
    ] = "backprop,checkpoint,aca,symplectic,continuous",
    methods: Annotated[
        str, typer.Option(help="Methods, e.g. dopri5,dopri8,verlet; separated by commas.")
    ] = "dopri5",
    models: Annotated[
        str, typer.Option(help="energy (learned energy), plain (learned dynamics), or both.")
    ] = "energy",
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of training.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of snapshots in a batch.")] = 20,
    width: Annotated[int, typer.Option(min=1, help="Width of the hidden layers.")] = 32,
    trajectories: Annotated[int, typer.Option(min=1, help="Trajectories to learn from.")] = 10,
    snapshots: Annotated[int, typer.Option(min=2, help="Snapshots of each.")] = 21,
    horizon: Annotated[int, typer.Option(min=2, help="Snapshots of the long prediction.")] = 41,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Step size of Adam.")] = 5e-3,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Of adaptive methods.")] = 1e-5,
    substeps: Annotated[int, typer.Option(min=1, help="Steps a snapshot of other methods.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Learns physical systems from snapshots, and predicts with what was learned.

    Systems: mass-spring, pendulum, double-pendulum, two-body, henon-heiles, kdv, cahn-hilliard. As
    it is it takes a few minutes on two cores; a larger scale is e.g. --iterations 10000 --width 200
    --trajectories 90 --snapshots 101 --methods dopri8.
    """

    def make() -> Study:
        return PhysicsStudy(
            tuple(systems.split(",")),
            tuple(strategies.split(",")),
            tuple(methods.split(",")),
            tuple(models.split(",")),
            iterations=iterations,
            batch=batch,
            width=width,
            trajectories=trajectories,
            snapshots=snapshots,
            horizon=horizon,
            learning_rate=learning_rate,
            tolerance=tolerance,
            substeps=substeps,
            seed=seed,
        )

    run_study(make, out, resume=resume, overwrite=overwrite)
