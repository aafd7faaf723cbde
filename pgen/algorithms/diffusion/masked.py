r"""Masked (absorbing) diffusion: hide tokens at random, learn to tell them from those that are shown.

Forward in time every token turns into a mask, independently, until at time 1 nothing is left to see; the reverse
process turns masks back. A network gives $p_\theta(x_i \mid x_\text{shown})$ at every hidden place. It never says "mask",
and what is shown stays as it is (the SUBS parametrisation), so a value is revealed place by place and the model is an
autoregressive one in every order at once. With $m(t)$ the chance of being hidden at time t,

.. math::
    \log p(x) \;\ge\; \int_0^1 \frac{m'(t)}{m(t)}\; \mathbb{E} \sum_{i \text{ hidden at } t} \log p_\theta(x_i \mid x_\text{shown})\, dt
    \;=\; \sum_{k=1}^{L} \frac1k\; \mathbb{E}_{|H| = k} \sum_{i \in H} \log p_\theta(x_i \mid x_{\setminus H})
    \;=\; \mathbb{E}_{\sigma} \sum_{j=1}^{L} \log p_\theta(x_{\sigma(j)} \mid x_{\sigma(1)}, \ldots, x_{\sigma(j-1)}),

the last two over uniformly random sets H of k places, and over uniformly random orders. The schedule m has gone: it only
says where one looks. All three are sums over *views* of the value, that is, which places are hidden and with what weight
each is scored; how views are drawn is told in `masked_views`, and `bound` is the same for all.

References:
    Structured denoising diffusion models in discrete state-spaces (Austin, Johnson, Ho, Tarlow, van den Berg; NeurIPS
    2021). Autoregressive diffusion models (Hoogeboom et al.; ICLR 2022). Simple and effective masked diffusion
    language models (Sahoo et al.; NeurIPS 2024). Simplified and generalized masked diffusion for discrete data (Shi,
    Han, Wang, Doucet, Titsias; NeurIPS 2024). Your absorbing discrete diffusion secretly models the conditional
    distributions of clean data (Ou et al.; ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""From tokens `[R, L]`, of which the number `levels` is the mask, and the numbers `[R]` of the rows they belong to (for
what else is known of a row), to unnormalised log probabilities `[R, L, levels]`."""

AT_ONCE = 2**16
"""Tokens that a network is given in one call, where no gradient keeps them in memory anyway."""


class Views(NamedTuple):
    """Ways to look at values of L places.

    Attributes:
        hidden: which places are masked, `[S, B, L]`.
        weight: how much each place counts, `[S, B, L]`; zero where it is shown.
    """

    hidden: Tensor
    weight: Tensor


def predicted(predict: Predict, tokens: Tensor, rows: Tensor) -> Tensor:
    """Log probabilities `[R, L, levels]` at every place."""
    return torch.cat([predict(some, which).log_softmax(-1) for some, which in _parts(tokens, rows)])


def scores(predict: Predict, tokens: Tensor, hidden: Tensor, levels: int) -> Tensor:
    """Log probability of the token at every place given the places shown.

    Args:
        predict: the network.
        tokens: values `[B, L]` in 0..levels - 1.
        hidden: which places are not shown, `[S, B, L]`.
        levels: how many values a token takes; the number of the mask.

    Returns:
        Shape `[S, B, L]`; of no meaning where a place is shown.
    """
    views, count, places = hidden.shape
    rows = torch.arange(count, device=tokens.device).repeat(views)
    seen = tokens.masked_fill(hidden, levels).reshape(-1, places)
    found = [
        predict(some, which).log_softmax(-1).gather(-1, tokens[which][..., None])[..., 0]
        for some, which in _parts(seen, rows)
    ]
    return torch.cat(found).reshape(hidden.shape)


def bound(predict: Predict, tokens: Tensor, views: Views, levels: int) -> Tensor:
    """The sum of weighted scores over views: in nats, `[B]`.

    Args:
        predict: the network.
        tokens: values `[B, L]`.
        views: ways to look at them; see `masked_views`.
        levels: how many values a token takes.
    """
    found = scores(predict, tokens, views.hidden, levels)
    # A place that does not count may have probability zero: 0 times -inf is no number.
    weight = views.weight.to(found.dtype)
    return torch.where(weight > 0, weight * found, 0.0).sum((0, 2))


def conditional_logits(predict: Predict, tokens: Tensor, known: Tensor, levels: int) -> Tensor:
    """Log probabilities `[B, L, levels]` at every place given the known ones `[B, L]`; certain where known."""
    rows = torch.arange(len(tokens), device=tokens.device)
    found = predicted(predict, tokens.masked_fill(~known, levels), rows)
    is_it = torch.arange(levels, device=tokens.device) == tokens[..., None]
    certain = torch.zeros_like(found).masked_fill(~is_it, -math.inf)
    return torch.where(known[..., None], certain, found)


def _parts(tokens: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows in parts, unless a gradient is wanted, which would keep them all."""
    if torch.is_grad_enabled() or tokens.numel() <= AT_ONCE:
        return [(tokens, rows)]
    size = max(1, AT_ONCE // tokens.shape[1])
    return list(zip(tokens.split(size), rows.split(size), strict=True))
