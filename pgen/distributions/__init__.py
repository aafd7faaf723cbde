"""Distributions that torch lacks, for use at any `pyro.sample` site; each declares what it can do."""

from pgen.algorithms.diffusion.mixture import Mixture as MixtureDenoiser
from pgen.algorithms.diffusion.schedules import EDM, VE, VP, RectifiedFlow, Schedule, SubVP
from pgen.distributions.autoregressive import Autoregressive
from pgen.distributions.diffusion import Diffusion
from pgen.distributions.energy import Energy
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
from pgen.distributions.masked_diffusion import MaskedDiffusion
from pgen.distributions.quantized import Quantized

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "Diffusion",
    "Energy",
    "Flow",
    "GaussianMixture",
    "Head",
    "Implicit",
    "LogisticMixture",
    "MaskedDiffusion",
    "MixtureDenoiser",
    "Ordinal",
    "Quantized",
    "RectifiedFlow",
    "Schedule",
    "SubVP",
    "ordinal_logits",
]
