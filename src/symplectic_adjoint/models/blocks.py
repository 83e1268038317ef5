"""Layers and networks for right-hand sides that depend on time and state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from symplectic_adjoint._errors import ArgumentError, UnknownNameError

Layer = Literal["concatsquash", "concat"]
Activation = Literal["softplus", "tanh"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": functional.softplus,
    "tanh": torch.tanh,
}


class ConcatSquash(nn.Module):
    """Affine layer whose output is gated and shifted by time: (W x + b) * sigmoid(g t + c) + v t.

    The layer of FFJORD (Grathwohl et al., ICLR 2019, section 4 and its published code).

    Args:
        features_in: Width of the input.
        features_out: Width of the output.

    Shape:
        t is a scalar, x has shape (..., features_in), the result (..., features_out).

    Example:
        >>> ConcatSquash(2, 3)(torch.tensor(0.5), torch.zeros(7, 2)).shape
        torch.Size([7, 3])
    """

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.linear = self._affine(features_in, features_out)
        self.gate_slope = nn.Parameter(torch.empty(features_out).uniform_(-1.0, 1.0))
        self.gate_offset = nn.Parameter(torch.empty(features_out).uniform_(-1.0, 1.0))
        self.shift = nn.Parameter(torch.empty(features_out).uniform_(-1.0, 1.0))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Maps x at time t; see the class."""
        gate = torch.sigmoid(t * self.gate_slope + self.gate_offset)
        return torch.addcmul(self._along(t * self.shift), self.linear(x), self._along(gate))

    def _affine(self, features_in: int, features_out: int) -> nn.Linear | nn.Conv2d:
        return nn.Linear(features_in, features_out)

    def _along(self, values: Tensor) -> Tensor:
        """One value for each feature, in the shape that broadcasts with the output."""
        return values


class ConcatSquashConv2d(ConcatSquash):
    """Convolution whose output is gated and shifted by time: ``ConcatSquash`` of each pixel.

    The kernel has 3 x 3 pixels, and the image keeps its size.

    Args:
        features_in: Channels of the input.
        features_out: Channels of the output.

    Shape:
        t is a scalar, x has shape (n, features_in, h, w), the result (n, features_out, h, w).

    Example:
        >>> ConcatSquashConv2d(2, 3)(torch.tensor(0.5), torch.zeros(7, 2, 4, 4)).shape
        torch.Size([7, 3, 4, 4])
    """

    def _affine(self, features_in: int, features_out: int) -> nn.Linear | nn.Conv2d:
        return nn.Conv2d(features_in, features_out, kernel_size=3, padding=1)

    def _along(self, values: Tensor) -> Tensor:
        return values[:, None, None]


class Concat(nn.Module):
    """Affine layer of the input with time appended as one more column.

    Args:
        features_in: Width of the input, without time.
        features_out: Width of the output.

    Shape:
        t is a scalar, x has shape (..., features_in), the result (..., features_out).

    Example:
        >>> Concat(2, 3)(torch.tensor(0.5), torch.zeros(7, 2)).shape
        torch.Size([7, 3])
    """

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features_in, features_out)
        # The column of the weight that meets time: a parameter of its own saves the concatenation.
        bound = 1 / math.sqrt(features_in + 1)
        self.shift = nn.Parameter(torch.empty(features_out).uniform_(-bound, bound))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Maps x at time t; see the class."""
        return functional.linear(x, self.linear.weight, self.linear.bias + t * self.shift)


_LAYERS: dict[str, type[ConcatSquash] | type[Concat]] = {
    "concatsquash": ConcatSquash,
    "concat": Concat,
}


class _TimeNetwork(nn.Module):
    """Layers that see the time, and perhaps a context beside the state, with a last one of zero."""

    def __init__(
        self,
        make: Callable[[int, int], ConcatSquash | Concat],
        dim: int,
        hidden: Sequence[int],
        activation: Activation,
        context: int,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise UnknownNameError("activation", activation, _ACTIVATIONS)
        widths = (dim + context, *hidden, dim)
        if min(widths) < 1 or dim < 1 or context < 0:
            raise ArgumentError(
                f"every width must be at least 1, got dim={dim}, hidden={tuple(hidden)}, "
                f"context={context}"
            )
        layers = [make(before, after) for before, after in pairwise(widths)]
        last = layers[-1]
        for parameter in (*last.linear.parameters(), last.shift):
            nn.init.zeros_(parameter)
        self.layers = nn.ModuleList(layers)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps x at time t; see the class."""
        *inner, last = self.layers
        if context is not None:
            x = torch.cat((x, self._beside(context, x)), dim=1)
        for layer in inner:
            x = self.activation(layer(t, x))
        result: Tensor = last(t, x)
        return result

    def _beside(self, context: Tensor, x: Tensor) -> Tensor:
        """The context in the shape of features of x."""
        return context


class TimeMLP(_TimeNetwork):
    """A multilayer perceptron f(t, x) whose every layer sees the time, of the width of x.

    The last layer starts as zero, so that the flow of dx/dt = f starts as the identity.

    Args:
        dim: Width of x and of the output.
        hidden: Widths of the hidden layers.
        layer: "concatsquash" or "concat".
        activation: "softplus" or "tanh", between the layers.
        context: Width of what the first layer sees beside x.

    Shape:
        t is a scalar, x has shape (n, dim), or (..., dim) where there is no context, the context
        (n, context); the result has the shape of x.

    Raises:
        UnknownNameError: The layer or activation is none of these.
        ArgumentError: A width is below one.

    Example:
        >>> net = TimeMLP(2, hidden=(16, 16))
        >>> net(torch.tensor(0.0), torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        layer: Layer = "concatsquash",
        activation: Activation = "softplus",
        context: int = 0,
    ) -> None:
        if layer not in _LAYERS:
            raise UnknownNameError("layer", layer, get_args(Layer))
        super().__init__(_LAYERS[layer], dim, hidden, activation, context)


class TimeConvNet(_TimeNetwork):
    """A convolutional network f(t, x) whose every layer sees the time, of the shape of x.

    The last layer starts as zero, so that the flow of dx/dt = f starts as the identity.

    Args:
        channels: Channels of x and of the output.
        hidden: Channels of the hidden layers.
        activation: "softplus" or "tanh", between the layers.
        context: Width of what the first layer sees at every pixel beside x.

    Shape:
        t is a scalar, x has shape (n, channels, h, w), the context (n, context); the result has the
        shape of x.

    Raises:
        UnknownNameError: The activation is none of these.
        ArgumentError: A number of channels is below one.

    Example:
        >>> net = TimeConvNet(1, hidden=(8, 8))
        >>> net(torch.tensor(0.0), torch.randn(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 64, 64),
        activation: Activation = "softplus",
        context: int = 0,
    ) -> None:
        super().__init__(ConcatSquashConv2d, channels, hidden, activation, context)

    def _beside(self, context: Tensor, x: Tensor) -> Tensor:
        return context[:, :, None, None].expand(-1, -1, *x.shape[2:])
