r"""The law of a masked diffusion that reveals one token at a time in a random order: exact, by all sets of places.

.. math::
    p(x) = \frac{1}{L!} \sum_\sigma \prod_j p_\theta(x_{\sigma(j)} \mid x_{\sigma(<j)}), \qquad
    f(S) = \sum_{i \in S} \frac{1}{L - |S| + 1}\; f(S \setminus i)\; p_\theta(x_i \mid x_{S \setminus i}),

where f(S) is the probability that, of all sets of so many places, S is the one revealed and shows x there; f of all
places is p(x). Instead of L! orders there are 2^L sets. This is what the sampler draws from; the bound of `masked` is the
mean over orders of the log where here is the log of the mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgen.algorithms.diffusion.masked import Predict, scores
from pgen.algorithms.diffusion.masked_views import MOST, every_set


def log_law(predict: Predict, tokens: Tensor, levels: int, limit: int = MOST) -> Tensor:
    """Log probability of values under the sampler that reveals one place at a time, in nats: `[B]`.

    Args:
        predict: the network.
        tokens: values `[B, L]`.
        levels: how many values a token takes.
        limit: the most places for which all sets are listed.

    Raises:
        ValueError: there are more places than `limit`.
    """
    rows, places = tokens.shape
    hidden = every_set(places, limit, tokens.device)  # numbered by their bits
    found = scores(predict, tokens, hidden[:, None].expand(-1, rows, -1), levels)
    sizes = hidden.sum(-1)
    bits = 2 ** torch.arange(places, device=tokens.device)
    number = torch.arange(places, device=tokens.device)
    reached = found.new_full((len(hidden), rows), -math.inf)
    reached[-1] = 0.0  # at first all are hidden
    for size in range(places - 1, -1, -1):
        sets = (sizes == size).nonzero()[:, 0]
        before = sets[:, None] | bits  # place i was hidden still
        terms = reached[before] + found[before, :, number]
        terms = terms.masked_fill(hidden[sets][..., None], -math.inf)
        reached = reached.index_put((sets,), terms.logsumexp(1) - math.log(size + 1))
    return reached[0]
