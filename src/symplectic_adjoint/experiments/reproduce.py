"""The command group ``reproduce``: the experiments of the paper, each a study of its own.

To plug in another study, write it as a ``sweep.Study`` and add a command here that builds it from
its options and hands it to ``run_study``.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console

from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint.experiments.book import read_book, write_book, write_index
from symplectic_adjoint.experiments.console import watcher
from symplectic_adjoint.experiments.costs import CostsStudy
from symplectic_adjoint.experiments.density import DensityStudy
from symplectic_adjoint.experiments.parallel import World, joined
from symplectic_adjoint.experiments.physics import SCALES as PHYSICS_SCALES
from symplectic_adjoint.experiments.physics import PhysicsStudy
from symplectic_adjoint.experiments.shell import StopSignal, guarded
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
Data: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Folder of the published files; without, stand-ins are generated."),
]
Scale: TypeAlias = Annotated[
    str, typer.Option(help="reduced, paper, or tiny to see that all works.")
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Device: TypeAlias = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
_PHYSICS = tuple(
    field.name for field in fields(PhysicsStudy) if field.name not in ("name", "scale")
)


@group.callback()
def _group() -> None:
    """Reproduces the paper's experiments: tables, figures and a report."""


@group.command()
def density(
    data: Data = None,
    scale: Scale = "reduced",
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("runs/density"),
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Continuous normalizing flows: strategies, methods, tolerances and precisions compared."""
    run_study(
        lambda: DensityStudy(scale, data, seed, device), out, resume=resume, overwrite=overwrite
    )


@group.command()
def costs(
    scale: Scale = "reduced",
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("runs/costs"),
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """The table of strategies: memory, work and error as components, steps and stages grow."""
    run_study(lambda: CostsStudy(scale, seed, device), out, resume=resume, overwrite=overwrite)


@group.command()
def physics(
    context: typer.Context,
    scale: Scale = "reduced",
    out: Out = Path("runs/physics"),
    systems: Annotated[str | None, typer.Option(help="Systems, separated by commas.")] = None,
    strategies: Annotated[
        str | None, typer.Option(help="Gradient strategies, separated by commas.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, e.g. dopri5,dopri8,verlet; separated by commas."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="energy (learned energy), plain (learned dynamics), or both."),
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Iterations of training.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pairs of snapshots in a batch.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the hidden layers.")] = None,
    trajectories: Annotated[
        int | None, typer.Option(min=1, help="Trajectories to learn from.")
    ] = None,
    snapshots: Annotated[int | None, typer.Option(min=2, help="Snapshots of each.")] = None,
    horizon: Annotated[
        int | None, typer.Option(min=2, help="Snapshots of the long prediction.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Step size of Adam.")] = None,
    tolerance: Annotated[float | None, typer.Option(min=0.0, help="Of adaptive methods.")] = None,
    substeps: Annotated[
        int | None, typer.Option(min=1, help="Steps a snapshot of other methods.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of everything that is drawn.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Learns physical systems from snapshots, and predicts with what was learned.

    Systems: mass-spring, pendulum, double-pendulum, two-body, henon-heiles, kdv, cahn-hilliard.
    Options that are not given are those of the scale.
    """
    given: dict[str, Any] = {
        name: tuple(value.split(",")) if isinstance(value, str) else value
        for name, value in context.params.items()
        if name in _PHYSICS and value is not None
    }
    if given.keys() - {"seed"}:
        given["scale"] = f"{scale}, changed"
    run_study(
        lambda: replace(physics_study(scale), **given), out, resume=resume, overwrite=overwrite
    )


@group.command(name="all")
def everything(
    data: Data = None,
    scale: Scale = "reduced",
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("runs/results"),
    pages: Annotated[
        Path | None, typer.Option(help="Folder of the pages; without, report in the output folder.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """All studies one after the other, and a report of every table and figure."""
    studies: tuple[Callable[[], Study], ...] = (
        lambda: CostsStudy(scale, seed, device),
        lambda: DensityStudy(scale, data, seed, device),
        lambda: replace(physics_study(scale), seed=seed),
    )
    report = pages or out / "report"
    with _running() as (messages, stop, world):
        made = [make() for make in studies]
        sweeps = [Sweep(x, out / x.name, world, report / x.name) for x in made]
        begun = world.agree([sweep.folder.holds_run() for sweep in sweeps])
        for sweep, before in zip(sweeps, begun, strict=True):
            # One that was stopped before it began is begun; where none was begun, resuming fails.
            again = resume and (before or not any(begun))
            sweep.prepare(resume=again, overwrite=overwrite)
        for number, sweep in enumerate(sweeps, 1):
            messages.print(f"{sweep.study.name} ({number} of {len(sweeps)})", highlight=False)
            with watcher(messages) as watching:
                sweep.run(watching, stop)
        if world.first:
            write_index([sweep.finished() for sweep in sweeps], report)
            typer.echo(f"Report: {report / 'index.md'}")


@group.command(name="pages")
def pages_again(
    folder: Annotated[Path, typer.Argument(help="Pages that `reproduce all` has written.")],
    to: Annotated[Path | None, typer.Option(help="Where to; without, in place.")] = None,
) -> None:
    """Writes the pages of finished results again, from their records alone."""
    with guarded(Console(stderr=True), "") as _:
        write_book(read_book(folder), to or folder)
    typer.echo(f"Report: {(to or folder) / 'index.md'}")


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
    with _running() as (messages, stop, world):
        sweep = Sweep(make(), out, world)
        sweep.prepare(resume=resume, overwrite=overwrite)
        with watcher(messages) as watching:
            sweep.run(watching, stop)
        if world.first:
            typer.echo(f"Report: {sweep.report / 'index.md'}")


def physics_study(scale: str) -> PhysicsStudy:
    """The study of physical systems at a scale.

    Raises:
        UnknownNameError: There is no such scale.
    """
    if scale not in PHYSICS_SCALES:
        raise UnknownNameError("scale", scale, PHYSICS_SCALES)
    return PHYSICS_SCALES[scale]


@contextmanager
def _running() -> Iterator[tuple[Console, StopSignal, World]]:
    """Where messages go, whether to stop, and the processes, for the time of a run."""
    messages = Console(stderr=True)
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    again = shlex.join(["symplectic-adjoint", *words, "--resume"])
    with guarded(messages, again) as stop, joined() as world:
        messages.quiet = not world.first
        yield messages, stop, world
