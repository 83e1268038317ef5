"""Multi-scale continuous normalizing flows of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint.models.blocks import Activation, TimeConvNet
from symplectic_adjoint.models.cnf import ContinuousFlow, Layout, Noise, SolverOptions, Trace


class ImageCNF(ContinuousFlow):
    """A multi-scale flow of images with convolutional networks (FFJORD, section 4.2).

    Pixels in (0, 1) go through a logit, logit(alpha + (1 - 2 alpha) x) (Dinh et al., Real NVP, ICLR
    2017, section 4.1). Then each scale carries the image through its blocks. Between two scales
    half of the channels leave for the base distribution, as long as there is more than one, and
    squares of 2 x 2 pixels become 4 channels (Real NVP, sections 3.6 and 3.7).

    Args:
        shape: Height and width, or channels, height and width.
        hidden: Channels of the hidden layers of each network.
        scales: Number of scales; height and width are halved between them.
        blocks: Blocks of each scale.
        activation: "softplus" or "tanh".
        trace: "hutchinson" or "exact".
        noise: Distribution of the noise in Hutchinson's estimate, "rademacher" or "gaussian".
        t1: End of each block's time interval.
        solver: How the equation is solved and differentiated.
        context: Width of what the density may depend on, given beside the images.
        alpha: How far the logit stays away from 0 and 1.

    Shape:
        An image is a row of ``dim`` = channels x height x width pixels, as in every flow.

    Raises:
        UnknownNameError: An argument is none of its choices.
        ArgumentError: A number is not positive, or a side cannot be halved so often.

    Example:
        >>> flow = ImageCNF((8, 8), hidden=(4,), scales=3, blocks=1)
        >>> [layout.shape for layout in flow.layouts]
        [(1, 8, 8), (4, 4, 4), (8, 2, 2)]
        >>> x = torch.rand(5, 64)
        >>> flow.log_prob(x).shape, flow.sample(2).shape
        (torch.Size([5]), torch.Size([2, 64]))
    """

    support = constraints.independent(constraints.unit_interval, 1)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        hidden: Sequence[int] = (64, 64, 64),
        scales: int = 3,
        blocks: int = 2,
        activation: Activation = "softplus",
        trace: Trace = "hutchinson",
        noise: Noise = "rademacher",
        t1: float = 1.0,
        solver: SolverOptions | None = None,
        context: int = 0,
        alpha: float = 0.05,
    ) -> None:
        if not 0 < alpha < 0.5:
            raise ArgumentError(f"alpha={alpha!r} must be between 0 and 1/2")
        layouts = _layouts((1, *shape) if len(shape) == 2 else tuple(shape), scales, blocks)
        super().__init__(
            [TimeConvNet(layout.shape[0], hidden, activation, context) for layout in layouts],
            layouts,
            trace=trace,
            noise=noise,
            t1=t1,
            solver=solver,
            context=context,
        )
        self.alpha = alpha

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = bool(((x >= 0) & (x <= 1)).all())
        if not inside:
            raise ArgumentError(
                f"pixels must lie between 0 and 1, got {float(x.min()):g} to {float(x.max()):g}; "
                "divide grey levels by their number and add the noise of dequantisation first"
            )
        y = torch.logit(self.alpha + (1 - 2 * self.alpha) * x)
        slope = logsigmoid(y) + logsigmoid(-y)  # log of the derivative of the inverse
        log_det = self.dim * math.log(1 - 2 * self.alpha) - slope.sum(1)
        return y.reshape(len(x), *self.layouts[0].shape), log_det

    def _restore(self, x: Tensor) -> Tensor:
        # The flow is free to leave the image of (0, 1) by a hair; pixels are not.
        y = (torch.sigmoid(x.flatten(1)) - self.alpha) / (1 - 2 * self.alpha)
        return y.clamp(0, 1)


def bits_per_pixel(nll: float, dim: int, levels: int) -> float:
    """A negative log-likelihood of dequantised pixels in (0, 1), in bits for each pixel.

    Args:
        nll: In nats for each image.
        dim: Number of pixels.
        levels: Number of grey levels.

    Example:
        >>> bits_per_pixel(0.0, 64, 256)
        8.0
    """
    return nll / (dim * math.log(2)) + math.log2(levels)


def _layouts(shape: tuple[int, ...], scales: int, blocks: int) -> list[Layout]:
    if scales < 1 or blocks < 1:
        raise ArgumentError(f"scales={scales!r} and blocks={blocks!r} must be at least 1")
    if any(side % 2 ** (scales - 1) for side in shape[1:]):
        raise ArgumentError(
            f"an image of shape {shape} cannot be halved {scales - 1} times; use fewer scales"
        )
    layouts = []
    for scale in range(scales):
        if scale == 0:
            layouts.append(Layout(shape))
        else:
            channels, height, width = shape
            leaving = channels // 2
            shape = (4 * (channels - leaving), height // 2, width // 2)
            layouts.append(Layout(shape, leaving, squeeze=True))
        layouts += [Layout(shape)] * (blocks - 1)
    return layouts
