"""A normalising flow as a program: one site, an exact density; and, for levels, a bound on their mass."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pgen.distributions import Flow, Quantized
from pgen.distributions.quiet import zuko


class SplineFlow(nn.Module):
    r"""A neural spline flow (Durkan et al. 2019), autoregressive, from zuko.

    .. math:: x = f(\epsilon), \qquad \epsilon \sim N(0, I)

    Site: `x`, the data. With `levels`, the data are whole numbers and the site is the flow seen through as
    many cells of width $2r / L$ over $[-r, r]$: the likelihood is then bounded from below, by uniform
    dequantisation, and stays a *mass*.

    Args:
        features: scalars of `x`.
        levels: levels of a scalar, or None for real values.
        transforms: spline transformations, one after the other.
        hidden: width of the hidden layer of each.
        bins: pieces of a spline.
        reach: the cells of levels lie in `[-reach, reach]`; splines bend in `[-5, 5]`.

    Example:
        >>> from pyro import poutine
        >>> trace = poutine.trace(SplineFlow(features=2)).get_trace(5)
        >>> trace.compute_log_prob()
        >>> trace.nodes["x"]["log_prob"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int = 2,
        levels: int | None = None,
        transforms: int = 2,
        hidden: int = 256,
        bins: int = 8,
        reach: float = 4.5,
    ) -> None:
        super().__init__()
        self.levels, self.reach = levels, reach
        self.flow = zuko.flows.NSF(features, transforms=transforms, hidden_features=(hidden,), bins=bins)

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        law = Flow(self.flow)
        if self.levels is not None:
            law = Quantized(law, self.levels, low=-self.reach, width=2 * self.reach / self.levels)
        with pyro.plate("data", n):
            return pyro.sample("x", law)
