"""Distributions that torch lacks, for use at any `pyro.sample` site; each declares what it can do."""

from pgen.distributions.autoregressive import Autoregressive
from pgen.distributions.flow import Flow
from pgen.distributions.heads import (
    Bernoulli,
    Categorical,
    GaussianMixture,
    Head,
    LogisticMixture,
    Ordinal,
    ordinal_logits,
)
from pgen.distributions.implicit import Implicit
from pgen.distributions.quantized import Quantized

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "Flow",
    "GaussianMixture",
    "Head",
    "Implicit",
    "LogisticMixture",
    "Ordinal",
    "Quantized",
    "ordinal_logits",
]
