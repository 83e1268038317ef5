"""The README tells the truth."""

import re

import torch

from symplectic_adjoint import gradients
from tests import markdown

README = markdown.ROOT / "README.md"


def test_example_runs_and_fills_every_gradient() -> None:
    torch.manual_seed(0)
    namespace = markdown.run(README)
    assert namespace["y"].shape == (100, 20, 2)
    for parameter in namespace["net"].parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_example_is_about_ten_lines() -> None:
    (example,) = [block for block in markdown.blocks(README) if block.language == "python"]
    assert sum(bool(line.strip()) for line in example.text.splitlines()) <= 10


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8")):
        assert (markdown.ROOT / target).exists(), target


def test_table_names_every_strategy() -> None:
    text = README.read_text(encoding="utf-8")
    for name in gradients.names():
        row = re.search(rf'^\| `"{name}"` \| (yes|no)\b', text, re.MULTILINE)
        assert row is not None, name
        assert (row[1] == "yes") == gradients.get(name).exact
