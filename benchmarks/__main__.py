"""The command ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures, methods
from benchmarks.measure import Record
from benchmarks.peers import BASELINE, PEERS, Peer
from benchmarks.problems import PROBLEMS, quick
from benchmarks.suite import load, merged, run_suite, save, write_atomically
from benchmarks.tables import figure, markdown, plain, plain_methods, records_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"


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
    if "methods" in options.problems:
        if len(options.problems) > 1 or options.load:
            parser.error("methods is measured by itself")
        return _methods(options)
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
    records = [record for problem in results["problems"] for record in problem["records"]]
    return int(any(r["peer"].startswith("ours/") and Record(**r).failed for r in records))


def _methods(options: argparse.Namespace) -> int:
    """Measures every method shared with torchdiffeq."""
    with _measuring():
        results = methods.run(options.rounds, options.quick, _progress)
    save(results, options.out)
    print(plain_methods(results))
    if options.write_docs:
        page = {**load(RESULTS), "methods": results}
        _write(page)
    return int(any(records[0]["refused"] for records in results["methods"].values()))


def _write(results: dict[str, Any]) -> None:
    """Writes results, page and figures."""
    save(results, RESULTS)
    write_atomically(PAGE, markdown(results))
    for problem in results["problems"]:
        image = figures.costs(problem["name"], records_of(problem))
        write_atomically(PAGE.parent / figure(problem), image.decode())


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
        help=f"of {', '.join(PROBLEMS)}; default all; or methods: all shared with torchdiffeq",
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
        help=f"write {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}",
    )
    return parser


def _problem(name: str) -> str:
    if name not in (*PROBLEMS, "methods"):
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
