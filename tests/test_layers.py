"""The contracts on imports hold, and break when a wrong import is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import importlinter.cli as cli; cli.lint_imports_command()"


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts of ``root/pyproject.toml`` on ``root/src``, whatever is installed."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--no-logo"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and its contracts that a test may spoil."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    return tmp_path


def spoil(root: Path, module: str, line: str) -> None:
    """Adds an import to a module, which is made if it is not there yet."""
    path = root / "src" / "symplectic_adjoint" / module
    source = path.read_text() if path.exists() else '"""Made by a test."""\n'
    path.write_text(f"{source}\n{line}\n")


def test_contracts_are_kept() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        pytest.param(
            "_types.py",
            "def late():\n    import symplectic_adjoint.loop",
            "Imports point to lower layers BROKEN",
            id="upward, inside a function",
        ),
        pytest.param(
            "stray.py",
            "",
            "Imports point to lower layers BROKEN",
            id="a module in no layer",
        ),
        pytest.param(
            "_types.py",
            "import numpy",
            "The core needs torch alone BROKEN",
            id="a dependency the core may not have",
        ),
    ],
)
def test_a_wrong_import_breaks_a_contract(
    copy: Path, module: str, line: str, contract: str
) -> None:
    spoil(copy, "_types.py", "")
    spoil(copy, "loop.py", "")
    spoil(copy, module, line)
    result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert contract in result.stdout


def test_siblings_may_not_import_in_a_circle(copy: Path) -> None:
    spoil(copy, "_types.py", "import symplectic_adjoint._errors")
    spoil(copy, "_errors.py", "import symplectic_adjoint._types")
    result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "No package of siblings imports in a circle BROKEN" in result.stdout
