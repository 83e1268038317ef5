"""How the parameters' parts of many vector-Jacobian products are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class InPlace:
    """Autograd adds each product to the ``.grad`` of the leaves, in their own dtype."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.leaves = leaves

    def collect(self) -> None:
        """Take over what one product has added."""

    def saved(self) -> list[Tensor | None]:
        """What the sums consist of, between two products."""
        return [leaf.grad for leaf in self.leaves]

    def restore(self, saved: Sequence[Tensor | None]) -> None:
        """Go on from what ``saved`` has given."""
        for leaf, grad in zip(self.leaves, saved, strict=True):
            leaf.grad = grad

    def totals(self) -> list[Tensor | None]:
        """The sums, None for leaves that no product reached; clears the leaves."""
        totals = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return totals


class Float64(InPlace):
    """Sums in float64 (complex128), rounded once at the end.

    Example:
        >>> leaf = torch.zeros(1, requires_grad=True)
        >>> sums = Float64([leaf])
        >>> for part in (1.0, 1e-8, 1e-8, -1.0):
        ...     leaf.grad = torch.tensor([part])
        ...     sums.collect()
        >>> sums.totals()[0].item() == torch.tensor(2e-8).item()
        True
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__(leaves)
        self.sums: list[Tensor | None] = [None] * len(leaves)

    def collect(self) -> None:
        """Move what one product has added to the sums."""
        for i, leaf in enumerate(self.leaves):
            if leaf.grad is not None:
                self._add(i, leaf.grad)
                leaf.grad = None

    def saved(self) -> list[Tensor | None]:
        """The sums."""
        return [*self.sums]

    def restore(self, saved: Sequence[Tensor | None]) -> None:
        """Go on from these sums."""
        self.sums = [*saved]

    def totals(self) -> list[Tensor | None]:
        """The sums in the leaves' dtype."""
        self.collect()
        return [
            None if total is None else total.to(leaf.dtype)
            for total, leaf in zip(self.sums, self.leaves, strict=True)
        ]

    def _add(self, i: int, part: Tensor) -> None:
        total = self.sums[i]
        if total is None:
            self.sums[i] = part.to(torch.promote_types(part.dtype, torch.float64))
        else:
            total += part


class Compensated(Float64):
    """Compensated summation in the leaves' dtype, for devices that are slow in float64.

    Kahan 1965, doi 10.1145/363707.363723, in the variant of Neumaier 1974, doi
    10.1002/zamm.19740540106, which also holds where a part is larger than the sum.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__(leaves)
        self.lost: list[Tensor] = [torch.zeros(()) for _ in leaves]

    def saved(self) -> list[Tensor | None]:
        """The sums, and their lost parts."""
        return [*self.sums, *self.lost]

    def restore(self, saved: Sequence[Tensor | None]) -> None:
        """Go on from these sums and lost parts."""
        count = len(self.sums)
        self.sums = [*saved[:count]]
        self.lost = [x for x in saved[count:] if x is not None]

    def totals(self) -> list[Tensor | None]:
        """The sums with their lost parts."""
        self.collect()
        pairs = zip(self.sums, self.lost, strict=True)
        return [None if total is None else total + lost for total, lost in pairs]

    def _add(self, i: int, part: Tensor) -> None:
        total = self.sums[i]
        if total is None:
            self.sums[i], self.lost[i] = part.clone(), torch.zeros_like(part)
            return
        new = total + part
        # What the larger of the two kept of the smaller one, and what it lost.
        larger = total.abs() >= part.abs()
        self.lost[i] += torch.where(larger, (total - new) + part, (part - new) + total)
        self.sums[i] = new
