"""A latent with a conjugate prior: its log likelihood as a function of its value, and the exact update."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.algorithms.conjugacy import FAMILIES, Conjugate, NotConjugate, prove, update
from pgen.backends.exact.groups import Group
from pgen.backends.exact.joint import Joint, axes_of, by_row
from pgen.backends.exact.laws import Law
from pgen.capability import Refusal
from pgen.errors import Refused
from pgen.structure import Structure

_WRAPPERS = (torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)


@dataclass(frozen=True)
class ConjugatePart:
    """One latent, integrated out.

    Attributes:
        structure: of the problem.
        name: of the latent.
        found: its update.
        axis: of its value along the rows of the data, if each row has an answer of its own.
    """

    structure: Structure
    name: str
    found: Conjugate
    axis: int | None

    @staticmethod
    def of(joint: Joint, group: Group, proof: bool) -> ConjugatePart:
        """Update the prior that the program gives the latent; with `proof`, settle whether it is conjugate.

        Raises:
            Refused: it is not; the refusal names the latent.
        """
        (name,) = group.latents
        law, shape, rows = joint.laws[name], joint.values[name].shape, joint.rows
        while isinstance(law, _WRAPPERS):
            law = law.base_dist
        site = joint.structure.sites[name]
        family = FAMILIES[site.distribution]
        prior = law.expand(shape[:-1] if family.vector else shape)
        axis = None if rows is None else axes_of(joint.structure, name, shape)[rows]

        def log_likelihood(value: Tensor) -> Tensor:
            factors = joint.read({name: value})
            found = value.new_zeros(() if axis is None else shape[axis])
            for other in group.sites - {name}:
                if rows is not None and rows in factors[other].names:
                    found = found + by_row(factors[other], rows)
                else:
                    found = found + factors[other].log.sum() / found.numel()
            return found

        try:
            found = update(log_likelihood, family, prior)
            if proof:
                prove(log_likelihood, found, prior)
        except NotConjugate as error:
            why = f"{site.distribution} at {name!r} is not conjugate to what depends on it: {error}"
            raise Refused(f"site {name!r}: {why}", Refusal(name, "a conjugate likelihood", why)) from error
        return ConjugatePart(joint.structure, name, found, axis)

    def evidence(self) -> Tensor:
        """Log of the integral: `[rows]`, or a scalar where the rows are tied."""
        found = self.found
        if self.axis is None:
            return found.likelihood.sum() + found.correction.sum()
        correction = found.correction.movedim(self.axis, 0).unsqueeze(-1)
        return found.likelihood + correction.flatten(1).sum(1)

    def draws(self, n: int) -> dict[str, Tensor]:
        """Independent draws of the latent, `[n, *batch, *event]`."""
        return {self.name: self._law.distribution().sample(torch.Size([n]))}

    def laws(self) -> dict[str, Law]:
        """The posterior of the latent."""
        return {self.name: self._law}

    @property
    def _law(self) -> Law:
        family = self.found.family
        kind = getattr(dist, family.posterior.__name__)
        events = len(self.structure.sites[self.name].event_shape) - family.vector
        return Law(lambda **tensors: kind(**tensors).to_event(events), self.found.parameters)
