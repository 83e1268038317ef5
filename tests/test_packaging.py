"""What an installation promises: torch alone is enough, and versions agree."""

import importlib.metadata
import itertools
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import markdown

PROJECT = tomllib.loads((markdown.ROOT / "pyproject.toml").read_text())["project"]

# Code runs after this as if the modules named on the command line were not installed, with every
# warning an error but torch's own (it warns when it is imported without numpy).
WITHOUT = """
import sys, warnings

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Absent())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    torch.zeros(1)
warnings.simplefilter("error")
"""


def requirements(name: str) -> set[str]:
    """A distribution and all that it requires here, without extras; canonical names."""
    found: set[str] = set()
    queue = [name]
    while queue:
        name = canonicalize_name(queue.pop())
        if name not in found:
            found.add(name)
            queue += [
                requirement.name
                for requirement in map(Requirement, importlib.metadata.requires(name) or ())
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            ]
    return found


def run_with_torch_only(code: str) -> subprocess.CompletedProcess[str]:
    present = {*requirements("torch"), canonicalize_name(PROJECT["name"])}
    absent = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if present.isdisjoint(map(canonicalize_name, owners))
    }
    assert {"numpy", "sklearn", "typer"} <= absent
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, ",".join(absent)],
        cwd=markdown.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_core_needs_torch_alone_and_warns_of_nothing() -> None:
    (example,) = [
        block.text
        for block in markdown.blocks(markdown.ROOT / "README.md")
        if block.language == "python"
    ]
    result = run_with_torch_only(f"{example}\nprint(y.shape)")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([100, 20, 2])\n"
    assert result.stderr == ""


def test_models_need_torch_alone() -> None:
    result = run_with_torch_only("import symplectic_adjoint.models")
    assert result.returncode == 0, result.stderr


def test_command_without_its_extra_says_what_to_install() -> None:
    result = run_with_torch_only("from symplectic_adjoint.cli import main\nmain()")
    assert result.returncode != 0
    assert "pip install 'symplectic-adjoint[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="symplectic-adjoint")
    assert [script.value for script in scripts] == ["symplectic_adjoint.cli:main"]


def test_citation_and_changelog_know_the_version() -> None:
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (markdown.ROOT / "CITATION.cff").read_text()
    heading = "[Unreleased]" if ".dev" in version else f"[{version}]"
    assert f"\n## {heading}" in (markdown.ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned() -> None:
    lines = (markdown.ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"].values()
    for requirement in map(Requirement, (*PROJECT["dependencies"], *itertools.chain(*extras))):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert version in requirement.specifier, f"{requirement} leaves out the pin {version}"
