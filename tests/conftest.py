"""What all tests share: quiet, repeatable, on one thread, on every device there is."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# In CI the examples are the same every time; elsewhere new ones are drawn at every run.
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=12, print_blob=True
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=200, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
