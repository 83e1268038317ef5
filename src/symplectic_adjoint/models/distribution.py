"""Flows with the interface of torch's distributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

if TYPE_CHECKING:
    from symplectic_adjoint.models.cnf import ContinuousFlow


class FlowDistribution(Distribution):
    """A flow, perhaps at a context, as a distribution of torch over vectors.

    Hutchinson's noise and the base samples are drawn from torch's global generator, as torch's own
    distributions do.

    Args:
        flow: The flow.
        context: What its density depends on, shape (\\*batch_shape, context), if it has a context.
        validate_args: As for every distribution.

    Raises:
        ValueError: The context does not have the width of the flow's.

    Example:
        >>> from symplectic_adjoint.models import CNF
        >>> distribution = CNF(2, hidden=(8,), trace="exact").distribution()
        >>> distribution.event_shape, distribution.sample((4,)).shape
        (torch.Size([2]), torch.Size([4, 2]))
        >>> distribution.log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        flow: ContinuousFlow,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        width = None if context is None else context.shape[-1]
        if width != (flow.context or None):
            raise ValueError(
                f"the context must have shape (..., {flow.context})"
                if flow.context
                else "the flow has no context"
            )
        self.flow = flow
        self.context = context
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size((flow.dim,)), validate_args)

    @property
    def support(self) -> Any:
        """Where the density is positive."""
        return self.flow.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The distribution with its batch broadcast to a shape."""
        shape = torch.Size(batch_shape)
        context = self.context
        if context is not None:
            context = context.expand(*shape, context.shape[-1])
        new = FlowDistribution(self.flow, context, validate_args=False)
        new._batch_shape = shape
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Samples of shape (\\*sample_shape, \\*batch_shape, dim), with gradient."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        rows = self.flow.rsample(math.prod(shape), context=self._rows(shape))
        return rows.reshape(*shape, self.flow.dim)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-densities in nats, of the shape of value without its last axis."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        rows = value.expand(*shape, self.flow.dim).reshape(-1, self.flow.dim)
        return self.flow.log_prob(rows, context=self._rows(shape)).reshape(shape)

    def _rows(self, shape: torch.Size) -> Tensor | None:
        """The context of each row of a batch of this shape."""
        if self.context is None:
            return None
        width = self.context.shape[-1]
        return self.context.expand(*shape, width).reshape(-1, width)
