"""The flows that FFJORD and the paper fit to each data set.

Source: Grathwohl et al., FFJORD, ICLR 2019, appendix B.1; the numbers of components are those of
Matsubara, Miyatake, Yaguchi, IEEE TNNLS 35(8), 2024, section V-A.
"""

from __future__ import annotations

from dataclasses import dataclass

from symplectic_adjoint.experiments.config import Model
from symplectic_adjoint.models.blocks import Activation

DIGITS = "digits"


@dataclass(frozen=True)
class Recipe:
    """The flow that FFJORD fits to a data set.

    Attributes:
        components: Stacked components, the paper's M.
        hidden: Widths, or channels, of the hidden layers of each.
        activation: Between the layers.
        batch_size: Rows in a batch.
        model: "mlp", or "conv" for images.
    """

    components: int
    hidden: tuple[int, ...]
    activation: Activation
    batch_size: int
    model: Model = "mlp"

    def blocks(self, limit: int | None) -> int:
        """Blocks in a stack; a flow of images has a stack at each of its three scales."""
        components = at_most(self.components, limit)
        return components if self.model == "mlp" else max(1, components // 3)


RECIPES = {
    "miniboone": Recipe(1, (860, 860), "softplus", 1000),
    "gas": Recipe(5, (160, 160, 160), "tanh", 1000),
    "power": Recipe(5, (60, 60, 60), "tanh", 10000),
    "hepmass": Recipe(10, (210, 210), "softplus", 10000),
    "bsds300": Recipe(2, (1260, 1260, 1260), "softplus", 10000),
    "mnist": Recipe(6, (64, 64, 64), "softplus", 200, "conv"),
    DIGITS: Recipe(6, (64, 64, 64), "softplus", 200, "conv"),
}
"""The data sets in the order of the paper's table, and the digits that are always there."""


def at_most(value: int, limit: int | None) -> int:
    """A value, cut where there is a limit."""
    return value if limit is None else min(value, limit)
