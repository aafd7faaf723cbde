"""Bayesian logistic regression: unknown weights, features given as an argument, labels observed."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def logistic_regression(features: int = 64, classes: int = 10, scale: float = 1.0) -> Callable[..., Tensor]:
    r"""A program that predicts a class from features.

    .. math:: W_{fc}, b_c \sim N(0, s^2), \qquad y \mid x \sim \text{Categorical}(\text{softmax}(x W + b))

    Sites: `weight` and `bias`, latent, shared by all rows; `y`, the label. The features `x` are an argument.

    Args:
        features: scalars of one input.
        classes: values of the label.
        scale: standard deviation of the prior.

    Example:
        >>> import torch
        >>> from pyro import poutine
        >>> trace = poutine.trace(logistic_regression(features=4, classes=3)).get_trace(torch.zeros(5, 4))
        >>> trace.nodes["y"]["value"].shape
        torch.Size([5])
    """

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(features, classes), scale).to_event(2))
        bias = pyro.sample("bias", dist.Normal(x.new_zeros(classes), scale).to_event(1))
        with pyro.plate("data", x.shape[0]):
            logits = torch.einsum("...f,...fc->...c", x, weight) + bias
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model
