"""Programs that most backends must refuse, by naming the site in the way."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class Opaque(dist.TorchDistribution):
    """Draws with gradients, and no density: the sine of a Gaussian."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - declared as torch declares it
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor) -> None:
        """Around `loc`."""
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws."""
        return torch.sin(self.loc + torch.randn(torch.Size(sample_shape) + self.batch_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Opaque:
        """The same over another batch shape."""
        return Opaque(self.loc.expand(batch_shape))


def implicit(n: int) -> None:
    """An observed site that can be drawn from and has no density."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", Opaque(z.expand(n)))


class LearnedEnergy(nn.Module):
    """A learned energy reached only through `pyro.factor`: the gradient of its normaliser is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, n: int) -> None:
        """Tilt a Gaussian by the energy."""
        with pyro.plate("data", n):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("energy", -self.slope * x.square())


def branching() -> None:
    """Python decides by the value of a latent: nothing runs side by side or is differentiated through."""
    z = pyro.sample("z", dist.Bernoulli(0.5))
    loc = 1.0 if z.item() else -1.0
    pyro.sample("x", dist.Normal(loc, 1.0))
