"""Exact conditioning inside the denoiser, where the prior is a Gaussian mixture, or offers it itself."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.operators.base import as_matrix
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian


class Conjugate(Protocol):
    """A denoiser that knows its law given linear-Gaussian observations exactly: all it takes is this method."""

    def linear_posterior(self, operator: Tensor, y: Tensor, n: int, *, sigma: float) -> tuple[Tensor, Tensor]:
        """Draws of x = x_0 + sigma eps given y = A x + N(0, I), and the log evidence; see `Mixture.linear_posterior`.

        Args:
            operator: A, `[m, D]`, D the number of scalars of an event.
            y: `[rows, m]`.
            n: draws for each row; may be 0.
            sigma: noise level of x.

        Returns:
            Draws `[rows, n, *event]`, and log p(y) in nats, `[rows]`.
        """
        ...


def condition(prior: Mixture, observation: LinearGaussian) -> Mixture:
    """The posterior of a Gaussian mixture given a linear-Gaussian observation: a mixture, and so its own denoiser.

    Args:
        prior: a mixture (with one component: a Gaussian).
        observation: one of them, y `[*out]`.

    Raises:
        ValueError: there are several observations.

    Example:
        >>> from pgen.algorithms.diffusion.operators import Mask
        >>> prior = Mixture(torch.zeros(1, 2), scale=1.0)
        >>> seen = LinearGaussian(Mask(torch.tensor([True, False])), torch.tensor([2.0]), 1.0)
        >>> condition(prior, seen).means
        tensor([[1.0000, 0.0000]])
    """
    matrix = as_matrix(observation.operator, prior.event_shape, prior.means)
    y = (observation.y.to(matrix) - observation.offset).reshape(-1)
    if len(y) != len(matrix):
        raise ValueError(
            f"condition: got y of {len(y)} numbers, expected {len(matrix)}: one observation, [*out]"
        )
    variance = torch.as_tensor(observation.variance).to(matrix).expand(observation.y.shape)
    return prior.posterior(matrix, y, torch.diag(variance.reshape(-1)))
