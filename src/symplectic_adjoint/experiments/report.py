"""The report: one HTML file that holds everything, figures included."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from html import escape
from string import Template

from symplectic_adjoint.experiments.config import CompareConfig
from symplectic_adjoint.experiments.results import Results, StrategyResult
from symplectic_adjoint.experiments.table import HEADINGS, findings, notes, row

_CAPTIONS = {
    "learning_curves": (
        "Learning curves",
        "Score of the validation rows while training, lower is better. All strategies start from "
        "the same weights and see the same batches and noise, so exact strategies with the same "
        "solver coincide until rounding separates them.",
    ),
    "costs": (
        "What a gradient costs",
        "Error against float64 backpropagation through the same accepted steps (what agrees to "
        "the last bit is drawn at 1e-17); tensors alive at once at most during one forward and "
        "backward pass; wall time of a training iteration.",
    ),
    "memory_against_steps": (
        "Memory against the number of steps",
        "Each point is one tolerance, on few rows; a tolerance that needs too many steps is left "
        "out. The symplectic strategy stores its stages unless named with -steps, which stores as "
        "much as aca and recomputes the stages of one step at a time.",
    ),
    "densities": (
        "Learned densities",
        "The data as a histogram, and each flow's density on one common colour scale.",
    ),
    "samples": (
        "Samples",
        "Held-out images, and what each flow makes of the same base samples.",
    ),
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink: #1c1f24; --soft: #5b6470; --line: #dde1e6; --wash: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff; }
main { max-width: 1160px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 80ch; }
ul { padding-left: 1.2rem; max-width: 84ch; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; margin: 1rem 0 .5rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; font-weight: 600; white-space: pre; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: var(--wash); }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
pre { background: var(--wash); border: 1px solid var(--line); padding: .8rem 1rem; }
pre { overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dl { font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="soft">$subtitle</p>
$findings
<h2>Results</h2>
<div class="wide">
<table>
<thead><tr>$headings</tr></thead>
<tbody>
$rows
</tbody>
</table>
</div>
$notes
$figures
<h2>Settings</h2>
<pre>$command</pre>
<dl>$settings</dl>
<h2>Machine</h2>
<dl>$environment</dl>
</main>
</body>
</html>
""")


def html(results: Results, images: Mapping[str, bytes]) -> str:
    """Renders the report.

    Args:
        results: The results.
        images: PNG images by the names that ``figures`` gives them.

    Returns:
        A page that refers to nothing outside itself.
    """
    data = results.data
    return _PAGE.substitute(
        title=escape(f"Gradient strategies compared on {data.name}"),
        subtitle=escape(
            f"A continuous normalizing flow on {sum(data.rows)} rows of {data.dim} columns "
            f"({data.rows[0]} to train, {data.rows[1]} to validate, {data.rows[2]} to test), "
            f"{results.config.iterations} iterations under each strategy."
        ),
        findings=_list(findings(results)),
        headings="".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS),
        rows="\n".join(_row(result) for result in results.strategies),
        notes=_list(notes(results), "soft"),
        figures="\n".join(_figure(name, images[name]) for name in _CAPTIONS if name in images),
        command=escape(command(results.config)),
        settings=_definitions(results.config.to_dict()),
        environment=_definitions(results.environment),
    )


def command(config: CompareConfig) -> str:
    """The command line that runs a comparison again.

    Example:
        >>> command(CompareConfig(data="pinwheel", iterations=5))
        'symplectic-adjoint compare --data pinwheel --iterations 5'
    """
    default = CompareConfig()
    words = ["symplectic-adjoint", "compare"]
    for name, value in config.to_dict().items():
        if getattr(config, name) != getattr(default, name):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def _row(result: StrategyResult) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row(result)) + "</tr>"


def _figure(name: str, image: bytes) -> str:
    title, caption = _CAPTIONS[name]
    source = base64.b64encode(image).decode()
    return (
        f"<h2>{escape(title)}</h2>\n<p class='soft'>{escape(caption)}</p>\n"
        f"<img alt='{escape(title)}' src='data:image/png;base64,{source}'>"
    )


def _list(lines: list[str], style: str = "") -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class='{style}'>{items}</ul>" if lines else ""


def _definitions(values: Mapping[str, object]) -> str:
    return "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd>"
        for name, value in values.items()
    )


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
