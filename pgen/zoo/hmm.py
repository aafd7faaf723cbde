"""A hidden Markov model: a hidden state that moves, and a symbol that it shows at every step."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class HMM(nn.Module):
    r"""Sequences of symbols from a hidden chain of states.

    .. math:: z_1 \sim \pi, \qquad z_t \mid z_{t-1} \sim A_{z_{t-1}}, \qquad x_t \mid z_t \sim B_{z_t}

    Sites: `z_0`, `z_1`, ..., latent; `x_0`, `x_1`, ..., the columns of the argument `x`. The three tables are
    learned.

    Args:
        states: values of the hidden state.
        symbols: values of what is seen.

    Example:
        >>> from pyro import poutine
        >>> trace = poutine.trace(HMM(states=2, symbols=5)).get_trace(torch.zeros(4, 3, dtype=torch.long))
        >>> trace.nodes["z_2"]["value"].shape
        torch.Size([4])
    """

    def __init__(self, states: int = 3, symbols: int = 5) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(states))
        self.move = nn.Parameter(torch.randn(states, states))
        self.show = nn.Parameter(torch.randn(states, symbols))

    def forward(self, x: Tensor) -> None:
        """The program: `x` holds sequences of symbols, shape `[n, T]`."""
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z_0", dist.Categorical(logits=self.start))
            for t in range(x.shape[1]):
                if t > 0:
                    z = pyro.sample(f"z_{t}", dist.Categorical(logits=self.move[z]))
                pyro.sample(f"x_{t}", dist.Categorical(logits=self.show[z]), obs=x[:, t])
