"""Exact conditioning inside the denoiser, where the prior is a Gaussian mixture."""

from __future__ import annotations

import torch

from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.operators.base import as_matrix
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian


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
