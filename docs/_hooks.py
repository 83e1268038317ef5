"""Fills in, when the documentation is built, what the code knows best.

A page asks for a text with a line ``<!-- generated: NAME -->``; :data:`GENERATORS` makes it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts generated text where a page asks for it (an event of mkdocs)."""
    return MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)


def methods() -> str:
    """The table of methods, and where each comes from."""
    from symplectic_adjoint import splitting, tableaus
    from symplectic_adjoint.steppers import Partitioned

    found = sorted(map(tableaus.get, tableaus.names()), key=lambda each: (each.order, each.name))
    rows = []
    for each in found:
        order = f"{each.order}({each.embedded_order})" if each.adaptive else f"{each.order}"
        extra = each.interpolant.extra_stages
        stages: object = each.stages
        if each.implicit:
            coupled = any(x for i, row in enumerate(each.a) for x in row[i + 1 :])
            solved = each.stages - 1
            stages = f"{solved} stage{'s' * (solved > 1)} solved" + " together" * coupled
        rows.append(
            (
                f"`{each.name}`",
                order,
                "adaptive" if each.adaptive else "fixed grid",
                stages,
                f"order {each.interpolant.order}" + (f", {extra} extra" if extra else ""),
            )
        )
    for each in map(splitting.get, splitting.names()):
        work = Partitioned(each).work
        cost, dense = work.inner + work.node, f"order {min(3, each.order)}, {work.extra} extra"
        rows.append((f"`{each.name}`", each.order, "fixed grid, (q, p)", cost, dense))
    titles = ("name", "order", "steps", "evaluations per step", "dense output")
    cited = [*found, *map(splitting.get, splitting.names())]
    sources = "\n".join(f"- `{each.name}`: {each.citation}" for each in cited)
    return f'{table(titles, rows)}\n\n??? note "Sources"\n{indent(sources)}'


def strategies() -> str:
    """What every strategy declares of itself."""
    from symplectic_adjoint import gradients

    rows = []
    for name in gradients.names():
        strategy = gradients.get(name)
        method = f"`{strategy.method}` only" if strategy.method else "any"
        does = (type(strategy).__doc__ or "").partition("\n")[0]
        rows.append((f'`"{name}"`', "yes" if strategy.exact else "**no**", method, does))
    return table(("`gradient=`", "exact", "method", "what it does"), rows)


def command_help(*words: str) -> str:
    """What ``symplectic-adjoint WORDS --help`` prints."""
    command = [str(Path(sys.executable).with_name("symplectic-adjoint")), *words, "--help"]
    plain = {**os.environ, "COLUMNS": "86", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    return f"```text\n{result.stdout.strip()}\n```"


def table(titles: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def indent(text: str) -> str:
    """Text as the content of an admonition."""
    return "\n".join(f"    {line}" if line else "" for line in ("", *text.splitlines()))


GENERATORS: dict[str, Callable[[], str]] = {
    "compare_help": partial(command_help, "compare"),
    "methods": methods,
    "reproduce_all_help": partial(command_help, "reproduce", "all"),
    "reproduce_physics_help": partial(command_help, "reproduce", "physics"),
    "strategies": strategies,
}
