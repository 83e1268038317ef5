"""The layer contract holds, and would be noticed if it did not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = (
    "import sys; from importlinter.cli import lint_imports; "
    "sys.exit(lint_imports(config_filename='pyproject.toml', is_debug_mode=True))"
)


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Runs the contracts of `root`'s pyproject.toml on `root`'s sources, not on the installed ones."""
    command = [sys.executable, "-c", f"sys_path = {str(root / 'src')!r}\n{LINT}"]
    code = f"import sys; sys.path.insert(0, {str(root / 'src')!r}); {LINT}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
