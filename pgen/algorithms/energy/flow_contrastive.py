r"""Noise-contrastive estimation whose noise learns too: a flow that becomes ever harder to tell from the data.

    max over f, c   min over q   sum_x log s(f(x) - c - log q(x)) + sum_y log s(-(f(y) - c - log q(y))),   y ~ q

The flow follows the data, so that its draws stay useful as noise in any dimension, and it is a sampler of the energy in the
end. Densities and draws of the flow enter with reversed gradients: one sum, one ascent, a game of two.

References:
    Gao, Nijkamp, Kingma, Xu, Dai & Wu, Flow contrastive estimation of energy-based models, CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.learning import Learned, at_least, reversed_gradient
from pgen.algorithms.energy.noise_contrastive import compared, unconditional
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density


class FlowNoise(nn.Module):
    """A flow that learns to be hard to tell from the data, and the logarithm of the partition function."""

    def __init__(self, data: Tensor, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        self.log_partition = nn.Parameter(torch.zeros((), dtype=data.dtype, device=data.device))


@dataclass(frozen=True)
class FlowContrastive:
    """NCE whose noise is a flow that learns too: it minimises what the energy maximises.

    Attributes:
        flow: called without arguments it is a distribution with `rsample` and `log_prob` (a flow of zuko, for instance) on
            the values themselves.
        likelihood: weight of the flow's own log likelihood: 1 keeps it near the data from the start; 0 is the adversarial
            game alone.
        ratio: draws of the flow for each row.
    """

    flow: Callable[[], Any]
    likelihood: float = 1.0
    ratio: int = 1

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        if not isinstance(self.flow, nn.Module):
            raise TypeError(
                f"the flow is a module that returns a distribution when called, got {type(self.flow).__name__}; e.g. "
                "FlowContrastive(zuko.flows.NSF(2))"
            )
        at_least("likelihood", self.likelihood, 0)
        at_least("ratio", self.ratio, 1)

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> FlowNoise:
        """The flow, and log Z.

        Raises:
            ValueError: the density is conditional, or some numbers are counted.
        """
        unconditional(conditional)
        if space.cardinalities:
            raise ValueError(
                "a flow has a density, and the space has numbers that are counted; use NoiseContrastive"
            )
        return FlowNoise(data, self.flow)  # type: ignore[arg-type]

    def __call__(self, f: Density, x: Tensor, memory: FlowNoise) -> Learned:
        """Log odds of data and of the flow's draws, and the flow's likelihood."""
        law = memory.flow()
        noise = law.rsample((self.ratio * len(x),))
        log_q, log_q_noise = law.log_prob(x), law.log_prob(noise)
        f_data, f_noise = f(x), f(reversed_gradient(noise))
        surrogate, told = compared(
            f_data, f_noise, reversed_gradient(log_q), reversed_gradient(log_q_noise), memory.log_partition
        )
        told["flow_log_prob"] = log_q.detach().mean()
        return Learned(surrogate + self.likelihood * log_q, told)
