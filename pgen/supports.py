"""Bijections that torch lacks, registered where it looks for them.

A mixture of laws on one support has that support, which `torch.distributions.MixtureSameFamily` wraps in a constraint
of its own, for which no bijection is registered.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.mixture_same_family import MixtureSameFamilyConstraint

__all__ = ["support_of_mixture"]


@biject_to.register(MixtureSameFamilyConstraint)
def support_of_mixture(constraint: MixtureSameFamilyConstraint) -> Transform:
    """From the real numbers to the support that the components of a mixture share.

    Raises:
        NotImplementedError: they have supports of their own, or ones without a bijection.

    Example:
        >>> import torch
        >>> halves = torch.distributions.HalfNormal(torch.ones(2))
        >>> law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), halves)
        >>> biject_to(law.support)(torch.zeros(1))
        tensor([1.])
    """
    base: constraints.Constraint = constraint.base_constraint
    if any(isinstance(value, Tensor) and value.dim() for value in vars(base).values()):
        raise NotImplementedError("the components of the mixture have supports of their own")
    return biject_to(base)
