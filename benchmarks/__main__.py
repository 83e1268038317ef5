"""The command ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    figures,
    floor,
    floor_page,
    memory,
    memory_page,
    methods,
    scaling,
    scaling_page,
)
from benchmarks.measure import Record
from benchmarks.peers import BASELINE, PEERS, Peer
from benchmarks.problems import PROBLEMS, quick
from benchmarks.suite import load, merged, run_suite, save, write_atomically
from benchmarks.tables import figure, markdown, plain, plain_methods, records_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
FLOOR = ROOT / "benchmarks" / "floor.json"
FLOOR_PAGE = ROOT / "docs" / "floor.md"
SCALING = ROOT / "benchmarks" / "scaling.json"
SCALING_PAGE = ROOT / "docs" / "scaling.md"
BUDGETS = ROOT / "benchmarks" / "budgets.json"
BUDGETS_PAGE = ROOT / "docs" / "budgets.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: As after ``python -m benchmarks``; those of the process by default.

    Returns:
        The exit status: 1 if one of our own strategies failed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick and options.write_docs:
        parser.error("--write-docs takes the figures of a full run, not of --quick")
    if options.threads:
        torch.set_num_threads(options.threads)
    special = [name for name in options.problems if name in SPECIAL]
    if special:
        if len(options.problems) > 1 or options.load:
            parser.error(f"{special[0]} is measured by itself")
        return _special(SPECIAL[special[0]], options)
    if options.load:
        results = load(options.load)
    else:
        problems = [PROBLEMS[name] for name in options.problems or PROBLEMS]
        problems = [quick(problem) for problem in problems] if options.quick else problems
        with _measuring():
            results = run_suite(problems, options.peers, options.rounds, options.quick, _progress)
        save(results, options.out)
    print(plain(results))
    if options.write_docs:
        page = merged(load(RESULTS), results, list(PROBLEMS)) if RESULTS.exists() else results
        _write(page)
    return int(any(record.failed and _is_ours(record) for record in _records(results)))


@dataclass(frozen=True)
class Special:
    """Something that is measured by itself.

    Attributes:
        run: Measures it, given the rounds, whether to be quick, and whom to tell the progress.
        plain: Its tables for the terminal.
        write: Writes its results, page and figures.
    """

    run: Callable[[int | None, bool, Callable[[str], None]], dict[str, Any]]
    plain: Callable[[dict[str, Any]], str]
    write: Callable[[dict[str, Any]], None]


def _special(special: Special, options: argparse.Namespace) -> int:
    """Measures it, prints it, and writes it if asked to; fails where one of ours does."""
    with _measuring():
        results = special.run(options.rounds, options.quick, _progress)
    save(results, options.out)
    print(special.plain(results))
    if options.write_docs:
        special.write(results)
    return int(any(record.failed and _is_ours(record) for record in _records(results)))


def _is_ours(record: Record) -> bool:
    return record.peer.startswith("ours/")


def _records(found: Any) -> Iterator[Record]:
    """All records within results."""
    if isinstance(found, dict) and "refused" in found:
        known = {each.name for each in fields(Record)}
        yield Record(**{name: value for name, value in found.items() if name in known})
    elif isinstance(found, dict | list):
        for each in found.values() if isinstance(found, dict) else found:
            yield from _records(each)


def _write_methods(results: dict[str, Any]) -> None:
    _write({**load(RESULTS), "methods": results})


def _write_floor(results: dict[str, Any]) -> None:
    save(results, FLOOR)
    write_atomically(FLOOR_PAGE, floor_page.markdown(results))


def _write_scaling(results: dict[str, Any]) -> None:
    save(results, SCALING)
    write_atomically(SCALING_PAGE, scaling_page.markdown(results))
    for place, image in scaling_page.images(results).items():
        write_atomically(SCALING_PAGE.parent / place, image.decode())


def _write_budgets(part: str, results: dict[str, Any]) -> None:
    """Writes one part of the page on budgets, and leaves the others as they were."""
    known = load(BUDGETS) if BUDGETS.exists() else {}
    found = {**known, part: results}
    save(found, BUDGETS)
    write_atomically(BUDGETS_PAGE, memory_page.markdown(found))
    for place, image in memory_page.images(found).items():
        write_atomically(BUDGETS_PAGE.parent / place, image.decode())


def _write(results: dict[str, Any]) -> None:
    """Writes results, page and figures."""
    save(results, RESULTS)
    write_atomically(PAGE, markdown(results))
    for problem in results["problems"]:
        image = figures.costs(problem["name"], records_of(problem))
        write_atomically(PAGE.parent / figure(problem), image.decode())


SPECIAL = {
    "methods": Special(methods.run, plain_methods, _write_methods),
    "scaling": Special(scaling.run, scaling_page.plain, _write_scaling),
    "floor": Special(floor.run, floor_page.plain, _write_floor),
    **{
        name: Special(run, memory_page.plain, functools.partial(_write_budgets, name))
        for name, run in (
            ("memory", memory.run),
            ("curve", memory.curve),
            ("million", memory.million),
        )
    },
}


@contextmanager
def _measuring() -> Iterator[None]:
    """Without the warnings of peers about torch's newer ways, and with nothing compiled before."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as cache:
        warnings.simplefilter("ignore")
        os.environ[name] = cache
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time, memory, evaluations and gradient error of this library and its peers.",
    )
    add = parser.add_argument
    add(
        "problems",
        nargs="*",
        metavar="problem",
        type=_problem,
        help=f"of {', '.join(PROBLEMS)}; default all. By themselves: methods, all of them shared "
        "with torchdiffeq; scaling, how cost grows; floor, what a gradient must cost; memory, "
        "curve and million, what a budget of memory costs",
    )
    add(
        "--peers",
        nargs="+",
        type=_peers,
        action=_Flatten,
        default=list(PEERS.values()),
        metavar="PATTERN",
        help=f"names or patterns such as 'ours/*'; {BASELINE} is always among them",
    )
    add("--rounds", type=_positive, help="timed rounds; default: each problem's own number")
    add("--threads", type=_positive, help="threads of torch; default: torch's choice")
    add(
        "--quick",
        action="store_true",
        help="small problems and few rounds, to see that everything runs",
    )
    add(
        "--out",
        type=Path,
        default=ROOT / "runs" / "benchmarks.json",
        metavar="FILE",
        help="JSON to write",
    )
    add(
        "--load",
        type=Path,
        metavar="FILE",
        help="print the tables of this JSON instead of measuring",
    )
    add(
        "--write-docs",
        action="store_true",
        help="write the results, and their page and figures in docs",
    )
    return parser


def _problem(name: str) -> str:
    if name not in (*PROBLEMS, *SPECIAL):
        raise argparse.ArgumentTypeError(f"no problem {name!r}; there are {', '.join(PROBLEMS)}")
    return name


def _peers(pattern: str) -> list[Peer]:
    found = [peer for name, peer in PEERS.items() if fnmatch.fnmatch(name, pattern)]
    if not found:
        raise argparse.ArgumentTypeError(
            f"no peer matches {pattern!r}; there are {', '.join(PEERS)}"
        )
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


class _Flatten(argparse.Action):
    """Joins the peers of all patterns and the baseline, in the order of the tables."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(values, list)
        names = {BASELINE, *(peer.name for peers in values for peer in peers)}
        setattr(namespace, self.dest, [peer for name, peer in PEERS.items() if name in names])


if __name__ == "__main__":
    sys.exit(main())
