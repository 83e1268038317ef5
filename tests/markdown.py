"""Runs the Python that a Markdown page shows."""

import doctest
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page its text begins on."""

    page: Path
    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        yield Block(page, match["language"], match["body"], line)


def run(page: Path) -> dict[str, Any]:
    """Runs a page's ``python`` blocks, and checks its ``pycon`` ones as doctests, in one namespace.

    A block that includes a file is left to the test of that file.

    Returns:
        The namespace as the last block left it.
    """
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    for block in blocks(page):
        if "--8<--" in block.text:
            continue
        if block.language == "python":
            _execute(block, namespace)
        elif block.language == "pycon":
            _check(block, namespace)
    return namespace


def _execute(block: Block, namespace: dict[str, Any]) -> None:
    padding = "\n" * (block.line - 1)  # tracebacks then name the page and its line
    exec(compile(padding + block.text, str(block.page), "exec"), namespace)


def _check(block: Block, namespace: dict[str, Any]) -> None:
    name = str(block.page.relative_to(ROOT))
    test = doctest.DocTestParser().get_doctest(
        block.text, namespace, name, str(block.page), block.line - 1
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    namespace.update(test.globs)  # get_doctest copies the namespace
    assert runner.failures == 0, "".join(report)
